// A form of the documentation that sends a request and shows the response.

import { apiKey } from "./api.js";
import { make } from "./elements.js";
import { loadSample } from "./intake.js";
import { meaningOf, rich } from "./schema.js";

const LONGEST_TEXT = 120; // of a value in a shown response: masks are longer

/** `takesImage`: the body is multipart with a file; `request`, if given, is its JSON to begin with. */
export function tryIt({ path, method, query, takesImage, request }) {
  const name = (field) => `${method}-${path}-${field}`.replaceAll("/", "-");
  const labelled = (field, text, control) => {
    control.id = name(field);
    return make("div", {}, make("label", { htmlFor: control.id }, ...rich(text)), control);
  };
  const file = make("input", { type: "file", accept: "image/*" });
  const json = make("textarea", { spellcheck: false, value: JSON.stringify(request, null, 1) });
  const parameters = query.map((parameter) => [parameter, make("input", { autocomplete: "off" })]);
  const status = make("p", { className: "soft", role: "status" });
  const output = make("pre", { hidden: true, tabIndex: 0, ariaLabel: "Response" });
  const form = make("form", { className: "try" });
  for (const [{ name, schema, description }, input] of parameters) {
    form.append(labelled(name, `${name}: ${meaningOf({ ...schema, description })}`, input));
  }
  if (takesImage) form.append(labelled("image", "Image (without a file, the sample is sent)", file));
  if (request) form.append(labelled("request", "Request", json));
  form.append(make("button", { className: "primary", textContent: "Send" }), status, output);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    status.textContent = "Sending…";
    try {
      const filled = parameters.filter(([, input]) => input.value).map(([{ name }, input]) => [name, input.value]);
      const search = filled.length ? `?${new URLSearchParams(filled)}` : "";
      const body = takesImage ? await bodyOf(file.files[0], request && json.value) : undefined;
      const start = performance.now();
      const headers = apiKey.get() ? { "X-API-Key": apiKey.get() } : {};
      const response = await fetch(path.slice(1) + search, { method, headers, body });
      const text = await response.text();
      const tookMs = Math.round(performance.now() - start);
      status.textContent = `${response.status} ${response.statusText} after ${tookMs} ms`;
      output.textContent = shorten(text);
      output.hidden = !text;
    } catch (error) {
      status.textContent = `The service did not answer: ${error.message}`;
    }
  });
  return form;
}

async function bodyOf(file, json) {
  const body = new FormData();
  body.append("image", file ?? (await loadSample()));
  if (json) body.append("request", json);
  return body;
}

function shorten(text) {
  try {
    const short = (_, value) =>
      typeof value === "string" && value.length > LONGEST_TEXT ? `${value.slice(0, LONGEST_TEXT)}…` : value;
    return JSON.stringify(JSON.parse(text), short, 1);
  } catch {
    return text; // no JSON, such as metrics
  }
}
