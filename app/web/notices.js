/** What happened, in plain words, at one place of the page: the most important first. */

/** @typedef {"wait" | "bad" | "note"} Mood "wait" passes by itself, "bad" wants something done, "note" is by the way */
/** @typedef {"connection" | "models" | "request" | "warning" | "done"} Topic */

/** @type {Topic[]} */
const ORDER = ["connection", "models", "request", "done", "warning"];

export class Notices {
  /** @type {Map<Topic, {words: string, mood: Mood}>} */
  #notices = new Map();

  /** @param {HTMLElement} element */
  constructor(element) {
    this.element = element;
  }

  /**
   * @param {Topic} topic
   * @param {string} words empty: nothing any more
   * @param {Mood} [mood]
   */
  say(topic, words, mood = "wait") {
    if (words) this.#notices.set(topic, { words, mood });
    else this.#notices.delete(topic);
    const { words: text, mood: how } = this.#first() ?? { words: "", mood: "wait" };
    this.element.dataset.mood = how;
    if (this.element.textContent !== text) this.element.textContent = text;
  }

  #first() {
    return ORDER.map((topic) => this.#notices.get(topic)).find(Boolean);
  }
}

/**
 * Why a request got no picture. Errors that pass by themselves have words of ours, others the server's.
 *
 * @param {{code: string, message: string}} error
 * @param {number | undefined} retryAfterMs
 * @param {string} model
 * @returns {{words: string, passes: boolean}}
 */
export function wordsForError({ code, message }, retryAfterMs, model) {
  const again = retryAfterMs && retryAfterMs >= 2_000 ? `Trying again in ${seconds(retryAfterMs)}.` : "Trying again…";
  /** @type {Record<string, string>} */
  const passing = {
    queue_full: "Many people are drawing right now.",
    deadline_unreachable: "Many people are drawing right now.",
    result_store_full: "Many people are drawing right now.",
    model_not_ready: `No worker has ${model || "the model"} loaded right now.`,
    queue_unavailable: "The service has lost its queue for a moment.",
    worker_lost: "That picture was lost with its worker.",
    request_lost: "That picture got lost on its way.",
    out_of_memory: "The worker ran out of memory.",
    rate_limit_exceeded: "That was more pictures than this key may draw in a minute.",
    prompt_check_failed: "The check of the prompt gave no answer.",
  };
  if (passing[code]) return { words: `${passing[code]} ${again}`, passes: true };
  if (retryAfterMs !== undefined) return { words: `${sentence(message)} ${again}`, passes: true };
  return { words: `Not drawn. ${sentence(message)}`, passes: false };
}

/**
 * Why nothing is drawn as long as no worker has the model ready.
 *
 * @param {string} model
 * @param {boolean} isAlone no other model is ready either
 * @param {boolean} isLoading
 */
export function wordsForMissing(model, isAlone, isLoading) {
  if (isAlone) return "No worker is ready yet. Drawing begins as soon as one is.";
  if (isLoading) return `${model} is being loaded. Drawing begins as soon as it is ready.`;
  return `No worker has ${model} loaded right now. Choose another model, or start a worker for it.`;
}

/**
 * Why there is no connection; empty where that needs no words.
 *
 * @param {{state: string, code?: number, reason?: string, retryInMs?: number}} change
 */
export function wordsForConnection({ state, code, reason = "", retryInMs = 0 }) {
  if (state === "closed") return `The service closed the connection: ${sentence(reason)}`;
  if (state !== "waiting") return "";
  const again = retryInMs >= 2_000 ? `Trying again in ${seconds(retryInMs)}.` : "Trying again…";
  if (code === 1012) return `The service restarts. ${again}`;
  if (code === 1013) return `The service is full: it has as many visitors as it can take. ${again}`;
  if (code === 4429) return `Too many changes in too short a time for this service. ${again}`;
  return "The connection is gone. Trying again…"; // the same words at each try: a screen reader says them once
}

/** @param {number} ms */
const seconds = (ms) => `${Math.ceil(ms / 1000)} seconds`;

/** @param {string} text */
export const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?…]$/.test(text) ? "" : ".");
