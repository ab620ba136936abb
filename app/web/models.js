/** The models of the service, as `/v1/models` tells them. */

/** @typedef {import("./request.js").Card} Card */

/** @typedef {{cards: Card[], standard: string, status: number}} ModelList `status` 0: no answer */

/**
 * @param {Record<string, string>} headers
 * @returns {Promise<ModelList>}
 */
export async function fetchModels(headers) {
  try {
    const response = await fetch("/v1/models", { headers });
    if (!response.ok) return { cards: [], standard: "", status: response.status };
    const list = await response.json();
    return { cards: list.data, standard: list.default, status: response.status };
  } catch {
    return { cards: [], standard: "", status: 0 };
  }
}

/**
 * The model to begin with: the one asked for, else the service's default, else any that is ready, else any.
 *
 * @param {ModelList} list
 * @param {string} wanted
 * @returns {Card | undefined}
 */
export function firstModel({ cards, standard }, wanted) {
  const ready = cards.filter(({ ready }) => ready);
  const named = (/** @type {string} */ name) => ready.find(({ id }) => id === name);
  const asked = cards.find(({ id }) => id === wanted);
  return asked ?? named(standard) ?? ready[0] ?? cards.find(({ id }) => id === standard) ?? cards[0];
}

/**
 * What a model offers, to compare: its card without what changes from minute to minute.
 *
 * @param {Card} card
 */
export function offers({ ready, state, state_detail, ...offer }) {
  return JSON.stringify(offer);
}

/**
 * Ready models first; those without a worker can be seen and not chosen. A list that is the same stays, as it may be open.
 *
 * @param {HTMLSelectElement} box
 * @param {Card[]} cards
 * @param {string} chosen
 */
export function listModels(box, cards, chosen) {
  const option = (/** @type {Card} */ { id, ready, state }) => {
    const why = state === "loading" ? "loading" : "no worker";
    const made = new Option(ready ? id : `${id} (${why})`, id, false, id === chosen);
    made.disabled = !ready;
    return made;
  };
  const sorted = [...cards].sort((one, other) => Number(other.ready) - Number(one.ready));
  const options = sorted.map(option);
  if (options.map(({ text }) => text).join() !== [...box.options].map(({ text }) => text).join())
    box.replaceChildren(...options);
  box.value = chosen;
}
