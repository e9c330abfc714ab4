// Example boxes: the list of them, and undo.

import { byId, keepFocus, make } from "./elements.js";

export class BoxList {
  boxes = [];
  #past = []; // earlier lists, the latest last
  #onChange;

  constructor(onChange) {
    this.#onChange = onChange;
    byId("undo").addEventListener("click", () => this.undo());
  }

  add(box) {
    this.#change([...this.boxes, box]);
  }

  undo() {
    if (!this.#past.length) return;
    this.boxes = this.#past.pop();
    this.#draw();
    this.#onChange();
  }

  /** Forget all, for a new image. */
  clear() {
    this.boxes = [];
    this.#past = [];
    this.#draw();
  }

  #change(boxes) {
    this.#past.push(this.boxes);
    this.boxes = boxes;
    this.#draw();
    this.#onChange();
  }

  #draw() {
    const canvas = document.querySelector("canvas");
    const entries = this.boxes.map((box, index) => {
      const kind = box.label ? "like this" : "not like this";
      const name = make("span", { textContent: `${box.label ? "+" : "−"} ${kind}` });
      const place = make("span", { className: "soft", textContent: box.xyxy.join(", ") });
      const remove = make("button", { type: "button", className: "chip-remove", textContent: "×" });
      remove.ariaLabel = `Delete box ${index + 1}, ${kind}`;
      remove.addEventListener("click", () => this.#change(this.boxes.toSpliced(index, 1)));
      return make("li", { className: box.label ? "box is-positive" : "box is-negative" }, name, place, remove);
    });
    keepFocus(byId("box-list"), () => byId("box-list").replaceChildren(...entries), canvas);
    byId("box-hint").hidden = entries.length > 0;
    if (document.activeElement === byId("undo") && !this.#past.length) canvas.focus();
    byId("undo").hidden = !this.#past.length;
  }
}
