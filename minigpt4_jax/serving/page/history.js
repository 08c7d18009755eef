// For: keeping chats one save after the other, and telling people when that does not work.
// Not for: how they are kept (store.js) nor the list of them (sidebar.js).

import { note } from "./dom.js";
import { MemoryStore, Store } from "./store.js";

/** @typedef {import("./chat.js").Chat} Chat */

/** @returns {Promise<History>} */
export async function openHistory() {
  try {
    return new History(await Store.open());
  } catch (error) {
    const why =
      error.name === "VersionError"
        ? "A newer version of this page kept the history of this browser."
        : "This browser keeps no history for this page.";
    note(`${why} Chats last until this tab is closed.`);
    return new History(new MemoryStore());
  }
}

export class History {
  /** @param {Store | MemoryStore} store */
  constructor(store) {
    this.store = store;
    /** The save that runs: two at once of the same chat would take each other for another tab's. */
    this.last = Promise.resolve();
  }

  /**
   * Keeps a chat; what goes wrong is told to people, and the chat goes on.
   * @param {Chat} chat
   */
  keep(chat) {
    this.last = this.last.then(() => this.keepNow(chat));
    return this.last;
  }

  /** @param {Chat} chat */
  async keepNow(chat) {
    try {
      if ((await this.store.save(chat)) === "copied") {
        note("This chat was changed in another tab. Yours goes on as a copy.");
      }
    } catch (error) {
      note(whyNotKept(error));
    }
  }
}

/** @param {DOMException} error */
function whyNotKept(error) {
  if (error.name === "QuotaExceededError") {
    return "The browser’s room for this page is full, and this chat is not kept. Delete old chats, or download this one.";
  }
  return `This chat is not kept (${error.name}). Load the page anew, or download the chat first.`;
}
