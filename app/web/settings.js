/** The controls beside the prompt. They follow the limits of the chosen model. */

import { sentence } from "./notices.js";
import { MAX_SEED, negativeReason, randomSeed } from "./request.js";

/** @typedef {import("./request.js").Wish} Wish */
/** @typedef {import("./request.js").Card} Card */
/** @typedef {import("./request.js").LoraCard} LoraCard */

const GUIDANCE_STEPS = 20;

export class Settings {
  /** @type {Card | null} */
  card = null;
  #seed = randomSeed();

  /**
   * @param {(id: string) => any} byId
   * @param {(at: number) => void} onChange with the moment of the change
   */
  constructor(byId, onChange) {
    this.byId = byId;
    this.onChange = onChange;
    const changed = (/** @type {Event} */ event) => this.#changed(event);
    for (const id of ["steps", "guidance", "negative", "loras"]) byId(id).addEventListener("input", changed);
    for (const id of ["size", "scheduler", "refine", "format", "grid"]) byId(id).addEventListener("change", changed);
    byId("seed").addEventListener("change", (/** @type {Event} */ event) => this.#readSeed(event));
    byId("lock").addEventListener("click", () => this.#lock(!this.isLocked));
    byId("new-seed").addEventListener("click", (/** @type {Event} */ event) => {
      this.seed = randomSeed();
      this.#changed(event);
    });
    this.seed = this.#seed;
  }

  get isLocked() {
    return this.byId("lock").getAttribute("aria-pressed") === "true";
  }

  get seed() {
    return this.#seed;
  }

  set seed(value) {
    this.#seed = value;
    this.byId("seed").value = String(value);
  }

  get grid() {
    const chosen = document.querySelector("[name=grid]:checked");
    return /** @type {1 | 2 | 3} */ (Number(chosen?.getAttribute("value") ?? 1));
  }

  /** @param {1 | 2 | 3} columns pictures on each side */
  set grid(columns) {
    this.byId(`grid-${columns}`).checked = true;
  }

  /** Before each picture: another seed, unless it is kept. */
  turn() {
    if (!this.isLocked) this.seed = randomSeed();
  }

  /**
   * Takes over a model's limits and defaults.
   *
   * @param {Card | null} card null where the service shows no models
   */
  use(card) {
    this.card = card;
    for (const element of /** @type {NodeListOf<HTMLElement>} */ (document.querySelectorAll("[data-needs-card]")))
      element.hidden = !card;
    if (!card) return this.#label();
    fill(this.byId("size"), card.sizes.map((size) => [size, size.replace("x", " × ")]), card.default_size);
    fill(this.byId("scheduler"), card.schedulers.map((name) => [name, name]), card.default_scheduler);
    this.byId("scheduler-field").hidden = card.schedulers.length < 2;
    bound(this.byId("steps"), card.num_inference_steps, 1);
    bound(this.byId("guidance"), card.guidance_scale, guidanceStep(card.guidance_scale));
    this.#offerGrids(card.max_num_images);
    this.#offerLoras(card.loras ?? []);
    this.#label();
  }

  /**
   * @param {string} prompt
   * @param {string} model
   * @returns {Wish}
   */
  read(prompt, model) {
    const { card, byId } = this;
    return {
      prompt,
      negative: byId("negative").value.trim(),
      model,
      size: card ? byId("size").value : "",
      steps: card ? Number(byId("steps").value) : null,
      guidance: card ? Number(byId("guidance").value) : null,
      seed: this.seed,
      scheduler: card ? byId("scheduler").value : "",
      loras: this.#readLoras(),
      grid: this.grid,
      refine: byId("refine").checked,
      format: byId("format").value,
    };
  }

  /**
   * Sets what a wish says, within the model's limits, and leaves the rest.
   *
   * @param {Partial<Wish>} wish
   * @returns {string[]} what could not be set, in words
   */
  write(wish) {
    const { byId } = this;
    const lost = [
      this.#choose("size", "size", wish.size),
      this.#choose("scheduler", "scheduler", wish.scheduler),
      this.#slide("steps", "steps", wish.steps),
      this.#slide("guidance", "guidance", wish.guidance),
      ...this.#writeLoras(wish.loras),
      this.#lay(wish.grid),
    ];
    if (wish.negative !== undefined) byId("negative").value = wish.negative;
    if (wish.refine !== undefined) byId("refine").checked = wish.refine;
    if (wish.format !== undefined) byId("format").value = wish.format;
    if (wish.seed !== undefined && wish.seed >= 0) {
      this.seed = wish.seed;
      this.#lock(true);
    }
    this.#label();
    return lost.filter(Boolean);
  }

  /** @param {Event} event */
  #changed({ timeStamp }) {
    this.#label();
    this.onChange(timeStamp);
  }

  /** The figures beside the sliders, and why a control has no effect. */
  #label() {
    const { byId, card } = this;
    for (const id of ["steps", "guidance"]) byId(`${id}-value`).textContent = byId(id).value;
    for (const output of document.querySelectorAll("#loras output"))
      output.textContent = /** @type {HTMLInputElement} */ (output.previousElementSibling).value;
    const reason = negativeReason(Number(byId("guidance").value), card);
    byId("negative").disabled = reason !== "";
    byId("negative-why").textContent = reason;
    const isFixed = card !== null && card.guidance_scale.min === card.guidance_scale.max;
    byId("guidance").disabled = isFixed;
    const { min = 1, max = 1 } = card?.num_inference_steps ?? {};
    byId("steps").disabled = min === max;
  }

