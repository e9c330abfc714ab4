// Controls of what is drawn and how: tool, zoom, masks, boxes, scores, fill. They change the scene only.

import { byId } from "./elements.js";

/** `scene` as of `Stage`; `draw()` draws all panels; `stage()` is the stage that is seen; `onTool()` follows the tool. */
export function wireLooks(scene, { draw, stage, onTool }) {
  for (const name of ["masks", "boxes", "labels"]) {
    byId(`show-${name}`).addEventListener("change", (event) => {
      scene.show[name] = event.target.checked;
      draw();
    });
  }
  const showFill = () => (byId("fill-value").textContent = `${Math.round(scene.show.fill * 100)} %`);
  byId("fill").addEventListener("input", (event) => {
    scene.show.fill = event.target.valueAsNumber;
    showFill();
    draw();
  });
  byId("tool").addEventListener("change", (event) => {
    scene.tool = event.target.value;
    byId("box-help").hidden = !["positive", "negative"].includes(scene.tool);
    onTool();
    draw();
  });
  byId("zoom-in").addEventListener("click", () => stage().zoomBy(1.5));
  byId("zoom-out").addEventListener("click", () => stage().zoomBy(1 / 1.5));
  byId("zoom-fit").addEventListener("click", () => stage().zoomBy(1 / scene.viewport.zoom));
  byId("settings-open").addEventListener("click", ({ currentTarget }) => {
    currentTarget.ariaExpanded = String(byId("settings").classList.toggle("is-open"));
  });
  showFill();
}
