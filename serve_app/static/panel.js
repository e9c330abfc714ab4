// One panel of the comparison: the detections of one adapter, or of the base.

import { known, knows } from "./adapters.js";
import { byId, download, keepFocus, make } from "./elements.js";
import { Edits } from "./edits.js";
import { toCoco, toJson, toPng } from "./export.js";
import { Stage } from "./stage.js";

export class Panel {
  element = byId("panel-template").content.firstElementChild.cloneNode(true);
  edits = new Edits(); // what a person corrected or added
  #scene;
  #colourOf;
  #answer = null; // results without empty masks
  #isFinal = false; // the service applied the threshold
  #settings = null;
  #chosen = []; // detections that are left, for each prompt
  #closed = new Set(); // prompts whose lists are folded
  #onRow;
  #rows = new Map(); // detection -> its row

  /**
   * `adapter` null is the base. `scene` and callbacks as of `Stage`; also `colourOf(prompt)`, `onFail(error)` when a
   * file cannot be made, `onCurl(panel)`, `onPick(id)` when another adapter is to be asked, `onShow(panel, shown)` for
   * clicks on the picture, and `onRow(panel, item)` for a click on an entry of the list.
   */
  constructor(adapter, scene, callbacks) {
    this.adapter = adapter;
    this.#scene = scene;
    this.#colourOf = callbacks.colourOf;
    this.#part("title").textContent = this.name;
    this.stage = new Stage(this.#part("canvas"), scene, {
      ...callbacks,
      onPoint: (found) => this.highlight(found),
      onShow: (shown) => callbacks.onShow(this, shown),
    });
    this.#onRow = (item) => callbacks.onRow(this, item);
    this.#part("canvas").setAttribute("aria-label", `Image with the detections of ${adapter ?? "the base model"}`);
    this.#part("json").addEventListener("click", () => {
      download(this.#fileName("json"), toJson(this.#answer, this.#chosen, this.#settings), "application/json");
    });
    this.#part("coco").addEventListener("click", () => {
      const content = toCoco(this.#answer, this.#chosen, this.#scene.picture.name);
      download(this.#fileName("coco.json"), content, "application/json");
    });
    this.#part("png").addEventListener("click", async () => {
      const { picture, boxes, show } = this.#scene;
      try {
        download(this.#fileName("png"), await toPng(picture, this.stage, boxes, show));
      } catch (error) {
        callbacks.onFail(error);
      }
    });
    this.#part("curl").addEventListener("click", () => callbacks.onCurl(this));
    this.#part("pick").addEventListener("click", (event) => callbacks.onPick(event.target.dataset.id));
    this.#part("list").addEventListener("keydown", (event) => this.#walk(event));
  }

  get name() {
    return this.adapter ?? "Base model";
  }

  /** Whether the service applied the threshold. */
  get isFinal() {
    return this.#isFinal;
  }

  get hasAnswer() {
    return this.#answer !== null;
  }

  /** What was asked, and so what new objects can be named. */
  get prompts() {
    return this.#answer?.results.map(({ prompt }) => prompt) ?? [];
  }

  /** Mark the clicks on the object in hand, an `Edit`; null marks none. */
  mark(edit) {
    this.stage.marks = edit && { clicks: edit.clicks, box: edit.box, detection: edit.detection };
    this.stage.draw();
  }

  setBusy(isBusy) {
    this.element.classList.toggle("is-busy", isBusy);
    this.element.setAttribute("aria-busy", String(isBusy));
  }

  /** Show a response of the service. `roundTripMs` is how long the browser waited; `isFinal` as the property. */
  setAnswer(answer, roundTripMs, isFinal) {
    const results = answer.results.map((result) => {
      return { ...result, detections: result.detections.filter(({ area_px }) => area_px > 0) };
    });
    this.#answer = { ...answer, results };
    this.#isFinal = isFinal;
    this.#part("results").hidden = false;
    this.#part("time").textContent = `${ms(answer.timing_ms.total)} in the service, ${ms(roundTripMs)} round trip`;
    const stages = Object.entries(answer.timing_ms).filter(([name]) => name !== "total");
    this.#part("times").replaceChildren(
      ...stages.flatMap(([name, value]) => [make("dt", {}, name.replaceAll("_", " ")), make("dd", {}, ms(value))]),
    );
  }

  clear() {
    this.#answer = null;
    this.#part("results").hidden = true;
    this.#part("offer").hidden = true;
    this.#part("counts").replaceChildren();
    this.stage.items = [];
    this.stage.highlight = null;
    this.stage.draw();
  }

  /** Until the answer comes, show only what is still asked. */
  expect(prompts) {
    if (!this.#answer) return;
    const before = new Map(this.#answer.results.map((result) => [result.prompt, result]));
    const results = prompts.map((prompt) => before.get(prompt) ?? { prompt, presence: null, detections: [] });
    this.#answer = { ...this.#answer, results };
    if (this.#settings) this.refine(this.#settings);
  }

  /** Select from the answer again; `settings` are the post-processing fields. Returns a sentence with the counts. */
  refine(settings) {
    this.#settings = settings;
    if (!this.#answer) return "";
    const { results } = this.#answer;
    this.#chosen = results.map((result) => {
      return this.edits.applyTo(result.prompt, this.#isFinal ? result.detections : select(result, settings));
    });
    this.stage.items = this.#chosen
      .flatMap((detections, index) => {
        const { prompt } = results[index];
        return detections.map((detection) => ({ detection, prompt, colour: this.#colourOf(prompt) }));
      })
      .sort((a, b) => b.detection.score - a.detection.score);
    this.stage.highlight = null;
    this.stage.draw();
    this.#drawCounts();
    keepFocus(this.#part("list"), () => this.#drawList(), this.#part("canvas"));
    if (!this.missing.length) this.#part("offer").hidden = true;
    return `${this.name}: ${results.map(({ prompt }, i) => `${prompt} ${this.#chosen[i].length}`).join(", ")}`;
  }

  /** Prompts without detections that the adapter was not trained on. */
  get missing() {
    const own = known.get(this.adapter) ?? { prompts: [] };
    const results = this.#answer?.results ?? [];
    const isMissing = ({ prompt, presence }, index) =>
      presence !== null && !this.#chosen[index]?.length && !knows(own, prompt);
    return results.filter(isMissing).map(({ prompt }) => prompt);
  }

  /** Say that another adapter, { id, prompts }, was trained on prompts that are missing here; null says nothing. */
  offer(other) {
    this.#part("offer").hidden = !other;
    if (!other) return;
    this.#part("offer-text").textContent = `${other.id} was trained on ${other.prompts.join(", ")}.`;
    this.#part("pick").textContent = `Ask ${other.id}`;
    this.#part("pick").dataset.id = other.id;
  }

  /** Highlight one detection in the image and in the list; null highlights none. */
  highlight(detection) {
    if (this.stage.highlight === detection) return;
    this.#rows.get(this.stage.highlight)?.classList.remove("is-highlit");
    this.#rows.get(detection)?.classList.add("is-highlit");
    this.stage.highlight = detection;
    this.stage.draw();
  }

  #part(name) {
    return this.element.querySelector(`[data-part="${name}"]`);
  }

  #fileName(ending) {
    const stem = this.#scene.picture.name.replace(/\.[^.]*$/, "");
    return `${stem}_${this.adapter ?? "base"}.${ending}`;
  }

  #drawCounts() {
    const counts = this.#answer.results.map(({ prompt, presence }, index) => {
      const name = make("span", { textContent: prompt });
      const count = make("strong", { textContent: presence === null ? "…" : this.#chosen[index].length });
      return make("li", { className: "count", colour: this.#colourOf(prompt) }, name, count);
    });
    this.#part("counts").replaceChildren(...counts);
  }

  #drawList() {
    this.#rows.clear();
    const groups = this.#answer.results.map(({ prompt, presence, detections }, index) => {
      const chosen = this.#chosen[index];
      const colour = this.#colourOf(prompt);
      const group = make("details", { open: !this.#closed.has(prompt), className: "group", colour });
      const all = detections.length;
      const edited = chosen.filter(({ corrected }) => corrected).length;
      const own = chosen.length - edited;
      const left = this.#isFinal || !all ? `${own} found` : `${own} of ${all} candidates`;
      const byHand = edited ? ` · ${edited} by hand` : "";
      const facts = presence === null ? "…" : `${left}${byHand} · presence ${presence.toFixed(2)}`;
      const title = make("span", { className: "group-title", textContent: prompt });
      group.append(make("summary", {}, title, make("span", { className: "soft", textContent: facts })));
      group.append(make("ol", {}, ...chosen.map((detection, number) => this.#row(detection, number, prompt))));
      group.addEventListener("toggle", () => this.#closed[group.open ? "delete" : "add"](prompt));
      return group;
    });
    this.#part("list").replaceChildren(...groups);
  }

  /** One tab stop for each list; arrow keys move within it. */
  #row(detection, number, prompt) {
    const score = make("span", { className: "score", textContent: detection.score.toFixed(2) });
    const bar = make("span", { className: "bar" });
    bar.style.setProperty("--share", detection.score);
    const area = make("span", { className: "area", textContent: `${detection.area_px.toLocaleString("en")} px` });
    const row = make("button", { type: "button", className: "row", tabIndex: number ? -1 : 0 }, bar, score, area);
    row.ariaLabel = `${prompt} ${number + 1}, score ${score.textContent}, ${area.textContent}`;
    if (detection.corrected) {
      score.prepend("✎ ");
      row.ariaLabel += ", by hand";
    }
    row.addEventListener("click", () => this.#onRow({ detection, prompt }));
    row.addEventListener("pointerenter", () => this.highlight(detection));
    row.addEventListener("pointerleave", () => this.highlight(null));
    row.addEventListener("focus", () => this.highlight(detection));
    row.addEventListener("blur", () => this.highlight(null));
    this.#rows.set(detection, row);
    return make("li", {}, row);
  }

  #walk(event) {
    const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    const list = event.target.closest("ol");
    if (!step || !list) return;
    const rows = [...list.querySelectorAll(".row")];
    rows[rows.indexOf(event.target) + step]?.focus();
    event.preventDefault();
  }
}

/** The detections of a prompt that reach its threshold. */
function select({ prompt, detections }, { threshold, prompt_thresholds }) {
  const lowest = Object.hasOwn(prompt_thresholds, prompt) ? prompt_thresholds[prompt] : threshold;
  return detections.filter(({ score }) => score >= lowest);
}

const ms = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