  /** @param {Event} event */
  #readSeed(event) {
    const digits = this.byId("seed").value.replace(/\D/g, "");
    if (!digits || Number(digits) > MAX_SEED) return (this.seed = this.#seed);
    this.seed = Number(digits);
    this.#lock(true);
    return this.#changed(event);
  }

  /** @param {boolean} isLocked */
  #lock(isLocked) {
    this.byId("lock").setAttribute("aria-pressed", String(isLocked));
  }

  /** @param {number} most pictures of one request */
  #offerGrids(most) {
    for (const columns of [2, 3]) {
      const radio = this.byId(`grid-${columns}`);
      radio.disabled = columns ** 2 > most;
      radio.parentElement.title = radio.disabled ? `This model draws at most ${most} pictures at once` : "";
    }
    if (document.querySelector("[name=grid]:checked:disabled")) this.grid = 1;
  }

  /** @param {LoraCard[]} loras */
  #offerLoras(loras) {
    this.byId("loras").hidden = !loras.length;
    this.byId("lora-list").replaceChildren(...loras.map(loraControl));
  }

  #readLoras() {
    const chosen = [...document.querySelectorAll("#lora-list input[type=checkbox]")].filter(
      (box) => /** @type {HTMLInputElement} */ (box).checked
    );
    return chosen.map((box) => {
      const { id, value } = /** @type {HTMLInputElement} */ (box);
      return { name: value, weight: Number(this.byId(`${id}-weight`).value) };
    });
  }

  /** @param {Wish["loras"] | undefined} loras */
  #writeLoras(loras) {
    if (!loras) return [];
    const boxes = /** @type {HTMLInputElement[]} */ ([...document.querySelectorAll("#lora-list input[type=checkbox]")]);
    for (const box of boxes) box.checked = false;
    return loras.map(({ name, weight }) => {
      const box = boxes.find(({ value }) => value === name);
      if (!box) return `there is no style ${name}`;
      box.checked = true;
      return this.#slide(`${box.id}-weight`, name, weight);
    });
  }

  /**
   * @param {string} id
   * @param {string} name
   * @param {string | undefined} value
   */
  #choose(id, name, value) {
    const box = this.byId(id);
    if (!value || !this.card) return "";
    if (![...box.options].some((option) => option.value === value)) return `there is no ${name} ${value}`;
    box.value = value;
    return "";
  }

  /** @param {1 | 2 | 3 | undefined} columns */
  #lay(columns) {
    if (!columns) return "";
    const isTooMany = this.byId(`grid-${columns}`).disabled;
    this.grid = isTooMany ? 1 : columns;
    return isTooMany ? `${columns ** 2} pictures became one` : "";
  }

  /**
   * @param {string} id
   * @param {string} name
   * @param {number | null | undefined} value
   */
  #slide(id, name, value) {
    const slider = this.byId(id);
    if (value === undefined || value === null || !this.card) return "";
    slider.value = String(value);
    return Number(slider.value) === value ? "" : `${name} ${value} became ${slider.value}`;
  }
}

/**
 * @param {HTMLSelectElement} box
 * @param {[string, string][]} options value and words
 * @param {string} chosen
 */
function fill(box, options, chosen) {
  box.replaceChildren(...options.map(([value, words]) => new Option(words, value, false, value === chosen)));
  box.disabled = options.length < 2;
}

/**
 * @param {HTMLInputElement} slider
 * @param {{default: number, min: number, max: number}} limit
 * @param {number | "any"} step
 */
function bound(slider, limit, step) {
  Object.assign(slider, { min: limit.min, max: limit.max, step });
  slider.value = String(limit.default);
}

/** Fine enough for the range, and a number that people would write. @param {{min: number, max: number}} limit */
const guidanceStep = ({ min, max }) => (max - min > GUIDANCE_STEPS / 4 ? 0.5 : 0.1);

/**
 * @param {LoraCard} lora
 * @param {number} place
 */
function loraControl({ name, description, trigger, weight, license }, place) {
  const id = `lora-${place}`;
  const row = document.createElement("div");
  row.className = "lora";
  const box = Object.assign(document.createElement("input"), { type: "checkbox", id, value: name });
  const label = Object.assign(document.createElement("label"), { htmlFor: id, textContent: name });
  const slider = Object.assign(document.createElement("input"), { type: "range", id: `${id}-weight` });
  slider.setAttribute("aria-label", `Weight of ${name}`);
  bound(slider, weight, 0.05);
  const output = document.createElement("output");
  output.htmlFor.add(slider.id);
  const hint = Object.assign(document.createElement("p"), { className: "hint", id: `${id}-hint` });
  hint.textContent = [description && sentence(description), trigger && `Say “${trigger}”.`, license]
    .filter(Boolean)
    .join(" ");
  box.setAttribute("aria-describedby", hint.id);
  row.append(box, label, slider, output, hint);
  return row;
}
