// The OpenAPI document as a page: commands to paste, forms to try, fields and errors. Loads nothing from other hosts.

import { trainedOn } from "./adapters.js";
import { apiKey, call } from "./api.js";
import { getOf, multipartOf, rawOf, uploadedOf } from "./curl.js";
import { byId, make } from "./elements.js";
import { meaningOf, rich, Schemas, table, typeOf } from "./schema.js";
import { tryIt } from "./try_it.js";

const PROMPTS = ["gear", "arrow"]; // the sample shows them
const FILE = "sample.jpg";
// How fields that are no single values are written in a query.
const IN_QUERY = {
  prompts: "prompts=gear&prompts=arrow",
  classes: "classes=water&classes=road",
  boxes: "boxes=113,278,262,476,1 (x0, y0, x1, y1, label); may be repeated",
};

const address = (path) => new URL(path.replace(/^\//, ""), document.baseURI).href;
const api = await call("openapi.json");
const schemas = new Schemas(api);
const isKeyed = await call("v1/adapters?limit=1").then(() => Boolean(apiKey.get()), ({ status }) => status === 401);
const adapter = await trainedOn(PROMPTS).catch(() => null);
const dense = await call("v1/adapters?limit=50&task=dense").then(firstUsable, () => undefined);
const requests = {
  "/v1/segment": { prompts: PROMPTS, ...(adapter && { adapter: adapter.id }) },
  "/v1/dense": { adapter: dense?.id ?? "land-cover" },
  "/v1/refine": { objects: [{ clicks: [{ x: 100, y: 80, label: 1 }] }] },
};

function firstUsable({ adapters }) {
  return adapters.find(({ task, error }) => task === "dense" && !error);
}

const takesRaw = (content) => "application/octet-stream" in content;
const codeOf = (text) => make("code", { textContent: text });

function command(title, text) {
  const pre = make("pre", { textContent: text, tabIndex: 0, ariaLabel: title });
  const copy = make("button", { type: "button", textContent: "Copy", ariaLabel: `Copy: ${title}` });
  copy.hidden = !navigator.clipboard;
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
  });
  return [make("div", { className: "command" }, make("h3", { textContent: title }), copy), pre];
}

function commands(path, content) {
  const url = address(path);
  if (!content) return command("With curl", getOf(url, isKeyed && path.startsWith("/v1")));
  const asked = requests[path] ?? null;
  const forms = [
    ["Multipart: the image as a file, the request as JSON", multipartOf(url, FILE, asked, isKeyed)],
  ];
  const raw = "Raw: the image as the body, the request as query parameters";
  if (takesRaw(content)) forms.push([raw, rawOf(url, FILE, asked, isKeyed)]);
  const uploaded = () => uploadedOf(url, address("/v1/images"), FILE, asked, isKeyed);
  if (asked) forms.push(["JSON: about an uploaded image", uploaded()]);
  return forms.flatMap(([title, text]) => command(asked ? title : title.replace(/, the request.*/, ""), text));
}

function folded(title, ...content) {
  return make("details", {}, make("summary", { textContent: title }), ...content);
}

function parameterTable(parameters) {
  const rows = parameters.map(({ name, schema, description }) => {
    return [codeOf(name), typeOf(schema), rich(meaningOf({ ...schema, description }))];
  });
  return table(["parameter", "type", "meaning"], rows, "with-type");
}

/** The fields of a request as query parameters. */
function rawTable(schema) {
  const rows = schemas
    .fieldsOf(schema)
    .filter(([name]) => !name.startsWith("image_"))
    .map(([name]) => [codeOf(name), codeOf(IN_QUERY[name] ?? `${name}=…`)]);
  return table(["field", "in the address"], rows);
}

function errorTable(responses) {
  const rows = Object.entries(responses).map(([status, { description, content, headers }]) => {
    const types = Object.keys(content?.["application/json"]?.examples ?? {});
    const names = types.flatMap((type) => [codeOf(type), " "]);
    const later = headers?.["Retry-After"] ? rich("Send it again after the seconds of the header `Retry-After`.") : [];
    return [codeOf(status), types.length ? names : [description], later];
  });
  return table(["status", "type", ""], rows);
}

function describe(path, method, operation) {
  const content = operation.requestBody?.content;
  const query = (operation.parameters ?? []).filter((parameter) => parameter.in === "query");
  const headers = (operation.parameters ?? []).filter((parameter) => parameter.in === "header");
  const badge = make("span", { className: `method is-${method}`, textContent: method.toUpperCase() });
  const section = make("section", { className: "card", id: operation.operationId });
  section.append(make("h2", {}, badge, codeOf(path)));
  section.append(make("p", {}, ...rich(`${operation.summary}. ${operation.description ?? ""}`)));
  section.append(...commands(path, content));
  const takesImage = Boolean(content);
  const asked = requests[path] ?? null;
  const shownQuery = takesImage ? [] : query;
  const form = tryIt({ path, method: method.toUpperCase(), query: shownQuery, takesImage, request: asked });
  section.append(folded("Try it", form));
  if (content) {
    const { schema } = content["application/json"];
    const about = operation.requestBody.description;
    section.append(folded("Request", ...(about ? [make("p", {}, ...rich(about))] : []), ...schemas.tables(schema)));
    if (asked && takesRaw(content)) section.append(folded("Query parameters of the raw form", rawTable(schema)));
  }
  if (shownQuery.length) section.append(folded("Query parameters", parameterTable(shownQuery)));
  if (headers.length) section.append(folded("Headers", parameterTable(headers)));
  const answer = operation.responses["200"].content?.["application/json"]?.schema;
  if (answer) section.append(folded("Response", ...schemas.tables(answer)));
  section.append(folded("Status codes and errors", errorTable(operation.responses)));
  const link = make("a", { href: `#${operation.operationId}` }, badge.cloneNode(true), " ", codeOf(path));
  byId("contents").append(make("li", {}, link));
  return section;
}

byId("description").replaceChildren(...rich(`${api.info.description} Version ${api.info.version}.`));
byId("about").append(...command("A picture to try the commands with", `curl -O ${address("static/sample.jpg")}`));
if (isKeyed) {
  byId("about").append(...command("The commands below take your API key from a variable", "KEY=your-key"));
  byId("key-form").hidden = false;
  byId("key").value = apiKey.get();
  byId("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    apiKey.set(byId("key").value.trim());
    const outcome = await call("v1/adapters?limit=1").then(() => "", ({ message }) => message);
    byId("key-message").textContent = outcome;
    byId("key-message").className = outcome ? "alarm" : "soft";
    if (!outcome) byId("key-message").textContent = "The key is accepted and used by the forms of this page.";
  });
}
for (const [path, methods] of Object.entries(api.paths)) {
  const sections = Object.entries(methods).map(([method, operation]) => describe(path, method, operation));
  byId("operations").append(...sections);
}
