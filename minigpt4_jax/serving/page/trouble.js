// For: a refusal in words for people, and what to do about it.
// Not for: what refusals there are (the server's errors.py).

/** @typedef {"retry" | "edit" | "new" | "key" | "settings"} Action */

/** How the request calls the setting "Longest answer". */
const LONGEST = ["max_tokens", "max_completion_tokens"];

/**
 * @param {NonNullable<import("./chat.js").Answer["failure"]>} failure
 * @returns {{title: string, text: string, actions: Action[]}}
 */
export function troubleOf({ status, code, param, message }) {
  if (code === "context_length_exceeded" && LONGEST.includes(param)) {
    const title = "The longest answer of your settings has no room";
    return { title, text: message, actions: ["settings", "retry"] };
  }
  if (code === "context_length_exceeded") {
    return { title: "This chat is longer than the model can read", text: message, actions: ["new"] };
  }
  if (status === 0) return { title: "No connection to the server", text: message, actions: ["retry"] };
  if (status === 401) return { title: "The server asks for an API key", text: message, actions: ["key"] };
  if (status === 429) return { title: "The server is busy", text: message, actions: ["retry"] };
  if (status === 408 || status === 504) return { title: "It took too long", text: message, actions: ["retry"] };
  if (status === 413) return { title: "Too large for one request", text: message, actions: ["edit"] };
  if (status >= 400 && status < 500) return { title: "The server refused this question", text: message, actions: ["edit"] };
  return { title: "Something went wrong", text: message, actions: ["retry"] };
}
