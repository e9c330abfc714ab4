// The page: builds requests, sends them, and shows the responses in panels.

import { apiKey, call, isAbort, ServiceError } from "./api.js";
import { byId, debounce, make } from "./elements.js";
import { Panel } from "./panel.js";
import { Picture } from "./picture.js";
import { PromptField } from "./prompts.js";
import { Viewport } from "./viewport.js";

// Requests ask for nearly everything: the page post-processes, so that the sliders act without another request.
const LOOSEST = { threshold: 0.05, nms: "none", merge: false, max_detections: 100, masks: "rle" };
const SLIDERS = { threshold: "threshold", "nms-iou": "nms_iou" }; // element -> field
const SAMPLE = { url: "static/sample.jpg", name: "sample.jpg", prompts: ["gear", "arrow", "capsule"] };
const BASE = ""; // value of the base model in the lists of adapters
const NONE = "-";

const scene = {
  picture: null,
  viewport: new Viewport(),
  tool: "move",
  boxes: [],
  show: { masks: true, boxes: false, labels: true },
};
const callbacks = { onView: drawAll, onBox: addBox, onFail: showError };
const prompts = new PromptField(askSoon);
let adapters = [];
let basePostProcessing = null; // of the base model; known when the adapters are
let changed = {}; // post-processing fields that the person set; the adapter's own values hold for the others
let panels = [];
let running = new AbortController();

// ---- asking ---------------------------------------------------------------------------------------------------------

const askAfterPause = debounce(200, ask);

function askSoon() {
  askAfterPause();
  byId("ask").disabled = !isAskable();
}

function isAskable() {
  return scene.picture !== null && (prompts.prompts.length > 0 || scene.boxes.length > 0);
}

async function ask() {
  running.abort();
  running = new AbortController();
  const { signal } = running;
  hideError();
  if (!basePostProcessing) {
    await loadAdapters(); // asks again
    return;
  }
  if (!isAskable()) {
    for (const panel of panels) panel.setAnswer(null);
    setBusy(false);
    say(scene.picture ? "Add a prompt or draw a box." : "");
    return;
  }
  setBusy(true);
  say("Asking…");
  const boxes = scene.boxes.map(({ xyxy, label }) => ({ xyxy, label }));
  const question = { prompts: prompts.prompts, boxes, ...LOOSEST };
  const { picture } = scene;
  try {
    await Promise.all(panels.map((panel) => askOne(panel, picture, { ...question, adapter: panel.adapter }, signal)));
    if (signal.aborted) return;
    say("");
    refineAll();
  } catch (error) {
    if (signal.aborted || isAbort(error)) return;
    running.abort();
    showError(error);
  }
  if (running.signal === signal) setBusy(false);
}

async function askOne(panel, picture, question, signal) {
  const onWait = (seconds) => say(`The service is busy: trying again in ${seconds} s.`);
  const { answer, roundTripMs } = await picture.segment(question, { signal, onWait });
  if (!signal.aborted) panel.setAnswer(answer, roundTripMs);
}

// ---- showing --------------------------------------------------------------------------------------------------------

const speakCounts = debounce(400, () => (byId("spoken").textContent = sentences.join(". ")));
let sentences = [];

function refineAll() {
  if (!basePostProcessing) return;
  showSettings();
  sentences = panels.map((panel) => panel.refine(settingsOf(panel.adapter))).filter(Boolean);
  if (sentences.length) speakCounts();
}

/** The settings recorded with an adapter, with those that the person changed. */
function settingsOf(id) {
  const recorded = adapters.find((adapter) => adapter.id === id)?.post_processing ?? basePostProcessing;
  const forAllPrompts = "threshold" in changed ? { prompt_thresholds: {} } : {};
  return { ...recorded, ...changed, ...forAllPrompts };
}

/** Show the settings of the first panel. */
function showSettings() {
  const shown = settingsOf(panels[0].adapter);
  for (const [id, field] of Object.entries(SLIDERS)) {
    byId(id).value = shown[field];
    byId(`${id}-value`).textContent = shown[field].toFixed(2);
  }
  if (Object.keys(shown.prompt_thresholds).length) byId("threshold-value").textContent += ", some prompts differ";
  byId("nms").value = shown.nms;
  byId("merge").checked = shown.merge;
  byId("recorded").hidden = !Object.keys(changed).length;
}

function change(field, value) {
  changed = { ...changed, [field]: value };
  refineAll();
}

function drawAll() {
  for (const panel of panels) panel.stage.draw();
  byId("zoom-value").textContent = `${Math.round(scene.viewport.zoom * 100)} %`;
}

function say(text) {
  byId("status").textContent = text;
}

function setBusy(isBusy) {
  for (const panel of panels) panel.setBusy(isBusy);
}

function showError(error) {
  if (!(error instanceof ServiceError)) console.warn(error);
  setBusy(false);
  say("");
  byId("error").hidden = false;
  byId("error-message").textContent = error.message;
  byId("error").scrollIntoView({ block: "nearest" });
  byId("error-request").textContent = error.requestId ? `Request ${error.requestId}` : "";
  if (error.type === "unauthorized") openKey();
}

function hideError() {
  byId("error").hidden = true;
}

// ---- image ----------------------------------------------------------------------------------------------------------

async function take(file, name) {
  hideError();
  let picture;
  try {
    picture = await Picture.open(file, name);
  } catch (error) {
    showError(error);
    return;
  }
  running.abort();
  scene.picture?.close();
  scene.picture = picture;
  scene.boxes = [];
  scene.viewport.fit(picture.width, picture.height);
  byId("image-name").textContent = byId("image-name").title = picture.name;
  byId("image-size").textContent = `${picture.width} × ${picture.height} px`;
  byId("empty").hidden = true;
  byId("image-card").hidden = false;
  byId("work").hidden = false;
  byId("panels").style.setProperty("--ratio", picture.width / picture.height);
  for (const panel of panels) panel.setAnswer(null);
  drawBoxList();
  drawAll();
  askSoon();
}

