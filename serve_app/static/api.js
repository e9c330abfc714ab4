// Client of the service's HTTP API: keys, readable errors, one retry when the service is busy.

const KEY = "sam3lora-api-key";
const LONGEST_WAIT_S = 60;

/** An error of the service, or of the connection to it. `field` is the field of the request at fault, or null. */
export class ServiceError extends Error {
  constructor(type, message, { status = 0, requestId = null, field = null } = {}) {
    super(message);
    Object.assign(this, { name: "ServiceError", type, status, requestId, field });
  }

  /** Number of the prompt at fault; -1 if it is not a prompt. */
  get promptIndex() {
    return Number(this.field?.match(/^prompts\[(\d+)\]/)?.[1] ?? -1);
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
 * `onProgress(share)` is called while the body is sent.
 * Throws ServiceError, or AbortError when `signal` fires.
 */
export async function call(path, { body, json, signal, onWait, onProgress } = {}) {
  const headers = { Accept: "application/json" };
  if (apiKey.get()) headers["X-API-Key"] = apiKey.get();
  if (json) headers["Content-Type"] = "application/json";
  const options = { method: body || json ? "POST" : "GET", headers, body: json ? JSON.stringify(json) : body, signal };
  for (let isRetry = false; ; isRetry = true) {
    const response = await reach(path, options, onProgress);
    if (response.ok) return readJson(response);
    const seconds = Number(response.headers.get("Retry-After") ?? NaN);
    const mayRetry = !isRetry && (response.status === 503 || response.status === 429) && seconds <= LONGEST_WAIT_S;
    if (!mayRetry) throw await readError(response);
    onWait?.(seconds);
    await pause(seconds * 1000, signal);
  }
}

async function reach(path, options, onProgress) {
  try {
    return await (onProgress ? send(path, options, onProgress) : fetch(path, options));
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ServiceError("unreachable", "The service cannot be reached. Check that it is running, then try again.");
  }
}

/** `fetch` with the progress of the upload, which only XMLHttpRequest tells. */
function send(path, { method, headers, body, signal }, onProgress) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open(method, path);
    for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
    request.upload.addEventListener("progress", ({ loaded, total }) => onProgress(loaded / total));
    request.addEventListener("load", () => {
      const kept = ["Retry-After", "X-Request-ID"].map((name) => [name, request.getResponseHeader(name)]);
      const known = kept.filter(([, value]) => value !== null);
      resolve(new Response(request.responseText, { status: request.status, headers: known }));
    });
    request.addEventListener("error", () => reject(new TypeError("network")));
    signal?.addEventListener("abort", () => {
      request.abort();
      reject(new DOMException("The upload was stopped.", "AbortError"));
    });
    request.send(body);
  });
}

async function readJson(response) {
  try {
    return await response.json();
  } catch (error) {
    if (isAbort(error)) throw error;
    const requestId = response.headers.get("X-Request-ID");
    throw new ServiceError("unexpected", "The answer of the service cannot be read.", { requestId });
  }
}

async function readError(response) {
  const { status } = response;
  const content = (await response.json().catch(() => null))?.error ?? {};
  const { type = "unexpected", message = `The service answered with status ${status}.`, field = null } = content;
  const requestId = content.request_id ?? response.headers.get("X-Request-ID");
  if (status !== 401) return new ServiceError(type, message, { status, requestId, field });
  const words = apiKey.get() ? "That key is not accepted." : "This service asks for an API key.";
  return new ServiceError("unauthorized", words, { status, requestId });
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
