/** The live page: conducts the prompt, the settings, the socket, the picture and what is remembered of it. */

import { asCurl, asJavaScript, asPython, copyText, fileName, suffix } from "./copy.js";
import { Door } from "./door.js";
import { LiveClient } from "./live.js";
import { fetchModels, firstModel, listModels, offers } from "./models.js";
import { Notices, wordsForConnection, wordsForError, wordsForMissing } from "./notices.js";
import { Numbers, figuresOf } from "./numbers.js";
import { LINK_DEFAULTS, isSamePicture, lengthReason, liveRequest, pictureFields } from "./request.js";
import { Settings } from "./settings.js";
import { Stage } from "./stage.js";
import { Strip } from "./strip.js";
import { readUrl, urlOf, writeUrl } from "./url.js";

/** @typedef {import("./live.js").LivePicture} LivePicture */
/** @typedef {import("./request.js").Wish} Wish */
/** @typedef {import("./request.js").Card} Card */

/**
 * A request under way: when the person acted, how long after that its first frame and its picture were shown, when its
 * sharpening began.
 *
 * @typedef {{at: number, wish: Wish, firstMs: number | null, finalMs: number | null, refinedFrom: number}} Asked
 */

const IDEAS_SHOWN = 4;
/** Longer prompts are set in smaller type. */
const LONG_PROMPT_CHARS = 75;
const MODELS_RETRY_MS = 2_000;
const RETRY_AFTER_MS = 1_000;
/** A picture that stood so long without newer words is worth keeping, and worth telling a screen reader of. */
const REST_MS = 900;
/** @type {Record<import("./notices.js").Mood, number>} */
const SAID_FOR_MS = { wait: 4_000, note: 4_000, bad: 12_000 };

/** @type {Record<import("./live.js").LiveState, string>} */
const CONNECTION_WORDS = {
  idle: "Ready",
  connecting: "Connecting",
  live: "Live",
  waiting: "Reconnecting",
  closed: "Disconnected",
};

/** @param {string} id @returns {any} */
const byId = (id) => document.getElementById(id);

const prompt = /** @type {HTMLTextAreaElement} */ (byId("prompt"));
const modelBox = /** @type {HTMLSelectElement} */ (byId("model"));
const door = new Door(byId);
const notices = new Notices(byId("message"));
const numbers = new Numbers(byId);
const stage = new Stage(byId("stage"), byId("picture"));
const strip = new Strip(byId("strip"), restore);
const settings = new Settings(byId, generate);
const live = new LiveClient(new URL("/v1/live", location.href.replace(/^http/, "ws")), {
  token: door.credential || undefined,
});

/** Requests under way, by `seq`. @type {Map<number, Asked>} */
const asked = new Map();
/** The newest request. */
let newestSeq = 0;
/** What the stage shows, once it is a picture. @type {import("./strip.js").Kept | null} */
let current = null;
/** @type {Map<string, Card>} */
const models = new Map();
/** The model that a person or a link asked for. */
let wanted = readUrl().model ?? "";
/** @type {ReturnType<typeof setTimeout> | undefined} */
let retryTimer;
/** @type {ReturnType<typeof setTimeout> | undefined} */
let restTimer;
/** @type {ReturnType<typeof setTimeout> | undefined} */
let doneTimer;
let wasLive = false;

// Words in

/** @param {number} [at] when the person acted, on the page's clock */
function generate(at = performance.now()) {
  notices.say("request", "");
  ask(at);
}

/** Once more, too, where an error passes by itself: what it said stands until then. @param {number} [at] */
function ask(at = performance.now()) {
  clearTimeout(retryTimer);
  clearTimeout(restTimer);
  prompt.classList.toggle("long", prompt.value.length > LONG_PROMPT_CHARS);
  if (!prompt.value.trim()) return forget();
  settings.turn();
  const wish = readWish();
  writeUrl(wish);
  const tooLong = lengthReason(wish, settings.card);
  if (tooLong) return refuse(tooLong);
  if (!canDraw(wish.model)) return;
  newestSeq = live.generate(/** @type {any} */ (liveRequest(wish, settings.card)));
  asked.set(newestSeq, { at, wish, firstMs: null, finalMs: null, refinedFrom: 0 });
}

function readWish() {
  return settings.read(prompt.value.trim(), modelBox.value);
}

/** An empty box asks for nothing. */
function forget() {
  live.cancel();
  asked.clear();
  writeUrl(readWish());
}

/** @param {string} why */
function refuse(why) {
  forget();
  notices.say("request", why, "bad");
}

/**
 * Whether some worker holds the model. Where none does, the list of models is asked until one has it.
 *
 * @param {string} model
 */
