/**
 * The page's state in the URL, so that a picture can be shared.
 *
 * It stands behind the `#`: browsers keep that to themselves, so no prompt ends up in the log of a server or proxy.
 */

/** @typedef {import("./request.js").Wish} Wish */

/** Browsers refuse more than some hundred changes of the URL in half a minute. */
const WRITE_AFTER_MS = 400;

/**
 * What the URL says; what it doesn't say is left out.
 *
 * @param {string} [hash]
 * @returns {Partial<Wish>}
 */
export function readUrl(hash = location.hash) {
  const said = new URLSearchParams(hash.replace(/^#/, ""));
  const text = (/** @type {string} */ name) => said.get(name) ?? undefined;
  const number = (/** @type {string} */ name) => (isNumber(said.get(name)) ? Number(said.get(name)) : undefined);
  const wish = {
    prompt: text("prompt"),
    negative: text("negative"),
    model: text("model"),
    size: text("size"),
    steps: number("steps"),
    guidance: number("guidance"),
    seed: Number.isSafeInteger(number("seed")) ? number("seed") : undefined,
    scheduler: text("scheduler"),
    loras: said.has("lora") ? said.getAll("lora").map(readLora) : undefined,
    grid: [1, 2, 3].includes(number("grid") ?? 0) ? number("grid") : undefined,
    refine: said.has("refine") ? said.get("refine") !== "0" : undefined,
    format: ["png", "jpeg", "webp"].includes(text("format") ?? "") ? text("format") : undefined,
  };
  return /** @type {Partial<Wish>} */ (
    Object.fromEntries(Object.entries(wish).filter(([, value]) => value !== undefined))
  );
}

/**
 * Everything that makes the picture, defaults included: those may change.
 *
 * @param {Wish} wish
 * @returns {string} from the `#` on; empty where there is no prompt
 */
export function urlOf(wish) {
  if (!wish.prompt) return "";
  const said = new URLSearchParams();
  for (const [name, value] of Object.entries(wish)) {
    if (name === "loras") for (const lora of wish.loras) said.append("lora", `${lora.name}:${lora.weight}`);
    else if (name === "refine") wish.refine || said.set(name, "0");
    else if (name === "grid") wish.grid > 1 && said.set(name, String(value));
    else if (value !== "" && value !== null) said.set(name, String(value));
  }
  return `#${said}`;
}

/** @type {ReturnType<typeof setTimeout> | undefined} */
let timer;

/** @param {Wish} wish */
export function writeUrl(wish) {
  clearTimeout(timer);
  timer = setTimeout(() => history.replaceState(null, "", urlOf(wish) || location.pathname), WRITE_AFTER_MS);
}

/** @param {string | null} text */
const isNumber = (text) => text !== null && text.trim() !== "" && Number.isFinite(Number(text));

/** @param {string} text as in "pixel:0.8" */
function readLora(text) {
  const [name, weight] = text.split(/:(?=[^:]*$)/);
  return { name, weight: isNumber(weight) ? Number(weight) : 1 };
}
