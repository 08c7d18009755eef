// For: opening <dialog>s, which trap the focus and give it back by themselves; asking yes or no; the large picture.
// Not for: what the dialogs decide (their callers).

import { byId } from "./dom.js";
import { addressOf } from "./pictures.js";

/**
 * @param {string} id
 * @param {{enter?: string}} [how] `enter`: the value of the button that the Enter key presses
 * @returns {Promise<string>} the value of the button that closed it; "" for Escape or a click beside it
 */
export function openDialog(id, { enter } = {}) {
  const dialog = /** @type {HTMLDialogElement} */ (byId(id));
  return new Promise((resolve) => {
    /** @param {string} value */
    function finish(value) {
      dialog.close(value);
      resolve(value);
    }

    dialog.onpointerdown = (event) => {
      if (event.target === dialog) finish("");
    };
    dialog.onkeydown = (event) => {
      if (!enter || event.key !== "Enter" || event.target.tagName !== "INPUT") return;
      // A form presses its first button otherwise.
      event.preventDefault();
      finish(enter);
    };
    dialog.onsubmit = (event) => {
      event.preventDefault();
      finish(event.submitter.value);
    };
    // Escape. The event comes some time after the closing, when the dialog may be open anew.
    dialog.onclose = () => {
      if (!dialog.open) resolve("");
    };
    dialog.showModal();
  });
}

/**
 * @param {{title: string, text: string, yes: string}} question
 * @returns {Promise<boolean>}
 */
export async function confirm({ title, text, yes }) {
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  byId("confirm-yes").textContent = yes;
  return (await openDialog("confirm")) === "yes";
}

/**
 * @param {string} title the present one
 * @returns {Promise<string>} the new one, "" for none
 */
export async function askForTitle(title) {
  const input = /** @type {HTMLInputElement} */ (byId("rename-value"));
  input.value = title;
  byId("rename-cancel").onclick = () => byId("rename").close("");
  const opened = openDialog("rename", { enter: "save" });
  input.select();
  return (await opened) === "save" ? input.value.trim() : "";
}

/**
 * Shows pictures large; the arrow keys walk through them.
 * @param {import("./chat.js").Picture[]} pictures
 * @param {number} at the one to begin with
 */
export function showLarge(pictures, at) {
  let place = at;
  const several = pictures.length > 1;

  /** @param {number} step */
  function walk(step) {
    place = (place + step + pictures.length) % pictures.length;
    const { name, width, height } = pictures[place];
    Object.assign(byId("lightbox-picture"), { src: addressOf(pictures[place]), alt: name });
    const count = several ? `${place + 1} of ${pictures.length} · ` : "";
    byId("lightbox-name").textContent = `${count}${name} · ${width} × ${height}`;
  }

  walk(0);
  for (const [id, step] of Object.entries({ "lightbox-before": -1, "lightbox-next": 1 })) {
    byId(id).hidden = !several;
    byId(id).onclick = () => walk(step);
  }
  openDialog("lightbox");
  byId("lightbox").onkeydown = (event) => {
    if (several && event.key === "ArrowLeft") walk(-1);
    if (several && event.key === "ArrowRight") walk(1);
  };
}
