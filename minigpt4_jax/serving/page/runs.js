// For: the answers that are being written now, one for each chat at most, shown or not.
// Not for: how an answer is written (answering.js).

import { fail, write } from "./answering.js";
import { newAnswer, place } from "./chat.js";
import { announce } from "./dom.js";

/** @typedef {import("./chat.js").Chat} Chat */
/** @typedef {import("./chat.js").Turn} Turn */
/** @typedef {import("./chat.js").Answer} Answer */
/**
 * @typedef {{chat: Chat, turn: Turn, at: number | null, before: Answer | null, restored: boolean,
 *            controller: AbortController, phase: string, since: number, waiting: number, done: Promise<void>}} Run
 *   `at`: where the turn is put into the chat with the first word of its answer; null when it stands there.
 *   `before`: the answer with a text that this one replaces; `restored`: it is back, for no new one came.
 *   `waiting`: requests that waited for a slot when the server last said so.
 */

/** So long after a change of the text the chat is kept, in milliseconds. */
const KEEP_MS = 2000;

export class Runs {
  /**
   * @param {{prepare: (run: Run) => Promise<{body: object, key: string}>, changed: (run: Run) => void,
   *          keep: (chat: Chat) => Promise<void>, forgetModel: () => void}} app
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
   * @param {Chat} chat
   * @returns {Turn[]} Its turns as people see them: with an edited question that waits for its first word.
   */
  turnsOf(chat) {
    const run = this.of(chat);
    return run && run.at !== null ? [...chat.turns.slice(0, run.at), run.turn] : chat.turns;
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
   * Begins a new answer to a turn.
   * @param {Chat} chat
   * @param {Turn} turn
   * @param {{at?: number | null}} [how] `at`: as in `Run`, for a turn of `chat.edit`
   * @returns {Run} `done` is fulfilled when the answer is there, or is not to come, and the chat is kept.
   */
  start(chat, turn, { at = null } = {}) {
    const before = turn.answer.text === "" ? null : turn.answer;
    Object.assign(turn, { before, answer: newAnswer() });
    const now = { phase: "sent", since: Date.now(), waiting: 0, restored: false };
    const run = { chat, turn, at, before, ...now, controller: new AbortController(), done: Promise.resolve() };
    this.running.add(run);
    run.done = this.write(run);
    return run;
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
    this.restore(run);
    if (run.turn.answer.state === "done") this.settle(run);
    if (run.at !== null) chat.edit = { ...chat.edit, failure: run.turn.answer.failure };
    this.running.delete(run);
    this.app.changed(run);
    chat.updated = Date.now();
    await this.app.keep(chat);
  }

  /**
   * Gives an answer back whose successor ended before its first word.
   * @param {Run} run
   */
  restore(run) {
    const { state, text, failure } = run.turn.answer;
    run.restored = run.before !== null && text === "" && state !== "done";
    if (run.restored) run.turn.answer = { ...run.before, failure: failure ?? run.before.failure };
    run.turn.before = null;
  }

  /**
   * The answer begins: it takes the place of the one before, and the turn its place in the chat.
   * @param {Run} run
   */
  settle(run) {
    run.turn.before = null;
    if (run.at === null) return;
    place(run.chat, run.at, run.turn);
    run.at = null;
    this.app.keep(run.chat);
  }

  /** @param {Run} run */
  async answer(run) {
    await this.attempt(run);
    if (run.turn.answer.failure?.code !== "model_not_found") return;
    // The server came back with another model since it was asked for its name.
    this.app.forgetModel();
    run.turn.answer = newAnswer();
    await this.attempt(run);
  }

  /** @param {Run} run */
  async attempt(run) {
    const { answer } = run.turn;
    const { signal } = run.controller;
    try {
      const { body, key } = await this.app.prepare(run);
      await write(answer, body, { key, signal, onChange: (phase, waiting) => this.enter(run, phase, waiting) });
    } catch (error) {
      if (signal.aborted) answer.state = "stopped";
      else fail(answer, error);
    }
  }

  /**
   * @param {Run} run
   * @param {string} phase
   * @param {number} [waiting]
   */
  enter(run, phase, waiting = 0) {
    const first = run.phase !== phase;
    if (first) Object.assign(run, { phase, waiting, since: Date.now() });
    if (phase === "text") this.settle(run);
    if (first || phase === "text") this.app.changed(run);
    if (first && (phase === "starting" || waiting > 0)) announce(waitText(run, { beams: 1 }));
  }
}

/**
 * @param {Run} run
 * @param {{beams: number}} how
 * @returns {string} what an answer without any text waits for
 */
export function waitText({ phase, since, waiting }, { beams }) {
  const seconds = Math.round((Date.now() - since) / 1000);
  const elapsed = seconds >= 2 ? ` · ${seconds} s` : "";
  if (phase === "starting") return `The server is not ready yet. The question is sent as soon as it is${elapsed}`;
  if (phase === "queued" && waiting > 0) {
    return `The server is busy: ${waiting === 1 ? "1 request waited" : `${waiting} requests waited`} for a turn${elapsed}`;
  }
  if (phase === "begun" || phase === "queued") return `Reading${elapsed}`;
  if (beams > 1) return `Searching with ${beams} beams${elapsed}`;
  return seconds >= 4 ? `Waiting for the server’s turn${elapsed}` : `Sent${elapsed}`;
}
