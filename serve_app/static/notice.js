// Errors in plain words, each with the one action that helps, and the API key.

import { apiKey, ServiceError } from "./api.js";
import { byId } from "./elements.js";

export class Notice {
  #actions;
  #act = null;
  #leave;

  /** `retry()` asks again, `choose()` opens the choice of files, `leave()` moves the focus out of the notice. */
  constructor({ retry, choose, leave }) {
    this.#leave = leave;
    this.#actions = {
      unauthorized: ["Enter key", () => this.#askKey()],
      unreadable_file: ["Choose another file", choose],
      other: ["Try again", retry],
    };
    byId("error-act").addEventListener("click", () => this.#act());
    byId("error-close").addEventListener("click", () => this.hide());
    byId("key").value = apiKey.get();
    byId("key-open").hidden = !apiKey.get();
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      apiKey.set(byId("key").value.trim());
      byId("key-message").textContent = "";
      byId("key-box").hidePopover();
      retry();
    });
  }

  show(error) {
    if (!(error instanceof ServiceError)) console.warn(error);
    const [name, act] = this.#actions[error.type] ?? this.#actions.other;
    this.#act = act;
    byId("error-act").textContent = name;
    byId("error-message").textContent = error.message;
    byId("error-request").textContent = error.requestId ? `Request ${error.requestId}` : "";
    byId("error").hidden = false;
    byId("error").scrollIntoView({ block: "nearest" });
    if (error.type !== "unauthorized") return;
    byId("key-message").textContent = error.message;
    byId("key-open").hidden = false;
    this.#askKey();
  }

  hide() {
    if (byId("error").contains(document.activeElement)) this.#leave();
    byId("error").hidden = true;
  }

  #askKey() {
    byId("key-box").showPopover();
    byId("key").select();
  }
}
