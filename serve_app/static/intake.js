// Ways in for an image: the choice of files, drop, paste, and the sample.

import { ServiceError } from "./api.js";
import { byId } from "./elements.js";

const SAMPLE = "static/sample.jpg";

/** `take(file)` is called with each image that a person gives, `onSample(loading)` for the sample. */
export function takeImages({ take, onSample }) {
  const takeFirst = (files, event) => {
    const file = [...(files ?? [])].find(({ type }) => type.startsWith("image/")) ?? files?.[0];
    if (!file) return;
    event.preventDefault();
    take(file);
  };
  byId("file").addEventListener("change", (event) => {
    takeFirst(event.target.files, event);
    event.target.value = ""; // the same file can be chosen again
  });
  for (const id of ["choose", "choose-first"]) byId(id).addEventListener("click", chooseFile);
  for (const id of ["sample", "sample-first"]) byId(id).addEventListener("click", onSample);
  document.addEventListener("paste", (event) => takeFirst(event.clipboardData?.files, event));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("is-dragging");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("is-dragging");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("is-dragging");
    takeFirst(event.dataTransfer?.files, event);
  });
}

export const chooseFile = () => byId("file").click();

export async function loadSample() {
  const response = await fetch(SAMPLE).catch(() => null);
  if (!response?.ok) throw new ServiceError("unreachable", "The sample cannot be loaded from the service.");
  return new File([await response.blob()], "sample.jpg", { type: "image/jpeg" });
}
