// For: from a chat and the settings to the body of a request, in OpenAI's form.
// Not for: sending it (api.js) nor showing it (code.js).

import { isTold } from "./chat.js";

/** @typedef {import("./chat.js").Turn} Turn */

/**
 * @param {string} model
 * @param {Turn[]} turns the last one is asked
 * @param {Record<string, number>} settings those that were changed
 */
export async function requestOf(model, turns, settings) {
  const body = { model, messages: await messagesOf(turns), ...settings };
  // Beams give their best answer whole, when all of them are done, and draw nothing, whatever the server's own is.
  if ((settings.num_beams ?? 1) > 1) return { ...body, temperature: settings.temperature ?? 0 };
  return { ...body, stream: true, stream_options: { include_usage: true } };
}

/** @param {Turn[]} turns */
export async function messagesOf(turns) {
  const messages = [];
  for (const turn of turns) {
    const last = turn === turns.at(-1);
    if (!last && !isTold(turn)) continue;
    messages.push({ role: "user", content: await contentOf(turn) });
    if (isTold(turn)) messages.push({ role: "assistant", content: turn.answer.text });
  }
  return messages;
}

/** @param {Turn} turn */
async function contentOf(turn) {
  if (turn.pictures.length === 0) return turn.text;
  const pictures = await Promise.all(turn.pictures.map((picture) => dataUrl(picture.blob)));
  const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  return turn.text ? [...parts, { type: "text", text: turn.text }] : parts;
}

/**
 * @param {Blob} blob
 * @returns {Promise<string>} `data:image/png;base64,…`
 */
export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(/** @type {string} */ (reader.result));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
