// Objects of one panel that a person corrects or adds by clicks, each with the way back.

/** One object. `source` is the detection of `prompt` that is corrected; null for a new object. */
export class Edit {
  #states;

  constructor(prompt, source = null) {
    Object.assign(this, { source });
    this.#states = [{ prompt, clicks: [], box: null, detection: source }];
  }

  /** Its name. */
  get prompt() {
    return this.#now.prompt;
  }

  /** Whether a detection of this prompt is corrected. */
  replaces(prompt) {
    return this.source !== null && this.isChanged && this.#states[0].prompt === prompt;
  }

  get clicks() {
    return this.#now.clicks;
  }

  /** The box that the person drew; null without. */
  get box() {
    return this.#now.box;
  }

  /** The last mask that is known, as a detection; null for a new object before the first answer. */
  get detection() {
    return lastMask(this.#states);
  }

  /** Whether clicks or another name changed what is shown. */
  get isChanged() {
    return this.detection !== null && this.detection !== this.source;
  }

  /** Whether clicks or a box were answered, and not only a name was given. */
  get isAnswered() {
    return this.isChanged && (this.clicks.length > 0 || this.box !== null);
  }

  get canUndo() {
    return this.#states.length > 1;
  }

  get #now() {
    return this.#states.at(-1);
  }

  /** One more click, { x, y, label }, or a box in the place of an earlier one. */
  add({ click = null, box = null }) {
    const { prompt, clicks, box: before } = this.#now;
    this.#states.push({ prompt, clicks: click ? [...clicks, click] : clicks, box: box ?? before, detection: null });
  }

  /** Another name, which can be undone once there is a mask. */
  rename(prompt) {
    const { detection } = this.#now;
    if (detection) this.#states.push({ ...this.#now, prompt, detection: { ...detection, corrected: true } });
    else this.#now.prompt = prompt;
  }

  /** Whether the last clicks have no mask yet. */
  get isOpen() {
    return this.#now.detection === null && this.canUndo;
  }

  /** Give the last clicks their mask. */
  answer(detection) {
    this.#now.detection = { ...detection, corrected: true };
  }

  /** Give the last clicks the same masks in another form; the one that was chosen stays so. */
  answerAgain({ alternatives, ...first }) {
    const masks = [first, ...alternatives];
    const { mask_id } = this.detection;
    const place = Math.max(0, masks.findIndex((mask) => mask_id && mask.mask_id === mask_id));
    this.answer({ ...masks[place], alternatives: [...masks.slice(place + 1), ...masks.slice(0, place)] });
  }

  /** Take the next of the other masks that the service offered. */
  takeOther() {
    const { alternatives, ...chosen } = this.detection;
    const [next, ...others] = alternatives;
    const detection = { ...next, corrected: true, alternatives: [...others, chosen] };
    this.#states.push({ ...this.#now, detection });
  }

  undo() {
    if (this.canUndo) this.#states.pop();
  }

  /** Forget the clicks that got no mask. */
  dropOpen() {
    while (this.isOpen) this.undo();
  }

  /**
   * The object as POST /v1/refine expects it; `isKept` says whether masks are sent by their id where they have one,
   * `isAgain` whether the clicks have an answer and are asked once more.
   */
  request(isKept, isAgain) {
    const { clicks, box } = this.#now;
    const asked = this.#states.findIndex((state) => state.clicks === clicks && state.box === box); // others chose a mask
    const before = isAgain ? lastMask(this.#states.slice(0, asked)) : this.detection;
    const mask = before && (isKept && before.mask_id ? { mask_id: before.mask_id } : before.mask);
    return { clicks: this.clicks, box: this.box ?? this.source?.box_xyxy ?? null, mask };
  }
}

function lastMask(states) {
  return states.findLast(({ detection }) => detection)?.detection ?? null;
}

export class Edits {
  list = [];

  add(edit) {
    this.list.push(edit);
  }

  /** Forget those without a change, all of them or one. */
  tidy() {
    this.list = this.list.filter(({ isChanged }) => isChanged);
  }

  clear() {
    this.list = [];
  }

  /** The edit whose mask is shown as this detection. */
  of(detection) {
    return this.list.find((edit) => edit.detection === detection);
  }

  /** Of a prompt: the objects that were corrected or added, and then the detections that nobody corrected. */
  applyTo(prompt, detections) {
    const mine = this.list.filter((edit) => edit.prompt === prompt && edit.isChanged);
    const replaced = new Set(this.list.filter((edit) => edit.replaces(prompt)).map(({ source }) => source.mask.counts));
    return [...mine.map(({ detection }) => detection), ...detections.filter(({ mask }) => !replaced.has(mask.counts))];
  }
}
