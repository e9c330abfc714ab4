// The OpenAPI document as a page: fields, responses, and examples that can be sent. Loads nothing from other hosts.

const api = await (await fetch("openapi.json")).json();

function element(tag, text = "", attributes = {}) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(text);
  return made;
}

function resolve(schema) {
  return schema?.$ref ? api.components.schemas[schema.$ref.split("/").pop()] : schema ?? {};
}

function typeName(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.anyOf) return schema.anyOf.map(typeName).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.type === "array") return `[${typeName(schema.items ?? {})}]`;
  return schema.format === "binary" ? "file" : schema.type ?? "any";
}

function table(head, rows) {
  const made = element("table");
  const row = (cells, tag) => {
    const line = element("tr");
    line.append(...cells.map((cell) => element(tag, cell)));
    return line;
  };
  made.append(row(head, "th"), ...rows.map((cells) => row(cells, "td")));
  return made;
}

function fieldTable(schema) {
  const rows = Object.entries(resolve(schema).properties ?? {}).map(([name, field]) => {
    const schemas = [field, ...(field.anyOf ?? [])];
    const bounds = ["minimum", "maximum", "maxItems", "pattern"].flatMap((key) =>
      schemas.filter((schema) => key in schema).map((schema) => `${key} ${schema[key]}`),
    );
    const fallback = "default" in field ? `default ${JSON.stringify(field.default)}` : "";
    return [element("code", name), typeName(field), [field.description, fallback, ...bounds].filter(Boolean).join("; ")];
  });
  return table(["field", "type", "meaning"], rows);
}

function nestedSchemas(schema, found = new Set()) {
  for (const [, name] of JSON.stringify(schema).matchAll(/schemas\/(\w+)/g)) {
    if (!found.has(name)) {
      found.add(name);
      nestedSchemas(api.components.schemas[name], found);
    }
  }
  return found;
}

function answerTable(responses) {
  const rows = Object.entries(responses).map(([status, answer]) => [element("code", status), answer.description]);
  return table(["status", "meaning"], rows);
}

async function send(path, method, body, output) {
  const headers = {};
  const key = document.getElementById("key").value;
  if (key) headers["X-API-Key"] = key;
  if (body !== null) headers["Content-Type"] = "application/json";
  output.textContent = "…";
  try {
    const answer = await fetch(path.slice(1), { method: method.toUpperCase(), headers, body });
    const text = await answer.text();
    let shown = text;
    try { shown = JSON.stringify(JSON.parse(text), null, 1); } catch { /* plain text, such as metrics */ }
    output.textContent = `${answer.status} ${answer.statusText}\n${shown}`;
  } catch (error) {
    output.textContent = `The service did not answer: ${error.message}`;
  }
}

function tryIt(path, method, operation) {
  const box = element("div");
  const examples = operation.requestBody?.content["application/json"]?.examples;
  let editor = null;
  if (examples) {
    const choice = element("select", "", { ariaLabel: "example" });
    for (const [name, example] of Object.entries(examples)) choice.append(element("option", example.summary, { value: name }));
    editor = element("textarea", "", { ariaLabel: "JSON body", spellcheck: false });
    const fill = () => { editor.value = JSON.stringify(examples[choice.value].value, null, 1); };
    choice.addEventListener("change", fill);
    fill();
    box.append(choice, editor);
  }
  const button = element("button", "Send", { type: "button" });
  const output = element("pre", "", { ariaLive: "polite" });
  button.addEventListener("click", () => send(path, method, editor ? editor.value : null, output));
  box.append(button, output);
  return box;
}

function describeOperation(path, method, operation) {
  const made = element("details", "", { id: operation.operationId });
  const summary = element("summary");
  summary.append(element("b", `${method.toUpperCase()} ${path}`), element("span", ` ${operation.summary}`));
  const body = element("div");
  if (operation.description) body.append(element("p", operation.description));
  const content = operation.requestBody?.content;
  if (content) {
    body.append(element("h3", "Body"), element("p", `${operation.requestBody.description ?? ""} Content types: ${Object.keys(content).join(", ")}.`));
    const schema = content["application/json"].schema;
    body.append(fieldTable(schema));
    for (const name of nestedSchemas(resolve(schema))) body.append(element("h4", name), fieldTable(api.components.schemas[name]));
  }
  const answer = operation.responses["200"].content?.["application/json"]?.schema;
  if (answer) {
    body.append(element("h3", "Answer"));
    for (const name of nestedSchemas(answer)) body.append(element("h4", name), fieldTable(api.components.schemas[name]));
  }
  body.append(element("h3", "Status codes"), answerTable(operation.responses), element("h3", "Try it"), tryIt(path, method, operation));
  made.append(summary, body);
  return made;
}

document.getElementById("about").textContent = `${api.info.description} Version ${api.info.version}.`;
document.forms[0].addEventListener("submit", (event) => event.preventDefault());
const operations = document.getElementById("operations");
operations.replaceChildren();
for (const [path, methods] of Object.entries(api.paths)) {
  for (const [method, operation] of Object.entries(methods)) operations.append(describeOperation(path, method, operation));
}
