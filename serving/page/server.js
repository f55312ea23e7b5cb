/** What the page asks of the server. */

const ROOT = new URL("../", import.meta.url);
let key = "";

/** The server's refusal: its HTTP status, its code, its message of one line, and whether the key is another by now. */
export class ServerError extends Error {
  constructor(status, code, message, outdated = false) {
    super(message);
    this.status = status;
    this.code = code;
    this.outdated = outdated;
  }
}

/** Use this API key from now on; it is kept in memory only. */
export function useKey(value) {
  key = value;
}

async function ask(path, { query = {}, body, accept = "application/json" } = {}) {
  const url = new URL(path, ROOT);
  for (const [name, value] of Object.entries(query)) if (value !== undefined) url.searchParams.set(name, value);
  const headers = { Accept: accept };
  const used = key;
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/octet-stream";
  let answer;
  try {
    answer = await fetch(url, { method: body ? "POST" : "GET", headers, body, cache: "no-store" });
  } catch {
    throw new ServerError(0, "unreachable", "server: found no answer, wanted one: is it running?");
  }
  if (answer.ok) return answer;
  let error = {};
  try {
    error = (await answer.json()).error ?? {};
  } catch {
    // A proxy's page instead of the server's envelope.
  }
  throw new ServerError(answer.status, error.code, error.message ?? `server: answered ${answer.status}`, used !== key);
}

/** What is loaded. */
export async function askModels() {
  return (await (await ask("v1/models")).json()).models;
}

/** The runs of equal units in a recording, and how long the answer took in milliseconds. */
export async function askUnits(body, model) {
  const started = performance.now();
  const answer = await ask("v1/units", { query: { deduplicate: true, model }, body });
  const [result] = (await answer.json()).results;
  return { ...result, latency: performance.now() - started };
}

/** The images that a recording speaks of, the best first: {id, rank, score, texts, thumbnail} each. */
export async function askImages(body, model, top) {
  const answer = await ask("v1/images/search", { query: { top, thumbnails: true, model }, body });
  return (await answer.json()).results[0].images;
}

/** The frames of a recording's first `seconds`, every dimension with mean 0 and variance 1: {frames, dim}. */
export async function askFrames(body, model, seconds) {
  const query = { model, end: seconds, normalise: "utterance" };
  return readNpy(await (await ask("v1/embeddings", { query, body, accept: "application/x-npy" })).arrayBuffer());
}

function readNpy(buffer) {
  const start = 10 + new DataView(buffer).getUint16(8, true);
  const head = new TextDecoder().decode(new Uint8Array(buffer, 10, start - 10));
  const shape = /'shape': \((\d+), (\d+)\)/.exec(head);
  if (!shape || !head.includes("'<f4'")) throw new ServerError(0, "bad_answer", "server: found no float32 frames");
  return { frames: new Float32Array(buffer.slice(start)), dim: Number(shape[2]) };
}

/**
 * Stream 16 kHz samples, 16 bits each, and get units as they become final.
 * on: {ready(latencyMs), units(startMs, units), error(ServerError)}, called as messages come.
 */
export class Stream {
  constructor(model, on) {
    const url = new URL("v1/stream", ROOT);
    url.protocol = url.protocol.replace("http", "ws");
    this.waiting = [];
    this.ready = false;
    this.closed = new Promise((resolve) => (this.resolve = resolve));
    this.socket = new WebSocket(url, ["sonorant", ...(key ? [`sonorant.key.${key}`] : [])]);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => this.socket.send(JSON.stringify({ format: "s16le", rate: 16000, model }));
    this.socket.onmessage = ({ data }) => this.take(JSON.parse(data), on);
    this.socket.onclose = () => {
      if (!this.done) on.error(new ServerError(0, "closed", "live: found the stream closed, wanted units"));
      this.done = true;
      this.resolve();
    };
  }

  take(message, on) {
    if (message.type === "ready") {
      this.ready = true;
      on.ready(message.latency_ms);
      for (const part of this.waiting.splice(0)) this.socket.send(part);
    } else if (message.type === "units") {
      on.units(message.start_ms, message.units);
    } else if (message.type === "error") {
      this.done = true;
      on.error(new ServerError(0, message.error.code, message.error.message));
      this.socket.close();
    } else if (message.type === "done") {
      this.done = true;
      this.socket.close();
    }
  }

  send(part) {
    if (this.done) return;
    if (this.ready) this.socket.send(part);
    else this.waiting.push(part);
  }

  /** Say that no samples follow; resolves once all units are there, or the stream has failed. */
  end() {
    this.send(JSON.stringify({ type: "end" }));
    return this.closed;
  }
}
