// For: a request as a command or a program that sends it again. Pictures are cut short for curl, and read from their
// files for Python; the key is never shown. Not for: sending.

import { openDialog } from "./dialogs.js";
import { byId, copyFrom } from "./dom.js";

const SHOWN_CHARS = 48;

/** What OpenAI's client does not know goes through its `extra_body`. */
const OWN_FIELDS = ["top_k", "repetition_penalty", "num_beams"];

/**
 * @typedef {{body: any, names: string[]}} Asked a request and the names of its pictures, in order
 */

/** @param {Asked} asked */
export function showCode(asked) {
  const base = new URL("v1", location.href).href;
  const show = () => {
    const language = document.querySelector("input[name=language]:checked").value;
    byId("code-text").textContent = (language === "curl" ? toCurl : toPython)(asked, base);
  };
  for (const radio of document.querySelectorAll("input[name=language]")) radio.onchange = show;
  byId("code-copy").onclick = () => copyFrom(byId("code-copy"), byId("code-text").textContent);
  show();
  openDialog("code");
}

/**
 * @param {Asked} asked
 * @param {string} base such as http://127.0.0.1:8000/v1
 */
function toCurl({ body }, base) {
  const short = JSON.stringify(body, (key, value) => (key === "url" ? shorten(value) : value), 2);
  const cut = short.includes("…") ? "# Each … stands for the rest of a picture in base64.\n" : "";
  return [
    `${cut}curl ${base}/chat/completions \\`,
    '  -H "Authorization: Bearer $MINIGPT4_API_KEY" \\',
    '  -H "Content-Type: application/json" \\',
    `  -d '${short.replaceAll("'", "'\\''")}'`,
  ].join("\n");
}

/** @param {string} url */
function shorten(url) {
  return url.length > SHOWN_CHARS ? `${url.slice(0, SHOWN_CHARS)}…` : url;
}

/**
 * @param {Asked} asked
 * @param {string} base
 */
function toPython({ body, names }, base) {
  const { model, messages, stream, stream_options: _usage, ...settings } = body;
  const own = Object.entries(settings).filter(([name]) => OWN_FIELDS.includes(name));
  const known = Object.entries(settings).filter(([name]) => !OWN_FIELDS.includes(name));
  const lines = ["import os", "", "from openai import OpenAI", ""];
  if (names.length > 0) lines.splice(0, 1, "import base64", "import os", "from pathlib import Path");
  lines.push(`client = OpenAI(base_url=${python(base)}, api_key=os.environ.get("MINIGPT4_API_KEY", "none"))`, "");
  if (names.length > 0) lines.push(...PICTURE, "");
  lines.push("answer = client.chat.completions.create(", `    model=${python(model)},`);
  lines.push(`    messages=${pythonMessages(messages, names)},`);
  for (const [name, value] of known) lines.push(`    ${name}=${python(value)},`);
  if (own.length > 0) lines.push(`    extra_body=${python(Object.fromEntries(own))},`);
  if (stream) lines.push("    stream=True,");
  return [...lines, ")", ...(stream ? PRINT_STREAM : PRINT_WHOLE)].join("\n");
}

const PICTURE = [
  "",
  "def picture(path, kind):",
  "    data = base64.b64encode(Path(path).read_bytes()).decode()",
  '    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}',
  "",
];
const PRINT_STREAM = [
  "for chunk in answer:",
  "    if chunk.choices:",
  '        print(chunk.choices[0].delta.content or "", end="", flush=True)',
];
const PRINT_WHOLE = ["print(answer.choices[0].message.content)"];

/**
 * @param {any[]} messages
 * @param {string[]} names
 */
function pythonMessages(messages, names) {
  const left = [...names];
  const lines = messages.map(({ role, content }) => {
    const parts = Array.isArray(content) ? `[${content.map((part) => pythonPart(part, left)).join(", ")}]` : python(content);
    return `        {"role": ${python(role)}, "content": ${parts}},`;
  });
  return `[\n${lines.join("\n")}\n    ]`;
}

/**
 * @param {any} part
 * @param {string[]} left names of the pictures that are still to come
 */
function pythonPart(part, left) {
  if (part.type !== "image_url") return python(part);
  const kind = part.image_url.url.slice("data:".length).split(";")[0];
  return `picture(${python(left.shift())}, ${python(kind)})`;
}

/** JSON of strings, numbers and flat objects is Python, too. @param {unknown} value */
function python(value) {
  return JSON.stringify(value);
}
