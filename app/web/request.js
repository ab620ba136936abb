/** What is asked for: as the page holds it, as the service reads it. No page in here. */

/**
 * What a person asks for, and what a shared URL holds.
 *
 * @typedef {object} Wish
 * @property {string} prompt
 * @property {string} negative
 * @property {string} model empty: the service's default
 * @property {string} size as in "512x512"; empty: the model's default, as with all that follow
 * @property {number | null} steps
 * @property {number | null} guidance
 * @property {number} seed
 * @property {string} scheduler
 * @property {{name: string, weight: number}[]} loras
 * @property {1 | 2 | 3} grid pictures on each side
 * @property {boolean} refine quick pictures while typing, and the better one after a pause
 * @property {"" | "png" | "jpeg" | "webp"} format
 */

/**
 * A model's entry in `/v1/models`, as far as it matters here.
 *
 * @typedef {object} Card
 * @property {string} id
 * @property {boolean} ready
 * @property {"warm" | "loading" | "failed" | "cold"} state
 * @property {string} state_detail
 * @property {string[]} sizes
 * @property {string} default_size
 * @property {{default: number, min: number, max: number}} num_inference_steps
 * @property {{default: number, min: number, max: number}} guidance_scale
 * @property {"classifier-free" | "embedded" | "none"} [guidance]
 * @property {string[]} schedulers
 * @property {string} default_scheduler
 * @property {number} max_num_images
 * @property {number} max_prompt_chars
 * @property {boolean} has_tiny_decoder
 * @property {boolean} has_safety_checker
 * @property {string[]} example_prompts
 * @property {LoraCard[]} [loras]
 *
 * @typedef {object} LoraCard
 * @property {string} name
 * @property {string} description
 * @property {string} [trigger] words that the prompt should have
 * @property {{default: number, min: number, max: number}} weight
 * @property {string} [license]
 */

/** What a link means where it says nothing; what isn't here is the model's default. */
export const LINK_DEFAULTS = Object.freeze({
  prompt: "",
  negative: "",
  loras: [],
  grid: 1,
  refine: true,
  format: "",
});
export const MAX_SEED = Number.MAX_SAFE_INTEGER;
/** Steps of the pictures while somebody types: one gives a guess at once, the second makes it worth looking at. */
const QUICK_STEPS = 2;
const REFINE_AFTER_MS = 300;
/** Small pictures are enlarged on the page, which shows JPEG's blocks; as PNG they cost next to nothing. */
const PNG_UP_TO_PIXELS = 128 * 128;

/**
 * The fields of `POST /v1/generations` that make the picture what it is; a shared one is made of these.
 *
 * @param {Wish} wish
 * @param {Card | null} card
 */
export function pictureFields(wish, card) {
  const [width, height] = sides(wish.size);
  const isGuided = negativeReason(wish.guidance, card) === "";
  return dropEmpty({
    prompt: wish.prompt,
    negative_prompt: isGuided ? wish.negative : "",
    model: wish.model,
    width,
    height,
    num_inference_steps: wish.steps,
    guidance_scale: wish.guidance,
    seed: wish.seed,
    scheduler: wish.scheduler,
    loras: wish.loras,
    num_images: wish.grid > 1 ? wish.grid ** 2 : null,
    output_format: wish.format || (card && sizeOf(wish, card) <= PNG_UP_TO_PIXELS ? "png" : null),
  });
}

/**
 * A message for the live socket, without its `type` and `seq`.
 *
 * @param {Wish} wish
 * @param {Card | null} card null where the service shows no models: then it fills in what it thinks best
 */
export function liveRequest(wish, card) {
  const fields = { ...pictureFields(wish, card), previews: !card?.has_safety_checker };
  if (!wish.refine) return { ...fields, decoder: card ? "full" : "auto" };
  if (!card || wish.steps === null) return { ...fields, refine: { after_ms: REFINE_AFTER_MS } };
  const quick = Math.min(Math.max(QUICK_STEPS, card.num_inference_steps.min), wish.steps);
  const refine = { after_ms: REFINE_AFTER_MS, num_inference_steps: wish.steps, decoder: "full" };
  return { ...fields, num_inference_steps: quick, refine };
}

/**
 * Why a negative prompt would change nothing; empty where it counts.
 *
 * @param {number | null} guidance
 * @param {Card | null} card
 */
export function negativeReason(guidance, card) {
  if (!card) return "";
  if (card.guidance === "embedded") return "This model reads the guidance itself and knows no negative prompt.";
  if (card.guidance === "none" || card.guidance_scale.max <= 1) return "This model draws without guidance.";
  return (guidance ?? card.guidance_scale.default) > 1 ? "" : "It counts with a guidance above 1 only.";
}

/**
 * Why the words are too long for the model; empty where they aren't. The service counts code points.
 *
 * @param {Wish} wish
 * @param {Card | null} card
 */
export function lengthReason({ prompt, negative }, card) {
  const length = Math.max([...prompt].length, [...negative].length);
  if (!card?.max_prompt_chars || length <= card.max_prompt_chars) return "";
  return `Not drawn. These are ${length} characters, and ${card.id} reads at most ${card.max_prompt_chars}.`;
}

/**
 * Whether two wishes make the same pictures.
 *
 * @param {Wish} one
 * @param {Wish} other
 */
export function isSamePicture(one, other) {
  const made = (/** @type {Wish} */ wish) => JSON.stringify({ ...wish, refine: true });
  return made(one) === made(other);
}

export const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

/**
 * @param {Wish} wish
 * @param {Card} card
 */
function sizeOf(wish, card) {
  const [width, height] = sides(wish.size || card.default_size);
  return Number(width) * Number(height);
}

/**
 * @param {string} size
 * @returns {(number | null)[]}
 */
function sides(size) {
  return size ? size.split("x").map(Number) : [null, null];
}

/** @param {Record<string, unknown>} fields */
function dropEmpty(fields) {
  const isSaid = (/** @type {unknown} */ value) =>
    value !== null && value !== "" && !(Array.isArray(value) && !value.length);
  return Object.fromEntries(Object.entries(fields).filter(([, value]) => isSaid(value)));
}
