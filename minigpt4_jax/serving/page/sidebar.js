// For: the list of chats, and the drawer that it is on a narrow screen.
// Not for: what a chat holds, nor keeping it (store.js).

import { byId } from "./dom.js";

/**
 * @param {import("./store.js").Listed[]} chats
 * @param {string} current id of the one that is shown
 * @param {{open(id: string): void, rename(id: string): void, remove(id: string): void}} acts
 */
export function showChats(chats, current, acts) {
  const template = /** @type {HTMLTemplateElement} */ (byId("chat-template"));
  const what = JSON.stringify([current, ...chats.map(({ id, title }) => [id, title])]);
  // A press that is under way, and the place of a screen reader, survive what changes nothing.
  if (byId("chats").dataset.what === what) return;
  byId("chats").dataset.what = what;
  const focused = focusedButton();
  const items = chats.map(({ id, title }) => {
    const item = template.content.firstElementChild.cloneNode(true);
    item.dataset.chat = id;
    const [link, rename, remove] = item.querySelectorAll("button");
    link.textContent = title;
    link.title = title;
    if (id === current) link.setAttribute("aria-current", "page");
    rename.setAttribute("aria-label", `Rename “${title}”`);
    remove.setAttribute("aria-label", `Delete “${title}”`);
    link.onclick = () => acts.open(id);
    rename.onclick = () => acts.rename(id);
    remove.onclick = () => acts.remove(id);
    return item;
  });
  byId("chats").replaceChildren(...items);
  byId("no-chats").hidden = chats.length > 0;
  byId("delete-all").hidden = chats.length === 0;
  if (focused) (document.querySelector(focused) ?? byId("new-chat")).focus();
}

/** @returns {string} a selector of the list's focused button, which is about to be made anew; "" for none */
function focusedButton() {
  const button = document.activeElement;
  const item = button?.closest(".chat-item");
  if (!item) return "";
  const at = [...item.querySelectorAll("button")].indexOf(button);
  return `.chat-item[data-chat="${item.dataset.chat}"] button:nth-of-type(${at + 1})`;
}

const narrow = matchMedia("(max-width: 800px)");

/** Wires the drawer. */
export function startSidebar() {
  byId("open-sidebar").onclick = () => setOpen({ open: true });
  byId("close-sidebar").onclick = () => setOpen({ open: false });
  byId("shade").onclick = () => setOpen({ open: false });
  byId("sidebar").addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !narrow.matches) return;
    event.preventDefault(); // it closes the drawer, and does not stop the answer behind it
    setOpen({ open: false });
  });
  narrow.addEventListener("change", () => setOpen({ open: false }));
  setOpen({ open: false });
}

/** Closes the drawer, after a choice in it. */
export function closeSidebar() {
  if (!byId("shade").hidden) setOpen({ open: false });
}

/** @param {{open: boolean}} how */
function setOpen({ open }) {
  const wasOpen = !byId("shade").hidden;
  const drawer = narrow.matches;
  byId("sidebar").classList.toggle("open", open);
  byId("sidebar").inert = drawer && !open;
  document.querySelector("main").inert = drawer && open;
  byId("shade").hidden = !(drawer && open);
  byId("open-sidebar").setAttribute("aria-expanded", String(open));
  if (drawer && open) byId("close-sidebar").focus();
  if (drawer && wasOpen && !open) byId("open-sidebar").focus();
}
