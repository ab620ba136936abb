/** The last pictures, small, in a row: the newest first. */

/** @typedef {import("./live.js").LivePicture} LivePicture */
/** @typedef {import("./request.js").Wish} Wish */

/**
 * A picture, or a grid of them, to come back to. `stages` are the milliseconds that the page showed beside it.
 *
 * @typedef {object} Kept
 * @property {Wish} wish
 * @property {LivePicture[]} pictures
 * @property {number} columns
 * @property {import("./numbers.js").Figures | null} figures
 */

const MAX_KEPT = 24;
const SIDE_PIXELS = 144;

export class Strip {
  /** @type {{kept: Kept, item: HTMLElement}[]} */
  #entries = [];

  /**
   * @param {HTMLElement} list
   * @param {(kept: Kept) => void} choose
   */
  constructor(list, choose) {
    this.list = list;
    this.choose = choose;
    list.addEventListener("keydown", (event) => this.#walk(event));
  }

  get newest() {
    return this.#entries[0]?.kept ?? null;
  }

  /**
   * @param {Kept} kept
   * @param {CanvasImageSource} picture what it looks like; a square
   * @param {boolean} isBetter than the newest, whose place it takes
   */
  add(kept, picture, isBetter) {
    if (isBetter) this.#entries.shift()?.item.remove();
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", describe(kept));
    button.title = kept.wish.prompt;
    button.append(thumbnail(picture));
    button.addEventListener("click", () => this.choose(kept));
    item.append(button);
    this.list.prepend(item);
    this.#entries.unshift({ kept, item });
    for (const { item: last } of this.#entries.splice(MAX_KEPT)) last.remove();
    this.#leadTo(this.#buttons()[0]);
  }

  /** The row is one stop of the Tab key; the arrows walk along it. @param {KeyboardEvent} event */
  #walk(event) {
    const buttons = this.#buttons();
    const now = buttons.indexOf(/** @type {HTMLButtonElement} */ (document.activeElement));
    const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (next === undefined || !buttons[next]) return;
    event.preventDefault();
    this.#leadTo(buttons[next]);
    buttons[next].focus();
  }

  /** @param {HTMLButtonElement} target */
  #leadTo(target) {
    for (const button of this.#buttons()) button.tabIndex = button === target ? 0 : -1;
  }

  #buttons() {
    return [...this.list.querySelectorAll("button")];
  }
}

/** @param {Kept} kept */
function describe({ wish, columns }) {
  const what = columns > 1 ? `${columns ** 2} pictures of ` : "";
  return `Back to ${what}${wish.prompt}, seed ${wish.seed}`;
}

/** @param {CanvasImageSource} picture */
function thumbnail(picture) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = SIDE_PIXELS;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, SIDE_PIXELS, SIDE_PIXELS);
  return canvas;
}
