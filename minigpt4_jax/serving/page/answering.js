// For: one answer, from the request to its last word: waiting for a server that starts, streaming, stopping, timing.
// Not for: the document (view.js) nor the wire (api.js).

import { ApiFailure, complete, isReady, stream } from "./api.js";

/** @typedef {import("./chat.js").Answer} Answer */

const POLL_MS = 1500;

/**
 * Writes into `answer` until it is done, stopped or failed; never throws for those.
 * @param {Answer} answer
 * @param {object} body
 * @param {{key: string, signal: AbortSignal, 
 *         onChange: (what: "text" | "starting" | "sent" | "queued" | "begun", waiting?: number) => void}} how
 */
export async function write(answer, body, { key, signal, onChange }) {
  for (;;) {
    try {
      onChange("sent");
      await (body.stream ? writeStream : writeWhole)(answer, body, { key, signal, onChange });
      answer.state = "done";
    } catch (error) {
      if (signal.aborted) {
        answer.state = "stopped";
      } else if (isStarting(error, answer)) {
        onChange("starting");
        if (await becomesReady(signal)) continue;
        answer.state = "stopped";
      } else {
        fail(answer, error);
      }
    }
    return;
  }
}

/**
 * @param {unknown} error
 * @param {Answer} answer
 */
function isStarting(error, answer) {
  return error instanceof ApiFailure && error.status === 503 && answer.text === "";
}

/**
 * @param {AbortSignal} signal
 * @returns {Promise<boolean>} false when it was stopped before
 */
async function becomesReady(signal) {
  while (!signal.aborted) {
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    if (await isReady()) return !signal.aborted;
  }
  return false;
}

/**
 * @param {Answer} answer
 * @param {unknown} error
 */
export function fail(answer, error) {
  const known = error instanceof ApiFailure;
  if (!known) console.error(error);
  answer.state = "failed";
  answer.failure = {
    status: known ? error.status : -1,
    code: known ? error.code : null,
    param: known ? error.param : null,
    message: known ? error.message : "The page failed; its console has the reason.",
    retryAt: known && error.retryAfterS !== null ? Date.now() + 1000 * error.retryAfterS : null,
  };
}

/** @type {(answer: Answer, body: object, how: object) => Promise<void>} */
async function writeStream(answer, body, { key, signal, onChange }) {
  const sent = performance.now();
  let pieces = 0;
  let first = null;
  let usage = null;
  try {
    for await (const chunk of stream(body, { key, signal })) {
      if (chunk.queued !== undefined) {
        onChange("queued", chunk.queued);
        continue;
      }
      const choice = chunk.choices?.[0];
      if (chunk.usage) usage = chunk.usage;
      if (choice?.finish_reason) answer.finish = choice.finish_reason;
      if (!choice?.delta?.content) {
        onChange("begun");
        continue;
      }
      first ??= performance.now();
      pieces += 1;
      answer.text += choice.delta.content;
      onChange("text");
    }
  } finally {
    // An answer that was stopped has no usage: then the pieces that came stand for its tokens.
    answer.stats = statsOf({ sent, first, usage, tokens: usage?.completion_tokens ?? pieces });
  }
}

/** @type {(answer: Answer, body: object, how: object) => Promise<void>} */
async function writeWhole(answer, body, { key, signal, onChange }) {
  const sent = performance.now();
  const whole = await complete(body, { key, signal });
  answer.text = whole.choices[0].message.content;
  answer.finish = whole.choices[0].finish_reason;
  const usage = whole.usage;
  answer.stats = statsOf({ sent, first: null, usage, tokens: usage.completion_tokens });
  onChange("text");
}

/**
 * @param {{sent: number, first: number | null, usage: any, tokens: number}} counted times in milliseconds
 * @returns {import("./chat.js").Stats}
 */
function statsOf({ sent, first, usage, tokens }) {
  const now = performance.now();
  // The first token is there when the clock starts; beams show nothing before all is done.
  const writing = first === null ? now - sent : now - first;
  const written = first === null ? tokens : tokens - 1;
  return {
    firstMs: first === null ? null : first - sent,
    totalMs: now - sent,
    tokens,
    exact: usage !== null,
    perSecond: written > 0 && writing > 0 ? (1000 * written) / writing : null,
    used: usage === null ? null : usage.prompt_tokens + usage.completion_tokens,
  };
}
