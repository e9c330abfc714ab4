// How two panels are compared: side by side where there is room, one at a time, or one over the other.

import { byId } from "./elements.js";

const WIDE = matchMedia("(min-width: 1000px)");

export const isNarrow = () => !WIDE.matches;

export class Views {
  #panels = [];
  #wanted = "pair";
  #onChange;

  constructor(onChange) {
    this.#onChange = onChange;
    byId("view").addEventListener("change", (event) => {
      this.#wanted = event.target.value;
      this.#show();
    });
    WIDE.addEventListener("change", () => this.#show());
  }

  /** Lay out one or two panels. */
  lay(panels) {
    this.#panels = panels;
    byId("panels").replaceChildren(...panels.map(({ element }) => element));
    const [first, second] = ["first", "second"].map((value) => byId("view").querySelector(`[value=${value}] + span`));
    first.textContent = panels[0].name;
    second.textContent = panels.at(-1).name;
    this.#show();
  }

  /** The panel whose picture is seen; the first one if both are. */
  get shown() {
    return this.#panels.find(({ stage }) => stage.isShown) ?? this.#panels[0];
  }

  /** Give the picture of the overlay what the other panel has. */
  update() {
    const [first, second] = this.#panels;
    if (!second) return;
    first.stage.ghosts = byId("panels").dataset.view === "overlay" ? second.stage.items : [];
    first.stage.draw();
  }

  #show() {
    const isPair = this.#panels.length > 1;
    const view = !isPair ? "first" : this.#wanted === "pair" && isNarrow() ? "first" : this.#wanted;
    byId("view").hidden = !isPair;
    byId("view-pair").hidden = isNarrow();
    byId("view").querySelector(`[value=${view}]`).checked = true;
    byId("panels").dataset.view = view;
    this.update();
    this.#onChange();
  }
}
