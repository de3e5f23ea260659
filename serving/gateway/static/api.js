// Calls of the gateway's API. Every failure is an Error whose message is for the reader.

export class ApiFailure extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function call(path, key, options = {}) {
  const headers = new Headers(options.body ? { "Content-Type": "application/json" } : {});
  try {
    if (key) headers.set("Authorization", `Bearer ${key}`);
  } catch {
    throw new ApiFailure("The API key holds characters that no key has.", 401);
  }
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiFailure("The gateway cannot be reached.");
  }
  if (!response.ok) throw new ApiFailure(await explain(response), response.status);
  return response;
}

async function explain(response) {
  let message = `The gateway answered with status ${response.status}.`;
  try {
    message = sentence((await response.json()).error.message);
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  return message;
}

export function sentence(text) {
  const capital = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}

export async function describe(key) {
  return (await call("/v1/page", key)).json();
}

export async function vote(key, record) {
  return (await call("/v1/votes", key, { method: "POST", body: JSON.stringify(record) })).json();
}

// Streams an answer: onText gets each piece. Resolves to what is known at its end.
export async function answer(key, request, signal, onText) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await call("/v1/chat/completions", key, { method: "POST", body, signal });
  const end = { version: "", reason: null, usage: null };
  let done = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      done = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiFailure(sentence(chunk.error.message));
    end.version = chunk.system_fingerprint;
    end.usage = chunk.usage ?? end.usage;
    for (const choice of chunk.choices) {
      if (choice.delta.content) onText(choice.delta.content);
      end.reason = choice.finish_reason ?? end.reason;
    }
  }
  if (!done) throw new ApiFailure("The answer broke off.");
  return end;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiFailure("The answer broke off.");
      }
      if (piece.done) return;
      const blocks = (pending + piece.value).split("\n\n");
      pending = blocks.pop();
      for (const block of blocks) {
        if (block.startsWith("data: ")) yield block.slice(6);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
