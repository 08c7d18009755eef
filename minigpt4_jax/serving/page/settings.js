// For: how answers are written: the fields, their ranges, and those values that a person changed.
// Not for: the server's own values: an empty field is not sent, and the server's preset holds.

import { byId, make, note } from "./dom.js";
import { forGood } from "./storage.js";

const NAME = "minigpt4.settings";

/**
 * @typedef {{name: string, label: string, help: string, least: number, most: number, step: number}} Field
 */

/** The ranges are those of `GenerationConfig` (presets.py) and `LimitsConfig` (serve_config.py). @type {Field[]} */
export const FIELDS = [
  {
    name: "temperature",
    label: "Temperature",
    help: "0 always takes the likeliest word. 1 draws as the model says; above, the unlikely gains.",
    least: 0,
    most: 2,
    step: 0.05,
  },
  {
    name: "top_p",
    label: "Top-p",
    help: "Draws only from the likeliest words that together reach this probability. 1 is off.",
    least: 0.01,
    most: 1,
    step: 0.01,
  },
  {
    name: "top_k",
    label: "Top-k",
    help: "Draws only from so many of the likeliest words. 0 is off.",
    least: 0,
    most: 1000,
    step: 1,
  },
  {
    name: "max_tokens",
    label: "Longest answer",
    help: "In tokens; a word is one or two.",
    least: 1,
    most: 100_000,
    step: 1,
  },
  {
    name: "repetition_penalty",
    label: "Repetition penalty",
    help: "Above 1, words that the answer already has become less likely. 1 is off.",
    least: 0.1,
    most: 10,
    step: 0.05,
  },
  {
    name: "seed",
    label: "Seed",
    help: "The same number, question and settings give the same answer. Empty draws anew each time.",
    least: 0,
    most: 2 ** 32 - 1,
    step: 1,
  },
  {
    name: "num_beams",
    label: "Beams",
    help: "Above 1 searches for the most probable answer with so many tries at once; nothing is drawn, and it comes whole, not word by word.",
    least: 1,
    most: 10,
    step: 1,
  },
];

/** @returns {Record<string, number>} what was changed and is valid */
export function loadSettings() {
  const kept = parse(forGood.get(NAME) ?? "{}");
  const valid = FIELDS.filter(({ name }) => typeof kept[name] === "number" && !problemOf(name, String(kept[name])));
  return Object.fromEntries(valid.map(({ name }) => [name, kept[name]]));
}

/**
 * @param {string} text
 * @returns {Record<string, unknown>} none, and a remark, for what is no object
 */
function parse(text) {
  try {
    const value = JSON.parse(text);
    if (value !== null && typeof value === "object") return value;
  } catch {
    // the same remark
  }
  note("The settings that this browser kept cannot be read. The server's own hold until you set others.");
  return {};
}

/** @param {Record<string, number>} settings */
function keep(settings) {
  forGood.set(NAME, JSON.stringify(settings));
}

/**
 * @param {string} name
 * @param {string} text
 * @returns {string} what is wrong with it, "" for nothing
 */
function problemOf(name, text) {
  const field = FIELDS.find((each) => each.name === name);
  const value = Number(text);
  const whole = field.step === 1;
  const holds = Number.isFinite(value) && value >= field.least && value <= field.most;
  if (holds && (!whole || Number.isInteger(value))) return "";
  const kind = whole ? "A whole number" : "A number";
  return `${kind} from ${field.least} to ${field.most}, or empty.`;
}

/**
 * @param {Record<string, number>} settings
 * @returns {string} what the server would refuse, "" for nothing
 */
export function conflictOf(settings) {
  if (settings.num_beams > 1 && settings.temperature > 0) {
    return "Beams search and draw nothing: set the temperature to 0, or the beams to 1.";
  }
  return "";
}

/**
 * Builds the fields and keeps what is typed.
 * @param {(settings: Record<string, number>) => void} onChange also called once at the start
 */
export function startSettings(onChange) {
  const place = byId("settings-fields");
  const inputs = new Map(FIELDS.map((field) => [field.name, addField(place, field)]));

  function show() {
    const settings = loadSettings();
    for (const [name, input] of inputs) input.value = settings[name] ?? "";
  }

  function read() {
    const settings = {};
    for (const [name, input] of inputs) {
      const problem = check(name, input);
      if (input.value.trim() !== "" && !problem) settings[name] = Number(input.value);
    }
    keep(settings);
    tell(settings);
  }

  function tell(settings) {
    byId("settings-conflict").textContent = conflictOf(settings);
    onChange(settings);
  }

  place.addEventListener("input", read);
  byId("settings-reset").onclick = () => {
    for (const input of inputs.values()) input.value = "";
    read();
  };
  addEventListener("storage", (event) => {
    if (event.key !== NAME) return;
    show();
    tell(loadSettings());
  });
  show();
  tell(loadSettings());
}

/**
 * @param {string} name
 * @param {HTMLInputElement} input
 * @returns {string} its problem, which is also shown
 */
function check(name, input) {
  const empty = input.value.trim() === "" && !input.validity.badInput;
  const problem = empty ? "" : problemOf(name, input.validity.badInput ? "?" : input.value);
  input.setAttribute("aria-invalid", String(problem !== ""));
  byId(`error-${name}`).textContent = problem && `${problem} This one is not used.`;
  return problem;
}

/**
 * @param {HTMLElement} place
 * @param {Field} field
 * @returns {HTMLInputElement}
 */
function addField(place, { name, label, help, least, most, step }) {
  const input = make("input", { id: `set-${name}`, type: "number", min: least, max: most, step });
  input.placeholder = "default";
  input.inputMode = step === 1 ? "numeric" : "decimal";
  input.setAttribute("aria-describedby", `help-${name} error-${name}`);
  place.append(
    make("div", { className: "field" }, [
      make("label", { htmlFor: input.id, className: "field-label", textContent: label }),
      input,
      make("p", { id: `help-${name}`, className: "field-help", textContent: help }),
      make("p", { id: `error-${name}`, className: "field-error" }),
    ]),
  );
  return input;
}
