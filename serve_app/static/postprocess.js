// Thresholds and suppression as the service does them, on detections that the browser already has.

import { areaPx, decodeSpans, intersectionPx } from "./rle.js";

/** Mask of a detection as spans, read when it is first needed. */
export function spansOf(detection) {
  return (detection.spans ??= decodeSpans(detection.mask.counts));
}

/**
 * The detections of one prompt that are left, by descending score, as in a response without merging.
 * `post` has the service's post-processing fields.
 */
export function select(prompt, detections, post) {
  const own = post.prompt_thresholds;
  const threshold = Object.hasOwn(own, prompt) ? own[prompt] : post.threshold;
  let kept = detections.filter((detection) => detection.score >= threshold);
  if (post.nms !== "none" && post.nms_iou < 1) kept = suppress(kept, post.nms_iou, post.nms === "mask" ? maskIou : boxIou);
  return kept.slice(0, post.max_detections);
}

function boxIou({ box_xyxy: a }, { box_xyxy: b }) {
  const width = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  const height = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
  if (width <= 0 || height <= 0) return 0;
  const both = width * height;
  return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both);
}

const knownOverlaps = new WeakMap(); // detection -> detection -> IoU: a slider asks again and again

function maskIou(a, b) {
  let known = knownOverlaps.get(a);
  if (!known) knownOverlaps.set(a, (known = new WeakMap()));
  if (!known.has(b)) {
    const both = intersectionPx(spansOf(a), spansOf(b));
    known.set(b, both ? both / (areaPx(spansOf(a)) + areaPx(spansOf(b)) - both) : 0);
  }
  return known.get(b);
}

/** Greedy: a detection that overlaps a better kept one by more than `iou` goes. */
function suppress(detections, iou, overlap) {
  const kept = [];
  for (const detection of detections) {
    if (!kept.some((better) => overlap(better, detection) > iou)) kept.push(detection);
  }
  return kept;
}
