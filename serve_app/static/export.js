// Downloads of what is on screen: JSON in the form of a response, the picture, COCO annotations.

import { drawDetections, drawExamples } from "./drawing.js";

/** The answer with the detections that `select` left under `settings`, in the form of a response. */
export function toJson(answer, chosen, settings) {
  const results = answer.results.map(({ prompt, presence }, index) => {
    const detections = chosen[index].map(({ score, box_xyxy, area_px, mask, corrected }) => {
      return { score, box_xyxy, area_px, mask, ...(corrected && { corrected }) };
    });
    return { prompt, presence, num_detections: detections.length, detections };
  });
  const { request_id, image, adapter, timing_ms } = answer;
  return JSON.stringify({ request_id, image, adapter, settings, results, timing_ms }, null, 1);
}

/** A COCO file of one image, with scores and compressed RLE masks; what a person clicked is marked as `corrected`. */
export function toCoco(answer, chosen, fileName) {
  const { width, height } = answer.image;
  const categories = answer.results.map(({ prompt }, index) => ({ id: index + 1, name: prompt }));
  const annotations = chosen.flatMap((detections, index) =>
    detections.map(({ score, box_xyxy: [x0, y0, x1, y1], area_px, mask, corrected }) => ({
      image_id: 1,
      category_id: index + 1,
      segmentation: mask,
      bbox: [x0, y0, x1 - x0, y1 - y0],
      area: area_px,
      iscrowd: 0,
      score,
      ...(corrected && { corrected }),
    })),
  );
  const numbered = annotations.map((annotation, index) => ({ id: index + 1, ...annotation }));
  const images = [{ id: 1, file_name: fileName, width, height }];
  return JSON.stringify({ images, categories, annotations: numbered });
}

/** The image with everything that is drawn on it, as a PNG of the image's own size. */
export async function toPng(picture, { items, ghosts }, boxes, show) {
  const { width, height } = picture;
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  const bitmap = await picture.fullBitmap();
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const pixel = Math.max(1, Math.max(width, height) / 1000);
  drawDetections(context, items, { pixel, width, height, step: 1, show, ghosts });
  drawExamples(context, boxes, pixel);
  return new Promise((resolve, reject) => {
    const done = (blob) => (blob ? resolve(blob) : reject(new Error("The image is too large for this browser.")));
    canvas.toBlob(done, "image/png");
  });
}
