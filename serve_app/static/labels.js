// The page of dense adapters: an image with the labels of its pixels in colour, and a legend.

import { apiKey, call, isAbort } from "./api.js";
import { byId, make } from "./elements.js";
import { loadSample, takeImages } from "./intake.js";
import { coloursOf, colourOf } from "./label_map.js";
import { Picture } from "./picture.js";

const MOST_LISTED = 1000; // of the service

const adapters = new Map(); // id -> adapter
let picture = null;
let colours = null; // canvas of the labels; null while there is no answer
let running = new AbortController();

const say = (text) => (byId("status").textContent = text);

function showFault(error) {
  if (isAbort(error)) return;
  say("");
  byId("fault").textContent = error ? `${error.message}${error.requestId ? ` (request ${error.requestId})` : ""}` : "";
  byId("key-form").hidden = error?.status !== 401;
}

// ---- adapters -------------------------------------------------------------------------------------------------------

async function start() {
  showFault(null);
  try {
    const listing = await call(`v1/adapters?limit=${MOST_LISTED}&task=dense`);
    const dense = listing.adapters.filter(({ task }) => task === "dense");
    adapters.clear();
    for (const adapter of dense) adapters.set(adapter.id, adapter);
    byId("adapter").replaceChildren(
      ...dense.map(({ id, error }) => make("option", { value: id, textContent: id, disabled: Boolean(error) })),
    );
    byId("adapter").disabled = !dense.length;
    const noneWords = "This service has no adapter that labels pixels: put the folder of one into its root.";
    const moreWords = `These are the first of ${listing.total} adapters.`;
    byId("adapter-note").textContent = !dense.length ? noneWords : listing.next ? moreWords : "";
    ask();
  } catch (error) {
    showFault(error);
  }
}

/** What gives a class its colour: its value in the label map, or its number from 1 on where there is no map. */
const valueOf = (adapter, { name, value }) => value ?? adapters.get(adapter).classes.indexOf(name) + 1;

// ---- asking ---------------------------------------------------------------------------------------------------------

async function ask() {
  running.abort();
  const { signal } = (running = new AbortController());
  const adapter = byId("adapter").value;
  if (!picture) return say("Choose an image.");
  if (!adapter) return say("");
  showFault(null);
  say("Asking…");
  byId("upload").hidden = false;
  const onProgress = (share) => (byId("upload").value = share);
  const onWait = (seconds) => say(`The service is busy: trying again in ${seconds} s.`);
  const asked = picture;
  try {
    const { answer, roundTripMs } = await asked.ask("v1/dense", { adapter }, { signal, onWait, onProgress });
    const { width, height } = asked.bitmap;
    const made = await coloursOf(answer, (found) => valueOf(adapter, found), width, height);
    if (signal.aborted) return;
    colours = made;
    draw();
    showLegend(answer, adapter);
    say(`${Math.round(roundTripMs)} ms`);
  } catch (error) {
    showFault(error);
  } finally {
    if (!signal.aborted) byId("upload").hidden = true;
  }
}

function showLegend({ classes }, adapter) {
  const found = classes.filter(({ area_px }) => area_px).toSorted((one, other) => other.area_px - one.area_px);
  const entries = found.map((one) => {
    const colour = `rgb(${colourOf(valueOf(adapter, one)).join(" ")})`;
    const area = make("span", { className: "soft", textContent: `${(100 * one.share).toFixed(1)} %` });
    return make("li", { className: "class", colour }, make("span", { textContent: one.name }), area);
  });
  byId("legend").replaceChildren(...entries);
}

// ---- the picture ----------------------------------------------------------------------------------------------------

function draw() {
  const canvas = byId("labels");
  const { bitmap } = picture;
  Object.assign(canvas, { width: bitmap.width, height: bitmap.height, hidden: false });
  byId("empty").hidden = true;
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  if (!colours) return;
  context.globalAlpha = Number(byId("fill").value);
  context.drawImage(colours, 0, 0);
}

async function take(file) {
  try {
    const opened = await Picture.open(file);
    picture?.close();
    picture = opened;
    colours = null;
    byId("legend").replaceChildren();
    byId("image-name").textContent = picture.name;
    byId("image-size").textContent = `${picture.width} × ${picture.height}`;
    draw();
    ask();
  } catch (error) {
    showFault(error);
  }
}

takeImages({ take, onSample: () => loadSample().then(take, showFault) });
byId("adapter").addEventListener("change", ask);
byId("fill").addEventListener("input", () => picture && draw());
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set(byId("key").value.trim());
  start();
});
start();
