// One panel of the comparison: the detections of one adapter, or of the base.

import { colourOf } from "./drawing.js";
import { byId, download, make } from "./elements.js";
import { toCoco, toJson, toPng } from "./export.js";
import { select } from "./postprocess.js";
import { Stage } from "./stage.js";

export class Panel {
  element = byId("panel-template").content.firstElementChild.cloneNode(true);
  #scene;
  #answer = null;
  #settings = null;
  #chosen = []; // detections that are left, for each prompt
  #closed = new Set(); // prompts whose lists are folded
  #rows = new Map(); // detection -> its row

  /** `adapter` null is the base. `scene` and callbacks as of `Stage`; `onFail(error)` when a file cannot be made. */
  constructor(adapter, scene, callbacks) {
    this.adapter = adapter;
    this.#scene = scene;
    this.#part("title").textContent = adapter ?? "Base model";
    this.stage = new Stage(this.#part("canvas"), scene, { ...callbacks, onPoint: (found) => this.highlight(found) });
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
        download(this.#fileName("png"), await toPng(picture, this.stage.items, boxes, show));
      } catch (error) {
        callbacks.onFail(error);
      }
    });
    this.#part("list").addEventListener("keydown", (event) => this.#walk(event));
  }

  setBusy(isBusy) {
    this.element.classList.toggle("is-busy", isBusy);
    this.element.setAttribute("aria-busy", String(isBusy));
  }

  /** Show a response of the service; null clears. `roundTripMs` is how long the browser waited. */
  setAnswer(answer, roundTripMs) {
    this.#answer = answer;
    this.#part("results").hidden = !answer;
    this.#part("counts").replaceChildren();
    this.stage.items = [];
    this.stage.highlight = null;
    this.stage.draw();
    if (!answer) return;
    this.#part("time").textContent = `${ms(answer.timing_ms.total)} in the service, ${ms(roundTripMs)} round trip`;
    const stages = Object.entries(answer.timing_ms).filter(([name]) => name !== "total");
    this.#part("times").replaceChildren(
      ...stages.flatMap(([name, value]) => [make("dt", {}, name.replaceAll("_", " ")), make("dd", {}, ms(value))]),
    );
  }

  /** Select from the answer again; `settings` are the post-processing fields. Returns a sentence with the counts. */
  refine(settings) {
    if (!this.#answer) return "";
    this.#settings = settings;
    const { results } = this.#answer;
    this.#chosen = results.map(({ prompt, detections }) => select(prompt, detections, settings));
    this.stage.items = this.#chosen
      .flatMap((detections, index) => {
        const { prompt } = results[index];
        return detections.map((detection) => ({ detection, prompt, colour: colourOf(index) }));
      })
      .sort((a, b) => b.detection.score - a.detection.score);
    this.stage.highlight = null;
    this.stage.draw();
    this.#drawCounts();
    this.#drawList();
    const counts = results.map(({ prompt }, index) => `${prompt} ${this.#chosen[index].length}`).join(", ");
    return `${this.adapter ?? "Base model"}: ${counts}`;
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
    const counts = this.#answer.results.map(({ prompt }, index) => {
      const count = make("strong", { textContent: this.#chosen[index].length });
      return make("li", { className: "count", colour: colourOf(index) }, make("span", { textContent: prompt }), count);
    });
    this.#part("counts").replaceChildren(...counts);
  }

  #drawList() {
    this.#rows.clear();
    const groups = this.#answer.results.map(({ prompt, presence, detections }, index) => {
      const chosen = this.#chosen[index];
      const group = make("details", { open: !this.#closed.has(prompt), className: "group", colour: colourOf(index) });
      const note = chosen.length ? `${chosen.length} of ${detections.length}` : "nothing at this threshold";
      const title = make("span", { className: "group-title", textContent: prompt });
      const facts = `${note} · presence ${presence.toFixed(2)}`;
      group.append(make("summary", {}, title, make("span", { className: "soft", textContent: facts })));
      group.append(make("ol", {}, ...chosen.map((detection, number) => this.#row(detection, number))));
      group.addEventListener("toggle", () => this.#closed[group.open ? "delete" : "add"](prompt));
      return group;
    });
    this.#part("list").replaceChildren(...groups);
  }

  /** One tab stop for each list; arrow keys move within it. */
  #row(detection, number) {
    const score = make("span", { className: "score", textContent: detection.score.toFixed(2) });
    const bar = make("span", { className: "bar" });
    bar.style.setProperty("--share", detection.score);
    const area = make("span", { className: "area", textContent: `${detection.area_px.toLocaleString("en")} px` });
    const row = make("button", { type: "button", className: "row", tabIndex: number ? -1 : 0 }, bar, score, area);
    row.ariaLabel = `Detection ${number + 1}, score ${score.textContent}, ${area.textContent}`;
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

const ms = (value) => `${value < 10 ? value.toFixed(1) : Math.round(value)} ms`;
