// What the service says of its adapters, searched there: it may have thousands.

import { call } from "./api.js";

const PAGE = 50; // adapters of one listing

export const known = new Map(); // id -> adapter, as it was last listed
export let basePostProcessing = null; // of the base model; null until a listing came
export let answersClicks = false; // whether the base model has a click head

/** A page of the adapters of a task with `search` in their id or prompts: { adapters, total, next }. */
export async function listAdapters({ search = "", after = null, task = "detection", signal } = {}) {
  const query = new URLSearchParams({ limit: PAGE, task });
  if (search) query.set("search", search);
  if (after !== null) query.set("after", after);
  const { adapters, base_post_processing, ...rest } = await call(`v1/adapters?${query}`, { signal });
  basePostProcessing = base_post_processing;
  answersClicks = rest.clicks ?? false;
  for (const adapter of adapters) known.set(adapter.id, adapter);
  return { adapters, total: rest.total ?? adapters.length, next: rest.next ?? null };
}

export const knows = (adapter, prompt) =>
  adapter.prompts.some((word) => word.toLowerCase() === prompt.toLowerCase());

/** Why an adapter of the click head cannot answer beside any of `adapters`, ids and null for the base; "" if it can. */
export function clickFault({ clicks_vision, vision_adapters }, adapters) {
  if (clicks_vision !== "adapter" || adapters.some((id) => vision_adapters.includes(id))) return "";
  if (!vision_adapters.length) return "it was trained on the vision trunk of an adapter that is not here";
  const named = vision_adapters.length > 4 ? [...vision_adapters.slice(0, 3), "another one"] : vision_adapters;
  return `it was trained on the vision trunk of ${named.join(" or ")}: pick that as adapter first`;
}

/** The usable adapter that was trained on most of `prompts`, and those: { id, prompts }, or null. */
export async function trainedOn(prompts, { signal } = {}) {
  const pages = await Promise.all(prompts.slice(0, 3).map((search) => listAdapters({ search, signal })));
  let best = null;
  for (const adapter of pages.flatMap(({ adapters }) => adapters)) {
    const shared = adapter.error ? [] : prompts.filter((prompt) => knows(adapter, prompt));
    if (shared.length > (best?.prompts.length ?? 0)) best = { id: adapter.id, prompts: shared };
  }
  return best;
}
