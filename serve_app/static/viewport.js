// What part of the image is seen: one viewport is shared by all canvases that show it.

const MAX_ZOOM = 40;
const MAX_SCALE = 32; // CSS pixels of a pixel of the image, where MAX_ZOOM is less
const HAIRLINE_PX = 12; // CSS pixels; an image narrower than that is shown in part

export class Viewport {
  zoom = 1; // 1 shows the whole image
  #centre = [0.5, 0.5]; // in shares of the image
  #size = [1, 1]; // of the image, in pixels

  fit(width, height) {
    this.#size = [width, height];
    this.zoom = 1;
    this.#centre = [0.5, 0.5];
  }

  /** Zoom in if all of the image would be a hairline. Returns whether it would. */
  widen(canvasWidth, canvasHeight) {
    const narrowest = Math.min(...this.#size) * this.transform(canvasWidth, canvasHeight).scale;
    const isHairline = Math.max(...this.#size) > 20 * Math.min(...this.#size) && narrowest < HAIRLINE_PX;
    if (isHairline) this.zoomBy(HAIRLINE_PX / narrowest, canvasWidth, canvasHeight);
    return isHairline;
  }

  /** Scale and offset from pixels of the image to CSS pixels of a canvas. */
  transform(canvasWidth, canvasHeight) {
    const [width, height] = this.#size;
    const scale = Math.min(canvasWidth / width, canvasHeight / height) * this.zoom;
    return {
      scale,
      left: canvasWidth / 2 - this.#centre[0] * width * scale,
      top: canvasHeight / 2 - this.#centre[1] * height * scale,
    };
  }

  /** Pixels of the image under a place on a canvas. */
  toImage([x, y], canvasWidth, canvasHeight) {
    const { scale, left, top } = this.transform(canvasWidth, canvasHeight);
    return [(x - left) / scale, (y - top) / scale];
  }

  /** Zoom by a factor; what lies at `anchor` (canvas pixels) stays there. */
  zoomBy(factor, canvasWidth, canvasHeight, anchor = [canvasWidth / 2, canvasHeight / 2]) {
    const before = this.toImage(anchor, canvasWidth, canvasHeight);
    const most = Math.max(MAX_ZOOM, (MAX_SCALE * this.zoom) / this.transform(canvasWidth, canvasHeight).scale);
    this.zoom = Math.min(most, Math.max(1, this.zoom * factor));
    const after = this.toImage(anchor, canvasWidth, canvasHeight);
    this.#moveCentre(before[0] - after[0], before[1] - after[1]);
  }

  /** Move the image by canvas pixels. */
  panBy(dx, dy, canvasWidth, canvasHeight) {
    const { scale } = this.transform(canvasWidth, canvasHeight);
    this.#moveCentre(-dx / scale, -dy / scale);
  }

  #moveCentre(dx, dy) {
    const half = 0.5 / this.zoom;
    const clamp = (value) => Math.min(1 - half, Math.max(half, value));
    this.#centre = [
      clamp(this.#centre[0] + dx / this.#size[0]),
      clamp(this.#centre[1] + dy / this.#size[1]),
    ];
  }
}
