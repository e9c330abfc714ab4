// Prompts as chips, with the adapter's own prompts as suggestions.

import { colourOf } from "./drawing.js";
import { byId, keepFocus, make } from "./elements.js";

const SUGGESTED = 10; // more are shown on demand

export class PromptField {
  most = 32; // prompts of one request
  #slots = new Map(); // prompt -> the number of its colour, which stays while others go
  #faults = new Map(); // prompt -> why the service refuses it
  #suggestions = [];
  #showsAll = false;
  #input = byId("prompt-input");
  #chips = byId("prompt-chips");
  #suggested = byId("prompt-suggestions");
  #onChange;

  constructor(onChange) {
    this.#onChange = onChange;
    this.#input.addEventListener("keydown", (event) => this.#key(event));
    this.#input.addEventListener("input", () => {
      if (/[,\n]/.test(this.#input.value)) this.#take();
    });
    this.#input.addEventListener("blur", () => this.#take());
    byId("prompt-field").addEventListener("click", (event) => {
      if (event.target.closest("button") === null) this.#input.focus();
    });
  }

  get isEmpty() {
    return !this.#slots.size;
  }

  /** The prompts to ask: those without a known fault. */
  get prompts() {
    return [...this.#slots.keys()].filter((prompt) => !this.#faults.has(prompt));
  }

  colourOf(prompt) {
    return colourOf(this.#slots.get(prompt) ?? 0);
  }

  /** Add prompts, up to the limit of a request; returns those that had no room. */
  add(prompts) {
    const names = prompts.map((prompt) => prompt.trim()).filter(Boolean);
    const left = [];
    const before = this.#slots.size;
    for (const prompt of names) {
      if (this.#slots.has(prompt)) continue;
      if (this.#slots.size < this.most) this.#slots.set(prompt, this.#freeSlot());
      else left.push(prompt);
    }
    if (this.#slots.size > before) this.#changed();
    const words = `At most ${this.most} prompts: remove one to add “${left[0]}”.`;
    byId("prompt-limit").textContent = left.length ? words : "";
    return left;
  }

  /** Mark a prompt that the service refuses, with the reason. */
  blame(prompt, reason) {
    if (!this.#slots.has(prompt)) return;
    this.#faults.set(prompt, reason);
    this.#draw();
  }

  suggest(prompts) {
    this.#suggestions = [...new Set(prompts)];
    this.#showsAll = false;
    this.#drawSuggestions();
  }

  #freeSlot() {
    const taken = new Set(this.#slots.values());
    let slot = 0;
    while (taken.has(slot)) slot++;
    return slot;
  }

  #take() {
    const words = this.#input.value.split(/[,\n]/);
    this.#input.value = "";
    this.#input.value = this.add(words)[0] ?? "";
  }

  #key(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      this.#take();
    } else if (event.key === "Backspace" && !this.#input.value && this.#slots.size) {
      this.#remove([...this.#slots.keys()].at(-1));
    }
  }

  #remove(prompt) {
    this.#slots.delete(prompt);
    this.#faults.delete(prompt);
    byId("prompt-limit").textContent = "";
    this.#changed();
  }

  #changed() {
    this.#draw();
    this.#drawSuggestions();
    this.#onChange();
  }

  #draw() {
    const chips = [...this.#slots.keys()].map((prompt) => {
      const fault = this.#faults.get(prompt);
      const button = make("button", { type: "button", className: "chip-remove", textContent: "×" });
      button.ariaLabel = `Remove ${prompt}`;
      button.addEventListener("click", () => this.#remove(prompt));
      const text = make("span", { className: "chip-text", textContent: prompt });
      const chip = make("li", { className: "chip", colour: this.colourOf(prompt) }, text, button);
      if (fault) {
        chip.classList.add("is-bad");
        chip.append(make("span", { className: "chip-fault", textContent: fault }));
      }
      return chip;
    });
    keepFocus(this.#chips, () => this.#chips.replaceChildren(...chips), this.#input);
    this.#input.placeholder = chips.length ? "" : "gear, red arrow";
  }

  #drawSuggestions() {
    const open = this.#suggestions.filter((prompt) => !this.#slots.has(prompt));
    const shown = this.#showsAll ? open : open.slice(0, SUGGESTED);
    const buttons = shown.map((prompt) => {
      const button = make("button", { type: "button", className: "suggestion", textContent: prompt });
      button.ariaLabel = `Add ${prompt}`;
      button.addEventListener("click", () => this.add([prompt]));
      return button;
    });
    if (shown.length < open.length) {
      const text = `${open.length - shown.length} more`;
      const more = make("button", { type: "button", className: "suggestion is-more", textContent: text });
      more.addEventListener("click", () => {
        this.#showsAll = true;
        this.#drawSuggestions();
      });
      buttons.push(more);
    }
    const lastChip = this.#chips.querySelector("li:last-child button") ?? this.#input;
    keepFocus(this.#suggested, () => this.#suggested.replaceChildren(...buttons), lastChip);
    byId("suggestions").hidden = !buttons.length;
  }
}
