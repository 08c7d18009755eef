// For: from a file that was dropped, pasted, picked or photographed to a picture that the server takes.
// Not for: showing it (view.js). A picture goes out byte for byte as it came, unless it is over a limit or of a format
// that the server does not read: then it is drawn anew, and the page says so.

import { newId } from "./chat.js";

/** The defaults of `PicturesConfig` and `LimitsConfig` (serve_config.py); a server may have others and then says so. */
export const LIMITS = {
  count: 8,
  bytes: 20 * 2 ** 20,
  pixels: 50_000_000,
  side: 65_500,
  bodyBytes: 32 * 2 ** 20,
};

/** The longest side of a picture that was drawn anew, in pixels; the model sees 224 to 448. */
const REDRAWN_SIDE = 2048;

/** Formats that the server reads, by how their files begin (each format's own specification). */
const SIGNATURES = [
  ["image/png", /^\x89PNG\r\n\x1a\n/],
  ["image/jpeg", /^\xff\xd8\xff/],
  ["image/gif", /^GIF8[79]a/],
  ["image/webp", /^RIFF[^]{4}WEBP/],
  ["image/bmp", /^BM/],
];

/** @typedef {import("./chat.js").Picture} Picture */

/** A file that cannot be shown to the model; the message is for people. */
export class PictureRefused extends Error {}

/**
 * @param {File} file
 * @param {number} takenBytes of the pictures that the same request carries already
 * @returns {Promise<{picture: Picture, remark: string}>} and what was changed, "" for nothing
 * @throws {PictureRefused}
 */
export async function readPicture(file, takenBytes) {
  const name = file.name || "picture";
  const type = await typeOf(file, name);
  const blob = type ? new Blob([file], { type }) : file;
  const bitmap = await decode(blob, name);
  const { width, height } = bitmap;
  try {
    const reason = whyRedraw({ type, bytes: blob.size, width, height, takenBytes });
    if (!reason) return { picture: { id: newId(), name, type, width, height, blob }, remark: "" };
    const drawn = await redraw(bitmap, name);
    const remark = `${name} ${reason}; it is sent as a JPEG of ${drawn.width} × ${drawn.height}.`;
    return { picture: { id: newId(), name, ...drawn }, remark };
  } finally {
    bitmap.close();
  }
}

/**
 * @param {Blob} blob
 * @param {string} name
 * @returns {Promise<string>} its MIME type by its first bytes; "" for one that the server does not read
 * @throws {PictureRefused} for what cannot be read at all: a folder, a file that is gone or not ours to read
 */
async function typeOf(blob, name) {
  let bytes;
  try {
    bytes = new Uint8Array(await blob.slice(0, 16).arrayBuffer());
  } catch {
    throw new PictureRefused(`${name} cannot be read: it is a folder, or the file is gone or closed to this browser.`);
  }
  const head = String.fromCharCode(...bytes);
  return SIGNATURES.find(([, pattern]) => pattern.test(head))?.[0] ?? "";
}

/**
 * @param {Blob} blob
 * @param {string} name
 */
async function decode(blob, name) {
  try {
    return await createImageBitmap(blob);
  } catch {
    throw new PictureRefused(`${name} is not a picture that this browser can read.`);
  }
}

/** @returns {string} Why a picture cannot go out as it is, "" when it can. */
function whyRedraw({ type, bytes, width, height, takenBytes }) {
  // Base64 makes four characters of three bytes, and the text needs room as well.
  const room = 0.7 * LIMITS.bodyBytes - takenBytes;
  if (!type) return "is of a format that the server does not read";
  if (bytes > LIMITS.bytes) return `has more than ${LIMITS.bytes / 2 ** 20} MiB`;
  if (bytes > room) return "does not fit into one request with the others";
  if (width * height > LIMITS.pixels) return `has more than ${LIMITS.pixels / 1e6} million pixels`;
  if (Math.max(width, height) > LIMITS.side) return `has a side of more than ${LIMITS.side} pixels`;
  return "";
}

/**
 * @param {ImageBitmap} bitmap
 * @param {string} name
 */
async function redraw(bitmap, name) {
  const scale = Math.min(1, REDRAWN_SIDE / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(scale * bitmap.width));
  const height = Math.max(1, Math.round(scale * bitmap.height));
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  // JPEG has no transparency; the server, too, puts such pictures on white.
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
  if (!blob) throw new PictureRefused(`${name} is too large for this browser to make smaller.`);
  return { type: "image/jpeg", width, height, blob };
}

/** Addresses of blobs for <img>, each made once; they live as long as the picture. */
const addresses = new WeakMap();

/**
 * @param {Picture} picture
 * @returns {string} a `blob:` address
 */
export function addressOf(picture) {
  if (!addresses.has(picture.blob)) addresses.set(picture.blob, URL.createObjectURL(picture.blob));
  return addresses.get(picture.blob);
}
