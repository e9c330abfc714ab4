// A field that picks an adapter: an ARIA combobox whose list is searched in the service.

import { listAdapters } from "./adapters.js";
import { isAbort } from "./api.js";
import { byId, debounce, make } from "./elements.js";

const TYPED_FROM = 8; // adapters; below, a touch screen shows no keyboard

/**
 * `value` is the id of an adapter of `task` or of one of the `fixed` choices, [[value, text], ...], which come first.
 * `faultOf(adapter)` says why one cannot be picked now; "" if it can.
 */
export class Picker {
  #input;
  #list;
  #fixed;
  #task;
  #faultOf;
  #onChange;
  #onFail;
  #active = null; // the option that Enter takes
  #next = null; // where the list goes on
  #search = new AbortController();

  constructor(id, fixed, { onChange, onFail, task = "detection", faultOf = () => "" }) {
    this.#input = byId(id);
    this.#list = byId(`${id}-list`);
    this.#fixed = fixed;
    this.#task = task;
    this.#faultOf = faultOf;
    this.#onChange = onChange;
    this.#onFail = onFail;
    this.value = fixed[0][0];
    const searchSoon = debounce(150, () => this.#open(this.#input.value.trim()));
    this.#input.addEventListener("input", searchSoon);
    this.#input.addEventListener("focus", () => this.#input.select()); // typing replaces what was picked
    this.#input.addEventListener("click", () => !this.#isOpen && this.#open());
    this.#input.addEventListener("keydown", (event) => this.#key(event));
    this.#input.addEventListener("blur", () => this.#close());
    this.#list.addEventListener("pointerdown", (event) => event.preventDefault()); // the field keeps the focus
    this.#list.addEventListener("click", (event) => this.#take(event.target.closest("[role=option]")));
    this.#list.addEventListener("scroll", () => {
      const { scrollTop, clientHeight, scrollHeight } = this.#list;
      if (scrollTop + clientHeight > scrollHeight - 40) this.#loadMore();
    });
  }

  get value() {
    return this.#input.dataset.value;
  }

  set value(value) {
    this.#input.dataset.value = value;
    this.#input.value = this.#textOf(value);
  }

  get #isOpen() {
    return this.#input.ariaExpanded === "true";
  }

  #textOf(value) {
    return this.#fixed.find(([fixed]) => fixed === value)?.[1] ?? value;
  }

  /** Show what the service has now. */
  async #open(search = "") {
    this.#search.abort();
    const { signal } = (this.#search = new AbortController());
    if (!this.#isOpen) this.#input.select();
    this.#input.ariaExpanded = "true";
    try {
      const page = await listAdapters({ search, task: this.#task, signal });
      if (!this.#isOpen || signal.aborted) return;
      const fixed = this.#fixed.filter(([, text]) => text.toLowerCase().includes(search.toLowerCase()));
      const options = fixed.map(([value, text]) => this.#option({ id: value, text, prompts: [] }));
      this.#list.replaceChildren(...options, ...page.adapters.map((adapter) => this.#option(adapter)));
      if (!this.#list.children.length) {
        const words = "No adapter has this in its name or prompts.";
        this.#list.append(make("li", { className: "soft", textContent: words }));
      }
      this.#next = page.next;
      this.#input.inputMode = search || page.total >= TYPED_FROM ? "search" : "none";
      this.#list.hidden = false;
      this.#activate((search ? null : this.#list.querySelector("[aria-selected=true]")) ?? this.#options[0]);
      byId("spoken").textContent = `${this.#options.length - page.adapters.length + page.total} choices`;
    } catch (error) {
      if (isAbort(error)) return;
      this.#close();
      this.#onFail(error);
    }
  }

  async #loadMore() {
    if (this.#next === null) return;
    const { signal } = this.#search;
    const after = this.#next;
    this.#next = null; // one page at a time
    const page = await listAdapters({ search: this.#typed, after, task: this.#task, signal }).catch(() => null);
    if (!page || signal.aborted || !this.#isOpen) return;
    this.#list.append(...page.adapters.map((adapter) => this.#option(adapter)));
    this.#next = page.next;
  }

  get #typed() {
    return this.#input.value === this.#textOf(this.value) ? "" : this.#input.value.trim();
  }

  #close() {
    this.#search.abort();
    this.#input.ariaExpanded = "false";
    this.#list.hidden = true;
    this.#activate(null);
    this.#input.value = this.#textOf(this.value);
  }

  get #options() {
    return [...this.#list.querySelectorAll("[role=option]")];
  }

  #option(adapter) {
    const { id, text = id, prompts } = adapter;
    const error = adapter.error || this.#faultOf(adapter);
    const option = make("li", { role: "option", id: `${this.#list.id}-${id || "base"}` });
    option.append(make("b", { textContent: text }));
    const about = error ? `cannot be used: ${error}` : prompts.slice(0, 12).join(", ");
    if (about) option.append(make("span", { className: "soft", textContent: about }));
    option.dataset.value = id;
    option.ariaSelected = String(id === this.value);
    if (error) option.ariaDisabled = "true";
    return option;
  }

  #activate(option) {
    this.#active?.classList.remove("is-active");
    this.#active = option ?? null;
    this.#active?.classList.add("is-active");
    this.#active?.scrollIntoView({ block: "nearest" });
    if (option) this.#input.setAttribute("aria-activedescendant", option.id);
    else this.#input.removeAttribute("aria-activedescendant");
  }

  #take(option) {
    if (!option || option.ariaDisabled) return;
    const isNew = option.dataset.value !== this.value;
    this.value = option.dataset.value;
    this.#close();
    if (isNew) this.#onChange();
  }

  #key(event) {
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 }[event.key];
    if (step && !this.#isOpen) {
      this.#open();
    } else if (step) {
      const options = this.#options;
      const place = Math.max(0, Math.min(options.length - 1, options.indexOf(this.#active) + step));
      this.#activate(options[place]);
      if (place >= options.length - 8) this.#loadMore();
    } else if (event.key === "Enter" && this.#isOpen && !event.isComposing) {
      this.#take(this.#active);
    } else if (event.key === "Escape" && this.#isOpen) {
      this.#close();
    } else {
      return;
    }
    event.preventDefault();
  }
}
