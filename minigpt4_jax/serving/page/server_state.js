// For: what is known of the server: its model, its context, and whether it takes questions; said in the header.
// Not for: refusals of a question (trouble.js).

import { ApiFailure, isReady } from "./api.js";
import { byId } from "./dom.js";

const POLL_MS = 2000;

export class ServerState {
  /**
   * @param {(signal?: AbortSignal) => Promise<{id: string, max_model_len?: number}[]>} listModels
   * @param {() => void} changed called when the model is known
   */
  constructor(listModels, changed) {
    this.listModels = listModels;
    this.changed = changed;
    this.name = "";
    /** Whether the name holds: a server that was away may come back with another model. */
    this.known = false;
    /** Tokens of question and answer together; 0 while unknown. */
    this.context = 0;
    this.watching = false;
  }

  /** Makes the next question ask for the model's name first. */
  forget() {
    this.known = false;
  }

  /**
   * @param {AbortSignal} [signal] stops asking for it
   * @returns {Promise<string>} the model's name
   * @throws {ApiFailure}
   */
  async model(signal) {
    if (!this.known) {
      const [first] = await this.listModels(signal);
      this.known = true;
      this.name = first.id;
      this.context = first.max_model_len ?? 0;
      byId("model-name").textContent = first.id;
      this.changed();
    }
    return this.name;
  }

  /** Looks until the server is ready and its model known, and says what it sees. */
  async watch() {
    this.forget();
    if (this.watching) return;
    this.watching = true;
    while (!(await this.look())) await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    this.watching = false;
  }

  /** @returns {Promise<boolean>} whether there is nothing more to wait for */
  async look() {
    try {
      await this.model();
    } catch (error) {
      if (!(error instanceof ApiFailure)) throw error;
      if (error.status === 401) return this.say("Key needed", { done: true });
      return this.say(error.status === 0 ? "No connection" : "Starting…", { done: false });
    }
    if (await isReady()) return this.say("", { done: true });
    return this.say("Not ready…", { done: false });
  }

  /**
   * @param {string} text
   * @param {{done: boolean}} how
   */
  say(text, { done }) {
    const place = byId("server-state");
    if (place.textContent !== text) place.textContent = text;
    return done;
  }
}
