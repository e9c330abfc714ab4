// The page: builds requests, sends them, and shows the responses in panels.

import { answersClicks, basePostProcessing, clickFault, known, listAdapters, trainedOn } from "./adapters.js";
import { isAbort, ServiceError } from "./api.js";
import { BoxList } from "./boxes.js";
import { Clicks } from "./clicks.js";
import { showCurl } from "./curl_box.js";
import { byId, debounce } from "./elements.js";
import { chooseFile, loadSample, takeImages } from "./intake.js";
import { wireLooks } from "./looks.js";
import { Notice } from "./notice.js";
import { Panel } from "./panel.js";
import { Picker } from "./picker.js";
import { Picture } from "./picture.js";
import { PromptField } from "./prompts.js";
import { Settings } from "./settings.js";
import { isNarrow, Views } from "./views.js";
import { Viewport } from "./viewport.js";

const LOWEST = 0.05; // threshold of requests: the page applies the person's own, without another request
const SAMPLE_PROMPTS = ["gear", "arrow", "capsule"];
const BASE = ""; // value of the base model in the pickers
const NONE = "-";

const scene = {
  picture: null,
  viewport: new Viewport(),
  tool: "move",
  boxes: [],
  show: { masks: true, boxes: false, labels: true, fill: 0.25 },
};
const prompts = new PromptField(askSoon);
const boxes = new BoxList(() => {
  scene.boxes = boxes.boxes;
  drawAll();
  askSoon();
});
const settings = new Settings(postProcess);
const views = new Views(drawAll);
const notice = new Notice({ retry, choose: chooseFile, leave: focusPicture });
const failed = { onFail: showError };
const adapter = new Picker("adapter", [[BASE, "Base model"]], { ...failed, onChange: pickByHand });
const compare = new Picker("compare", [[NONE, "Nothing"], [BASE, "Base model"]], { ...failed, onChange: layPanels });
const clickAdapter = new Picker("click-adapter", [[BASE, "Base model"]], {
  ...failed,
  onChange() {},
  task: "clicks",
  faultOf: (one) => clickFault(one, panels.map((panel) => panel.adapter)),
});
const clicks = new Clicks(scene, {
  ...failed,
  onChange: refineAll,
  say,
  panel: () => views.shown,
  adapter: () => known.get(clickAdapter.value) ?? null,
});
let isPickedByHand = false;
let panels = [];
let running = new AbortController();

// ---- asking ---------------------------------------------------------------------------------------------------------

const askAfterPause = debounce(200, ask);

function askSoon() {
  showReadiness();
  askAfterPause();
}

function isAskable() {
  return scene.picture !== null && (prompts.prompts.length > 0 || scene.boxes.length > 0);
}

function showReadiness() {
  byId("ask").disabled = !isAskable();
  byId("ask").hidden = panels.every(({ hasAnswer }) => hasAnswer);
  if (!scene.picture) say("Choose an image first.");
  else if (!isAskable()) say("Add a prompt or draw a box.");
  else say(byId("ask").hidden ? "Updates by itself." : "");
}

async function ask() {
  running.abort();
  const { signal } = (running = new AbortController());
  const { picture } = scene;
  if (!isAskable()) {
    for (const panel of panels) panel.clear();
    setBusy(false);
    showReadiness();
    return;
  }
  notice.hide();
  setBusy(true);
  say("Asking…");
  for (const panel of panels) panel.expect(prompts.prompts.length ? prompts.prompts : ["visual"]);
  const outcomes = await Promise.allSettled(panels.map((panel) => askOne(panel, picture, signal)));
  if (signal.aborted) return;
  setBusy(false);
  outcomes.forEach(({ reason }, index) => reason && panels[index].clear());
  showReadiness();
  refineAll();
  showPicture();
  const failure = outcomes.findIndex(({ reason }) => reason);
  if (failure >= 0) showError(outcomes[failure].reason, panels.length > 1 ? `${panels[failure].name}: ` : "");
  await Promise.allSettled(panels.map((panel) => offerOther(panel, signal)));
}

