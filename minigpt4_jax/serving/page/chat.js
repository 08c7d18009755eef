// For: what a chat is, and the changes it goes through. Pure: no document, no storage, no network.
// Not for: keeping it (store.js) nor showing it (view.js).

/**
 * @typedef {{id: string, name: string, type: string, width: number, height: number, blob: Blob}} Picture
 * @typedef {{firstMs: number | null, totalMs: number, tokens: number, exact: boolean, perSecond: number | null,
 *            used: number | null}} Stats
 *   Times in milliseconds since the question was sent; `used`: tokens of the context that question and answer take.
 * @typedef {{text: string, state: "writing" | "done" | "stopped" | "failed", finish: string | null,
 *            stats: Stats | null, failure: {status: number, code: string | null, param?: string | null,
 *            message: string, retryAt: number | null} | null}} Answer
 * @typedef {{id: string, text: string, pictures: Picture[], answer: Answer, before?: Answer | null}} Turn
 *   `before`: the answer with a text that the present one replaces with its first word.
 * @typedef {{turn: string, text: string, pictures: Picture[], failure: Answer["failure"]}} Edit
 *   A turn's question in other words, to which no answer has begun yet.
 * @typedef {{version: 1, id: string, title: string, named: boolean, created: number, updated: number,
 *            revision: number, turns: Turn[], edit: Edit | null}} Chat
 *   `revision` counts what was kept: two tabs that write the same chat notice each other by it.
 */

/** @returns {string} 128 random bits. (`crypto.randomUUID` is missing on plain http from another machine.) */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** @returns {Chat} */
export function newChat() {
  const now = Date.now();
  return {
    version: 1,
    id: newId(),
    title: "New chat",
    named: false,
    created: now,
    updated: now,
    revision: 0,
    turns: [],
    edit: null,
  };
}

/** @returns {Answer} */
export function newAnswer() {
  return { text: "", state: "writing", finish: null, stats: null, failure: null };
}

/**
 * @param {{text: string, pictures: Picture[]}} question
 * @returns {Turn} It is part of no chat yet.
 */
export function newTurn({ text, pictures }) {
  return { id: newId(), text, pictures, answer: newAnswer() };
}

/**
 * Puts a turn at a place of the chat: what came after it is gone.
 * @param {Chat} chat
 * @param {number} at its index; the number of turns adds one
 * @param {Turn} turn
 */
export function place(chat, at, turn) {
  chat.turns.splice(at, chat.turns.length, turn);
  if (!chat.turns.some(({ id }) => id === chat.edit?.turn)) chat.edit = null;
  if (at === 0 && !chat.named) chat.title = titleOf(turn.text, turn.pictures);
}

/**
 * @param {string} text
 * @param {Picture[]} pictures
 */
function titleOf(text, pictures) {
  const line = text.trim().split("\n")[0] || pictures[0]?.name || "New chat";
  return line.length > 48 ? `${line.slice(0, 47)}…` : line;
}

/**
 * Whether the model is told of a turn. One without any answer would leave two questions in a row.
 * @param {Turn} turn
 */
export function isTold(turn) {
  return turn.answer.text !== "";
}

/** @param {Chat} chat every picture of its turns */
export function picturesOf(chat) {
  return chat.turns.flatMap((turn) => turn.pictures);
}
