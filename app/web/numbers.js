/** What the page measures: the stages of a picture, latencies from key to screen, frames per second. */

import { Plot, percentile } from "./plot.js";

/** @typedef {import("./live.js").PictureHeader} PictureHeader */

/**
 * Of one picture, in milliseconds.
 *
 * @typedef {object} Figures
 * @property {number} total from the key, or from the pause for a sharpened one, to the screen
 * @property {boolean} refined
 * @property {Record<string, number>} stages
 */

/** What each stage of the server's timings is called here, and what it is, in the order of their occurrence. */
const STAGES = [
  ["queue_ms", "Queue", "Waiting for a worker"],
  ["text_ms", "Text", "Reading the prompt"],
  ["denoise_ms", "Steps", "All steps of the model"],
  ["decode_ms", "Decode", "From the model's numbers to pixels; with a safety checker, its look at them"],
  ["encode_ms", "Encode", "From pixels to a file"],
  ["rest_ms", "Network", "Everything else: network, browser, screen"],
];
/** So many latencies are remembered for the percentiles. */
const REMEMBERED = 500;
const RATE_OVER_MS = 2_000;

export class Numbers {
  /** @type {import("./plot.js").Latency[]} */
  #latencies = [];
  /** When the last frames came to the screen. @type {number[]} */
  #frames = [];
  #superseded = 0;
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #rateTimer;

  /** @param {(id: string) => HTMLElement} byId */
  constructor(byId) {
    this.byId = byId;
    this.plot = new Plot(/** @type {any} */ (byId("plot")));
    for (const [key, name, meaning] of STAGES) this.#layOut(key, name, meaning);
  }

  /** A frame came to the screen, preview or not. */
  frame() {
    const now = performance.now();
    this.#frames.push(now);
    this.#showRate(now);
  }

  superseded() {
    this.byId("superseded").textContent = String(++this.#superseded);
  }

  /**
   * A picture answers a key.
   *
   * @param {number | null} first milliseconds from the key to the first preview; null where the picture was the first
   * @param {number} final
   */
  latency(first, final) {
    this.#latencies = [...this.#latencies.slice(1 - REMEMBERED), { first, final }];
    this.plot.show(this.#latencies);
    const finals = this.#latencies.map(({ final: ms }) => ms);
    const firsts = this.#latencies.map(({ first: ms, final: other }) => ms ?? other);
    this.byId("latency").textContent = shortly(final);
    for (const [name, values] of /** @type {[string, number[]][]} */ ([["first", firsts], ["final", finals]])) {
      this.byId(`${name}-p50`).textContent = shortly(percentile(values, 0.5));
      this.byId(`${name}-p95`).textContent = shortly(percentile(values, 0.95));
    }
  }

  /** For those who don't see the plot. */
  describe() {
    const finals = this.#latencies.map(({ final }) => final);
    if (!finals.length) return;
    const [p50, p95] = [percentile(finals, 0.5), percentile(finals, 0.95)].map(shortly);
    const words = `Latency of the last pictures: median ${p50} ms, 95th percentile ${p95} ms`;
    this.byId("plot").setAttribute("aria-label", words);
  }

  /** @param {Figures | null} figures of the picture on the stage; null: nothing is known */
  show(figures) {
    const all = STAGES.reduce((sum, [key]) => sum + (figures?.stages[key] ?? 0), 0) || 1;
    let before = 0;
    for (const [key] of STAGES) {
      const ms = figures?.stages[key] ?? 0;
      // Each part lies over the whole bar and shows its share: nothing is laid out anew, so nothing moves.
      const after = before + ms;
      const percent = (/** @type {number} */ at) => `${(100 * at) / all}%`;
      this.byId(`bar-${key}`).style.clipPath = `inset(0 ${percent(all - after)} 0 calc(${percent(before)} + 1px))`;
      before = after;
      this.byId(`stage-${key}`).textContent = figures ? `${shortly(ms)} ms` : "–";
    }
    this.byId("drawn").textContent = figures
      ? `${figures.refined ? "Sharpened" : "Drawn"} in ${shortly(figures.total)} ms`
      : "Not measured";
  }

  /** @param {number} now */
  #showRate(now) {
    this.#frames = this.#frames.filter((at) => at > now - RATE_OVER_MS);
    this.byId("rate").textContent = ((this.#frames.length * 1000) / RATE_OVER_MS).toFixed(1);
    clearTimeout(this.#rateTimer);
    if (this.#frames.length) this.#rateTimer = setTimeout(() => this.#showRate(performance.now()), RATE_OVER_MS / 4);
  }

  /**
   * The stages keep their places from the start, so that nothing moves when figures arrive.
   *
   * @param {string} key
   * @param {string} name
   * @param {string} meaning
   */
  #layOut(key, name, meaning) {
    const part = document.createElement("i");
    part.id = `bar-${key}`;
    part.dataset.stage = key;
    this.byId("bar").append(part);

    const group = document.createElement("div");
    const term = document.createElement("dt");
    const value = document.createElement("dd");
    group.dataset.stage = key;
    group.title = meaning;
    term.textContent = name;
    value.id = `stage-${key}`;
    value.textContent = "–";
    group.append(term, value);
    this.byId("stages").append(group);
  }
}

/**
 * @param {PictureHeader} header
 * @param {number} total milliseconds since it was asked for
 * @returns {Figures}
 */
export function figuresOf({ timings, refined }, total) {
  const ms = (/** @type {string} */ name) => Number(timings?.[name] ?? 0);
  const stages = {
    queue_ms: ms("queue_ms"),
    text_ms: ms("text_ms"),
    denoise_ms: ms("denoise_ms"),
    decode_ms: ms("decode_ms") + ms("check_ms"),
    encode_ms: ms("encode_ms"),
    rest_ms: Math.max(0, total - ms("total_ms")),
  };
  return { total: Math.max(total, ms("total_ms")), refined: Boolean(refined), stages };
}

/** @param {number} ms */
const shortly = (ms) => (ms < 9.95 ? ms.toFixed(1) : ms.toFixed(0));
