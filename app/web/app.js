/** The live page: wires the prompt box, LiveClient and the picture together. */

import { LiveClient, isNewer } from "./live.js";

/** @typedef {import("./live.js").LivePicture} LivePicture */
/** @typedef {{at: number, words: string}} Asked when the key was pressed, and for which words */

const EXAMPLES_SHOWN = 6;
/** Longer prompts are set in smaller type. */
const LONG_PROMPT_CHARS = 75;
const MODELS_RETRY_MS = 2_000;
/** A screen reader hears of a picture only after this pause in typing. */
const SPEAK_AFTER_MS = 900;
/** Small pictures are enlarged on the page, which shows JPEG's blocks; as PNG they cost next to nothing. */
const PNG_UP_TO_PIXELS = 128 * 128;

/** What each stage of the server's timings is called here, and what it is, in the order of their occurrence. */
const STAGES = [
  ["queue_ms", "Queue", "Waiting for a worker"],
  ["text_ms", "Text", "Reading the prompt"],
  ["denoise_ms", "Denoise", "All steps of the model"],
  ["decode_ms", "Decode", "From the model's numbers to pixels; with a safety checker, its look at them"],
  ["encode_ms", "Encode", "From pixels to a file"],
  ["rest_ms", "Network", "Everything else: network, browser, screen"],
];

/**
 * Errors that pass by themselves, in plain words; others are shown as the server words them.
 *
 * @type {Record<string, string>}
 */
const PASSING_ERRORS = {
  queue_full: "Many people are drawing right now. Trying again…",
  model_not_ready: "The model is still warming up. Trying again…",
  queue_unavailable: "The service has lost its queue for a moment. Trying again…",
  worker_lost: "That picture was lost with its worker. Trying again…",
};
const RETRY_AFTER_MS = 1_000;

/**
 * @template {HTMLElement} T
 * @param {string} id
 * @returns {T}
 */
const byId = (id) => /** @type {T} */ (document.getElementById(id));

const prompt = /** @type {HTMLTextAreaElement} */ (byId("prompt"));
const seedBox = /** @type {HTMLInputElement} */ (byId("seed"));
const lock = byId("lock");
const modelBox = /** @type {HTMLSelectElement} */ (byId("model"));
const stage = byId("stage");
const canvas = /** @type {HTMLCanvasElement} */ (byId("picture"));
const steps = /** @type {HTMLProgressElement} */ (byId("steps"));
const download = /** @type {HTMLAnchorElement} */ (byId("download"));

const live = new LiveClient(new URL("/v1/live", location.href.replace(/^http/, "ws")));

/** Ready models by name, as `/v1/models` tells them. @type {Map<string, any>} */
const models = new Map();
/** The seed that requests carry, so that it outlives a connection, which has one of its own. */
let seed = 0;
/** Requests under way, by `seq`. @type {Map<number, Asked>} */
const asked = new Map();
/** The picture on the page. @type {(LivePicture & {bitmap: ImageBitmap}) | null} */
let shown = null;
/** The newest request. */
let newestSeq = 0;

// Words in

/** @param {number} [at] when the person acted, on the page's clock */
function generate(at = performance.now()) {
  clearTimeout(retryTimer);
  prompt.classList.toggle("long", prompt.value.length > LONG_PROMPT_CHARS);
  const words = prompt.value.trim();
  if (!words) return forget();
  if (!isLocked()) setSeed(randomSeed());
  newestSeq = live.generate(request(words));
  asked.set(newestSeq, { at, words });
}

/** @param {string} words */
function request(words) {
  const model = models.get(modelBox.value);
  const isSmall = model && pixels(model.default_size) <= PNG_UP_TO_PIXELS;
  return {
    prompt: words,
    previews: true,
    seed,
    ...(model && { model: model.id }),
    ...(isSmall && { output_format: "png" }),
  };
}

/** @param {string} size as in "512x512" */
function pixels(size) {
  const [width, height] = size.split("x").map(Number);
  return width * height;
}

/** An empty box asks for nothing. */
function forget() {
  live.cancel();
  asked.clear();
  say("");
}

/** @param {string} words */
function write(words) {
  prompt.value = words;
  prompt.focus();
  generate();
}