/** Ask one adapter, without the prompts that the service refuses. */
async function askOne(panel, picture, signal) {
  const onWait = (seconds) => say(`The service is busy: trying again in ${seconds} s.`);
  if (!basePostProcessing) await listAdapters({ signal });
  for (;;) {
    const { merge, threshold, prompt_thresholds } = settings.of(panel.adapter);
    const isFinal = merge; // what is joined depends on the threshold
    const lowest = Math.min(LOWEST, threshold, ...Object.values(prompt_thresholds));
    const kept = answersClicks && { keep_masks: true }; // for corrections
    const question = { ...requestOf(panel), ...(!isFinal && { threshold: lowest }), ...kept };
    try {
      const { answer, roundTripMs } = await picture.segment(question, { signal, onWait, onProgress });
      if (!signal.aborted) panel.setAnswer(answer, roundTripMs, isFinal);
      return;
    } catch (error) {
      const refused = question.prompts[error.promptIndex];
      if (signal.aborted || refused === undefined) throw error;
      prompts.blame(refused, error.message.replace(/^prompts\[\d+\]:? */, ""));
      if (!isAskable()) throw error;
    }
  }
}

/** What the service has to be sent to answer just what the panel shows, without the image. */
function requestOf({ adapter }) {
  const drawn = scene.boxes.map(({ xyxy, label }) => ({ xyxy, label }));
  return { prompts: prompts.prompts, boxes: drawn, adapter, ...settings.requestOf(adapter) };
}

function onProgress(share) {
  byId("upload").hidden = share === 1;
  byId("upload").value = share;
  say(share === 1 ? "Asking…" : `Uploading ${Math.floor(share * 100)} %`);
}

function cancel() {
  running.abort();
  scene.picture?.stopUpload();
  for (const panel of panels) panel.clear();
  setBusy(false);
  showReadiness();
  say("Cancelled.");
  byId("ask").focus();
}

function retry() {
  focusPicture();
  notice.hide();
  if (basePostProcessing) ask();
  else start();
}

/** Where prompts have no detections, name an adapter that was trained on them. */
async function offerOther(panel, signal) {
  const missing = panel.missing;
  const other = missing.length ? await trainedOn(missing, { signal }) : null;
  if (!signal.aborted) panel.offer(other);
}

async function readLimits() {
  const api = await fetch("openapi.json").then((response) => response.json()).catch(() => null);
  prompts.most = api?.components?.schemas?.SegmentRequest?.properties?.prompts?.maxItems ?? prompts.most;
}

// ---- showing --------------------------------------------------------------------------------------------------------

const speakCounts = debounce(400, () => (byId("spoken").textContent = sentences.join(". ")));
let sentences = [];

function refineAll() {
  if (!basePostProcessing) return;
  settings.show(panels[0].adapter);
  sentences = panels.map((panel) => panel.refine(settings.of(panel.adapter))).filter(Boolean);
  views.update();
  clicks.showBar();
  if (sentences.length) speakCounts();
}

/** After a setting changed. Overlaps are the service's part: it compares the model's masks, not those it answers. */
function postProcess(field) {
  refineAll();
  const isOurs = field === "threshold" && !panels.some(({ adapter, isFinal }) => isFinal || settings.of(adapter).merge);
  if (!isOurs) askSoon();
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
  if (!isBusy && document.activeElement === byId("cancel")) focusPicture();
  byId("cancel").hidden = !isBusy;
  if (!isBusy) byId("upload").hidden = true;
}

function showError(error, prefix = "") {
  if (isAbort(error)) return;
  if (error instanceof ServiceError) error.message = prefix + error.message;
  notice.show(error);
}

function focusPicture() {
  if (scene.picture) views.shown.stage.focus();
  else byId("choose-first").focus();
}

