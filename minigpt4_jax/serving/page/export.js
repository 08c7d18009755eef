// For: a chat as a file: Markdown for people, JSON (messages in OpenAI's form) for programs, pictures within.
// Not for: reading such files again.

import { openDialog } from "./dialogs.js";
import { make } from "./dom.js";
import { isTold, picturesOf } from "./chat.js";
import { dataUrl, messagesOf } from "./requests.js";

/** @typedef {import("./chat.js").Chat} Chat */

/**
 * Asks which form, and hands the file to the browser.
 * @param {Chat} chat
 * @param {string} model
 */
export async function offerDownload(chat, model) {
  const kind = await openDialog("export");
  if (kind === "markdown") {
    download(await toMarkdown(chat, model), { name: fileName(chat.title, "md"), type: "text/markdown" });
  }
  if (kind === "json") {
    download(await toJson(chat, model), { name: fileName(chat.title, "json"), type: "application/json" });
  }
}

/**
 * `answers` has one entry for each question, with the place of its message in `messages` (null without any text);
 * `pictures` has one for each picture of `messages`, in their order.
 * @param {Chat} chat
 * @param {string} model
 */
async function toJson(chat, model) {
  // Each turn by itself: a request leaves out questions without an answer, and a file does not.
  const told = await Promise.all(chat.turns.map((turn) => messagesOf([turn])));
  const messages = told.flat();
  const answers = chat.turns.map(({ answer }, at) => ({
    message: isTold(chat.turns[at]) ? told.slice(0, at + 1).flat().length - 1 : null,
    text: answer.text,
    state: answer.state,
    finish_reason: answer.finish,
    tokens: answer.stats?.exact ? answer.stats.tokens : null,
    first_token_ms: answer.stats?.firstMs ?? null,
    total_ms: answer.stats?.totalMs ?? null,
  }));
  const about = { format: "minigpt4-chat", version: 1, model, title: chat.title };
  const times = { created: iso(chat.created), updated: iso(chat.updated) };
  const pictures = picturesOf(chat).map(({ name, type, width, height }) => ({ name, type, width, height }));
  return JSON.stringify({ ...about, ...times, messages, answers, pictures }, null, 2);
}

/**
 * @param {Chat} chat
 * @param {string} model
 */
async function toMarkdown(chat, model) {
  const lines = [`# ${escape(chat.title)}`, "", `${escape(model)}, ${iso(chat.created)}`, ""];
  const sources = [];
  for (const turn of chat.turns) {
    lines.push("## Question", "");
    for (const picture of turn.pictures) {
      sources.push(`[picture-${sources.length + 1}]: ${await dataUrl(picture.blob)}`);
      lines.push(`![${escape(picture.name)}][picture-${sources.length}]`, "");
    }
    if (turn.text) lines.push(quote(turn.text), "");
    lines.push("## Answer", "", turn.answer.text ? quote(turn.answer.text) : "(none)", "");
  }
  return [...lines, ...sources, ""].join("\n");
}

/**
 * What people and models wrote stays text in a viewer that renders HTML and Markdown.
 * @param {string} text
 */
function escape(text) {
  return text.replace(/[\\`*_[\]<>&#|~]/g, (mark) => (mark === "<" ? "&lt;" : mark === "&" ? "&amp;" : `\\${mark}`));
}

/** @param {string} text */
function quote(text) {
  return text
    .split("\n")
    .map((line) => `> ${escape(line)}`.trimEnd())
    .join("\n");
}

/** @param {number} time milliseconds since 1970 */
function iso(time) {
  return new Date(time).toISOString();
}

/**
 * Hands a file to the browser.
 * @param {string} text
 * @param {{name: string, type: string}} file
 */
function download(text, { name, type }) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  make("a", { href: address, download: name }).click();
  // The browser reads it after this task.
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

/**
 * @param {string} title
 * @param {string} ending
 * @returns {string} a name that every file system takes
 */
function fileName(title, ending) {
  const plain = title.normalize("NFKD").replace(/[^a-zA-Z0-9]+/g, "-").replace(/^-+|-+$/g, "");
  return `${plain.toLowerCase() || "chat"}.${ending}`;
}
