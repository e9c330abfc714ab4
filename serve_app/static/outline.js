// Outlines of masks as vector paths: sharp at any zoom, quick to fill, and usable for hit tests.

import { cropOf } from "./rle.js";

const DX = [1, 0, -1, 0]; // right, down, left, up
const DY = [0, 1, 0, -1];

/**
 * Path2D around a mask, holes included, in pixels of the image.
 * It runs through the middles of pixel edges, so corners lose half a pixel and slopes look straight.
 */
export function outlinePath(spans, size, step = 1) {
  const path = new Path2D();
  const crop = cropOf(spans, size, step);
  if (!crop) return path;
  const { left, top, width, height, bits } = crop;
  const isVisited = new Uint8Array(bits.length); // pixels whose upper edge is in a loop
  for (let y = 1; y < height; y++) {
    for (let x = 1; x < width; x++) {
      const pixel = y * width + x;
      if (bits[pixel] && !bits[pixel - width] && !isVisited[pixel]) traceLoop(x, y);
    }
  }
  return path;

  // Corners of pixels are walked with the mask on the right hand.
  function traceLoop(startX, startY) {
    let [x, y, direction] = [startX, startY, 0];
    let isFirst = true;
    const add = (px, py) => {
      path[isFirst ? "moveTo" : "lineTo"]((px + left) * step, (py + top) * step);
      isFirst = false;
    };
    do {
      if (direction === 0) isVisited[y * width + x] = 1;
      x += DX[direction];
      y += DY[direction];
      const turn = turnAt(x, y, direction);
      if (turn) {
        add(x - DX[direction] / 2, y - DY[direction] / 2);
        direction = (direction + turn) & 3;
        add(x + DX[direction] / 2, y + DY[direction] / 2);
      }
    } while (x !== startX || y !== startY || direction !== 0);
    path.closePath();
  }

  /** 1 to turn right, 3 to turn left, 0 to go straight; pixels that only share a corner are separate. */
  function turnAt(x, y, direction) {
    const right = (direction + 1) & 3;
    const ahead = (side) => {
      const column = x + (DX[direction] + DX[side] - 1) / 2;
      const row = y + (DY[direction] + DY[side] - 1) / 2;
      return bits[row * width + column];
    };
    if (!ahead(right)) return 1;
    return ahead((direction + 3) & 3) ? 3 : 0;
  }
}