// Pictures out

live.on("picture", async (picture) => {
  try {
    await show(picture);
  } finally {
    live.ack(picture);
  }
});

/**
 * Decodes first and swaps then, between two frames of the screen: nothing flickers, and nothing older comes back.
 *
 * @param {LivePicture} picture
 */
async function show(picture) {
  const bitmap = await createImageBitmap(picture.image);
  await nextScreenFrame();
  if (!isNewer(picture, shown)) return bitmap.close();
  shown?.bitmap.close();
  shown = { ...picture, bitmap };
  paint();
  const { header } = picture;
  const of = asked.get(header.seq);
  canvas.setAttribute("aria-label", of?.words ?? prompt.value);
  steps.max = header.num_inference_steps;
  steps.value = header.step;
  stage.dataset.state = header.type;
  stage.dataset.seq = String(header.seq);
  if (header.type === "final") finish(picture, of);
}

/**
 * @param {LivePicture} picture
 * @param {Asked | undefined} of
 */
function finish(picture, of) {
  const { header } = picture;
  if (header.seq === newestSeq) say("");
  offerDownload(picture, of?.words ?? "picture");
  if (!of) return;
  const latencyMs = performance.now() - of.at;
  showLatency(latencyMs, header.timings ?? {});
  speakLater(`Picture of ${of.words}, after ${Math.round(latencyMs)} milliseconds`);
  for (const seq of asked.keys()) if (seq <= header.seq) asked.delete(seq);
}

/** A hidden page gets no screen frames, but its pictures still want their acknowledgement. */
function nextScreenFrame() {
  if (document.hidden) return Promise.resolve();
  return new Promise((resolve) => requestAnimationFrame(resolve));
}

/** Draws the picture as large as the stage, smoothly. */
function paint() {
  if (!shown) return;
  const { bitmap } = shown;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const scale = Math.min(canvas.width / bitmap.width, canvas.height / bitmap.height);
  const [width, height] = [bitmap.width * scale, bitmap.height * scale];
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
}

new ResizeObserver(([{ contentRect }]) => {
  const side = Math.round(contentRect.width * devicePixelRatio);
  if (!side || side === canvas.width) return;
  canvas.width = canvas.height = side;
  paint();
}).observe(canvas);

/**
 * @param {LivePicture} picture
 * @param {string} words
 */
function offerDownload({ header, image }, words) {
  if (download.href) URL.revokeObjectURL(download.href);
  const name = words.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "");
  download.href = URL.createObjectURL(image);
  download.download = `${name || "picture"}-${header.seed}.${header.format === "jpeg" ? "jpg" : header.format}`;
  download.removeAttribute("aria-disabled");
}

// Latency

/**
 * @param {number} latencyMs
 * @param {Record<string, number | number[]>} timings
 */
function showLatency(latencyMs, timings) {
  byId("latency").textContent = latencyMs < 9.95 ? latencyMs.toFixed(1) : latencyMs.toFixed(0);
  const total = Number(timings.total_ms ?? 0);
  const decode_ms = Number(timings.decode_ms ?? 0) + Number(timings.check_ms ?? 0);
  /** @type {Record<string, number | number[]>} */
  const values = { ...timings, decode_ms, rest_ms: Math.max(0, latencyMs - total) };
  for (const [key] of STAGES) {
    const ms = Number(values[key] ?? 0);
    byId(`bar-${key}`).style.flexGrow = String(ms);
    byId(`stage-${key}`).textContent = `${ms < 9.95 ? ms.toFixed(1) : ms.toFixed(0)} ms`;
  }
}

/** The stages keep their places from the start, so that nothing moves when figures arrive. */
function layOutStages() {
  for (const [key, name, meaning] of STAGES) {
    const part = document.createElement("i");
    part.id = `bar-${key}`;
    part.dataset.stage = key;
    byId("bar").append(part);

    const group = document.createElement("div");
    const term = document.createElement("dt");
    const value = document.createElement("dd");
    group.dataset.stage = key;
    group.title = meaning;
    term.textContent = name;
    value.id = `stage-${key}`;
    value.textContent = "–";
    group.append(term, value);
    byId("stages").append(group);
  }
}

