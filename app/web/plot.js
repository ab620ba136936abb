/** Latencies as dots over time, with lines at the median and at the 95th percentile. */

const SHOWN = 120;
const SVG = "http://www.w3.org/2000/svg";
const LABEL_PIXELS = 44;
const EDGE_PIXELS = 6;
const NICE_MS = [10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 30_000];

/** @typedef {{first: number | null, final: number}} Latency of the first look and of the picture, in milliseconds */

export class Plot {
  #size = { width: 0, height: 0 };

  /** @param {SVGSVGElement} svg */
  constructor(svg) {
    this.svg = svg;
    this.parts = Object.fromEntries(
      ["p95", "p50", "first", "final"].map((name) => [name, part("path", name, svg)])
    );
    this.labels = Object.fromEntries(["p95", "p50"].map((name) => [name, part("text", name, svg)]));
    /** @type {Latency[]} */
    this.latencies = [];
    new ResizeObserver(([{ contentRect }]) => {
      this.#size = contentRect;
      this.draw();
    }).observe(svg);
  }

  /** @param {Latency[]} latencies oldest first */
  show(latencies) {
    this.latencies = latencies.slice(-SHOWN);
    this.draw();
  }

  draw() {
    if (!this.latencies.length || !this.#size.width) return;
    const finals = this.latencies.map(({ final }) => final);
    const top = roof(Math.max(...finals));
    const wide = this.#size.width - LABEL_PIXELS - 2 * EDGE_PIXELS;
    const high = this.#size.height - 2 * EDGE_PIXELS;
    const x = (/** @type {number} */ index) => EDGE_PIXELS + (wide * index) / (SHOWN - 1);
    const y = (/** @type {number} */ ms) => EDGE_PIXELS + high * (1 - ms / top);
    this.parts.final.setAttribute("d", dots(finals, x, y));
    this.parts.first.setAttribute("d", dots(this.latencies.map(({ first }) => first), x, y));
    this.#line("p50", y(percentile(finals, 0.5)));
    this.#line("p95", y(percentile(finals, 0.95)), y(percentile(finals, 0.5)));
  }

  /**
   * @param {string} name
   * @param {number} y
   * @param {number} [below] the other line, whose label it may not cover
   */
  #line(name, y, below = Infinity) {
    const end = this.#size.width - LABEL_PIXELS;
    this.parts[name].setAttribute("d", `M0 ${y.toFixed(1)}H${end}`);
    this.labels[name].setAttribute("x", String(end + 6));
    this.labels[name].setAttribute("y", String(Math.max(10, Math.min(y + 4, below - 10))));
    this.labels[name].textContent = name.toUpperCase();
  }
}

/**
 * The value that this share of all values doesn't exceed.
 *
 * @param {number[]} values
 * @param {number} share
 */
export function percentile(values, share) {
  const sorted = [...values].sort((one, other) => one - other);
  return sorted[Math.max(0, Math.ceil(sorted.length * share) - 1)];
}

/**
 * One path for all dots: each a line of no length with round ends.
 *
 * @param {(number | null)[]} values
 * @param {(index: number) => number} x
 * @param {(ms: number) => number} y
 */
function dots(values, x, y) {
  return values.map((ms, index) => (ms === null ? "" : `M${x(index).toFixed(1)} ${y(ms).toFixed(1)}h0`)).join("");
}

/** @param {number} ms */
const roof = (ms) => NICE_MS.find((nice) => nice >= ms) ?? ms;

/**
 * @param {string} tag
 * @param {string} name
 * @param {SVGElement} parent
 */
function part(tag, name, parent) {
  const element = document.createElementNS(SVG, tag);
  element.setAttribute("class", name);
  parent.append(element);
  return element;
}
