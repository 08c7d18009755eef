// For: wiring: which chat is shown, what is asked, and what each button does.
// Not for: how a part works; each has its module.

import { listModels } from "./api.js";
import { isTold, newChat, newTurn, picturesOf, place } from "./chat.js";
import { showCode } from "./code.js";
import { Composer } from "./composer.js";
import { openDialog } from "./dialogs.js";
import { announce, byId, clearNote, note } from "./dom.js";
import { Editing } from "./editing.js";
import { startExamples } from "./examples.js";
import { offerDownload } from "./export.js";
import { openHistory } from "./history.js";
import { askForKey, currentKey } from "./key.js";
import { Library } from "./library.js";
import { readPicture } from "./pictures.js";
import { requestOf } from "./requests.js";
import { Runs, waitText } from "./runs.js";
import { ServerState } from "./server_state.js";
import { FIELDS, startSettings } from "./settings.js";
import { closeSidebar, startSidebar } from "./sidebar.js";
import { startTheme } from "./theme.js";
import { troubleOf } from "./trouble.js";
import { makeTurn, NO_NEW_ANSWER, showAnswer, showWait } from "./view.js";

/** @typedef {import("./chat.js").Chat} Chat */
/** @typedef {import("./chat.js").Turn} Turn */

const mouse = matchMedia("(pointer: fine)");

class App {
  /** @param {import("./history.js").History} history */
  constructor(history) {
    this.history = history;
    this.chat = newChat();
    /** @type {import("./code.js").Asked | null} */
    this.asked = null;
    /** @type {Record<string, number>} */
    this.settings = {};
    /** Remarks of this sitting beside answers, by the turn's id. @type {Map<string, string>} */
    this.remarks = new Map();
    /** Whether the conversation is scrolled to its end, and follows what is written. */
    this.atEnd = false;
    const models = (signal) => listModels({ key: currentKey(), signal });
    this.server = new ServerState(models, () => this.showContext());
    this.runs = new Runs({
      prepare: (run) => this.prepare(run),
      changed: (run) => this.runChanged(run),
      keep: (chat) => this.keep(chat),
      forgetModel: () => this.server.forget(),
    });
    this.library = new Library(this);
    this.composer = new Composer({ send: () => this.send(), others: () => picturesOf(this.chatBefore()) });
    this.editing = new Editing(this);
    this.acts = {
      edit: (turn) => this.editing.begin(turn),
      again: (turn) => this.again(turn),
      newChat: () => this.library.begin(),
      key: (turn) => this.enterKey(() => this.again(turn)),
      settings: () => openDialog("settings"),
    };
  }

  // --- asking ---

  /** The turns of the chat that is shown, as they are shown. */
  get turns() {
    return this.runs.turnsOf(this.chat);
  }

  /** The part of the chat that stays before the question that is being written. */
  chatBefore() {
    const end = this.editing.turn ? this.turns.indexOf(this.editing.turn) : this.turns.length;
    return { ...this.chat, turns: this.turns.slice(0, end).filter(isTold) };
  }

  send() {
    if (!this.composer.ready) return;
    if (this.runs.of(this.chat)) {
      note("An answer is being written. Stop it first, or wait.");
      return;
    }
    const { chat } = this;
    const edited = this.editing.turn;
    const at = edited ? chat.turns.indexOf(edited) : chat.turns.length;
    const turn = newTurn(this.composer.question);
    // Answers that the new question replaces stay until it has one itself.
    const replaces = chat.turns.slice(at).some(isTold);
    if (replaces) chat.edit = { turn: edited.id, text: turn.text, pictures: turn.pictures, failure: null };
    else place(chat, at, turn);
    if (edited) this.editing.end();
    else this.composer.set({ text: "", pictures: [] });
    clearNote();
    this.run(turn, { at: replaces ? at : null });
  }

  /**
   * @param {Turn} turn
   * @param {{at?: number | null}} [how] as `Runs.start` takes it
   */
  async run(turn, how) {
    const { chat } = this;
    this.remarks.delete(turn.id);
    const run = this.runs.start(chat, turn, how);
    this.render();
    this.toEnd();
    this.focusAfterSending(turn);
    await run.done;
    if (!run.restored && run.before?.text === turn.answer.text && !this.settings.temperature) {
      this.remarks.set(turn.id, "The same answer again. A temperature above 0, in the settings, brings others.");
      if (this.chat === chat) this.update(turn);
    }
    if (turn.answer.failure?.status !== 401 || this.chat !== chat) return;
    if (run.at === null) await this.enterKey(() => this.again(turn));
    else if (this.editing.turn) await this.enterKey(() => this.send());
  }

