// For: the API key: asked for, kept for this window or (if ticked) for good, forgotten.
// Not for: sending it (api.js).

import { byId } from "./dom.js";
import { openDialog } from "./dialogs.js";
import { forGood, forWindow } from "./storage.js";

const NAME = "minigpt4.key";

/** @returns {string} the key, "" for none */
export function currentKey() {
  return forWindow.get(NAME) ?? forGood.get(NAME) ?? "";
}

/**
 * @param {string} key "" forgets it
 * @param {{always: boolean}} how
 */
function keepKey(key, { always }) {
  forWindow.remove(NAME);
  forGood.remove(NAME);
  if (key) (always ? forGood : forWindow).set(NAME, key);
}

/**
 * Asks for a key.
 * @param {string} reason
 * @returns {Promise<boolean>} whether there is another one now
 */
export async function askForKey(reason) {
  const input = byId("key-value");
  input.value = currentKey();
  byId("key-keep").checked = forGood.get(NAME) !== null;
  byId("key-reason").textContent = reason;
  byId("key-forget").hidden = currentKey() === "";
  const answer = await openDialog("key-dialog", { enter: "save" });
  if (answer !== "save" && answer !== "forget") return false;
  const key = answer === "save" ? input.value.trim() : "";
  keepKey(key, { always: byId("key-keep").checked });
  input.value = "";
  return key !== "";
}