function canDraw(model) {
  const card = models.get(model);
  const isReady = !card || card.ready;
  if (!isReady) loadModelsLater();
  const isAlone = ![...models.values()].some(({ ready }) => ready);
  const isLoading = card?.state === "loading";
  notices.say("models", isReady ? "" : wordsForMissing(model, isAlone, isLoading), isAlone || isLoading ? "wait" : "bad");
  return isReady;
}

/** @param {string} words */
function write(words) {
  prompt.value = words;
  prompt.focus();
  generate();
}

// Pictures out

live.on("picture", async (/** @type {LivePicture} */ picture) => {
  try {
    await show(picture);
  } finally {
    live.ack(picture);
  }
});

/** @param {LivePicture} picture */
async function show(picture) {
  const { header } = picture;
  const of = asked.get(header.seq);
  const columns = of?.wish.grid ?? 1;
  if (!of || !(await stage.show(picture, columns))) return;
  const shownAt = performance.now();
  numbers.frame();
  if (!stage.isComplete) byId("cells").hidden = true;
  of.firstMs ??= shownAt - of.at;
  showProgress(header);
  if (header.type === "final") finish(picture, of, shownAt);
}

/** @param {import("./live.js").PictureHeader} header */
function showProgress(header) {
  const progress = byId("progress");
  progress.max = header.num_inference_steps;
  progress.value = header.step;
}

/**
 * @param {LivePicture} picture
 * @param {Asked} of
 * @param {number} shownAt
 */
function finish(picture, of, shownAt) {
  const { header } = picture;
  const figures = figuresOf(header, shownAt - (header.refined ? of.refinedFrom : of.at));
  if (!header.refined && of.finalMs === null) {
    of.finalMs = shownAt - of.at;
    numbers.latency(of.firstMs, of.finalMs);
  }
  numbers.show(figures);
  for (const seq of asked.keys()) if (seq < header.seq) asked.delete(seq);
  if (!stage.isComplete) return;
  present({ wish: of.wish, pictures: stage.pictures, columns: stage.columns, figures });
  if (header.seq !== newestSeq) return;
  notices.say("request", "");
  clearTimeout(restTimer);
  restTimer = setTimeout(() => rest(of.finalMs ?? shownAt - of.at), REST_MS);
}

/** What can be done with the picture on the stage. @param {import("./strip.js").Kept} kept */
function present(kept) {
  current = kept;
  const { wish, columns } = kept;
  const many = columns > 1 ? `${columns ** 2} pictures of ` : "";
  byId("picture").setAttribute("aria-label", many + wish.prompt);
  for (const button of /** @type {NodeListOf<HTMLButtonElement>} */ (document.querySelectorAll("#actions button")))
    disable(button, columns > 1 && button.dataset.single !== undefined);
  offerChoice(kept);
}

/**
 * @param {HTMLButtonElement} button
 * @param {boolean} isOff
 */
function disable(button, isOff) {
  button.disabled = isOff;
  button.title = isOff ? "Take one of the pictures first" : "";
}

/** Nobody typed for a moment: the picture is kept, and told. @param {number} latencyMs */
function rest(latencyMs) {
  if (!current) return;
  const newest = strip.newest;
  strip.add(current, stage.canvas, newest !== null && isSamePicture(newest.wish, current.wish));
  numbers.describe();
  speak(`Picture of ${current.wish.prompt}, after ${Math.round(latencyMs)} milliseconds`);
}

/**
 * A grid's pictures are buttons: the one that is pressed becomes the picture.
 *
 * @param {import("./strip.js").Kept} kept
 */
function offerChoice({ pictures, columns }) {
  const cells = byId("cells");
  const count = columns === 1 ? 0 : pictures.length;
  cells.hidden = count === 0;
  cells.dataset.columns = String(columns);
  const buttons = () => Array.from({ length: count }, (_, index) => cellButton(index));
  if (cells.childElementCount !== count) cells.replaceChildren(...buttons());
  for (const [index, button] of [...cells.children].entries())
    button.setAttribute("aria-label", `Take picture ${index + 1} of ${count}, seed ${pictures[index].header.seed}`);
}

/** @param {number} index */
function cellButton(index) {
  const button = document.createElement("button");
  button.type = "button";
  button.addEventListener("click", () => {
    if (!current) return;
    const { wish, pictures, figures } = current;
    const seed = pictures[index].header.seed;
    restore({ wish: { ...wish, seed, grid: 1 }, pictures: [pictures[index]], columns: 1, figures });
    prompt.focus();
  });
  return button;
}

/**
 * Back to a picture of before: what it was made of, and itself, without drawing it again. File format and sharpening
 * stay as they are chosen now.
 *
 * @param {import("./strip.js").Kept} before
 */
