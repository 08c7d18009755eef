// For: small values of this browser (key, theme, settings), also where it keeps none: then they last as long as the
// page, and that is said. Not for: chats (store.js) nor the first drawing's colours (early.js, which cannot import).

import { note } from "./dom.js";

/** @typedef {"localStorage" | "sessionStorage"} Area */

let said = false;

class Kept {
  /** @param {Area} area */
  constructor(area) {
    this.area = area;
    /** What the browser did not take. @type {Map<string, string>} */
    this.here = new Map();
  }

  /**
   * @param {string} name
   * @returns {string | null}
   */
  get(name) {
    if (this.here.has(name)) return this.here.get(name);
    try {
      return window[this.area].getItem(name);
    } catch {
      return null; // a browser that keeps nothing has nothing; `set` says so
    }
  }

  /**
   * @param {string} name
   * @param {string} value
   */
  set(name, value) {
    try {
      window[this.area].setItem(name, value);
      this.here.delete(name);
    } catch {
      this.here.set(name, value);
      if (!said) note("This browser keeps nothing for this page: what you choose lasts until it is closed or loaded anew.");
      said = true;
    }
  }

  /** @param {string} name */
  remove(name) {
    this.here.delete(name);
    try {
      window[this.area].removeItem(name);
    } catch {
      // nothing was kept there
    }
  }
}

/** Kept until somebody clears it. */
export const forGood = new Kept("localStorage");
/** Kept until the window is closed. */
export const forWindow = new Kept("sessionStorage");
