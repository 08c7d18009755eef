// For: what is done with whole chats: opened, begun, renamed, deleted, here and in other tabs.
// Not for: questions and answers (app.js) nor keeping (history.js).

import { newChat } from "./chat.js";
import { askForTitle, confirm } from "./dialogs.js";
import { announce, byId, clearNote, note } from "./dom.js";
import { showChats } from "./sidebar.js";

/** @typedef {import("./chat.js").Chat} Chat */
/**
 * @typedef {{chat: Chat, history: import("./history.js").History, runs: import("./runs.js").Runs,
 *            editing: import("./editing.js").Editing, show(chat: Chat): void, refresh(chat: Chat): void, keep(chat: Chat): Promise<void>, render(): void}} App
 */

export class Library {
  /** @param {App} app */
  constructor(app) {
    this.app = app;
  }

  get store() {
    return this.app.history.store;
  }

  async list() {
    showChats(await this.store.list(), this.app.chat.id, {
      open: (id) => this.open(id),
      rename: (id) => this.rename(id),
      remove: (id) => this.remove(id),
    });
  }

  begin() {
    clearNote();
    this.app.show(newChat());
  }

  /**
   * @param {string} id
   * @returns {Promise<Chat | null>} the one in use, if there is one, else as it was kept
   */
  async find(id) {
    if (id === this.app.chat.id) return this.app.chat;
    const running = [...this.app.runs.running].find(({ chat }) => chat.id === id);
    if (running) return running.chat;
    await this.app.history.last; // an answer may be over, and the chat not kept yet
    return this.store.load(id);
  }

  /** @param {string} id */
  async open(id) {
    const chat = await this.find(id);
    if (!chat) return;
    clearNote();
    this.app.show(chat);
  }

  /** @param {string} id */
  async rename(id) {
    const chat = await this.find(id);
    const title = chat && (await askForTitle(chat.title));
    if (!title) return;
    Object.assign(chat, { title, named: true });
    await this.app.keep(chat);
    if (chat === this.app.chat) this.app.render();
  }

  /** @param {string} id */
  async remove(id) {
    const chat = await this.find(id);
    if (!chat) return;
    const text = `“${chat.title}” and its pictures are gone then; nobody else has them.`;
    if (!(await confirm({ title: "Delete this chat?", text, yes: "Delete" }))) return;
    await this.app.runs.end(chat);
    await this.app.history.last; // a save that comes behind would bring a copy back
    await this.store.remove(chat.id);
    if (chat.id === this.app.chat.id) this.begin();
    else await this.list();
    // The button that opened the dialog is gone with its chat.
    if (document.activeElement === document.body) byId("new-chat").focus();
    announce("Chat deleted");
  }

  async removeAll() {
    const text = "All chats of this browser and their pictures are gone then; nobody else has them.";
    if (!(await confirm({ title: "Delete all chats?", text, yes: "Delete all" }))) return;
    await this.app.runs.end();
    await this.app.history.last; // a save that comes behind would bring a copy back
    await this.store.clear();
    this.begin();
    announce("All chats deleted");
  }

  /** @param {string} id of a chat that another tab kept or deleted; "" for all */
  async changedElsewhere(id) {
    const { app } = this;
    await this.list();
    const shown = app.chat;
    if (!(id === shown.id || id === "") || shown.revision === 0) return;
    const kept = await this.store.load(shown.id);
    // An edit goes on, and an answer: if they are kept later, as a copy of the chat.
    if (app.chat !== shown || app.runs.of(shown) || app.editing.turn || kept?.revision === shown.revision) return;
    if (kept) {
      app.refresh(kept);
      return;
    }
    app.show(newChat());
    note("The chat was deleted in another tab.");
  }
}
