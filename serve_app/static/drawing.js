// Detections and example boxes on a canvas whose context is scaled to pixels of the image.

import { outlinePath } from "./outline.js";
import { spansOf } from "./postprocess.js";

/** One colour for each prompt, in turn; white text is readable on all of them. */
export const PALETTE = ["#dc2626", "#2563eb", "#15803d", "#b45309", "#9333ea", "#0e7490", "#be185d", "#65543c"];
export const colourOf = (promptIndex) => PALETTE[promptIndex % PALETTE.length];

const FILL_ALPHA = 0.4;
const TRACED_SIDE = 2048; // masks of larger images are outlined more coarsely on screen

/** Coarseness of outlines on screen for an image of this size. */
export const screenStep = ({ width, height }) => Math.ceil(Math.max(width, height) / TRACED_SIDE);

/** Path of a detection's mask, cached for each coarseness. */
export function pathOf(detection, step) {
  detection.paths ??= new Map();
  if (!detection.paths.has(step)) {
    detection.paths.set(step, outlinePath(spansOf(detection), detection.mask.size, step));
  }
  return detection.paths.get(step);
}

/**
 * Draw detections, the best in front.
 * `items` are { detection, prompt, colour }; `pixel` is the width of a screen pixel in pixels of the image;
 * `width` is that of the image; `highlight` is the detection to set apart; `show` is { masks, boxes, labels }.
 */
export function drawDetections(context, items, { pixel, width, step, show, highlight = null }) {
  const order = [...items].reverse();
  const isDimmed = ({ detection }) => highlight !== null && detection !== highlight;
  context.lineJoin = "round";
  for (const item of order) {
    context.globalAlpha = isDimmed(item) ? 0.3 : 1;
    if (show.masks) drawMask(context, item, pixel, step);
    if (show.boxes || item.detection === highlight) drawBox(context, item, pixel);
  }
  context.globalAlpha = 1;
  if (show.labels) {
    const taken = [];
    for (const item of items) if (highlight === null) drawLabel(context, item, pixel, width, taken);
  }
  const chosen = items.find(({ detection }) => detection === highlight);
  if (chosen) drawLabel(context, chosen, pixel, width, null);
}

function drawMask(context, { detection, colour }, pixel, step) {
  const path = pathOf(detection, step);
  const alpha = context.globalAlpha;
  context.globalAlpha = alpha * FILL_ALPHA;
  context.fillStyle = colour;
  context.fill(path);
  context.globalAlpha = alpha;
  strokeTwice(context, colour, pixel, 1.5, () => context.stroke(path));
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

/** A tag above the box; left out where it would cover another, unless `taken` is null. */
function drawLabel(context, { detection, prompt, colour }, pixel, imageWidth, taken) {
  const [x0, y0] = detection.box_xyxy;
  const size = 12 * pixel;
  const pad = 4 * pixel;
  const name = prompt.length > 24 ? `${prompt.slice(0, 23)}…` : prompt;
  const text = `${name} ${detection.score.toFixed(2)}`;
  context.font = `600 ${size}px system-ui, sans-serif`;
  const width = context.measureText(text).width + 2 * pad;
  const height = size + pad * 1.5;
  const left = Math.max(0, Math.min(x0, imageWidth - width));
  const top = Math.max(0, y0 - height);
  if (taken?.some(([x, y, w, h]) => left < x + w && x < left + width && top < y + h && y < top + height)) return;
  taken?.push([left, top, width, height]);
  context.fillStyle = colour;
  context.beginPath();
  context.roundRect(left, top, width, height, 3 * pixel);
  context.fill();
  context.fillStyle = "#fff";
  context.textBaseline = "middle";
  context.fillText(text, left + pad, top + height / 2);
}

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