async function restore(before) {
  const { format, refine } = readWish();
  const kept = { ...before, wish: { ...before.wish, format, refine } };
  live.cancel();
  clearTimeout(retryTimer);
  clearTimeout(restTimer);
  asked.clear();
  notices.say("request", "");
  complain("Not as it was", writeWish(kept.wish));
  writeUrl(kept.wish);
  if (!(await stage.restore(kept.pictures, kept.columns, newestSeq))) return;
  numbers.show(kept.figures);
  present(kept);
}

/**
 * @param {Partial<Wish>} wish
 * @returns {string[]} what of it can't be had, in words
 */
function writeWish(wish) {
  if (wish.prompt !== undefined) prompt.value = wish.prompt;
  prompt.classList.toggle("long", prompt.value.length > LONG_PROMPT_CHARS);
  const isGone = Boolean(wish.model && settings.card && !models.has(wish.model));
  if (wish.model && wish.model !== modelBox.value && models.has(wish.model)) {
    modelBox.value = wanted = wish.model;
    useModel(wish.model);
  }
  const lost = settings.write(wish);
  return isGone ? [`there is no model ${wish.model}`, ...lost] : lost;
}

/**
 * @param {string} what
 * @param {string[]} lost
 */
function complain(what, lost) {
  if (lost.length) tell(`${what}: ${lost.join(", ")}.`, "bad");
}

// What to do with a picture

byId("download").addEventListener("click", async () => {
  if (!current) return;
  const { wish, pictures: [picture] } = current;
  const file = await inFormat(picture.image, byId("format").value);
  const url = URL.createObjectURL(file);
  const link = Object.assign(document.createElement("a"), { href: url });
  link.download = `${fileName(wish.prompt, picture.header.seed)}.${suffix(file.type.replace("image/", ""))}`;
  link.click();
  URL.revokeObjectURL(url);
});

/**
 * Pictures come in the chosen format; one that came before the choice is written anew.
 *
 * @param {Blob} image
 * @param {string} format empty: as it is
 */
async function inFormat(image, format) {
  if (!format || image.type === `image/${format}`) return image;
  const bitmap = await createImageBitmap(image);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d")?.drawImage(bitmap, 0, 0);
  bitmap.close();
  return canvas.convertToBlob({ type: `image/${format}`, quality: 0.92 });
}

byId("link").addEventListener("click", () => current && copy(location.origin + "/" + urlOf(current.wish), "The link"));
for (const [id, write, what] of /** @type {[string, Function, string][]} */ ([
  ["curl", asCurl, "The curl command"],
  ["python", asPython, "The Python program"],
  ["javascript", asJavaScript, "The JavaScript"],
])) {
  byId(id).addEventListener("click", () => {
    if (!current) return;
    const { wish, pictures: [{ header }] } = current;
    const name = fileName(wish.prompt, header.seed);
    const place = { origin: location.origin, hasKeys: door.credential !== "", name };
    copy(write({ ...pictureFields(wish, settings.card), seed: header.seed }, place), what);
  });
}

/**
 * @param {string} text
 * @param {string} what
 */
async function copy(text, what) {
  if (await copyText(text)) tell(`${what} is in the clipboard.`, "note");
  else tell("The browser lets no page use the clipboard here.", "bad");
}

// Connection and errors

live.on("state", (change) => {
  const connection = byId("connection");
  const { state, code, reason } = change;
  const isStillAway = state === "connecting" && connection.dataset.state === "waiting";
  const words = CONNECTION_WORDS[/** @type {import("./live.js").LiveState} */ (isStillAway ? "waiting" : state)];
  connection.dataset.state = state;
  if (connection.textContent !== words) connection.textContent = words; // once for a screen reader, not at each try
  connection.title = reason ?? "";
  if (state === "closed" && code === 4401) return door.ask(`The service says: ${reason}`);
  const mood = state === "closed" ? "bad" : "wait";
  if (state !== "connecting") notices.say("connection", wordsForConnection(change), mood);
  return undefined;
});

live.on("queued", ({ seq, refined, warnings }) => {
  const of = asked.get(seq);
  if (of && refined) of.refinedFrom = performance.now();
  if (seq !== newestSeq) return;
  notices.say("request", "");
  notices.say("warning", (warnings ?? []).join(" "), "note");
});

live.on("ready", () => {
  if (wasLive) renewModels();
  wasLive = true;
});

live.on("superseded", ({ refined }) => refined || numbers.superseded());

live.on("error", ({ seq, error, retry_after_ms }) => {
  if (seq !== null && seq < newestSeq) return;
  const { words, passes } = wordsForError(error, retry_after_ms, modelBox.value);
  notices.say("request", words, passes ? "wait" : "bad");
  if (error.code === "model_not_found") renewModels();
  if (!passes) return;
  const at = asked.get(newestSeq)?.at;
  retryTimer = setTimeout(() => ask(at), retry_after_ms ?? RETRY_AFTER_MS);
});

