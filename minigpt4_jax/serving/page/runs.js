// For: the answers that are being written now, one for each chat at most, shown or not.
// Not for: how an answer is written (answering.js).

import { fail, write } from "./answering.js";

/** @typedef {import("./chat.js").Chat} Chat */
/** @typedef {import("./chat.js").Turn} Turn */
/**
 * @typedef {{chat: Chat, turn: Turn, controller: AbortController, phase: string, since: number,
 *            done: Promise<void>}} Run
 */

/** So long after a change of the text the chat is kept, in milliseconds. */
const KEEP_MS = 2000;

export class Runs {
  /**
   * @param {{prepare: (run: Run) => Promise<{body: object, key: string}>, changed: (run: Run) => void,
   *          keep: (chat: Chat) => Promise<void>}} app
   */
  constructor(app) {
    this.app = app;
    /** @type {Set<Run>} */
    this.running = new Set();
  }

  /**
   * @param {Chat} chat
   * @returns {Run | undefined}
   */
  of(chat) {
    return [...this.running].find((run) => run.chat === chat);
  }

  /**
   * Stops what is written of a chat, or of all; fulfilled when it is kept.
   * @param {Chat} [chat]
   */
  async end(chat) {
    const ending = [...this.running].filter((run) => !chat || run.chat === chat);
    for (const { controller } of ending) controller.abort();
    await Promise.all(ending.map(({ done }) => done));
  }

  /**
   * @param {Chat} chat
   * @param {Turn} turn
   * @returns {Promise<void>} Fulfilled when the answer is there, or is not to come, and the chat is kept.
   */
  start(chat, turn) {
    const controller = new AbortController();
    const run = { chat, turn, controller, phase: "sent", since: Date.now(), done: Promise.resolve() };
    this.running.add(run);
    run.done = this.write(run);
    return run.done;
  }

  /**
   * Writes a turn's answer and keeps the chat meanwhile.
   * @param {Run} run
   */
  async write(run) {
    const { chat } = run;
    this.app.keep(chat);
    const ticks = setInterval(() => this.app.changed(run), 1000);
    const keeping = setInterval(() => run.phase === "text" && this.app.keep(chat), KEEP_MS);
    await this.answer(run);
    clearInterval(ticks);
    clearInterval(keeping);
    this.running.delete(run);
    this.app.changed(run);
    chat.updated = Date.now();
    await this.app.keep(chat);
  }

  /** @param {Run} run */
  async answer(run) {
    const { turn, controller } = run;
    try {
      const { body, key } = await this.app.prepare(run);
      await write(turn.answer, body, {
        key,
        signal: controller.signal,
        onChange: (phase) => this.enter(run, phase),
      });
    } catch (error) {
      fail(turn.answer, error);
    }
  }

  /**
   * @param {Run} run
   * @param {string} phase
   */
  enter(run, phase) {
    const first = run.phase !== phase;
    if (first) Object.assign(run, { phase, since: Date.now() });
    if (first || phase === "text") this.app.changed(run);
  }
}

/**
 * @param {Run} run
 * @param {{beams: number}} how
 * @returns {string} what an answer without any text waits for
 */
export function waitText({ phase, since }, { beams }) {
  const seconds = Math.round((Date.now() - since) / 1000);
  const elapsed = seconds >= 2 ? ` · ${seconds} s` : "";
  if (phase === "starting") return `The server is not ready yet. The question is sent as soon as it is${elapsed}`;
  if (phase === "begun") return `Reading${elapsed}`;
  if (beams > 1) return `Searching with ${beams} beams${elapsed}`;
  return seconds >= 4 ? `Waiting for the server’s turn${elapsed}` : `Sent${elapsed}`;
}
