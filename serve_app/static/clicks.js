// Clicks on the picture: they correct a found outline or add an object. Asks the service and keeps one object in hand.

import { clickFault } from "./adapters.js";
import { isAbort } from "./api.js";
import { ClickBar } from "./click_bar.js";
import { Edit } from "./edits.js";

export class Clicks {
  #scene;
  #on;
  #bar;
  #panel = null; // of the object in hand
  #edit = null; // the object in hand
  #running = new AbortController();

  /**
   * `scene` as of `Stage`. Callbacks: `onChange()` after an outline changed, which has to call `showBar`,
   * `onFail(error)`, `say(text)`, `panel()`, which returns the panel that is seen, and `adapter()`, which returns the
   * adapter of the click head as the service lists it, null for the base's.
   */
  constructor(scene, callbacks) {
    this.#scene = scene;
    this.#on = callbacks;
    this.#bar = new ClickBar({
      onUndo: () => this.undo(),
      onOther: () => this.#takeOther(),
      onNew: () => this.begin(),
      onDone: () => this.finish(),
      onName: (name) => this.#rename(name),
      onClean: () => this.#askAgain(),
    });
    document.addEventListener("keydown", (event) => this.#key(event));
  }

  get isOn() {
    return this.#scene.tool === "click";
  }

  /** A click { x, y, isOut } or a box on the picture of a panel; `item` is what is found under the click, if anything. */
  show(panel, { click = null, box = null, item = null }) {
    const answering = this.#on.adapter();
    const fault = answering && clickFault(answering, [panel.adapter]);
    if (fault) return this.#on.say(`${answering.id} cannot answer here: ${fault}.`);
    if (this.#panel && this.#panel !== panel) this.finish();
    const label = click && Number(!click.isOut && !this.#bar.isOut);
    if (!this.#edit && item && click) {
      this.select(panel, item);
      if (label) return; // the next click corrects it
    }
    if (!this.#edit) {
      if (click && !label) return this.#on.say("Click the object itself first.");
      if (!panel.prompts.length) return this.#on.say("Add a prompt first: it names what you click.");
      this.#begin(panel);
    }
    this.#edit.add({ box, click: click && { x: click.x, y: click.y, label } });
    this.#ask();
  }

  /** Take a shown outline, { detection, prompt }, in hand. */
  select(panel, { detection, prompt }) {
    this.#take(panel, panel.edits.of(detection) ?? new Edit(prompt, detection));
  }

  /** Let go of the object in hand; what was changed stays. */
  finish() {
    this.#running.abort();
    this.#edit?.dropOpen();
    this.#panel?.edits.tidy();
    this.#panel?.mark(null);
    this.#edit = this.#panel = null;
    this.#on.onChange();
  }

  /** A new object, also where an outline lies already; the one in hand is done. */
  begin() {
    const panel = this.#panel ?? this.#on.panel();
    if (panel?.prompts.length) this.#begin(panel);
  }

  undo() {
    if (!this.#edit?.canUndo) return;
    this.#running.abort();
    this.#edit.undo();
    if (this.#edit.isOpen) this.#ask();
    else this.#changed();
  }

  /** After the tool, the prompts or the panels changed. */
  showBar() {
    if (this.#edit && !this.isOn) return this.finish();
    const panel = this.#panel ?? this.#on.panel();
    this.#bar.show(this.isOn, panel?.prompts ?? [], this.#edit);
  }

  #begin(panel) {
    this.#take(panel, new Edit(this.#bar.nameOf(panel.prompts)));
  }

  #take(panel, edit) {
    this.finish();
    this.#panel = panel;
    this.#edit = edit;
    if (!panel.edits.list.includes(edit)) panel.edits.add(edit);
    this.#changed();
    panel.stage.focus();
  }

  #rename(name) {
    this.#edit?.rename(name);
    if (this.#edit) this.#changed();
  }

  #takeOther() {
    this.#edit.takeOther();
    this.#changed();
  }

  #changed() {
    this.#on.onChange();
    this.#panel.mark(this.#edit);
  }

  /** The answer to the last click in another form. */
  #askAgain() {
    if (this.#edit?.isOpen) this.#ask();
    else if (this.#edit?.isAnswered) this.#ask({ isAgain: true });
  }

  async #ask({ isAgain = false } = {}) {
    this.#running.abort();
    const { signal } = (this.#running = new AbortController());
    const [panel, edit] = [this.#panel, this.#edit];
    this.#changed();
    panel.setBusy(true);
    try {
      const found = await this.#answer(panel, edit, isAgain, signal);
      signal.throwIfAborted();
      if (isAgain) edit.answerAgain(found);
      else edit.answer(found);
      this.#on.say(found.area_px ? "" : "Nothing is there, says the model: click elsewhere, or undo.");
    } catch (error) {
      if (isAbort(error)) return;
      edit.dropOpen();
      this.#on.onFail(error);
    } finally {
      if (this.#running.signal === signal || this.#panel !== panel) panel.setBusy(false); // else the next one waits
    }
    if (this.#edit === edit) this.#changed();
  }

  /** Ask with the mask by its id, or as a code where the service no longer keeps it. */
  async #answer({ adapter }, edit, isAgain, signal) {
    const onWait = (seconds) => this.#on.say(`The service is busy: trying again in ${seconds} s.`);
    for (let isKept = true; ; isKept = false) {
      const answering = this.#on.adapter();
      const question = {
        adapter,
        click_adapter: answering?.id ?? null,
        clicks_vision: answering?.clicks_vision ?? "adapter",
        objects: [edit.request(isKept, isAgain)],
        ...this.#bar.cleaning,
      };
      try {
        const { answer } = await this.#scene.picture.ask("v1/refine", question, { signal, onWait });
        return answer.objects[0];
      } catch (error) {
        if (error.type !== "mask_not_found" || !isKept) throw error;
      }
    }
  }

  #key(event) {
    if (!this.isOn || event.target.matches("input:not([type=radio], [type=checkbox]), select, textarea")) return;
    const key = event.key.toLowerCase();
    if (key === "z") this.undo();
    else if (key === "n" && !event.ctrlKey && !event.metaKey) this.begin();
    else if (key === "escape") this.finish();
    else return;
    event.preventDefault();
  }
}
