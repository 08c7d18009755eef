// For: a refusal in words for people, and the one thing to do about it.
// Not for: what refusals there are (the server's errors.py).

/**
 * @param {NonNullable<import("./chat.js").Answer["failure"]>} failure
 * @returns {{title: string, text: string, action: "retry" | "edit" | "new" | "key"}}
 */
export function troubleOf({ status, code, message }) {
  if (code === "context_length_exceeded") {
    return { title: "This chat is longer than the model can read", text: message, action: "new" };
  }
  if (status === 0) return { title: "No connection to the server", text: message, action: "retry" };
  if (status === 401) return { title: "The server asks for an API key", text: message, action: "key" };
  if (status === 429) return { title: "The server is busy", text: message, action: "retry" };
  if (status === 408 || status === 504) return { title: "It took too long", text: message, action: "retry" };
  if (status === 413) return { title: "Too large for one request", text: message, action: "edit" };
  if (status >= 400 && status < 500) return { title: "The server refused this question", text: message, action: "edit" };
  return { title: "Something went wrong", text: message, action: "retry" };
}
