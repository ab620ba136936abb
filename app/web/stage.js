/** The picture, or a grid of them, on one canvas whose size never depends on what it shows. */

import { isNewer } from "./live.js";

/** @typedef {import("./live.js").LivePicture} LivePicture */

/**
 * @typedef {object} Cell
 * @property {LivePicture | null} picture what it shows
 * @property {ImageBitmap | null} bitmap
 * @property {number} fadeFrom when the change to it began
 * @property {number} fadeUntil
 */

/** A picture that only gets better is blended in; one of other words stands there at once. */
const FADE_MS = 140;
const GAP_PIXELS = 6;

export class Stage {
  /** @type {Cell[]} */
  #cells = [newCell()];
  #columns = 1;
  /** Requests up to this one are answered too late: another picture was chosen since. */
  #over = 0;
  /** Pictures of before that are being decoded; later ones replace them. @type {LivePicture[]} */
  #restoring = [];
  #isFading = false;

  /**
   * @param {HTMLElement} element
   * @param {HTMLCanvasElement} canvas
   */
  constructor(element, canvas) {
    this.element = element;
    this.canvas = canvas;
    this.context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { alpha: true }));
    new ResizeObserver(([{ contentRect }]) => this.#resize(contentRect.width)).observe(canvas);
  }

  get columns() {
    return this.#columns;
  }

  /** What is to be seen, in the order of the cells. @returns {LivePicture[]} */
  get pictures() {
    return this.#cells.flatMap(({ picture }) => picture ?? []);
  }

  /** Whether every cell has its picture of the newest request, and none is a preview. */
  get isComplete() {
    const newest = Math.max(0, ...this.pictures.map(({ header }) => header.seq));
    return this.#cells.every(({ picture }) => picture?.header.type === "final" && picture.header.seq === newest);
  }

  /**
   * Decodes first and swaps then, between two frames of the screen: nothing flickers, and nothing older comes back.
   *
   * @param {LivePicture} picture
   * @param {number} columns of the grid that it belongs to
   * @returns {Promise<boolean>} false for one that came too late
   */
  async show(picture, columns) {
    if (this.#isOld(picture)) return false;
    const bitmap = await createImageBitmap(picture.image);
    await nextScreenFrame();
    if (this.#isOld(picture)) {
      bitmap.close();
      return false;
    }
    this.#restoring = [];
    this.#lay(columns);
    this.#put(picture, bitmap, picture.header.index ?? 0);
    this.#describe(picture);
    return true;
  }

  /**
   * Pictures of before take the place of whatever is there, and of what is still on its way.
   *
   * @param {LivePicture[]} pictures
   * @param {number} columns
   * @param {number} over the newest request of now
   * @returns {Promise<boolean>} false where something newer was there before they were decoded
   */
  async restore(pictures, columns, over) {
    this.#over = over;
    this.#restoring = pictures;
    const bitmaps = await Promise.all(pictures.map(({ image }) => createImageBitmap(image)));
    if (this.#restoring !== pictures) {
      for (const bitmap of bitmaps) bitmap.close();
      return false;
    }
    for (const cell of this.#cells) drop(cell);
    this.#cells = [];
    this.#lay(columns);
    pictures.forEach((picture, index) => this.#put(picture, bitmaps[index], index));
    this.#repaint();
    this.#describe(pictures[0]);
    return true;
  }

  /** @param {LivePicture} picture */
  #isOld(picture) {
    const { header } = picture;
    if (header.seq <= this.#over) return true;
    const newest = Math.max(0, ...this.pictures.map(({ header: { seq } }) => seq).filter((seq) => seq > this.#over));
    const own = this.#cells[header.index ?? 0]?.picture;
    return header.seq < newest || (own?.header.seq === header.seq && !isNewer(picture, own));
  }

  /** @param {number} columns */
  #lay(columns) {
    if (columns === this.#columns && this.#cells.length === columns ** 2) return;
    for (const cell of this.#cells) drop(cell);
    this.#columns = columns;
    this.#cells = Array.from({ length: columns ** 2 }, newCell);
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  /**
   * @param {LivePicture} picture
   * @param {ImageBitmap} bitmap
   * @param {number} index
   */
  #put(picture, bitmap, index) {
    const cell = this.#cells[index];
    if (!cell) return bitmap.close();
    const isSharper = cell.picture?.header.seq === picture.header.seq;
    const hadRoom = cell.bitmap && cell.bitmap.width * bitmap.height === bitmap.width * cell.bitmap.height;
    const now = performance.now();
    cell.bitmap?.close();
    Object.assign(cell, { picture, bitmap, fadeFrom: now, fadeUntil: isSharper && mayMove() ? now + FADE_MS : now });
    if (!hadRoom) this.#clear(index);
    this.#paint(index, now);
    this.#fade();
  }

  /** @param {LivePicture} picture the newest */
  #describe({ header }) {
    this.element.dataset.state = this.isComplete || header.type === "preview" ? header.type : "partial";
    this.element.dataset.seq = String(header.seq);
    this.element.dataset.refined = String(Boolean(header.refined));
  }

  /** Paints on until the last blend is over. */
  #fade() {
    if (this.#isFading || !this.#cells.some(isFading)) return;
    this.#isFading = true;
    requestAnimationFrame(() => {
      this.#isFading = false;
      const now = performance.now();
      this.#cells.forEach((cell, index) => isFading(cell) && this.#paint(index, now));
      this.#fade();
    });
  }

  /**
   * Blends a cell's picture over what is there: a share of what is left, and all of it in the end.
   *
   * @param {number} index
   * @param {number} now
   */
  #paint(index, now) {
    const cell = this.#cells[index];
    if (!cell.bitmap) return;
    const left = cell.fadeUntil - cell.fadeFrom;
    const share = left > 0 ? Math.min(1, (now - cell.fadeFrom + 16) / left) : 1;
    cell.fadeFrom = share < 1 ? now : cell.fadeUntil;
    const { x, y, width, height } = this.#placeOf(index);
    const scale = Math.min(width / cell.bitmap.width, height / cell.bitmap.height);
    const [wide, high] = [cell.bitmap.width * scale, cell.bitmap.height * scale];
    this.context.globalAlpha = share;
    this.context.imageSmoothingEnabled = true;
    this.context.imageSmoothingQuality = "high";
    this.context.drawImage(cell.bitmap, x + (width - wide) / 2, y + (height - high) / 2, wide, high);
    this.context.globalAlpha = 1;
  }

  /** @param {number} index */
  #clear(index) {
    const { x, y, width, height } = this.#placeOf(index);
    this.context.clearRect(x, y, width, height);
  }

  /** @param {number} index */
  #placeOf(index) {
    const gap = this.#columns > 1 ? GAP_PIXELS * devicePixelRatio : 0;
    const side = (this.canvas.width - gap * (this.#columns - 1)) / this.#columns;
    const [column, row] = [index % this.#columns, Math.floor(index / this.#columns)];
    return { x: column * (side + gap), y: row * (side + gap), width: side, height: side };
  }

  /** @param {number} width in CSS pixels */
  #resize(width) {
    const side = Math.round(width * devicePixelRatio);
    if (!side || side === this.canvas.width) return;
    this.canvas.width = this.canvas.height = side;
    this.#repaint();
  }

  #repaint() {
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.#cells.forEach((cell, index) => {
      cell.fadeFrom = cell.fadeUntil;
      this.#paint(index, cell.fadeUntil);
    });
  }
}

/** @returns {Cell} */
function newCell() {
  return { picture: null, bitmap: null, fadeFrom: 0, fadeUntil: 0 };
}

/** @param {Cell} cell */
function drop(cell) {
  cell.bitmap?.close();
  Object.assign(cell, newCell());
}

/** @param {Cell} cell */
const isFading = ({ fadeFrom, fadeUntil }) => fadeFrom < fadeUntil;

/** A hidden page gets no screen frames, so nothing could be blended there. */
const mayMove = () => !document.hidden && !matchMedia("(prefers-reduced-motion: reduce)").matches;

/** A hidden page gets no screen frames, but its pictures still want their acknowledgement. */
function nextScreenFrame() {
  if (document.hidden) return Promise.resolve();
  return new Promise((resolve) => requestAnimationFrame(resolve));
}
