// The chosen image: decoded for the screen, uploaded once for all requests.

import { call, isAbort, ServiceError } from "./api.js";

const SCREEN_SIDE = 2048; // pixels of the copy that is drawn on screen

export class Picture {
  #file;
  #upload = null; // promise of the image's id
  #life = new AbortController();

  /** Read an image file. Throws ServiceError if the browser cannot read it. */
  static async open(file, name = file.name) {
    let full;
    try {
      full = await createImageBitmap(file);
    } catch {
      const words = `This browser cannot read ${name || "the file"} as an image. Try JPEG, PNG or WebP.`;
      throw new ServiceError("unreadable_file", words);
    }
    const { width, height } = full;
    const factor = Math.min(1, SCREEN_SIDE / Math.max(width, height));
    if (factor === 1) return new Picture(file, name, width, height, full);
    const [resizeWidth, resizeHeight] = [width, height].map((side) => Math.max(1, Math.round(side * factor)));
    const bitmap = await createImageBitmap(full, { resizeWidth, resizeHeight, resizeQuality: "high" });
    full.close();
    return new Picture(file, name, width, height, bitmap);
  }

  constructor(file, name, width, height, bitmap) {
    Object.assign(this, { name, width, height, bitmap });
    this.#file = file;
  }

  /** Decoded at its full size, for downloads. */
  fullBitmap() {
    return createImageBitmap(this.#file);
  }

  /** Forget the image. */
  close() {
    this.stopUpload();
    this.bitmap.close();
  }

  stopUpload() {
    this.#life.abort();
    this.#life = new AbortController();
  }

  /**
   * Ask the service: `question` is a request without its image. An image that is no longer kept goes up again.
   * `onProgress(share)` follows the upload. Returns { answer, roundTripMs }, the latter without the upload.
   */
  segment(question, options) {
    return this.ask("v1/segment", question, options);
  }

  /** As `segment`, of any route that takes an `image_id`. */
  async ask(path, question, { signal, onWait, onProgress }) {
    for (let isRetry = false; ; isRetry = true) {
      const upload = (this.#upload ??= this.#send(onWait, onProgress));
      let image_id;
      try {
        image_id = await upload;
      } catch (error) {
        if (this.#upload === upload) this.#upload = null;
        throw error;
      }
      signal.throwIfAborted();
      try {
        const start = performance.now();
        const answer = await call(path, { json: { image_id, ...question }, signal, onWait });
        return { answer, roundTripMs: performance.now() - start };
      } catch (error) {
        if (isAbort(error) || error.type !== "image_not_found" || isRetry) throw error;
        if (this.#upload === upload) this.#upload = null;
      }
    }
  }

  async #send(onWait, onProgress) {
    const body = new FormData();
    body.append("image", this.#file, this.name);
    const { image_id } = await call("v1/images", { body, signal: this.#life.signal, onWait, onProgress });
    return image_id;
  }
}
