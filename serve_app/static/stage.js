// One canvas with the image and what was found in it: zoom, pan, pointing at detections, drawing example boxes.

import { drawClickMarks } from "./click_marks.js";
import { drawCrosshair, drawDetections, drawExamples, pathOf, screenStep } from "./drawing.js";

const CLICK_PX = 4; // a pointer that moved less did not draw a box

/**
 * `scene` is shared by all stages and owned by the page: { picture, viewport, tool ("move", "click", "positive",
 * "negative"), boxes, show }. Callbacks: `onView()` after zoom or pan, `onBox({ xyxy, label })`, `onPoint(detection or
 * null)`, `onShow({ click: { x, y, isOut }, item })` or `onShow({ box })` with the tool "click".
 */
export class Stage {
  items = [];
  ghosts = []; // items of another adapter, to compare with
  highlight = null;
  marks = null; // of the object in hand: { clicks, box, detection }
  #canvas;
  #scene;
  #on;
  #pointers = new Map(); // id -> place in canvas pixels
  #corner = null; // first corner of a box being drawn, in pixels of the image
  #cursor = null; // place of the other one
  #hasKeyboardCursor = false;
  #frame = 0;

  constructor(canvas, scene, callbacks) {
    this.#canvas = canvas;
    this.#scene = scene;
    this.#on = callbacks;
    canvas.addEventListener("pointerdown", (event) => this.#press(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#release(event));
    canvas.addEventListener("pointercancel", (event) => this.#cancel(event));
    canvas.addEventListener("pointerleave", () => this.#on.onPoint(null));
    canvas.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#dropCorner());
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  get isShown() {
    return this.#canvas.clientWidth > 0;
  }

  focus() {
    this.#canvas.focus({ preventScroll: true });
  }

  /** Show the whole image, or a part of one that would be a hairline. Returns whether all is shown. */
  showAll() {
    const { picture, viewport } = this.#scene;
    viewport.fit(picture.width, picture.height);
    const isPart = viewport.widen(...this.#canvasSize());
    this.#on.onView();
    return !isPart;
  }

  zoomBy(factor, anchor) {
    this.#scene.viewport.zoomBy(factor, ...this.#canvasSize(), anchor);
    this.#on.onView();
  }

  /** Draw soon; many calls make one frame. */
  draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = requestAnimationFrame(() => this.#drawNow());
  }

  #canvasSize() {
    return [this.#canvas.clientWidth, this.#canvas.clientHeight];
  }

  #drawNow() {
    const { picture, viewport, boxes, show, tool } = this.#scene;
    const [width, height] = this.#canvasSize();
    if (!picture || !width || !height) return;
    const density = window.devicePixelRatio || 1;
    this.#canvas.width = Math.round(width * density);
    this.#canvas.height = Math.round(height * density);
    this.#canvas.style.touchAction = tool === "move" && viewport.zoom === 1 ? "pan-y" : "none";
    this.#canvas.style.cursor = tool === "move" ? (viewport.zoom > 1 ? "grab" : "default") : "crosshair";
    const context = this.#canvas.getContext("2d");
    const { scale, left, top } = viewport.transform(width, height);
    context.setTransform(density * scale, 0, 0, density * scale, density * left, density * top);
    context.imageSmoothingEnabled = scale < 4;
    context.imageSmoothingQuality = "high";
    context.drawImage(picture.bitmap, 0, 0, picture.width, picture.height);
    const { ghosts } = this;
    const inHand = this.items.find(({ detection }) => detection === this.marks?.detection)?.detection;
    const highlight = this.highlight ?? inHand ?? null;
    const options = { pixel: 1 / scale, width: picture.width, height: picture.height, step: screenStep(picture), show };
    drawDetections(context, this.items, { ...options, ghosts, highlight });
    const drawn = this.#corner ? [...boxes, this.#boxBeingDrawn()] : boxes;
    drawExamples(context, drawn, 1 / scale);
    if (this.marks) drawClickMarks(context, this.marks, 1 / scale);
    if (this.#hasKeyboardCursor && tool !== "move") drawCrosshair(context, this.#cursor, 1 / scale);
  }

  // ---- places ------------------------------------------------------------------------------------------------------

  #placeOf(event) {
    const { left, top } = this.#canvas.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  }

  #inImage(place) {
    const { picture, viewport } = this.#scene;
    const [x, y] = viewport.toImage(place, ...this.#canvasSize());
    return [clamp(Math.round(x), picture.width), clamp(Math.round(y), picture.height)];
  }

  /** The smallest detection under a place. */
  #detectionAt(place) {
    return this.#itemAt(place)?.detection ?? null;
  }

  #itemAt(place) {
    const [x, y] = this.#scene.viewport.toImage(place, ...this.#canvasSize());
    const context = this.#canvas.getContext("2d");
    context.save();
    context.resetTransform();
    const step = screenStep(this.#scene.picture);
    const under = this.items.filter(({ detection: { box_xyxy: box }, detection }) => {
      const isNear = x >= box[0] - step && x <= box[2] + step && y >= box[1] - step && y <= box[3] + step;
      return isNear && context.isPointInPath(pathOf(detection, step), x, y);
    });
    context.restore();
    under.sort((a, b) => a.detection.area_px - b.detection.area_px);
    return under[0] ?? null;
  }

  // ---- pointer -----------------------------------------------------------------------------------------------------

  #press(event) {
    if (!this.#scene.picture || event.button !== 0) return;
    const place = this.#placeOf(event);
    this.#pointers.set(event.pointerId, place);
    this.#canvas.setPointerCapture(event.pointerId);
    this.#hasKeyboardCursor = false;
    this.#corner = null;
    if (this.#pointers.size === 1 && this.#scene.tool !== "move") {
      this.#corner = this.#cursor = this.#inImage(place);
    }
  }

  #move(event) {
    if (!this.#scene.picture) return;
    const place = this.#placeOf(event);
    const before = this.#pointers.get(event.pointerId);
    if (!before) {
      if (event.pointerType === "mouse") this.#on.onPoint(this.#detectionAt(place));
      return;
    }
    if (this.#pointers.size === 2) {
      const other = [...this.#pointers].find(([id]) => id !== event.pointerId)[1];
      const spread = distance(place, other) / Math.max(1, distance(before, other));
      const middle = [(place[0] + other[0]) / 2, (place[1] + other[1]) / 2];
      this.zoomBy(spread, middle);
      this.#pan((place[0] - before[0]) / 2, (place[1] - before[1]) / 2);
    } else if (this.#corner) {
      this.#cursor = this.#inImage(place);
      this.draw();
    } else {
      this.#pan(place[0] - before[0], place[1] - before[1]);
    }
    this.#pointers.set(event.pointerId, place);
  }

  #release(event) {
    if (this.#corner && this.#pointers.has(event.pointerId)) {
      const { scale } = this.#scene.viewport.transform(...this.#canvasSize());
      if (distance(this.#corner, this.#cursor) * scale >= CLICK_PX) this.#finishBox();
      else if (this.#scene.tool === "click") this.#click(this.#placeOf(event), event.altKey);
    }
    this.#cancel(event);
    if (event.pointerType !== "mouse" && this.#scene.picture && this.#scene.tool === "move") {
      this.#on.onPoint(this.#detectionAt(this.#placeOf(event)));
    }
  }

  #cancel(event) {
    this.#pointers.delete(event.pointerId);
    this.#dropCorner();
  }

  #pan(dx, dy) {
    this.#scene.viewport.panBy(dx, dy, ...this.#canvasSize());
    this.#on.onView();
  }

  /** The page scrolls with the wheel; with Ctrl, or once zoomed in, the image zooms. */
  #wheel(event) {
    if (!this.#scene.picture || (!event.ctrlKey && this.#scene.viewport.zoom === 1)) return;
    event.preventDefault();
    this.zoomBy(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.002)), this.#placeOf(event));
  }

  // ---- keyboard ----------------------------------------------------------------------------------------------------

  #key(event) {
    const { picture, tool } = this.#scene;
    if (!picture || event.ctrlKey || event.metaKey || (event.altKey && event.key !== "Enter")) return;
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (way) {
      this.#step(way, event.shiftKey);
    } else if (event.key === "+" || event.key === "=") {
      this.zoomBy(1.25);
    } else if (event.key === "-") {
      this.zoomBy(0.8);
    } else if (event.key === "Escape") {
      this.#dropCorner();
    } else if (event.key === "Enter" && tool === "click") {
      this.#showCursor();
      this.draw();
      this.#click(this.#placeOn(this.#cursor), event.altKey);
    } else if ((event.key === "Enter" || event.key === " ") && tool !== "move") {
      this.#setCorner();
    } else {
      return;
    }
    event.preventDefault();
  }

  #step([dx, dy], isLarge) {
    const { picture, tool } = this.#scene;
    if (tool === "move") {
      this.#pan(-dx * 40, -dy * 40);
      return;
    }
    this.#showCursor();
    const step = Math.max(1, Math.round(Math.max(picture.width, picture.height) / (isLarge ? 20 : 100)));
    const [x, y] = this.#cursor;
    this.#cursor = [clamp(x + dx * step, picture.width), clamp(y + dy * step, picture.height)];
    this.draw();
  }

  #showCursor() {
    if (!this.#hasKeyboardCursor || !this.#cursor) {
      this.#cursor = this.#inImage(this.#canvasSize().map((side) => side / 2));
    }
    this.#hasKeyboardCursor = true;
  }

  #setCorner() {
    this.#showCursor();
    if (!this.#corner) this.#corner = this.#cursor;
    else this.#finishBox();
    this.draw();
  }

  // ---- clicks ------------------------------------------------------------------------------------------------------

  /** A click on the pixel at a place; beside the image it is none. */
  #click(place, isOut) {
    const { picture, viewport } = this.#scene;
    const [x, y] = viewport.toImage(place, ...this.#canvasSize()).map(Math.floor);
    if (x < 0 || y < 0 || x >= picture.width || y >= picture.height) return;
    this.#on.onShow({ click: { x, y, isOut }, item: this.#itemAt(place) });
  }

  /** Where the middle of a pixel is on the canvas. */
  #placeOn([x, y]) {
    const { picture, viewport } = this.#scene;
    const { scale, left, top } = viewport.transform(...this.#canvasSize());
    return [left + (Math.min(x, picture.width - 1) + 0.5) * scale, top + (Math.min(y, picture.height - 1) + 0.5) * scale];
  }

  // ---- boxes -------------------------------------------------------------------------------------------------------

  #boxBeingDrawn() {
    const [[xa, ya], [xb, yb]] = [this.#corner, this.#cursor];
    const xyxy = [Math.min(xa, xb), Math.min(ya, yb), Math.max(xa, xb), Math.max(ya, yb)];
    return { xyxy, label: this.#scene.tool === "negative" ? 0 : 1 };
  }

  #finishBox() {
    const box = this.#boxBeingDrawn();
    if (box.xyxy[0] === box.xyxy[2] || box.xyxy[1] === box.xyxy[3]) return;
    this.#corner = null;
    if (this.#scene.tool === "click") this.#on.onShow({ box: box.xyxy });
    else this.#on.onBox(box);
  }

  #dropCorner() {
    if (!this.#corner) return;
    this.#corner = null;
    this.draw();
  }
}

const clamp = (value, most) => Math.min(most, Math.max(0, value));
const distance = ([xa, ya], [xb, yb]) => Math.hypot(xa - xb, ya - yb);
