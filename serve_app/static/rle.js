// COCO run-length masks as spans: ascending [start, end, start, end, ...] positions of ones in column-major order.

/** Spans of a compressed RLE string (5 bits a character, differences from the run before the last). */
export function decodeSpans(counts) {
  const runs = [];
  let value = 0;
  let shift = 0;
  for (let i = 0; i < counts.length; i++) {
    const bits = counts.charCodeAt(i) - 48;
    value |= (bits & 31) << shift;
    shift += 5;
    if (bits & 32) continue;
    if (bits & 16 && shift < 32) value |= -1 << shift;
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
    value = shift = 0;
  }
  const spans = new Uint32Array(runs.length & ~1);
  let position = 0;
  for (let i = 0; i < spans.length; i++) spans[i] = position += runs[i];
  return spans;
}

/** Tight box [x0, y0, x1, y1] in pixels; null for an empty mask. */
function boundsOf(spans, height) {
  let [x0, y0, x1, y1] = [Infinity, Infinity, -Infinity, -Infinity];
  for (let i = 0; i < spans.length; i += 2) {
    const [start, last] = [spans[i], spans[i + 1] - 1];
    if (last < start) continue;
    const [column, lastColumn] = [Math.floor(start / height), Math.floor(last / height)];
    x0 = Math.min(x0, column);
    x1 = Math.max(x1, lastColumn + 1);
    y0 = Math.min(y0, column === lastColumn ? start % height : 0);
    y1 = Math.max(y1, column === lastColumn ? (last % height) + 1 : height);
  }
  return x1 > x0 ? [x0, y0, x1, y1] : null;
}

/**
 * The mask in its tight box with a border of one zero; a square of `step` pixels that holds any of it becomes a 1.
 * Returns { left, top, width, height, bits }: bits are rows of 0 and 1; left and top are in steps. Null if empty.
 */
export function cropOf(spans, [height], step = 1) {
  const bounds = boundsOf(spans, height);
  if (!bounds) return null;
  const [left, top] = [Math.floor(bounds[0] / step) - 1, Math.floor(bounds[1] / step) - 1];
  const cropWidth = Math.ceil(bounds[2] / step) - left + 1;
  const cropHeight = Math.ceil(bounds[3] / step) - top + 1;
  const bits = new Uint8Array(cropWidth * cropHeight);
  for (let i = 0; i < spans.length; i += 2) {
    for (let start = spans[i]; start < spans[i + 1]; ) {
      const column = Math.floor(start / height);
      const end = Math.min(spans[i + 1], (column + 1) * height);
      const x = Math.floor(column / step) - left;
      const beyond = Math.ceil((end - column * height) / step);
      for (let y = Math.floor((start % height) / step); y < beyond; y++) bits[(y - top) * cropWidth + x] = 1;
      start = end;
    }
  }
  return { left, top, width: cropWidth, height: cropHeight, bits };
}
