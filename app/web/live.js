/**
 * The live WebSocket of fewstep, without a page: words in, pictures out.
 *
 * ```js
 * const live = new LiveClient("wss://example.org/v1/live");
 * live.on("picture", (picture) => {
 *   show(picture.header.type, picture.image); // "preview" or "final", and a Blob
 *   live.ack(picture);
 * });
 * live.connect();
 * live.generate({ prompt: "a red apple on a blue background", previews: true });
 * ```
 *
 * Where the service asks for keys, a page brings a short-lived token. Its own backend gets one with
 * `POST /v1/live/tokens`; the client asks for it whenever it connects, and again before it ends:
 *
 * ```js
 * const token = async () => (await fetch("/my-backend/live-token", { method: "POST" })).text();
 * const live = new LiveClient("wss://example.org/v1/live", { token });
 * ```
 *
 * A string instead of a function is one token for good: once it has ended, so has the connection.
 *
 * Call `generate` at every change: the server draws the newest words and drops what they replace. The client
 * reconnects by itself and then sends its newest unfinished request again. docs/live-protocol.md has every frame.
 *
 * @module
 */

export const SUBPROTOCOL = "fewstep.live.v1";
/** Before a token, offered beside the subprotocol. */
const AUTH_PREFIX = "fewstep.auth.";

/** The key or token is missing, wrong, or has ended. */
const AUTH_CLOSE_CODE = 4401;
/** Close codes after which another try can't succeed by itself. */
const FINAL_CLOSE_CODES = new Set([1002, 1003, 1007, 1008, AUTH_CLOSE_CODE]);
/** The server closed a connection that nobody used: the next request opens a new one. */
const IDLE_CLOSE_CODE = 4408;
/** Our message was too big: sending it again would end the same way. */
const TOO_BIG_CLOSE_CODE = 1009;

const FIRST_DELAY_MS = 250;
const LONGEST_DELAY_MS = 10_000;
/** A server answers every request at once, if only with "queued". Silence for this long means a dead connection. */
const LONGEST_SILENCE_MS = 8_000;
/** The part of a token's time after which the next one is fetched. */
const REFRESH_SHARE = 0.7;
const REFRESH_RETRY_MS = 2_000;
/** With more than this unsent the network is behind: requests wait here, where only the newest is kept. */
const MAX_BUFFERED_BYTES = 8_192;
const BUFFER_CHECK_MS = 20;

/**
 * What to draw: the fields of `POST /v1/generations`, and `refine`.
 *
 * @typedef {object} LiveRequest
 * @property {string} prompt
 * @property {string} [model]
 * @property {number} [seed] without one, the connection keeps the seed that `ready` told
 * @property {boolean} [previews]
 * @property {number} [num_images]
 * @property {{after_ms?: number, num_inference_steps?: number, decoder?: string}} [refine]
 */

/**
 * @typedef {object} PictureHeader
 * @property {"preview" | "final"} type
 * @property {number} frame counts up within one connection
 * @property {number} seq the request that it answers
 * @property {string} request_id
 * @property {number} index
 * @property {number} step
 * @property {number} num_inference_steps
 * @property {number} seed
 * @property {string} format "jpeg", "webp" or "png"
 * @property {number} width
 * @property {number} height
 * @property {boolean} refined the better picture after a pause
 * @property {Record<string, number | number[]>} [timings] milliseconds; with the final
 */

/**
 * @typedef {object} LivePicture
 * @property {PictureHeader} header
 * @property {Blob} image
 * @property {number} connection counts the connections of this client; each numbers its frames from the start
 */

/**
 * @callback TokenSource
 * @returns {string | Promise<string>} a fresh live token
 */

/**
 * @typedef {object} Pending a request, until all its pictures have come
 * @property {number} seq
 * @property {LiveRequest} request
 * @property {Set<number>} finals indices of the pictures that came
 * @property {Set<number>} refined indices of the better ones
 */

/** @typedef {"idle" | "connecting" | "live" | "waiting" | "closed"} LiveState */

/**
 * Events, heard by `on(type, listener)`:
 *
 * | type | what the listener gets |
 * | --- | --- |
 * | `state` | `{state, retryInMs?, reason?, code?}`, at every change of `state`; `code` is the close code |
 * | `ready`, `authenticated`, `queued`, `superseded`, `cancelled`, `error` | the server's frame |
 * | `picture` | `LivePicture`; answer with `ack(picture)` once it is shown or dropped |
 */
export class LiveClient extends EventTarget {
  /** @type {LiveState} */
  state = "idle";
  /** @type {string} */
  #url;
  /** @type {WebSocket | null} */
  #socket = null;
  #connection = 0;
  #seq = 0;
  /** The newest request, until it has ended. @type {Pending | null} */
  #newest = null;
  #failures = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #retryTimer;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #silenceTimer;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #bufferTimer;
  /** @type {TokenSource | string | undefined} */
  #tokenSource;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #refreshTimer;
  /** The connection that waits for its token, if one does. @type {object | null} */
  #opening = null;