  /** @param {Turn} turn whose answer is awaited */
  focusAfterSending(turn) {
    // On a touch screen the question's focus would bring the keyboard up, and the pressed button is gone.
    if (mouse.matches) this.composer.focus();
    else if (document.activeElement === document.body || document.activeElement.getClientRects().length === 0) {
      this.elementOf(turn)?.focus();
    }
  }

  /** @param {Turn} turn */
  elementOf(turn) {
    return /** @type {HTMLElement | null} */ (document.querySelector(`[data-turn="${turn.id}"]`));
  }

  /** @param {Turn} turn the last one: another tab may have gone on meanwhile */
  again(turn) {
    if (!this.runs.of(this.chat) && this.chat.turns.at(-1) === turn) this.run(turn);
  }

  /** @param {() => void} then what a new key is tried with */
  async enterKey(then) {
    if (await askForKey("This server asks for a key. It goes to this server only.")) {
      this.server.watch();
      then();
    }
  }

  /** @param {import("./runs.js").Run} run */
  async prepare({ chat, turn, controller }) {
    const model = await this.server.model(controller.signal);
    const turns = this.runs.turnsOf(chat);
    const body = await requestOf(model, turns, this.settings);
    const told = turns.filter((each) => each === turn || isTold(each));
    this.asked = { body, names: told.flatMap(({ pictures }) => pictures.map(({ name }) => name)) };
    return { body, key: currentKey() };
  }

  /** @param {import("./runs.js").Run} run */
  runChanged(run) {
    const { chat, turn, restored } = run;
    const running = this.runs.running.has(run);
    if (restored) this.remarks.set(turn.id, NO_NEW_ANSWER);
    if (chat === this.chat) this.update(turn);
    if (running) return;
    const { failure, state } = turn.answer;
    if (failure && (failure.status === 0 || failure.status === 503)) this.server.watch();
    if (run.at !== null && chat === this.chat) {
      this.render();
      this.editing.bringBack();
    } else if (failure) announce(`${troubleOf(failure).title}. ${failure.message}`);
    else if (restored) announce("Stopped. The answer from before is back.");
    else announce(`${state === "stopped" ? "Stopped" : "Answer"}: ${turn.answer.text}`);
    if (chat === this.chat) this.showButtons();
  }

  stop() {
    this.runs.of(this.chat)?.controller.abort();
  }

  /**
   * Asks without the box for questions, where a draft may be.
   * @param {Promise<File>} loading
   * @param {string} text
   */
  async askExample(loading, text) {
    const { chat } = this;
    const { picture } = await readPicture(await loading, 0);
    if (this.chat !== chat || chat.turns.length > 0) {
      note(`“${text}” was not asked: the chat that it was for has gone on, or another one is shown.`);
      return;
    }
    const turn = newTurn({ text, pictures: [picture] });
    place(chat, 0, turn);
    clearNote();
    this.run(turn);
  }

  // --- showing ---

  /** @param {Chat} chat */
  show(chat) {
    this.editing.end();
    this.chat = chat;
    closeSidebar();
    byId("turns").replaceChildren();
    this.render();
    if (chat.turns.length > 0) this.toEnd();
    if (mouse.matches) this.composer.focus();
    this.editing.bringBack();
  }

  /**
   * Brings the chat that is shown up to what was kept of it, and leaves alone what is the same: scroll, focus, selection.
   * @param {Chat} kept
   */
  refresh(kept) {
    const shown = new Map(this.chat.turns.map((turn) => [turn.id, turn]));
    // A turn's question never changes: another one is another turn.
    const turns = kept.turns.map((turn) => Object.assign(shown.get(turn.id) ?? turn, { answer: turn.answer }));
    Object.assign(this.chat, kept, { turns });
    this.render();
  }

  /** Shows the chat's turns as they are now: those that are gone go, those that are new come. */
  render() {
    const { turns } = this;
    const { title, id } = this.chat;
    const ids = new Set(turns.map((turn) => turn.id));
    for (const element of [...byId("turns").children]) if (!ids.has(element.dataset.turn)) element.remove();
    const fresh = turns.filter((turn) => !this.elementOf(turn));
    byId("turns").append(...fresh.map((turn) => makeTurn(turn, this.placeOf(turn))));
    byId("welcome").hidden = turns.length > 0;
    byId("chat-title").textContent = title;
    document.title = turns.length > 0 ? `${title} – MiniGPT-4` : "MiniGPT-4";
    history.replaceState(null, "", turns.length > 0 ? `#chat=${id}` : location.pathname);
    for (const turn of turns) this.update(turn);
    this.showButtons();
    this.library.list();
  }