/**
 * Says something that was done, for a while.
 *
 * @param {string} words
 * @param {import("./notices.js").Mood} mood
 */
function tell(words, mood) {
  notices.say("done", words, mood);
  clearTimeout(doneTimer);
  doneTimer = setTimeout(() => notices.say("done", ""), SAID_FOR_MS[mood]);
}

/** @param {string} words */
function speak(words) {
  byId("spoken").textContent = words;
}

// Models

/** Asks until the chosen model is ready: a service that still warms up says so. */
async function loadModels() {
  const list = await fetchModels(door.headers);
  if (list.status === 401) return door.ask(door.credential && "The service doesn't know this key.");
  const isFirst = models.size === 0;
  const card = takeModels(list, wanted);
  if (!card) return loadModelsLater();
  if (isFirst) start(card);
  else if (card.id !== settings.card?.id) useModel(card.id);
  if (prompt.value.trim()) generate();
  else canDraw(card.id);
  return undefined;
}

/**
 * @param {import("./models.js").ModelList} list
 * @param {string} name
 * @returns {Card | undefined} the one to draw with
 */
function takeModels(list, name) {
  const card = firstModel(list, name);
  if (!card) return undefined;
  models.clear();
  for (const model of list.cards) models.set(model.id, model);
  listModels(modelBox, list.cards, card.id);
  watchLoading();
  return card;
}

/** Models become ready while the page is open. */
function watchLoading() {
  if ([...models.values()].some(({ state }) => state === "loading")) renewModelsLater();
}

/** A service that was away may have come back with other models. The chosen one stays if it is still there. */
async function renewModels() {
  if (!settings.card) return;
  const list = await fetchModels(door.headers);
  const before = settings.card; // another one may have been chosen meanwhile
  const card = takeModels(list, before.id);
  if (!card) return watchLoading();
  wanted = card.id;
  if (card.id === before.id) return adapt(before, card);
  useModel(card.id);
  tell(`There is no model ${before.id} any more.`, "bad");
  generate();
}

/** The same model may have other limits now. @param {Card} before @param {Card} card */
function adapt(before, card) {
  if (offers(before) === offers(card)) return;
  const wish = readWish();
  useModel(card.id);
  complain(`${card.id} has other limits now`, writeWish(wish));
}

/** @type {ReturnType<typeof setTimeout> | undefined} */
let renewalTimer;

function renewModelsLater() {
  clearTimeout(renewalTimer);
  renewalTimer = setTimeout(renewModels, MODELS_RETRY_MS);
}

/** @type {ReturnType<typeof setTimeout> | undefined} */
let modelsTimer;

function loadModelsLater() {
  clearTimeout(renewalTimer);
  clearTimeout(modelsTimer);
  modelsTimer = setTimeout(loadModels, MODELS_RETRY_MS);
}

/** @param {Card | null} card null for a page with a live token, which may not read the list */
function start(card) {
  if (card) useModel(card.id);
  else settings.use(null);
  complain("Not as in the link", writeWish(readUrl()));
  document.body.dataset.ready = "true";
}

/** @param {string} name */
function useModel(name) {
  const card = /** @type {Card} */ (models.get(name));
  settings.use(card);
  offerIdeas(card.example_prompts ?? []);
}

/**
 * The first of them, and behind a button the rest.
 *
 * @param {string[]} ideas
 */
function offerIdeas(ideas) {
  byId("ideas").hidden = !ideas.length;
  byId("ideas-list").replaceChildren(...ideas.slice(0, IDEAS_SHOWN).map(ideaButton));
  byId("more-ideas").hidden = ideas.length <= IDEAS_SHOWN;
  byId("more-ideas").onclick = () => offerIdeas([...ideas.slice(IDEAS_SHOWN), ...ideas.slice(0, IDEAS_SHOWN)]);
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
byId("words").addEventListener("submit", (/** @type {Event} */ event) => event.preventDefault());
modelBox.addEventListener("change", ({ timeStamp }) => {
  wanted = modelBox.value;
  useModel(modelBox.value);
  generate(timeStamp);
});
addEventListener("hashchange", () => {
  if (settings.card) useModel(settings.card.id);
  complain("Not as in the link", writeWish({ ...LINK_DEFAULTS, ...readUrl() }));
  generate();
});
addEventListener("online", comeBack);
document.addEventListener("visibilitychange", comeBack);

/** Timers of a hidden page are slow, and pauses grow long without a network: whoever looks again need not wait. */
function comeBack() {
  if (live.state === "waiting" && !document.hidden) live.connect();
}

/** A page with a live token draws by the service's own choices: the token opens the live socket and nothing else. */
function startWithToken() {
  start(null);
  live.connect();
  if (prompt.value.trim()) generate();
}

if (door.isToken) startWithToken();
else {
  await loadModels();
  if (byId("door").hidden) live.connect();
}
