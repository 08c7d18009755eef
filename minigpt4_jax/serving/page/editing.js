// For: a question that is edited: what is in the box meanwhile, and the edit's return when no answer to it began.
// Not for: the box itself (composer.js) nor asking (app.js, runs.js).

import { byId, clearNote, note } from "./dom.js";
import { openDialog } from "./dialogs.js";
import { troubleOf } from "./trouble.js";

/** @typedef {import("./chat.js").Turn} Turn */
/** @typedef {{text: string, pictures: import("./chat.js").Picture[]}} Question */
/**
 * @typedef {{chat: import("./chat.js").Chat, composer: import("./composer.js").Composer,
 *            runs: import("./runs.js").Runs, library: import("./library.js").Library,
 *            keep(chat: import("./chat.js").Chat): Promise<void>, send(): void,
 *            enterKey(then: () => void): Promise<void>}} App
 */

export class Editing {
  /** @param {App} app */
  constructor(app) {
    this.app = app;
    /** Whose question is in the box. @type {Turn | null} */
    this.turn = null;
    /** What was in the box before, and comes back. @type {Question | null} */
    this.draft = null;
  }

  /** @param {Turn} turn */
  begin(turn) {
    const { chat, composer, runs } = this.app;
    if (runs.of(chat)) return;
    if (composer.reading > 0) {
      note("A picture is still being read for the question in the box. Edit this one when it is there.");
      return;
    }
    this.open(turn);
    composer.focus();
  }

  /**
   * Puts a turn's question into the box, or the edit of it that had no answer.
   * @param {Turn} turn
   */
  open(turn) {
    const { chat, composer } = this.app;
    this.draft ??= composer.question;
    this.turn = turn;
    const at = chat.turns.indexOf(turn);
    const after = chat.turns.length - at - 1;
    const gone = after > 0 ? `, and the ${after === 1 ? "question" : `${after} questions`} after it` : "";
    byId("editing-text").textContent = `Editing question ${at + 1}. Sending replaces its answer${gone}.`;
    byId("editing").hidden = false;
    composer.set(chat.edit?.turn === turn.id ? chat.edit : turn);
  }

  /** Gives the box back to what was in it before. */
  end() {
    const { draft } = this;
    this.turn = null;
    this.draft = null;
    byId("editing").hidden = true;
    if (draft) this.app.composer.set(draft);
  }

  /** Leaves the edited question as it was; what another tab did meanwhile is shown now. */
  async cancel() {
    const { app, turn } = this;
    const { chat } = app;
    const hadNoAnswer = chat.edit?.turn === turn.id;
    if (hadNoAnswer) {
      // Before anything is waited for: the same question may be edited again at once.
      chat.edit = null;
      clearNote();
    }
    this.end();
    app.composer.focus();
    await app.library.changedElsewhere(chat.id);
    if (!hadNoAnswer || app.chat !== chat) return;
    // What another tab kept meanwhile has the edit still.
    if (chat.edit?.turn === turn.id && !app.runs.of(chat)) chat.edit = null;
    await app.keep(chat);
  }

  /** Shows the chat's edit to which no answer began, if there is one. A draft in the box is not pushed out of it. */
  bringBack() {
    const { chat, composer, runs } = this.app;
    const turn = chat.turns.find(({ id }) => id === chat.edit?.turn);
    if (!turn || runs.of(chat)) return;
    const why = whyNoAnswer(chat.edit.failure);
    if (!composer.empty) {
      note(`${why} The chat is as it was.`, { label: "Edit the question again", act: () => this.begin(turn) });
      return;
    }
    this.open(turn);
    if (document.activeElement === document.body) composer.focus();
    note(`${why} The chat is as it was, and your edit is in the box.`, this.remedyOf(chat.edit.failure));
  }

  /** @param {import("./chat.js").Answer["failure"]} failure */
  remedyOf(failure) {
    const actions = failure ? troubleOf(failure).actions : [];
    if (actions.includes("settings")) return { label: "Open the settings", act: () => openDialog("settings") };
    if (actions.includes("key")) return { label: "Enter a key", act: () => this.app.enterKey(() => this.app.send()) };
    return undefined;
  }
}

/** @param {import("./chat.js").Answer["failure"]} failure */
function whyNoAnswer(failure) {
  if (!failure) return "No answer to your edit had begun.";
  const { title, text } = troubleOf(failure);
  const seconds = Math.ceil(((failure.retryAt ?? 0) - Date.now()) / 1000);
  return `${title}: ${text}${seconds > 0 ? ` It can be asked again in ${seconds} s.` : ""}`;
}
