/**
 * Where the service asks who it is: a field for a live token or a key.
 *
 * It stays in this tab's session storage: other tabs and later visits don't have it, and no URL or request but those to
 * the service itself carries it.
 */

const STORED_AS = "fewstep.credential";
const KEY_PREFIX = "fs_";
/** What a header and a WebSocket's handshake can carry. */
const CREDENTIAL = /^[\w.~+-]+$/;

export class Door {
  /** @param {(id: string) => any} byId */
  constructor(byId) {
    this.byId = byId;
    byId("door").addEventListener("submit", (/** @type {Event} */ event) => this.#enter(event));
    byId("leave").addEventListener("click", () => this.#leave());
    byId("leave").hidden = !this.credential;
  }

  /** A key, a live token, or nothing. */
  get credential() {
    return sessionStorage.getItem(STORED_AS) ?? "";
  }

  /** A live token opens live sockets only; a key the rest of the API too. */
  get isToken() {
    return this.credential !== "" && !this.credential.startsWith(KEY_PREFIX);
  }

  /** @returns {Record<string, string>} for requests over HTTP */
  get headers() {
    return this.credential && !this.isToken ? { Authorization: `Bearer ${this.credential}` } : {};
  }

  /** @param {string} [reason] why what was given is no good */
  ask(reason = "") {
    sessionStorage.removeItem(STORED_AS);
    this.byId("leave").hidden = true;
    this.byId("door").hidden = false;
    this.byId("words").hidden = true;
    this.byId("connection").dataset.state = "closed";
    this.byId("connection").textContent = "Needs a key";
    this.byId("door-reason").textContent = reason;
    this.byId("credential").focus();
  }

  /** The page starts anew with it: everything else stands in its URL. @param {Event} event */
  #enter(event) {
    event.preventDefault();
    const credential = this.byId("credential").value.trim();
    if (!credential) return undefined;
    if (!CREDENTIAL.test(credential)) return this.ask("That is no key or token: allowed are letters, digits, . _ ~ + -");
    sessionStorage.setItem(STORED_AS, credential);
    return location.reload();
  }

  #leave() {
    sessionStorage.removeItem(STORED_AS);
    location.reload();
  }
}
