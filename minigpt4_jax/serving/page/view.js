// For: turns of a chat as elements, kept up to date while an answer is written.
// Not for: what their buttons do (app.js). Text of models, people and files only ever becomes text nodes.

import { byId, copyFrom, icon, make } from "./dom.js";
import { showLarge } from "./dialogs.js";
import { addressOf } from "./pictures.js";
import { troubleOf } from "./trouble.js";

/** @typedef {import("./chat.js").Turn} Turn */
/** @typedef {import("./chat.js").Picture} Picture */
/**
 * @typedef {{edit(turn: Turn): void, again(turn: Turn): void, newChat(): void, key(turn: Turn): void,
 *            settings(): void}} Acts
 * @typedef {{index: number, last: boolean, running: boolean, remark: string, acts: Acts}} Place
 */

export const NO_NEW_ANSWER = "No new answer came. This is the one from before.";

/**
 * @param {Turn} turn
 * @param {Place} place
 * @returns {HTMLElement}
 */
export function makeTurn(turn, place) {
  const template = /** @type {HTMLTemplateElement} */ (byId("turn-template"));
  const element = template.content.firstElementChild.cloneNode(true);
  element.dataset.turn = turn.id;
  element.tabIndex = -1;
  element.querySelector(".question-title").textContent = `Question ${place.index + 1}`;
  element.querySelector(".answer-title").textContent = `Answer ${place.index + 1}`;
  element.querySelector(".question-text").textContent = turn.text;
  element.querySelector(".question-text").hidden = turn.text === "";
  const shown = element.querySelector(".shown");
  shown.hidden = turn.pictures.length === 0;
  shown.append(...turn.pictures.map((_, at) => shownPicture(turn.pictures, at)));
  wire(element, turn, place.acts);
  showAnswer(element, turn, place);
  return element;
}

/**
 * @param {HTMLElement} element
 * @param {Turn} turn
 * @param {Acts} acts
 */
function wire(element, turn, acts) {
  const [copyQuestion, copyAnswer] = ["copy-question", "copy-answer"].map((name) => element.querySelector(`.${name}`));
  element.querySelector(".edit").onclick = () => acts.edit(turn);
  element.querySelector(".again").onclick = () => acts.again(turn);
  copyQuestion.hidden = turn.text === "";
  copyQuestion.onclick = () => copyFrom(copyQuestion, turn.text);
  copyAnswer.onclick = () => copyFrom(copyAnswer, turn.answer.text);
}

/**
 * @param {Picture[]} pictures
 * @param {number} at
 */
function shownPicture(pictures, at) {
  const { name, width, height } = pictures[at];
  const image = make("img", { src: addressOf(pictures[at]), alt: name, width, height, decoding: "async" });
  const button = make("button", { type: "button", className: "picture-button" }, [image]);
  button.setAttribute("aria-label", `${name}, show it large`);
  button.onclick = () => showLarge(pictures, at);
  return make("li", {}, [button]);
}

/**
 * Brings the answer's part up to date.
 * @param {HTMLElement} element of `makeTurn`
 * @param {Turn} turn
 * @param {Place} place
 */
export function showAnswer(element, turn, place) {
  const { answer } = turn;
  const writing = answer.state === "writing" && place.running;
  element.classList.toggle("writing", writing && answer.text !== "");
  element.querySelector(".answer").setAttribute("aria-busy", String(writing));
  appendText(element.querySelector(".answer-text"), answer.text);
  element.querySelector(".wait").hidden = !writing || answer.text !== "";
  element.querySelector(".edit").disabled = writing;
  element.querySelector(".answer-foot").hidden = writing;
  element.querySelector(".copy-answer").hidden = answer.text === "";
  element.querySelector(".again").hidden = !place.last || answer.state === "failed";
  element.querySelector(".stats").textContent = answer.stats ? statsText(answer) : "";
  const remark = writing ? "" : place.remark || remarkOf(turn, place);
  element.querySelector(".remark").textContent = remark;
  element.querySelector(".remark").hidden = remark === "";
  showTrouble(element.querySelector(".trouble"), turn, place);
}

/**
 * Adds what is new to the one text node, so that a selection in it survives.
 * @param {Element} paragraph
 * @param {string} text
 */