// Seed

const isLocked = () => lock.getAttribute("aria-pressed") === "true";
const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

/** @param {number} value */
function setSeed(value) {
  seed = value;
  seedBox.value = String(value);
}

function readSeed() {
  const digits = seedBox.value.replace(/\D/g, "");
  seedBox.value = digits;
  if (!digits || Number(digits) > Number.MAX_SAFE_INTEGER) return;
  seed = Number(digits);
  lock.setAttribute("aria-pressed", "true");
  generate();
}

// Connection and errors

/** @type {Record<import("./live.js").LiveState, string>} */
const CONNECTION_WORDS = {
  idle: "Ready",
  connecting: "Connecting",
  live: "Live",
  waiting: "Reconnecting",
  closed: "Disconnected",
};

live.on("state", (/** @type {{state: import("./live.js").LiveState, reason?: string}} */ { state, reason }) => {
  const connection = byId("connection");
  connection.dataset.state = state;
  connection.textContent = CONNECTION_WORDS[state];
  connection.title = reason ?? "";
  if (state === "closed" && reason) say(`The server closed the connection: ${reason}`, "bad");
});

/** @type {ReturnType<typeof setTimeout> | undefined} */
let retryTimer;

live.on("error", ({ seq, error, retry_after_ms }) => {
  if (seq !== null && seq < newestSeq) return;
  const passing = PASSING_ERRORS[error.code];
  if (!passing && retry_after_ms === undefined) return say(error.message, "bad");
  say(passing ?? error.message);
  const at = asked.get(newestSeq)?.at;
  retryTimer = setTimeout(() => generate(at), retry_after_ms ?? RETRY_AFTER_MS);
});

/**
 * @param {string} words
 * @param {"wait" | "bad"} [mood] "wait" passes by itself, "bad" wants another prompt
 */
function say(words, mood = "wait") {
  const message = byId("message");
  message.dataset.mood = mood;
  if (message.textContent !== words) message.textContent = words;
}

/** @type {ReturnType<typeof setTimeout> | undefined} */
let speakTimer;

/** @param {string} words */
function speakLater(words) {
  clearTimeout(speakTimer);
  speakTimer = setTimeout(() => (byId("spoken").textContent = words), SPEAK_AFTER_MS);
}

// Models

/** Asks until a model is ready: a service that still warms up says so. */
async function loadModels() {
  const { ready, standard } = await readyModels();
  if (!ready.length) {
    say("The model is warming up…");
    setTimeout(loadModels, MODELS_RETRY_MS);
    return;
  }
  say("");
  for (const model of ready) {
    models.set(model.id, model);
    modelBox.add(new Option(model.id, model.id, false, model.id === standard));
  }
  byId("model-field").hidden = ready.length < 2;
  applyModel();
  if (prompt.value.trim()) generate();
}

async function readyModels() {
  try {
    const response = await fetch("/v1/models");
    const list = await response.json();
    return { ready: list.data.filter((/** @type {any} */ model) => model.ready), standard: list.default };
  } catch {
    return { ready: [] };
  }
}

function applyModel() {
  const model = models.get(modelBox.value);
  if (model.max_prompt_chars) prompt.maxLength = model.max_prompt_chars;
  const ideas = (model.example_prompts ?? []).slice(0, EXAMPLES_SHOWN);
  byId("ideas").replaceChildren(...ideas.map(ideaButton));
  byId("ideas").hidden = !ideas.length;
}

/** @param {string} words */
function ideaButton(words) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = words;
  button.addEventListener("click", () => write(words));
  return button;
}

// Events of the page

prompt.addEventListener("input", ({ timeStamp }) => generate(timeStamp));
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  generate();
});
byId("form").addEventListener("submit", (event) => event.preventDefault());
modelBox.addEventListener("change", () => {
  applyModel();
  generate();
});
seedBox.addEventListener("change", readSeed);
lock.addEventListener("click", () => lock.setAttribute("aria-pressed", String(!isLocked())));
byId("new-seed").addEventListener("click", () => {
  setSeed(randomSeed());
  generate();
});
addEventListener("online", () => live.connect());

layOutStages();
setSeed(randomSeed());
live.connect();
loadModels();
