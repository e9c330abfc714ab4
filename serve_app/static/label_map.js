// Label maps and masks of classes as coloured pixels.

import { cropOf, decodeSpans } from "./rle.js";

/** The colour of a value in the palette of the service's label maps (Pascal VOC): [red, green, blue]. */
export function colourOf(value) {
  const colour = [0, 0, 0];
  for (let bit = 0; bit < 3; bit++) {
    for (let channel = 0; channel < 3; channel++) {
      colour[channel] |= ((value >> (3 * bit + channel)) & 1) << (7 - bit);
    }
  }
  return colour;
}

/** A canvas of `width` x `height` with the colours of the classes, by `valueOf` of each; transparent where none is. */
export async function coloursOf(answer, valueOf, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = false;
  if (answer.label_png) {
    await drawMap(context, answer.label_png);
    return canvas;
  }
  // Small ones on top of large ones.
  for (const found of answer.classes.toSorted((one, other) => other.area_px - one.area_px)) {
    if (found.mask) drawMask(context, found.mask, colourOf(valueOf(found)));
  }
  return canvas;
}

async function drawMap(context, base64) {
  const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  const { width, height } = context.canvas;
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const pixels = context.getImageData(0, 0, width, height);
  const { data } = pixels;
  for (let i = 0; i < data.length; i += 4) {
    if (!data[i] && !data[i + 1] && !data[i + 2]) data[i + 3] = 0; // the background is black
  }
  context.putImageData(pixels, 0, 0);
}

function drawMask(context, { size, counts }, [red, green, blue]) {
  const crop = cropOf(decodeSpans(counts), size);
  if (!crop) return;
  const pixels = new ImageData(crop.width, crop.height);
  crop.bits.forEach((bit, i) => bit && pixels.data.set([red, green, blue, 255], 4 * i));
  const layer = new OffscreenCanvas(crop.width, crop.height);
  layer.getContext("2d").putImageData(pixels, 0, 0);
  const { width, height } = context.canvas;
  const [across, down] = [width / size[1], height / size[0]];
  context.drawImage(layer, crop.left * across, crop.top * down, crop.width * across, crop.height * down);
}
