/** A picture as something to run elsewhere: curl, Python with OpenAI's client, JavaScript over the live socket. */

/** @typedef {Record<string, any>} Fields of `POST /v1/generations`, for one picture */

/**
 * What of a request OpenAI's `images.generate` takes by name; the rest goes into `extra_body`.
 *
 * @type {Set<string>}
 */
const OPENAI_FIELDS = new Set(["prompt", "model", "size", "output_format"]);

/**
 * For a shell.
 *
 * @param {Fields} fields
 * @param {{origin: string, hasKeys: boolean, name: string}} place
 */
export function asCurl({ output_format = "jpeg", ...fields }, { origin, hasKeys, name }) {
  return [
    `curl ${quote(`${origin}/v1/generations`)}`,
    ...(hasKeys ? ['-H "Authorization: Bearer $FEWSTEP_API_KEY"'] : []),
    "-H 'Content-Type: application/json'",
    `-H 'Accept: image/${output_format}'`,
    `-d ${quote(JSON.stringify(fields))}`,
    `-o ${quote(`${name}.${suffix(output_format)}`)}`,
  ].join(" \\\n  ");
}

/**
 * For Python, with the `openai` package.
 *
 * @param {Fields} fields
 * @param {{origin: string, hasKeys: boolean, name: string}} place
 */
export function asPython({ width, height, output_format = "jpeg", ...fields }, { origin, hasKeys, name }) {
  const all = { ...fields, ...(width && { size: `${width}x${height}` }), output_format };
  const [own, extra] = split(all);
  const key = hasKeys ? 'os.environ["FEWSTEP_API_KEY"]' : '"none"';
  return `import base64
${hasKeys ? "import os\n" : ""}
from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(`${origin}/v1`)}, api_key=${key})
answer = client.images.generate(
${own.map(([name, value]) => `    ${name}=${JSON.stringify(value)},`).join("\n")}
    extra_body=${JSON.stringify(Object.fromEntries(extra))},
)
with open(${JSON.stringify(`${name}.${suffix(output_format)}`)}, "wb") as file:
    file.write(base64.b64decode(answer.data[0].b64_json))
`;
}

/**
 * For a page or a browser's console: the picture appears at the end of the page.
 *
 * @param {Fields} fields
 * @param {{origin: string, hasKeys: boolean}} place
 */
export function asJavaScript(fields, { origin, hasKeys }) {
  const url = `${origin.replace(/^http/, "ws")}/v1/live`;
  const request = JSON.stringify(fields, null, 2).replaceAll("<", "\\u003c"); // a page's own script may not end in it
  const protocols = hasKeys ? '["fewstep.live.v1", "fewstep.auth." + token]' : '["fewstep.live.v1"]';
  return `${hasKeys ? "const token = prompt('A live token');\n" : ""}const request = ${request};
const socket = new WebSocket(${JSON.stringify(url)}, ${protocols});
socket.binaryType = "arraybuffer";
socket.onopen = () => socket.send(JSON.stringify({ type: "generate", seq: 1, ...request }));
socket.onmessage = ({ data }) => {
  if (typeof data === "string") return console.log(data);
  const length = new DataView(data).getUint32(0);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  socket.send(JSON.stringify({ type: "ack", frame: header.frame }));
  if (header.type !== "final") return;
  const file = new Blob([new Uint8Array(data, 4 + length)], { type: "image/" + header.format });
  document.body.append(Object.assign(new Image(), { src: URL.createObjectURL(file), alt: request.prompt }));
  socket.close();
};
`;
}

/**
 * A name for the file of a picture, without its ending.
 *
 * @param {string} words
 * @param {number} seed
 */
export function fileName(words, seed) {
  const name = words.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60).replace(/^-|-$/g, "");
  return `${name || "picture"}-${seed}`;
}

/** @param {string} format */
export const suffix = (format) => (format === "jpeg" ? "jpg" : format);

/**
 * Puts a text into the clipboard; by the old way where the page has no HTTPS and so no clipboard of its own.
 *
 * @param {string} text
 * @returns {Promise<boolean>} whether it worked
 */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

/** @param {string} text */
function copyBySelection(text) {
  const focused = /** @type {HTMLElement | null} */ (document.activeElement);
  const box = document.createElement("textarea");
  box.value = text;
  box.className = "unseen";
  document.body.append(box);
  box.select();
  const worked = document.execCommand("copy");
  box.remove();
  focused?.focus();
  return worked;
}

/** @param {string} text */
const quote = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** @param {Fields} fields */
function split(fields) {
  const entries = Object.entries(fields);
  return [
    entries.filter(([name]) => OPENAI_FIELDS.has(name)),
    entries.filter(([name]) => !OPENAI_FIELDS.has(name)),
  ];
}
