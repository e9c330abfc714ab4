// Client of the service's HTTP API: keys, readable errors, one retry when the service is busy.

const KEY = "sam3lora-api-key";
const LONGEST_WAIT_S = 60;

/** An error of the service, or of the connection to it. */
export class ServiceError extends Error {
  constructor(type, message, { status = 0, requestId = null } = {}) {
    super(message);
    Object.assign(this, { name: "ServiceError", type, status, requestId });
  }
}

export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY)),
};

export const isAbort = (error) => error?.name === "AbortError";

/**
 * Call the service and read its JSON.
 * If the service is busy and sends Retry-After, `onWait(seconds)` is called and the call is retried once.
 * Throws ServiceError, or AbortError when `signal` fires.
 */
export async function call(path, { body, json, signal, onWait } = {}) {
  const headers = { Accept: "application/json" };
  if (apiKey.get()) headers["X-API-Key"] = apiKey.get();
  if (json) headers["Content-Type"] = "application/json";
  const options = { method: body || json ? "POST" : "GET", headers, body: json ? JSON.stringify(json) : body, signal };
  for (let isRetry = false; ; isRetry = true) {
    const response = await reach(path, options);
    if (response.ok) return response.json();
    const seconds = Number(response.headers.get("Retry-After") ?? NaN);
    const mayRetry = !isRetry && (response.status === 503 || response.status === 429) && seconds <= LONGEST_WAIT_S;
    if (!mayRetry) throw await readError(response);
    onWait?.(seconds);
    await pause(seconds * 1000, signal);
  }
}

async function reach(path, options) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ServiceError("unreachable", "The service cannot be reached. Check that it is running, then try again.");
  }
}

async function readError(response) {
  const requestId = response.headers.get("X-Request-ID");
  const content = await response.json().catch(() => null);
  const { type = "unexpected", message = `The service answered with status ${response.status}.` } = content?.error ?? {};
  return new ServiceError(type, message, { status: response.status, requestId: content?.error?.request_id ?? requestId });
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("The request was replaced by a newer one.", "AbortError"));
    });
  });
}