  /** @param {Turn} turn */
  placeOf(turn) {
    const index = this.turns.indexOf(turn);
    const running = this.runs.of(this.chat)?.turn === turn;
    const remark = this.remarks.get(turn.id) ?? "";
    return { index, last: turn === this.turns.at(-1), running, remark, acts: this.acts };
  }

  /** @param {Turn} turn */
  update(turn) {
    const element = this.elementOf(turn);
    if (!element) return;
    const { atEnd } = this;
    showAnswer(element, turn, this.placeOf(turn));
    const run = this.runs.of(this.chat);
    if (run?.turn === turn) showWait(element, waitText(run, { beams: this.settings.num_beams ?? 1 }));
    if (atEnd) this.toEnd();
  }

  toEnd() {
    this.atEnd = true;
    byId("log").scrollTop = byId("log").scrollHeight;
  }

  showButtons() {
    const running = this.runs.of(this.chat) !== undefined;
    const focused = document.activeElement === byId("stop");
    byId("stop").hidden = !running;
    byId("send").hidden = running;
    if (focused && !running) this.composer.focus();
    const empty = this.chat.turns.length === 0;
    byId("open-export").disabled = empty || running;
    byId("open-code").disabled = this.asked === null;
    this.showContext();
  }

  showContext() {
    const used = this.turns.findLast(({ answer }) => answer.stats?.used)?.answer.stats.used;
    const { context } = this.server;
    const place = byId("context-use");
    place.hidden = !used || !context;
    if (place.hidden) return;
    place.textContent = `${used.toLocaleString("en")} of ${context.toLocaleString("en")} tokens`;
    place.classList.toggle("nearly-full", used > 0.85 * context);
  }

  /** @param {Chat} chat */
  async keep(chat) {
    await this.history.keep(chat);
    if (chat === this.chat && chat.turns.length > 0) {
      byId("chat-title").textContent = chat.title;
      history.replaceState(null, "", `#chat=${chat.id}`);
    }
    await this.library.list();
  }

  // --- buttons ---

  start() {
    const clicks = {
      "new-chat": () => this.library.begin(),
      "delete-all": () => this.library.removeAll(),
      "open-key": async () => (await askForKey("Servers that others can reach ask for one. It goes to this server only.")) && this.server.watch(),
      "open-settings": () => openDialog("settings"),
      "changed-settings": () => openDialog("settings"),
      "open-export": () => offerDownload(this.chat, this.server.name),
      "open-code": () => showCode(this.asked),
      "cancel-edit": () => this.editing.cancel(),
      "to-end": () => {
        this.toEnd();
        byId("log").focus({ preventScroll: true }); // the button goes
      },
      stop: () => this.stop(),
    };
    for (const [id, act] of Object.entries(clicks)) byId(id).addEventListener("click", act);
    byId("skip").addEventListener("click", (event) => {
      event.preventDefault(); // the address keeps the chat that is shown
      this.composer.focus();
    });
    addEventListener("keydown", (event) => this.key(event));
    byId("log").addEventListener("scroll", () => this.scrolled(), { passive: true });
    // The box for the question grows and takes room from the conversation, whose end stays in sight.
    new ResizeObserver(() => this.atEnd && this.toEnd()).observe(byId("log"));
    this.history.store.onChange((id) => this.library.changedElsewhere(id));
    startExamples((loading, question) => this.askExample(loading, question));
    startSettings((settings) => this.settingsChanged(settings));
    startTheme();
    startSidebar();
    this.server.watch();
  }

  /** @param {KeyboardEvent} event */
  key(event) {
    // An input method's Escape drops its own word.
    if (event.key !== "Escape" || event.isComposing || event.defaultPrevented) return;
    if (document.querySelector("dialog[open]")) return;
    if (this.runs.of(this.chat)) this.stop();
    else if (this.editing.turn) this.editing.cancel();
  }

  scrolled() {
    const log = byId("log");
    const left = log.scrollHeight - log.scrollTop - log.clientHeight;
    this.atEnd = left < 60;
    byId("to-end").hidden = left < 200;
  }

  /** @param {Record<string, number>} settings */
  settingsChanged(settings) {
    this.settings = settings;
    const changed = FIELDS.filter(({ name }) => name in settings);
    const chip = byId("changed-settings");
    chip.hidden = changed.length === 0;
    chip.textContent = changed.map(({ name, label }) => `${label} ${settings[name]}`).join(" · ");
  }
}

const app = new App(await openHistory());
app.start();
const wanted = /^#chat=([0-9a-f]{32})$/.exec(location.hash)?.[1];
const kept = wanted ? await app.history.store.load(wanted) : null;
app.show(kept ?? newChat());
await app.library.list();
document.documentElement.dataset.ready = "yes";
