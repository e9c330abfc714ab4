// Schemas of the OpenAPI document as tables.

import { make } from "./elements.js";

/** Text with `code` in backticks, as nodes. */
export const rich = (text) =>
  text.split("`").map((part, index) => (index % 2 ? make("code", { textContent: part }) : part));

export function table(head, rows, className = "") {
  const row = (cells, tag) => make("tr", {}, ...cells.map((cell) => make(tag, {}, ...[cell].flat())));
  return make(
    "table",
    { className },
    make("thead", {}, row(head, "th")),
    make("tbody", {}, ...rows.map((cells) => row(cells, "td"))),
  );
}

export class Schemas {
  #schemas;

  constructor(api) {
    this.#schemas = api.components.schemas;
  }

  resolve(schema) {
    return schema.$ref ? this.#schemas[nameOf(schema)] : schema;
  }

  fieldsOf(schema) {
    return Object.entries(this.resolve(schema).properties ?? {});
  }

  /** A table of the fields, and one of each schema that they hold. */
  tables(schema) {
    const nested = [...this.#namesIn(this.resolve(schema))].filter((name) => this.#schemas[name].properties);
    return [
      ...(this.resolve(schema).properties ? [this.#table(schema)] : []),
      ...nested.flatMap((name) => [make("h4", { textContent: name }), this.#table(this.#schemas[name])]),
    ];
  }

  #table(schema) {
    const rows = this.fieldsOf(schema).map(([name, field]) => {
      return [make("code", { textContent: name }), typeOf(field), rich(meaningOf(field))];
    });
    return table(["field", "type", "meaning"], rows, "with-type");
  }

  #namesIn(schema, found = new Set()) {
    for (const [, name] of JSON.stringify(schema).matchAll(/schemas\/(\w+)/g)) {
      if (found.has(name)) continue;
      found.add(name);
      this.#namesIn(this.#schemas[name], found);
    }
    return found;
  }
}

const nameOf = (schema) => schema.$ref.split("/").pop();

export function typeOf(schema) {
  if (schema.$ref) return nameOf(schema);
  if (schema.anyOf) return schema.anyOf.map(typeOf).join(" or ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.type === "array") return `list of ${typeOf(schema.items ?? {})}`;
  return schema.type ?? "any";
}

/** The description, the default and the bounds, in sentences. */
export function meaningOf(field) {
  const bound = (key) => [field, ...(field.anyOf ?? [])].find((schema) => key in schema)?.[key];
  const [least, most, items, pattern] = ["minimum", "maximum", "maxItems", "pattern"].map(bound);
  const sentences = [
    field.description,
    field.default !== undefined && field.default !== null && `Default: \`${JSON.stringify(field.default)}\`.`,
    least !== undefined && most !== undefined && `From ${least} to ${most}.`,
    least !== undefined && most === undefined && `At least ${least}.`,
    least === undefined && most !== undefined && `At most ${most}.`,
    items !== undefined && items !== bound("minItems") && `At most ${items}.`,
    pattern && `Form: \`${pattern}\``,
  ];
  return sentences.filter(Boolean).join(" ");
}
