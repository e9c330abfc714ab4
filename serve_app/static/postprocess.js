// Post-processing as the service does it, on detections that the browser already has.

import { areaPx, boundsOf, decodeSpans, encodeSpans, intersectionPx, union } from "./rle.js";

/** Mask of a detection as spans, read when it is first needed. */
export function spansOf(detection) {
  return (detection.spans ??= decodeSpans(detection.mask.counts));
}

/**
 * The detections of one prompt that are left, by descending score, as in a response.
 * `post` has the service's post-processing fields. Masks decide after merging in any case.
 */
export function select(prompt, detections, post) {
  const own = post.prompt_thresholds;
  const threshold = Object.hasOwn(own, prompt) ? own[prompt] : post.threshold;
  let kept = detections.filter((detection) => detection.score >= threshold);
  if (post.merge) kept = mergeOverlapping(kept, post.merge_iou);
  if (post.nms !== "none" && post.nms_iou < 1) {
    kept = suppress(kept, post.nms_iou, post.merge || post.nms === "mask" ? maskIou : boxIou);
  }
  return kept.slice(0, post.max_detections);
}

export function boxIou({ box_xyxy: a }, { box_xyxy: b }) {
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

/** Detections whose masks overlap by `mergeIou`, transitively, become one under the best one's score. */
function mergeOverlapping(detections, mergeIou) {
  const left = new Set(detections);
  const merged = [];
  for (const best of detections) {
    if (!left.delete(best)) continue;
    const group = [best];
    for (const member of group) {
      for (const other of left) {
        if (maskIou(member, other) >= mergeIou) {
          left.delete(other);
          group.push(other);
        }
      }
    }
    merged.push(group.length > 1 ? unionOf(best, group) : best);
  }
  return merged;
}

const knownUnions = new WeakMap(); // best detection -> its unions by number of members

function unionOf(best, group) {
  const known = knownUnions.get(best);
  if (known?.group.length === group.length && known.group.every((member, i) => member === group[i])) return known.made;
  const spans = group.map(spansOf).reduce(union);
  const { size } = best.mask;
  const made = {
    ...best,
    spans,
    paths: undefined,
    box_xyxy: boundsOf(spans, size[0]) ?? best.box_xyxy,
    area_px: areaPx(spans),
    mask: { size, counts: encodeSpans(spans, size) },
  };
  knownUnions.set(best, { group, made });
  return made;
}