/** On a small screen, scroll to the picture and its downloads, unless a person is busy elsewhere. */
function showPicture() {
  if (!isNarrow() || document.activeElement.matches("#prompt-input, [type=range]")) return;
  const { element } = views.shown;
  const { top } = element.getBoundingClientRect();
  const { bottom } = element.querySelector(".facts").getBoundingClientRect();
  if (top >= 0 && bottom <= innerHeight) return;
  const behavior = matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth";
  byId("work").scrollIntoView({ block: "start", behavior });
}

// ---- image ----------------------------------------------------------------------------------------------------------

async function take(file) {
  notice.hide();
  let picture;
  try {
    picture = await Picture.open(file);
  } catch (error) {
    showError(error);
    return;
  }
  running.abort();
  setBusy(false);
  scene.picture?.close();
  scene.picture = picture;
  const isFirst = byId("work").hidden;
  byId("empty").hidden = true;
  byId("image-card").hidden = false;
  byId("work").hidden = false;
  byId("panels").style.setProperty("--ratio", Math.min(4, Math.max(0.4, picture.width / picture.height)));
  byId("image-name").textContent = byId("image-name").title = picture.name;
  clicks.finish();
  for (const panel of panels) {
    panel.edits.clear();
    panel.clear();
  }
  boxes.clear();
  scene.boxes = [];
  const note = views.shown.stage.showAll() ? "" : ": a part is shown";
  byId("image-size").textContent = `${picture.width} × ${picture.height} px${note}`;
  if (isFirst) focusPicture();
  askSoon();
}

async function useSample() {
  const wanted = prompts.isEmpty ? SAMPLE_PROMPTS : prompts.prompts;
  const finding = isPickedByHand ? null : trainedOn(wanted).catch(() => null);
  try {
    const file = await loadSample();
    const other = await finding;
    if (other) pick(other.id);
    await take(file);
    prompts.add(wanted);
  } catch (error) {
    showError(error);
  }
}

// ---- adapters -------------------------------------------------------------------------------------------------------

async function start() {
  try {
    await listAdapters();
  } catch (error) {
    showError(error);
    return;
  }
  byId("tool-click").hidden = !answersClicks;
  layPanels();
  if (!answersClicks) return;
  const ofClicks = await listAdapters({ task: "clicks" }).catch(() => null);
  byId("click-picker").hidden = !ofClicks?.total;
}

function pickByHand() {
  isPickedByHand = true;
  layPanels();
}

function pick(id) {
  adapter.value = id;
  layPanels();
}

function layPanels() {
  const ids = [adapter.value];
  if (![NONE, ids[0]].includes(compare.value)) ids.push(compare.value);
  const onPick = (id) => {
    pick(id);
    focusPicture();
  };
  const onCurl = (panel) => showCurl(scene.picture.name, requestOf(panel));
  const onBox = (box) => boxes.add(box);
  const colourOf = (prompt) => prompts.colourOf(prompt);
  const onShow = (panel, shown) => clicks.show(panel, shown);
  const onRow = (panel, item) => clicks.isOn && clicks.select(panel, item);
  const callbacks = { ...failed, onView: drawAll, onBox, onCurl, onPick, onShow, onRow, colourOf };
  clicks.finish();
  panels = ids
    .map((id) => (id === BASE ? null : id))
    .map((id) => panels.find((panel) => panel.adapter === id) ?? new Panel(id, scene, callbacks));
  views.lay(panels);
  prompts.suggest(ids.flatMap((id) => known.get(id)?.prompts ?? []));
  refineAll();
  askSoon();
}

// ---- wiring ---------------------------------------------------------------------------------------------------------

takeImages({ take, onSample: useSample });
document.addEventListener("keydown", (event) => {
  if (!event.ctrlKey && !event.metaKey) return;
  if (event.key === "Enter") ask();
  if (event.key === "z" && !clicks.isOn && !event.target.matches("input")) boxes.undo();
});
byId("ask").addEventListener("click", () => {
  focusPicture();
  ask();
});
byId("cancel").addEventListener("click", cancel);
wireLooks(scene, { draw: drawAll, stage: () => views.shown.stage, onTool: () => clicks.showBar() });

layPanels();
start();
readLimits();