async function useSample() {
  const response = await fetch(SAMPLE.url).catch(() => null);
  if (!response?.ok) {
    showError(new ServiceError("unreachable", "The sample cannot be loaded from the service."));
    return;
  }
  await take(await response.blob(), SAMPLE.name);
  if (!prompts.prompts.length) prompts.add(SAMPLE.prompts);
}

function takeFirstImage(files, event) {
  const file = [...(files ?? [])].find(({ type }) => type.startsWith("image/")) ?? files?.[0];
  if (!file) return;
  event.preventDefault();
  take(file);
}

// ---- boxes ----------------------------------------------------------------------------------------------------------

function addBox(box) {
  scene.boxes.push(box);
  drawBoxList();
  askSoon();
}

function drawBoxList() {
  const entries = scene.boxes.map((box, index) => {
    const kind = box.label ? "like this" : "not like this";
    const name = make("span", { textContent: `${box.label ? "+" : "−"} ${kind}` });
    const place = make("span", { className: "soft", textContent: box.xyxy.join(", ") });
    const remove = make("button", { type: "button", className: "chip-remove", textContent: "×" });
    remove.ariaLabel = `Delete box ${index + 1}, ${kind}`;
    remove.addEventListener("click", () => {
      scene.boxes.splice(index, 1);
      drawBoxList();
      askSoon();
    });
    return make("li", { className: box.label ? "box is-positive" : "box is-negative" }, name, place, remove);
  });
  byId("box-list").replaceChildren(...entries);
  byId("box-hint").hidden = entries.length > 0;
  drawAll();
}

// ---- adapters -------------------------------------------------------------------------------------------------------

async function loadAdapters() {
  try {
    ({ adapters, base_post_processing: basePostProcessing } = await call("v1/adapters"));
  } catch (error) {
    showError(error);
    return;
  }
  hideError();
  fillAdapters(byId("adapter"), [["Base model", BASE]]);
  fillAdapters(byId("compare"), [["Nothing", NONE], ["Base model", BASE]]);
  chooseAdapters();
}

function fillAdapters(list, first) {
  const before = list.value;
  const options = first.map(([text, value]) => new Option(text, value));
  for (const { id, error } of adapters) {
    const option = new Option(error ? `${id} (cannot be used)` : id, id);
    option.disabled = Boolean(error);
    option.title = error ?? "";
    options.push(option);
  }
  list.replaceChildren(...options);
  if (options.some(({ value }) => value === before)) list.value = before;
}

function chooseAdapters() {
  const ids = [byId("adapter").value];
  if (![NONE, ids[0]].includes(byId("compare").value)) ids.push(byId("compare").value);
  panels = ids.map((id) => new Panel(id === BASE ? null : id, scene, callbacks));
  byId("panels").replaceChildren(...panels.map(({ element }) => element));
  byId("panels").classList.toggle("is-pair", panels.length > 1);
  prompts.suggest(ids.flatMap((id) => adapters.find((adapter) => adapter.id === id)?.prompts ?? []));
  drawAll();
  refineAll();
  askSoon();
}

// ---- key ------------------------------------------------------------------------------------------------------------

function openKey() {
  byId("key-box").open = true;
  byId("key").focus();
}

// ---- wiring ---------------------------------------------------------------------------------------------------------

byId("file").addEventListener("change", (event) => takeFirstImage(event.target.files, event));
for (const id of ["choose", "choose-first"]) byId(id).addEventListener("click", () => byId("file").click());
for (const id of ["sample", "sample-first"]) byId(id).addEventListener("click", useSample);
document.addEventListener("paste", (event) => takeFirstImage(event.clipboardData?.files, event));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("is-dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("is-dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("is-dragging");
  takeFirstImage(event.dataTransfer?.files, event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask();
});

byId("ask").addEventListener("click", ask);
byId("retry").addEventListener("click", ask);
for (const id of ["adapter", "compare"]) byId(id).addEventListener("change", chooseAdapters);
for (const [id, field] of Object.entries(SLIDERS)) {
  byId(id).addEventListener("input", (event) => change(field, event.target.valueAsNumber));
}
byId("nms").addEventListener("input", (event) => change("nms", event.target.value));
byId("merge").addEventListener("input", (event) => change("merge", event.target.checked));
byId("recorded").addEventListener("click", () => {
  changed = {};
  refineAll();
});
for (const name of ["masks", "boxes", "labels"]) {
  byId(`show-${name}`).addEventListener("change", (event) => {
    scene.show[name] = event.target.checked;
    drawAll();
  });
}
for (const input of document.querySelectorAll("input[name=tool]")) {
  input.addEventListener("change", () => {
    scene.tool = input.value;
    byId("box-help").hidden = scene.tool === "move";
    drawAll();
  });
}
byId("zoom-in").addEventListener("click", () => panels[0].stage.zoomBy(1.5));
byId("zoom-out").addEventListener("click", () => panels[0].stage.zoomBy(1 / 1.5));
byId("zoom-fit").addEventListener("click", () => panels[0].stage.zoomBy(1 / scene.viewport.zoom));
byId("key").value = apiKey.get();
byId("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  apiKey.set(byId("key").value.trim());
  byId("key-box").open = false;
  await loadAdapters();
});

chooseAdapters();
loadAdapters();
