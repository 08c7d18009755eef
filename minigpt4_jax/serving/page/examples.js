// For: the gallery of an empty chat: two pictures (examples/LICENCES.md) with questions that can be asked at once.
// Not for: chats that have begun.

import { byId, make, note } from "./dom.js";

const QUESTIONS = ["What is this?", "Describe this picture.", "Write a two-line poem about it."];
const EXAMPLES = [
  { file: "coffee.jpg", alt: "A cup of coffee on a saucer", credit: "Rachel Michetti, CC0" },
  { file: "flower.jpg", alt: "An orange dahlia", credit: "danielbuechele, CC BY 2.0" },
];

/**
 * @typedef {(picture: Promise<File>, question: string) => Promise<void>} Ask called at the press, while the picture is
 *   loaded; rejected where that fails
 */

/** @param {Ask} ask */
export function startExamples(ask) {
  byId("examples").replaceChildren(...EXAMPLES.map((example) => card(example, ask)));
}

/** @type {(example: {file: string, alt: string, credit: string}, ask: Ask) => HTMLElement} */
function card({ file, alt, credit }, ask) {
  const buttons = QUESTIONS.map((question) => {
    const button = make("button", { type: "button", className: "ask", textContent: question });
    button.setAttribute("aria-label", `${question} (${alt})`);
    button.onclick = () => askOnce(button, () => ask(fetchExample(file), question));
    return make("li", {}, [button]);
  });
  return make("li", { className: "example" }, [
    make("figure", {}, [
      make("img", { src: `examples/${file}`, alt, width: 400, height: 300 }),
      make("figcaption", { textContent: credit }),
    ]),
    make("ul", { className: "asks" }, buttons),
  ]);
}

/**
 * Asks while no other example can be asked.
 * @param {HTMLButtonElement} button that was pressed
 * @param {() => Promise<void>} act
 */
async function askOnce(button, act) {
  const buttons = /** @type {NodeListOf<HTMLButtonElement>} */ (byId("examples").querySelectorAll(".ask"));
  for (const each of buttons) each.disabled = true;
  try {
    await act();
  } catch (error) {
    console.error(error);
    note("The picture could not be loaded: the server cannot be reached.");
  } finally {
    for (const each of buttons) each.disabled = false;
    // A button that cannot be pressed has lost the focus.
    if (document.activeElement === document.body && button.getClientRects().length > 0) button.focus();
  }
}

/**
 * @param {string} file
 * @returns {Promise<File>}
 */
async function fetchExample(file) {
  const response = await fetch(`examples/${file}`);
  if (!response.ok) throw new Error(`the server answered ${response.status}`);
  return new File([await response.blob()], file);
}
