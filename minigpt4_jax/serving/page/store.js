// For: the chats of this browser in IndexedDB, pictures too, for several tabs at once. A chat is kept whole or not at
// all (one transaction); a tab that kept a chat after another tab changed it gets a copy instead of the other's work.
// Not for: what a chat is (chat.js). Nothing of it ever leaves the browser.

import { newId, picturesOf } from "./chat.js";

/** @typedef {import("./chat.js").Chat} Chat */
/** @typedef {import("./chat.js").Picture} Picture */
/** @typedef {{id: string, title: string, updated: number}} Listed */

const NAME = "minigpt4";
const VERSION = 1;

/**
 * @param {IDBRequest} request
 * @returns {Promise<any>}
 */
function resultOf(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/**
 * @param {IDBTransaction} transaction
 * @returns {Promise<void>} Fulfilled when everything is written.
 */
function endOf(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = () => reject(transaction.error);
  });
}

/** @returns {Promise<IDBDatabase>} */
function openDatabase() {
  const request = indexedDB.open(NAME, VERSION);
  request.onupgradeneeded = () => {
    const database = request.result;
    database.createObjectStore("chats", { keyPath: "id" });
    database.createObjectStore("pictures", { keyPath: "id" }).createIndex("chat", "chat");
  };
  return resultOf(request);
}

export class Store {
  /** @param {IDBDatabase} database */
  constructor(database) {
    this.database = database;
    this.channel = new BroadcastChannel("minigpt4-history");
    // A newer page in another tab wants to change the database: it may, and this tab says so when it next writes.
    database.onversionchange = () => database.close();
  }

  /**
   * @returns {Promise<Store>}
   * @throws {DOMException} where the browser keeps nothing: private windows, a newer page's history, a full disk
   */
  static async open() {
    return new Store(await openDatabase());
  }

  /** @param {(id: string) => void} act called with a chat's id when another tab kept or deleted it */
  onChange(act) {
    this.channel.onmessage = (event) => act(event.data);
  }

  /** @returns {Promise<Listed[]>} the latest first */
  async list() {
    const chats = await resultOf(this.database.transaction("chats").objectStore("chats").getAll());
    return chats.sort((one, other) => other.updated - one.updated);
  }

  /**
   * @param {string} id
   * @returns {Promise<Chat | null>}
   */
  async load(id) {
    const transaction = this.database.transaction(["chats", "pictures"]);
    const record = await resultOf(transaction.objectStore("chats").get(id));
    if (!record) return null;
    const kept = await resultOf(transaction.objectStore("pictures").index("chat").getAll(id));
    const pictures = new Map(kept.map((picture) => [picture.id, picture]));
    const turns = record.turns.map((turn) => ({
      ...turn,
      pictures: turn.pictures.map((picture) => pictures.get(picture)),
    }));
    const edit = record.edit && { ...record.edit, pictures: record.edit.pictures.map((picture) => pictures.get(picture)) };
    return { ...record, turns, edit: edit ?? null };
  }

  /**
   * Keeps a chat and counts its revision. If another tab kept or deleted it since, `chat` becomes a copy under a new id.
   * @param {Chat} chat
   * @returns {Promise<"kept" | "copied">}
   * @throws {DOMException} `QuotaExceededError` when the browser's storage is full; then nothing was changed
   */
  async save(chat) {
    const transaction = this.database.transaction(["chats", "pictures"], "readwrite");
    const ended = endOf(transaction);
    const [chats, pictures] = ["chats", "pictures"].map((name) => transaction.objectStore(name));
    let copied = false;
    chats.get(chat.id).onsuccess = (event) => {
      copied = (event.target.result?.revision ?? 0) !== chat.revision;
      if (copied) becomeCopy(chat);
      chats.put(recordOf(chat));
      putPictures(pictures, chat);
    };
    await ended;
    chat.revision += 1;
    this.channel.postMessage(chat.id);
    return copied ? "copied" : "kept";
  }

  /** @param {string} id */
  async remove(id) {
    const transaction = this.database.transaction(["chats", "pictures"], "readwrite");
    const ended = endOf(transaction);
    transaction.objectStore("chats").delete(id);
    dropPictures(transaction.objectStore("pictures"), id, new Set());
    await ended;
    this.channel.postMessage(id);
  }

  /** Deletes everything. */
  async clear() {
    const transaction = this.database.transaction(["chats", "pictures"], "readwrite");
    const ended = endOf(transaction);
    transaction.objectStore("chats").clear();
    transaction.objectStore("pictures").clear();
    await ended;
    this.channel.postMessage("");
  }
}

/** @param {Chat} chat */
function recordOf(chat) {
  const idsOf = ({ pictures }) => pictures.map(({ id }) => id);
  const turns = chat.turns.map(({ before, ...turn }) => ({ ...turn, answer: before ?? turn.answer, pictures: idsOf(turn) }));
  const edit = chat.edit && { ...chat.edit, pictures: idsOf(chat.edit) };
  return { ...chat, revision: chat.revision + 1, turns, edit };
}

/**
 * The pictures that a chat is kept with, each once.
 * @param {Chat} chat
 * @returns {Set<Picture>}
 */
function keptPicturesOf(chat) {
  return new Set([...picturesOf(chat), ...(chat.edit?.pictures ?? [])]);
}

/** @param {Chat} chat */
function becomeCopy(chat) {
  chat.id = newId();
  chat.revision = 0;
  chat.title = `${chat.title} (copy)`;
  // In place: a question that is being written or asked has the same pictures.
  for (const picture of keptPicturesOf(chat)) picture.id = newId();
}

/**
 * Writes the pictures that are new and drops those that no turn has any more.
 * @param {IDBObjectStore} pictures
 * @param {Chat} chat
 */
function putPictures(pictures, chat) {
  const needed = new Map([...keptPicturesOf(chat)].map((picture) => [picture.id, picture]));
  for (const [id, picture] of needed) {
    pictures.getKey(id).onsuccess = (event) => {
      if (event.target.result === undefined) pictures.put({ ...picture, chat: chat.id });
    };
  }
  dropPictures(pictures, chat.id, needed);
}

/**
 * @param {IDBObjectStore} pictures
 * @param {string} chat
 * @param {{has(id: string): boolean}} but ids that stay
 */
function dropPictures(pictures, chat, but) {
  pictures.index("chat").getAllKeys(chat).onsuccess = (event) => {
    for (const id of event.target.result) if (!but.has(id)) pictures.delete(id);
  };
}

/** What stands in where the browser keeps nothing: the chats of this tab, until it is closed. */
export class MemoryStore {
  constructor() {
    /** @type {Map<string, Chat>} */
    this.chats = new Map();
  }

  /** There are no other tabs. */
  onChange() {}

  async list() {
    return [...this.chats.values()].sort((one, other) => other.updated - one.updated);
  }

  /** @param {string} id */
  async load(id) {
    return this.chats.get(id) ?? null;
  }

  /** @param {Chat} chat */
  async save(chat) {
    chat.revision += 1;
    this.chats.set(chat.id, chat);
    return "kept";
  }

  /** @param {string} id */
  async remove(id) {
    this.chats.delete(id);
  }

  async clear() {
    this.chats.clear();
  }
}
