// Detections and example boxes on a canvas whose context is scaled to pixels of the image.

import { outlinePath } from "./outline.js";
import { decodeSpans } from "./rle.js";

const FIRST = ["#dc2626", "#2563eb", "#15803d", "#b45309", "#9333ea", "#0e7490", "#be185d", "#65543c"];
const [LIGHTNESS, HUE_STEP, FIRST_HUE] = [[0.5, 0.42, 0.3], 52.5, 270]; // keep 32 colours furthest apart

/** A colour of its own for each prompt; white text is readable on all of them. */
export function colourOf(slot) {
  return FIRST[slot] ?? `oklch(${LIGHTNESS[slot % 3]} 0.14 ${(FIRST_HUE + slot * HUE_STEP) % 360})`;
}

const TRACED_SIDE = 2048; // masks of larger images are outlined more coarsely on screen

/** Coarseness of outlines on screen for an image of this size. */
export const screenStep = ({ width, height }) => Math.ceil(Math.max(width, height) / TRACED_SIDE);

/** Path of a detection's mask, cached for each coarseness. */
export function pathOf(detection, step) {
  detection.paths ??= new Map();
  if (!detection.paths.has(step)) {
    detection.paths.set(step, outlinePath(decodeSpans(detection.mask.counts), detection.mask.size, step));
  }
  return detection.paths.get(step);
}

/**
 * Draw detections, the best in front.
 * `items` are { detection, prompt, colour }; `ghosts` are such of another adapter, drawn as dashed outlines;
 * `pixel` is the width of a screen pixel in pixels of the image, `width` and `height` its size;
 * `highlight` is the detection to set apart; `show` is { masks, boxes, labels, fill }.
 */
export function drawDetections(context, items, { pixel, width, height, step, show, ghosts = [], highlight = null }) {
  const isDimmed = ({ detection }) => highlight !== null && detection !== highlight;
  context.lineJoin = "round";
  for (const item of [...items].reverse()) {
    context.globalAlpha = isDimmed(item) ? 0.3 : 1;
    if (show.masks) drawMask(context, item, pixel, step, show.fill);
    if (show.boxes || item.detection === highlight) drawBox(context, item, pixel);
  }
  context.globalAlpha = 1;
  context.setLineDash([5 * pixel, 4 * pixel]);
  for (const { detection, colour } of ghosts) {
    const path = pathOf(detection, step);
    strokeTwice(context, colour, pixel, 2, () => context.stroke(path));
  }
  context.setLineDash([]);
  const chosen = items.filter(({ detection }) => detection === highlight);
  if (show.labels || chosen.length) drawLabels(context, chosen.length ? chosen : items, pixel, [width, height]);
}

function drawMask(context, { detection, colour }, pixel, step, fill) {
  const path = pathOf(detection, step);
  const alpha = context.globalAlpha;
  context.globalAlpha = alpha * fill;
  context.fillStyle = colour;
  context.fill(path);
  context.globalAlpha = alpha;
  strokeTwice(context, colour, pixel, 2, () => context.stroke(path));
}

function drawBox(context, { detection, colour }, pixel) {
  const [x0, y0, x1, y1] = detection.box_xyxy;
  strokeTwice(context, colour, pixel, 1.5, () => context.strokeRect(x0, y0, x1 - x0, y1 - y0));
}

/** A coloured line with a pale rim, visible on any image. */
function strokeTwice(context, colour, pixel, width, stroke) {
  context.strokeStyle = "rgb(255 255 255 / 75%)";
  context.lineWidth = (width + 1.5) * pixel;
  stroke();
  context.strokeStyle = colour;
  context.lineWidth = width * pixel;
  stroke();
}

/** A tag at each box where no other tag is; where none has room, a dot. */
function drawLabels(context, items, pixel, [imageWidth, imageHeight]) {
  const size = 12 * pixel;
  const pad = 4 * pixel;
  const height = size + pad * 1.5;
  context.font = `600 ${size}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  const tags = [];
  for (const { detection, prompt, colour } of items) {
    const [x0, y0, x1, y1] = detection.box_xyxy;
    const name = prompt.length > 24 ? `${prompt.slice(0, 23)}…` : prompt;
    const text = `${name} ${detection.score.toFixed(2)}`;
    const width = context.measureText(text).width + 2 * pad;
    const isFree = ([left, top]) =>
      !tags.some(({ x, y, w }) => left < x + w && x < left + width && top < y + height && y < top + height);
    const middle = [(x0 + x1 - width) / 2, (y0 + y1 - height) / 2];
    const [above, right] = [y0 - height, x1 - width];
    const places = [[x0, above], [right, above], [x0, y0], [right, y0], middle, [x0, y1 - height]];
    const place = places.map(([x, y]) => [clamp(x, imageWidth - width), clamp(y, imageHeight - height)]).find(isFree);
    if (place) tags.push({ x: place[0], y: place[1], w: width, text, colour });
    else drawDot(context, [(x0 + x1) / 2, (y0 + y1) / 2], colour, pixel);
  }
  for (const { x, y, w, text, colour } of tags) {
    context.fillStyle = colour;
    context.beginPath();
    context.roundRect(x, y, w, height, 3 * pixel);
    context.fill();
    context.fillStyle = "#fff";
    context.fillText(text, x + pad, y + height / 2);
  }
}

function drawDot(context, place, colour, pixel) {
  context.beginPath();
  context.arc(...place, 4 * pixel, 0, 2 * Math.PI);
  strokeTwice(context, colour, pixel, 1, () => context.stroke());
  context.fillStyle = colour;
  context.fill();
}

const clamp = (value, most) => Math.max(0, Math.min(most, value));

/** Example boxes: positive ones with a plus, negative ones with a minus. */
export function drawExamples(context, boxes, pixel) {
  for (const { xyxy, label } of boxes) {
    const [x0, y0, x1, y1] = xyxy;
    const colour = label ? "#15803d" : "#b91c1c";
    context.setLineDash([6 * pixel, 4 * pixel]);
    strokeTwice(context, colour, pixel, 2, () => context.strokeRect(x0, y0, x1 - x0, y1 - y0));
    context.setLineDash([]);
    const side = 16 * pixel;
    context.fillStyle = colour;
    context.fillRect(x0, y0, side, side);
    context.strokeStyle = "#fff";
    context.lineWidth = 2 * pixel;
    context.beginPath();
    context.moveTo(x0 + side * 0.25, y0 + side / 2);
    context.lineTo(x0 + side * 0.75, y0 + side / 2);
    if (label) {
      context.moveTo(x0 + side / 2, y0 + side * 0.25);
      context.lineTo(x0 + side / 2, y0 + side * 0.75);
    }
    context.stroke();
  }
}

/** The cursor for drawing boxes with the keyboard. */
export function drawCrosshair(context, [x, y], pixel) {
  const arm = 12 * pixel;
  strokeTwice(context, "#111827", pixel, 1.5, () => {
    context.beginPath();
    context.moveTo(x - arm, y);
    context.lineTo(x + arm, y);
    context.moveTo(x, y - arm);
    context.lineTo(x, y + arm);
    context.stroke();
  });
}
