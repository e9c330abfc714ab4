// Prompts as chips, with the adapter's own prompts as suggestions.

import { colourOf } from "./drawing.js";
import { byId, make } from "./elements.js";

const SUGGESTED = 10; // more are shown on demand

export class PromptField {
  #prompts = [];
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

  get prompts() {
    return [...this.#prompts];
  }

  add(prompts) {
    const added = [...new Set(prompts.map((prompt) => prompt.trim()))].filter(
      (prompt) => prompt && !this.#prompts.includes(prompt),
    );
    if (!added.length) return;
    this.#prompts.push(...added);
    this.#changed();
  }

  suggest(prompts) {
    this.#suggestions = [...new Set(prompts)];
    this.#showsAll = false;
    this.#drawSuggestions();
  }

  #take() {
    const words = this.#input.value.split(/[,\n]/);
    this.#input.value = "";
    this.add(words);
  }

  #key(event) {
    if (event.isComposing) return;
    if (event.key === "Enter" && !event.ctrlKey) {
      event.preventDefault();
      this.#take();
    } else if (event.key === "Backspace" && !this.#input.value && this.#prompts.length) {
      this.#remove(this.#prompts.length - 1);
    }
  }

  #remove(index) {
    this.#prompts.splice(index, 1);
    this.#changed();
    this.#input.focus();
  }

  #changed() {
    this.#chips.replaceChildren(
      ...this.#prompts.map((prompt, index) => {
        const button = make("button", { type: "button", className: "chip-remove", textContent: "×" });
        button.ariaLabel = `Remove ${prompt}`;
        button.addEventListener("click", () => this.#remove(index));
        const text = make("span", { className: "chip-text", textContent: prompt });
        return make("li", { className: "chip", colour: colourOf(index) }, text, button);
      }),
    );
    this.#input.placeholder = this.#prompts.length ? "" : "gear, red arrow";
    this.#drawSuggestions();
    this.#onChange();
  }

  #drawSuggestions() {
    const open = this.#suggestions.filter((prompt) => !this.#prompts.includes(prompt));
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
    this.#suggested.replaceChildren(...buttons);
    byId("suggestions").hidden = !buttons.length;
  }
}