  /**
   * @param {string | URL} url of `/v1/live`, with `ws:` or `wss:`
   * @param {{token?: TokenSource | string}} [options]
   */
  constructor(url, { token } = {}) {
    super();
    this.#url = String(url);
    this.#tokenSource = token;
  }

  /**
   * @param {string} type
   * @param {(detail: any) => void} listener
   */
  on(type, listener) {
    this.addEventListener(type, (event) => listener(/** @type {CustomEvent} */ (event).detail));
  }

  /** Opens the connection, now. Does nothing while there is one. */
  connect() {
    if (this.#socket || this.#opening) return;
    clearTimeout(this.#retryTimer);
    if (typeof this.#tokenSource === "string") this.#open([SUBPROTOCOL, AUTH_PREFIX + this.#tokenSource]);
    else if (this.#tokenSource) this.#openWithToken(this.#tokenSource);
    else this.#open([SUBPROTOCOL]);
  }

  /** @param {TokenSource} source */
  async #openWithToken(source) {
    const opening = (this.#opening = {});
    this.#setState("connecting");
    this.#expectAnswer();
    try {
      const token = await source();
      if (this.#opening === opening) this.#open([SUBPROTOCOL, AUTH_PREFIX + token]);
    } catch (error) {
      if (this.#opening === opening) this.#lost(`no token: ${error}`);
    }
  }

  /** @param {string[]} subprotocols */
  #open(subprotocols) {
    if (this.state !== "connecting") this.#setState("connecting");
    this.#connection += 1;
    const socket = new WebSocket(this.#url, subprotocols);
    this.#opening = null;
    socket.binaryType = "arraybuffer";
    socket.addEventListener("message", ({ data }) => this.#socket === socket && this.#receive(data));
    socket.addEventListener("close", (event) => this.#socket === socket && this.#closed(event));
    this.#socket = socket;
    this.#expectAnswer();
  }

  /** Closes the connection for good; its work is cancelled. */
  close() {
    this.#newest = null;
    this.#drop();
    this.#setState("closed");
  }

  /**
   * Asks for a picture. It replaces every request before it, on this side and on the server.
   *
   * @param {LiveRequest} request
   * @returns {number} its `seq`
   */
  generate(request) {
    this.#newest = { seq: ++this.#seq, request, finals: new Set(), refined: new Set() };
    if (this.state === "live") this.#sendNewest();
    else if (this.state !== "waiting") this.connect();
    return this.#seq;
  }

  /** Takes back whatever is not drawn yet. */
  cancel() {
    this.#newest = null;
    if (this.state === "live") this.#send({ type: "cancel" });
  }

  /**
   * Says that a picture was shown or dropped. The server keeps at most two pictures on the way.
   *
   * @param {LivePicture} picture
   */
  ack({ header, connection }) {
    if (this.state === "live" && connection === this.#connection) this.#send({ type: "ack", frame: header.frame });
  }

  /** @param {object} message */
  #send(message) {
    this.#socket?.send(JSON.stringify(message));
  }

  #sendNewest() {
    clearTimeout(this.#bufferTimer);
    if (!this.#newest || !this.#socket) return;
    if (this.#socket.bufferedAmount > MAX_BUFFERED_BYTES) {
      this.#bufferTimer = setTimeout(() => this.#sendNewest(), BUFFER_CHECK_MS);
      return;
    }
    this.#send({ type: "generate", seq: this.#newest.seq, ...this.#newest.request });
    this.#expectAnswer();
  }

  #expectAnswer() {
    clearTimeout(this.#silenceTimer);
    this.#silenceTimer = setTimeout(() => this.#lost("no answer"), LONGEST_SILENCE_MS);
  }

  /** @param {string | ArrayBuffer} data */
  #receive(data) {
    clearTimeout(this.#silenceTimer);
    if (typeof data !== "string") return this.#receivePicture(data);
    const message = JSON.parse(data);
    if (message.type === "ready") this.#ready();
    if (message.type === "ready" || message.type === "authenticated") this.#refreshLater(message.token_expires_in_s);
    if (message.type === "error" || message.type === "cancelled") this.#ended(message.seq);
    this.#emit(message.type, message);
  }

  /** @param {ArrayBuffer} data */
  #receivePicture(data) {
    const picture = parsePicture(data);
    if (picture.header.type === "final") this.#arrived(picture.header);
    this.#emit("picture", { ...picture, connection: this.#connection });
  }

  #ready() {
    this.#failures = 0;
    this.#setState("live");
    this.#sendNewest();
  }

  /** @param {number | null} [expiresInS] null: nothing ends by itself */
  #refreshLater(expiresInS) {
    clearTimeout(this.#refreshTimer);
    if (typeof this.#tokenSource !== "function" || !expiresInS) return;
    this.#refreshTimer = setTimeout(() => this.#refresh(), expiresInS * 1000 * REFRESH_SHARE);
  }

  /** A fresh token over the open connection. Where none comes in time, the server closes and a new try begins. */
  async #refresh() {
    const socket = this.#socket;
    const source = /** @type {TokenSource} */ (this.#tokenSource);
    try {
      const token = await source();
      if (socket && this.#socket === socket) this.#send({ type: "auth", token });
    } catch {
      if (socket && this.#socket === socket) this.#refreshTimer = setTimeout(() => this.#refresh(), REFRESH_RETRY_MS);
    }
  }

  /**
   * A request that is to be refined is over when its better pictures have come.
   *
   * @param {PictureHeader} header
   */
  #arrived({ seq, index, refined }) {
    if (this.#newest?.seq !== seq) return;
    const { request, ...came } = this.#newest;
    (refined ? came.refined : came.finals).add(index);
    const wanted = request.refine ? came.refined : came.finals;
    if (wanted.size >= (request.num_images ?? 1)) this.#newest = null;
  }

  /** Whether somebody still waits for a picture. A better one that the server leaves out is no reason to come back. */
  get #isWaitedFor() {
    return this.#newest !== null && this.#newest.finals.size < (this.#newest.request.num_images ?? 1);
  }

  /** @param {number} seq */
  #ended(seq) {
    if (this.#newest?.seq === seq) this.#newest = null;
  }

  /** @param {CloseEvent} event */
  #closed({ code, reason }) {
    const canRenew = typeof this.#tokenSource === "function" && this.state === "live";
    const hasEndedToken = code === AUTH_CLOSE_CODE && canRenew;
    this.#drop();
    if (code === TOO_BIG_CLOSE_CODE) this.#newest = null;
    const isFinal = FINAL_CLOSE_CODES.has(code) && !hasEndedToken;
    if (isFinal) this.#setState("closed", { reason: reason || `code ${code}`, code });
    else if (code === IDLE_CLOSE_CODE && !this.#isWaitedFor) this.#rest(code);
    else this.#retry(reason, wishedPauseMs(reason), code);
  }

  /** @param {number} code */
  #rest(code) {
    this.#newest = null;
    this.#setState("idle", { code });
  }

  /** @param {string} reason */
  #lost(reason) {
    this.#drop();
    this.#retry(reason);
  }

  /**
   * @param {string} reason
   * @param {number} [atLeastMs]
   * @param {number} [code]
   */
  #retry(reason, atLeastMs = 0, code = undefined) {
    const retryInMs = Math.max(atLeastMs, backoffMs(this.#failures++));
    this.#retryTimer = setTimeout(() => this.connect(), retryInMs);
    this.#setState("waiting", { retryInMs, reason, code });
  }

  #drop() {
    clearTimeout(this.#retryTimer);
    clearTimeout(this.#silenceTimer);
    clearTimeout(this.#refreshTimer);
    clearTimeout(this.#bufferTimer);
    this.#opening = null;
    const socket = this.#socket;
    this.#socket = null;
    socket?.close();
  }

  /**
   * @param {LiveState} state
   * @param {{retryInMs?: number, reason?: string, code?: number}} [more]
   */
  #setState(state, more = {}) {
    this.state = state;
    this.#emit("state", { state, ...more });
  }

  /**
   * @param {string} type
   * @param {object} detail
   */
  #emit(type, detail) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}

/**
 * Takes a binary frame apart: 4 bytes header length (big-endian), the header as JSON, the image file.
 *
 * @param {ArrayBuffer} data
 * @returns {{header: PictureHeader, image: Blob}}
 */
export function parsePicture(data) {
  const length = new DataView(data).getUint32(0);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  return { header, image: new Blob([new Uint8Array(data, 4 + length)], { type: `image/${header.format}` }) };
}

/**
 * Whether one picture may take the place of another: it answers a later request, or came later for the same one. After
 * a reconnect a request is drawn again: its previews don't take the place of its picture.
 *
 * @param {LivePicture} picture
 * @param {LivePicture | null} shown
 */
export function isNewer(picture, shown) {
  if (!shown) return true;
  if (picture.header.seq !== shown.header.seq) return picture.header.seq > shown.header.seq;
  if (picture.header.type === "preview" && shown.header.type === "final") return false;
  if (picture.connection !== shown.connection) return picture.connection > shown.connection;
  return picture.header.frame > shown.header.frame;
}

/**
 * The pause before try number `failures + 1`: doubling, with jitter so that many clients don't come back at once.
 *
 * @param {number} failures
 */
export function backoffMs(failures) {
  return Math.min(LONGEST_DELAY_MS, FIRST_DELAY_MS * 2 ** failures) * (0.5 + Math.random() / 2);
}

/**
 * A server that goes away, or is full, closes with a reason like `{"reconnect_in_ms": 1000}`.
 *
 * @param {string} reason
 * @returns {number}
 */
function wishedPauseMs(reason) {
  try {
    return Number(JSON.parse(reason).reconnect_in_ms) || 0;
  } catch {
    return 0;
  }
}
