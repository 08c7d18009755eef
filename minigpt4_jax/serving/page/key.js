// For: the API key: asked for, kept for this window or (if ticked) for good, forgotten.
// Not for: sending it (api.js).

import { byId } from "./dom.js";
import { openDialog } from "./dialogs.js";

const NAME = "minigpt4.key";

/** @returns {string} the key, "" for none */
export function currentKey() {
  return sessionStorage.getItem(NAME) ?? localStorage.getItem(NAME) ?? "";
}

/**
 * @param {string} key "" forgets it
 * @param {{forGood: boolean}} how
 */
function keepKey(key, { forGood }) {
  sessionStorage.removeItem(NAME);
  localStorage.removeItem(NAME);
  if (key) (forGood ? localStorage : sessionStorage).setItem(NAME, key);
}

/**
 * Asks for a key.
 * @param {string} reason
 * @returns {Promise<boolean>} whether there is another one now
 */
export async function askForKey(reason) {
  const input = byId("key-value");
  input.value = currentKey();
  byId("key-keep").checked = localStorage.getItem(NAME) !== null;
  byId("key-reason").textContent = reason;
  byId("key-forget").hidden = currentKey() === "";
  const answer = await openDialog("key-dialog", { enter: "save" });
  if (answer !== "save" && answer !== "forget") return false;
  const key = answer === "save" ? input.value.trim() : "";
  keepKey(key, { forGood: byId("key-keep").checked });
  input.value = "";
  return key !== "";
}
