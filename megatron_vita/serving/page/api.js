// What the page says to the server, and hears from it. Addresses are relative to the page.

export class ApiError extends Error {
  /** @param {number} status of the answer; 0: there was none */
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const GONE = "The server cannot be reached. It may have stopped, or the network is down.";
const BROKEN_OFF = "The connection ended before the answer was complete.";
const IN_WORDS = {
  401: "The server asks for an API key.",
  403: "The server does not allow this.",
  404: "The server does not know this address.",
  413: "The request is larger than the server takes.",
  429: "The server is busy: its queue is full.",
  503: "The server cannot answer now: it is starting, stopping, or has lost a process.",
};

/** What the server is and allows: {model, state, max_model_len, vision, api_key, limits}. */
export async function info() {
  const response = await request("info", {});
  return response.json();
}

async function request(address, options) {
  let response;
  try {
    response = await fetch(address, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(GONE);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let said;
  try {
    said = (await response.json()).error?.message;
  } catch {
    // A proxy in between answers in HTML.
  }
  if (said) return new ApiError(sentence(said), response.status);
  const message = IN_WORDS[response.status] ?? `The server failed (HTTP status ${response.status}).`;
  const seconds = Number(response.headers.get("retry-after"));
  return new ApiError(message + (seconds > 0 ? ` Try again in ${seconds} s.` : ""), response.status);
}

/** The server's words for a programmer as a sentence for a person: without the request's name, beginning with a capital. */
const sentence = (words) => words.replace(/^request:\d+: /, "").replace(/^[a-z]+(?= )/, (first) => first[0].toUpperCase() + first.slice(1));

/**
 * Asks, and yields what comes: {text}, {finish} and at last {usage}.
 *
 * @param {Blob} body JSON of a chat completions request that streams
 * @throws {ApiError} in words for people; AbortError when the signal says so
 */
export async function* ask(body, key, signal) {
  const headers = { "content-type": "application/json" };
  if (key) headers.authorization = `Bearer ${key}`;
  const response = await request("v1/chat/completions", { method: "POST", headers, body, signal });
  let whole = false;
  for await (const data of events(response)) {
    if (data === "[DONE]") return;
    let chunk;
    try {
      chunk = JSON.parse(data);
    } catch {
      throw new ApiError("The server sent what is no JSON.");
    }
    if (chunk.error) throw new ApiError(sentence(chunk.error.message ?? "the server failed while it answered."), chunk.error.status);
    const choice = chunk.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) {
      whole = true;
      yield { finish: choice.finish_reason };
    }
    if (chunk.usage) yield { usage: chunk.usage };
  }
  if (!whole) throw new ApiError(BROKEN_OFF);
}

/** Data of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(BROKEN_OFF);
  } finally {
    reader.cancel().catch(() => {});
  }
}
