// Clicks and the box of the object in hand, on a canvas whose context is scaled to pixels of the image.

const [IN, OUT] = ["#15803d", "#b42318"];

/** `marks` are { clicks: [{ x, y, label }], box }; `pixel` is the width of a screen pixel in pixels of the image. */
export function drawClickMarks(context, { clicks, box }, pixel) {
  if (box) {
    const [x0, y0, x1, y1] = box;
    context.setLineDash([6 * pixel, 4 * pixel]);
    for (const [colour, width] of [["#fff", 3.5], [IN, 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = width * pixel;
      context.strokeRect(x0, y0, x1 - x0, y1 - y0);
    }
    context.setLineDash([]);
  }
  for (const { x, y, label } of clicks) {
    const arm = 3.5 * pixel;
    context.beginPath();
    context.arc(x + 0.5, y + 0.5, 7 * pixel, 0, 2 * Math.PI);
    context.fillStyle = label ? IN : OUT;
    context.fill();
    context.strokeStyle = "#fff";
    context.lineWidth = 2 * pixel;
    context.stroke();
    context.beginPath();
    context.moveTo(x + 0.5 - arm, y + 0.5);
    context.lineTo(x + 0.5 + arm, y + 0.5);
    if (label) {
      context.moveTo(x + 0.5, y + 0.5 - arm);
      context.lineTo(x + 0.5, y + 0.5 + arm);
    }
    context.stroke();
  }
}
