// For: the few words that every module that touches the document shares. Not for: anything that knows of chats.

/**
 * @param {string} id
 * @returns {HTMLElement} The element of that id, which index.html has.
 */
export function byId(id) {
  const element = document.getElementById(id);
  if (!element) throw new Error(`index.html has no #${id}`);
  return element;
}

/**
 * A new element. Text always becomes a text node: nothing that a model, a file or a person wrote is ever parsed.
 * @param {string} tag
 * @param {Record<string, unknown>} [properties] such as className, textContent, onclick
 * @param {(Node | string)[]} [children]
 */
export function make(tag, properties = {}, children = []) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** @param {string} name a symbol of icons.svg */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `icons.svg#${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/**
 * Says a sentence to screen readers, once.
 * @param {string} text
 */
export function announce(text) {
  const place = byId("announcer");
  place.textContent = "";
  // A reader speaks changes only, and the same sentence twice is none: so it comes in a later task.
  setTimeout(() => (place.textContent = text), 50);
}

/**
 * Shows a remark above the question until the next one or until it is closed. One that is there already stays as it is:
 * screen readers would say it again.
 * @param {string} text
 * @param {{label: string, act: () => void}} [action]
 */
export function note(text, action) {
  if (!action && byId("notes").querySelector("span")?.textContent === text) return;
  const close = make("button", { className: "icon-button small", type: "button" }, [icon("close")]);
  close.setAttribute("aria-label", "Close this remark");
  const line = make("p", { className: "note" }, [make("span", { textContent: text })]);
  close.onclick = () => {
    // The focus of somebody at the keyboard would be lost with the button.
    if (close.matches(":focus-visible")) byId("question").focus();
    line.remove();
  };
  if (action) {
    const button = make("button", { className: "link-button", type: "button", textContent: action.label });
    button.onclick = () => {
      line.remove();
      action.act();
    };
    line.append(button);
  }
  line.append(close);
  byId("notes").replaceChildren(line);
}

/** Takes the remark away. */
export function clearNote() {
  byId("notes").replaceChildren();
}

/**
 * Puts text on the clipboard and shows that it is there.
 * @param {HTMLElement} button
 * @param {string} text
 */
export async function copyFrom(button, text) {
  try {
    await writeClipboard(text);
  } catch {
    note("This browser does not let the page copy. Select the text and copy it yourself.");
    return;
  }
  announce("Copied");
  const use = button.querySelector("use");
  if (!use) return;
  use.setAttribute("href", "icons.svg#check");
  setTimeout(() => use.setAttribute("href", "icons.svg#copy"), 1500);
}

/** @param {string} text */
async function writeClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Plain http from another machine has no navigator.clipboard; the old command still works there.
  const area = make("textarea", { value: text, className: "hidden" });
  const focused = document.activeElement;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!done) throw new Error("the browser refused to copy");
}
