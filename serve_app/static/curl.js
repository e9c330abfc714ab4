// Requests as curl commands that can be pasted into a shell.

const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const lines = (...parts) => parts.join(" \\\n  ");

/** curl with the API key, if one is needed, from the shell's variable KEY. */
const curl = (needsKey, options = "") => `curl${options}${needsKey ? ' -H "X-API-Key: $KEY"' : ""}`;

export const getOf = (url, needsKey) => `${curl(needsKey)} ${quote(url)}`;

/** Multipart: an image file and, unless it is null, the request as JSON. */
export function multipartOf(url, fileName, request, needsKey) {
  const name = /[",;\\]/.test(fileName) ? `"${fileName.replaceAll(/["\\]/g, "\\$&")}"` : fileName;
  const parts = [`-F ${quote(`image=@${name}`)}`];
  if (request) parts.push(`-F ${quote(`request=${JSON.stringify(request)}`)}`);
  return lines(`${curl(needsKey)} ${quote(url)}`, ...parts);
}

/** The image as the body; the request as query parameters. */
export function rawOf(url, fileName, request, needsKey) {
  const query = new URLSearchParams();
  for (const [field, value] of Object.entries(request ?? {})) {
    for (const one of [value].flat()) query.append(field, one);
  }
  const address = request ? `${url}?${query}` : url;
  const body = `--data-binary ${quote(`@${fileName}`)}`;
  return lines(`${curl(needsKey)} ${quote(address)}`, `-H 'Content-Type: image/jpeg' ${body}`);
}

/** An upload, then the request about the uploaded image. */
export function uploadedOf(url, uploadUrl, fileName, request, needsKey) {
  const upload = `${curl(needsKey, " -s")} -F ${quote(`image=@${fileName}`)} ${quote(uploadUrl)}`;
  const body = quote(JSON.stringify({ ...request, image_id: "ID" })).replace("ID", `'"$id"'`);
  const ask = lines(`${curl(needsKey)} ${quote(url)}`, `-H 'Content-Type: application/json' -d ${body}`);
  return `id=$(${upload} | grep -o 'img_[0-9a-f]*')\n${ask}`;
}
