// Controls beside the picture while the pointer clicks: in or out, undo, the other outlines, the name of a new object.

import { byId, make } from "./elements.js";

const LARGEST_AREA = 8; // of a hole or a speck that is cleaned, in pixels of the low-resolution mask: docs/clicks.md

export class ClickBar {
  #chosen = ""; // name of new objects

  /**
   * Callbacks: `onUndo()`, `onOther()`, `onNew()`, `onDone()`, `onName(name)` after another name was chosen, and
   * `onClean()` after `cleaning` changed.
   */
  constructor({ onUndo, onOther, onNew, onDone, onName, onClean }) {
    byId("click-undo").addEventListener("click", onUndo);
    byId("click-other").addEventListener("click", onOther);
    byId("click-new").addEventListener("click", onNew);
    byId("click-done").addEventListener("click", onDone);
    byId("click-clean").addEventListener("change", onClean);
    byId("click-prompt").addEventListener("input", ({ target }) => {
      this.#chosen = target.value;
      onName(target.value);
    });
  }

  /** Whether a plain click says "not this". */
  get isOut() {
    return byId("click-side").querySelector(":checked").value === "out";
  }

  /** The fields of a request that say which holes and specks are left out of masks. */
  get cleaning() {
    const area = byId("click-clean").checked ? LARGEST_AREA : 0;
    return { max_hole_area: area, max_sprinkle_area: area };
  }

  /** The name of a new object, one of `prompts`; "" if there are none. */
  nameOf(prompts) {
    return prompts.includes(this.#chosen) ? this.#chosen : (prompts[0] ?? "");
  }

  /** `edit` is the object in hand, or null. Everything keeps its place: the picture below must not move under a finger. */
  show(isOn, prompts, edit) {
    byId("click-bar").hidden = !isOn;
    byId("click-state").textContent = edit ? stateOf(edit) : "Click an outline to correct it, or a thing without one.";
    const list = byId("click-prompt");
    list.replaceChildren(...prompts.map((prompt) => make("option", { value: prompt, textContent: prompt })));
    list.value = edit?.prompt ?? this.nameOf(prompts);
    list.disabled = !prompts.length;
    if (!edit) byId("click-side").querySelector("[value=in]").checked = true;
    const hadFocus = document.activeElement;
    byId("click-undo").disabled = !edit?.canUndo;
    byId("click-other").disabled = !edit?.detection?.alternatives?.length;
    byId("click-new").disabled = !prompts.length || isUntouched(edit);
    byId("click-done").disabled = edit === null;
    if (hadFocus.disabled) document.querySelector("canvas").focus();
  }
}

/** Whether a new object is in hand that nobody has clicked yet. */
function isUntouched(edit) {
  return edit !== null && !edit.source && !edit.canUndo;
}

function stateOf({ prompt, source, clicks, detection }) {
  const doing = source ? `Correcting ${prompt}` : `New ${prompt}`;
  if (detection && detection !== source) return `${doing}: score ${detection.score.toFixed(2)}`;
  if (clicks.length) return `${doing}…`;
  return source ? `${doing}: click what is missing; what is too much, as Out.` : `${doing}: click it, or drag a box.`;
}
