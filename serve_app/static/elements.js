// Small functions for the DOM.

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; `colour` sets the custom property --mark. */
export function make(tag, { colour, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  if (colour) element.style.setProperty("--mark", colour);
  element.append(...children);
  return element;
}

/** Change `container`; where the focused button goes away, its place there, or else `fallback`, gets the focus. */
export function keepFocus(container, change, fallback) {
  const buttons = () => [...container.querySelectorAll("button")];
  const place = buttons().indexOf(document.activeElement);
  change();
  if (place < 0 || container.contains(document.activeElement)) return;
  (buttons()[place] ?? buttons().at(-1) ?? fallback).focus();
}

/** Download a file in the browser. */
export function download(name, content, type) {
  const blob = content instanceof Blob ? content : new Blob([content], { type });
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

export function debounce(milliseconds, act) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(act, milliseconds);
  };
}
