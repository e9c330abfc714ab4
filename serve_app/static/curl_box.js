// The popover with the request of a panel as a curl command.

import { apiKey } from "./api.js";
import { multipartOf } from "./curl.js";
import { byId } from "./elements.js";

/** Show the command that sends `request` with the image of this file name. */
export function showCurl(fileName, { boxes, ...request }) {
  const url = new URL("v1/segment", document.baseURI).href;
  const needsKey = Boolean(apiKey.get());
  const shown = boxes.length ? { ...request, boxes } : request;
  byId("curl-text").textContent = multipartOf(url, fileName, shown, needsKey);
  byId("curl-key").hidden = !needsKey;
  byId("curl-copy").textContent = "Copy";
  byId("curl-box").showPopover();
}

byId("curl-copy").addEventListener("click", async () => {
  const text = byId("curl-text");
  getSelection().selectAllChildren(text);
  // Pages of other hosts without TLS have no clipboard: the selection is copied the old way.
  if (navigator.clipboard) await navigator.clipboard.writeText(text.textContent);
  else document.execCommand("copy");
  byId("curl-copy").textContent = "Copied";
});
