// The post-processing: what the adapters recorded, with what the person changed.

import { basePostProcessing, known } from "./adapters.js";
import { byId } from "./elements.js";

const SLIDERS = { threshold: "threshold", "nms-iou": "nms_iou" }; // element -> field

export class Settings {
  #changed = {}; // fields that the person set; the adapter's own values hold for the others
  #onChange;

  /** `onChange(field)`; the field is null if several changed. */
  constructor(onChange) {
    this.#onChange = onChange;
    for (const [id, field] of Object.entries(SLIDERS)) {
      byId(id).addEventListener("input", (event) => this.#change(field, event.target.valueAsNumber));
    }
    byId("nms").addEventListener("input", (event) => this.#change("nms", event.target.value));
    byId("merge").addEventListener("input", (event) => this.#change("merge", event.target.checked));
    byId("recorded").addEventListener("click", () => {
      this.#changed = {};
      onChange(null);
      byId("threshold").focus();
    });
  }

  /** All fields, as they hold for an adapter; null is the base model. */
  of(adapter) {
    const recorded = known.get(adapter)?.post_processing ?? basePostProcessing;
    const forAllPrompts = "threshold" in this.#changed ? { prompt_thresholds: {} } : {};
    return { ...recorded, ...this.#changed, ...forAllPrompts };
  }

  /** The fields of a request that the service answers just so. */
  requestOf(adapter) {
    const { nms_iou, ...fields } = this.#changed;
    return nms_iou === undefined || this.of(adapter).nms === "none" ? fields : { ...fields, nms_iou };
  }

  /** Set the controls to the values of an adapter. */
  show(adapter) {
    const shown = this.of(adapter);
    for (const [id, field] of Object.entries(SLIDERS)) {
      byId(id).value = shown[field];
      byId(`${id}-value`).textContent = shown[field].toFixed(2);
    }
    if (Object.keys(shown.prompt_thresholds).length) byId("threshold-value").textContent += ", some prompts differ";
    byId("nms").value = shown.nms;
    byId("nms-iou").disabled = shown.nms === "none";
    byId("merge").checked = shown.merge;
    byId("recorded").hidden = !Object.keys(this.#changed).length;
  }

  #change(field, value) {
    this.#changed = { ...this.#changed, [field]: value };
    this.#onChange(field);
  }
}