function appendText(paragraph, text) {
  const node = paragraph.firstChild ?? paragraph.appendChild(document.createTextNode(""));
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}

/**
 * @param {HTMLElement} element of `makeTurn`
 * @param {string} text what the answer waits for
 */
export function showWait(element, text) {
  element.querySelector(".wait").textContent = text;
}

/** @param {import("./chat.js").Answer} answer */
function statsText({ stats, finish }) {
  const parts = [];
  if (stats.firstMs !== null) parts.push(`first token ${seconds(stats.firstMs)}`);
  if (stats.perSecond !== null) parts.push(`${stats.exact ? "" : "about "}${rate(stats.perSecond)} tokens/s`);
  if (stats.tokens > 0) parts.push(`${stats.exact ? "" : "about "}${stats.tokens} tokens`);
  if (stats.firstMs === null && stats.tokens > 0) parts.push(seconds(stats.totalMs));
  if (finish === "length") parts.push("cut at its longest");
  return parts.join(" · ");
}

/** @param {number} ms */
function seconds(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  return `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`;
}

/** @param {number} perSecond */
function rate(perSecond) {
  return perSecond < 10 ? perSecond.toFixed(1) : String(Math.round(perSecond));
}

/**
 * @param {Turn} turn
 * @param {Place} place
 */
function remarkOf({ answer }, { last }) {
  if (!last && answer.text === "") return "Without an answer: the model is not told of this question.";
  if (answer.state === "writing") return "This answer was not finished.";
  if (answer.state !== "failed" && answer.failure !== null) return NO_NEW_ANSWER;
  if (answer.state === "stopped") return "Stopped.";
  if (answer.state === "done" && answer.text === "") return "The model answered with nothing.";
  return "";
}

/**
 * @param {HTMLElement} box
 * @param {Turn} turn
 * @param {Place} place
 */
function showTrouble(box, turn, { last, acts }) {
  const { failure } = turn.answer;
  const shown = failure !== null && last;
  const what = JSON.stringify(failure);
  if (box.hidden === !shown && box.dataset.what === what) return;
  box.hidden = !shown;
  box.dataset.what = what;
  if (!shown) return;
  const { title, text, actions } = troubleOf(failure);
  box.querySelector(".trouble-title").textContent = title;
  box.querySelector(".trouble-text").textContent = text;
  const buttons = actions.map((action) => troubleButton(turn, action, acts));
  box.querySelector(".trouble-actions").replaceChildren(...buttons);
}

/**
 * @param {Turn} turn
 * @param {import("./trouble.js").Action} action
 * @param {Acts} acts
 */
function troubleButton(turn, action, acts) {
  const [label, act] = {
    retry: ["Try again", acts.again],
    edit: ["Edit the question", acts.edit],
    new: ["New chat", acts.newChat],
    key: ["Enter a key", acts.key],
    settings: ["Open the settings", acts.settings],
  }[action];
  const button = make("button", { type: "button", className: "button", textContent: label });
  button.onclick = () => act(turn);
  if (action === "retry") countDown(button, turn.answer.failure.retryAt);
  return button;
}

/**
 * Counts the seconds down on a button, which can be pressed when they are over.
 * @param {HTMLButtonElement} button
 * @param {number | null} until milliseconds since 1970
 */
function countDown(button, until) {
  const left = Math.ceil(((until ?? 0) - Date.now()) / 1000);
  button.disabled = left > 0;
  button.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
  if (left <= 0) return;
  const timer = setInterval(() => {
    clearInterval(timer);
    if (button.isConnected) countDown(button, until);
  }, 1000);
}

/**
 * @param {Picture[]} pictures
 * @param {(picture: Picture) => void} remove
 */
export function showThumbs(pictures, remove) {
  const list = byId("attached");
  list.hidden = pictures.length === 0;
  list.replaceChildren(...pictures.map((picture, at) => thumb(pictures, at, remove)));
}

/** @type {(pictures: Picture[], at: number, remove: (picture: Picture) => void) => HTMLElement} */
function thumb(pictures, at, remove) {
  const picture = pictures[at];
  const item = shownPicture(pictures, at);
  const button = make("button", { type: "button", className: "remove" }, [icon("close")]);
  button.setAttribute("aria-label", `Remove ${picture.name}`);
  button.onclick = () => remove(picture);
  item.append(button);
  return item;
}
