// For: the server's public API: JSON, server-sent events, and refusals as one class.
// Not for: what a request says (requests.js) nor what is done about a refusal (answering.js, view.js).

/** A refusal: what the server said, or status 0 where it said nothing at all. */
export class ApiFailure extends Error {
  /**
   * @param {number} status HTTP status; 0 when no answer came
   * @param {string} message
   * @param {{code?: string | null, param?: string | null, retryAfterS?: number | null}} [more] as the server's errors.py
   */
  constructor(status, message, { code = null, param = null, retryAfterS = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.param = param;
    this.retryAfterS = retryAfterS;
  }
}

/**
 * @typedef {{key: string, signal?: AbortSignal}} Access the API key ("" for none) and what stops the request
 */

/**
 * @param {Access} access
 * @returns {Promise<{id: string, max_model_len?: number}[]>} What the server serves.
 */
export async function listModels(access) {
  const response = await send("v1/models", { method: "GET" }, access);
  return (await response.json()).data;
}

/** @returns {Promise<boolean>} Whether the server takes questions now. */
export async function isReady() {
  try {
    return (await fetch("ready", { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

/**
 * A whole answer at once.
 * @param {object} body
 * @param {Access} access
 */
export async function complete(body, access) {
  const response = await post(body, access);
  return response.json();
}

/**
 * The chunks of a streamed answer as they come; before them `{queued: N}` if it waits for a slot, as N requests do then.
 * @param {object} body
 * @param {Access} access
 * @returns {AsyncGenerator<any>}
 */
export async function* stream(body, access) {
  const response = await post(body, access);
  let ended = false;
  for await (const event of events(response.body)) {
    const queued = /^: queued (\d+)$/m.exec(event)?.[1];
    if (queued !== undefined) yield { queued: Number(queued) };
    const data = dataOf(event);
    if (!data) continue;
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiFailure(500, chunk.error.message, chunk.error);
    yield chunk;
  }
  if (!ended) throw new ApiFailure(0, "The connection ended in the middle of the answer.");
}

/**
 * @param {object} body
 * @param {Access} access
 */
function post(body, access) {
  const headers = { "Content-Type": "application/json" };
  return send("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body) }, access);
}

/**
 * @param {string} path below the page's own address
 * @param {RequestInit & {headers?: Record<string, string>}} options
 * @param {Access} access
 */
async function send(path, options, { key, signal }) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, signal, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiFailure(0, "The server cannot be reached.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/**
 * @param {Response} response
 * @returns {Promise<ApiFailure>}
 */
async function refusal(response) {
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const retryAfterS = Number.isNaN(seconds) ? null : seconds;
  try {
    const { error } = await response.json();
    return new ApiFailure(response.status, error.message, { code: error.code, param: error.param, retryAfterS });
  } catch {
    // A proxy's page, or nothing: there is only the status to tell.
    return new ApiFailure(response.status, `The server answered ${response.status}.`, { retryAfterS });
  }
}

/**
 * The lines of each event (https://html.spec.whatwg.org/multipage/server-sent-events.html). `EventSource` cannot POST.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string>}
 */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split(/\r?\n\r?\n/);
      rest = parts.pop() ?? "";
      yield* parts;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiFailure) throw error;
    throw new ApiFailure(0, "The connection ended in the middle of the answer.");
  } finally {
    reader.cancel().catch(() => {}); // it is over either way: a broken stream cannot be cancelled
  }
}

/**
 * @param {string} event the lines of one event
 * @returns {string} Its data; "" for a comment that keeps the connection open.
 */
function dataOf(event) {
  return event
    .split(/\r?\n/)
    .filter((line) => line.startsWith("data:"))
    .map((line) => line.slice(5).trimStart())
    .join("\n");
}
