// A sequence while it grows: gpt_tf/generation/sequence.py, in JavaScript.
//
// Bytes are held in strings, one character of 0 to 255 each, as `token_bytes.json` has
// them: searching and cutting is then that of strings.

/** One sequence: its ids, the model's window, what may be shown.
 *
 * When the window fills the context, its newest half is kept.
 */
export class SequenceState {
  /**
   * @param {number[]} prompt Token ids, at least one.
   * @param {Sampler} sampler
   * @param {Detokenizer} detokenizer
   * @param {object} limits `contextLength`, `maxNewTokens`, `endIds`.
   */
  constructor(prompt, sampler, detokenizer, { contextLength, maxNewTokens, endIds }) {
    this.ids = [...prompt];
    this.seen = new Set(prompt);
    this.remaining = maxNewTokens;
    this.finished = maxNewTokens === 0;
    this.sampler = sampler;
    this.detokenizer = detokenizer;
    this.contextLength = contextLength;
    this.endIds = endIds;
    this.keep(contextLength);
  }

  /** Choose the next token by the logits of the last pending id.
   *
   * @returns {{token: number, text: string}} The token, and what can be shown now.
   */
  push(logits) {
    const token = this.sampler.choose(logits, this.seen);
    if (this.endIds.includes(token)) return { token, text: this.finish() };
    this.ids.push(token);
    this.seen.add(token);
    this.remaining -= 1;
    const text = this.detokenizer.push(token);
    if (!this.remaining || this.detokenizer.stopped)
      return { token, text: text + this.finish() };
    if (this.windowLength === this.contextLength) {
      this.keep(Math.max(1, Math.floor(this.contextLength / 2)));
    } else {
      this.windowLength += 1;
      this.needsPrefill = false;
      this.pending = [token];
    }
    return { token, text };
  }

  /** End the sequence; return the text that was held back. */
  finish() {
    this.finished = true;
    return this.detokenizer.finish();
  }

  /** Ask for the newest ids of the window anew; all of it unless a number is given. */
  keep(count = this.windowLength) {
    this.needsPrefill = true;
    this.pending = this.ids.slice(-count);
    this.windowLength = this.pending.length;
  }
}

/** Makes of new tokens text, as soon as no stop text can cut it off. */
export class Detokenizer {
  /**
   * @param {string[]} tokenBytes The bytes of each token.
   * @param {string[]} stop Texts that end the sequence; they are cut off.
   */
  constructor(tokenBytes, stop = []) {
    this.stopped = false;
    this.tokenBytes = tokenBytes;
    this.stop = stop.filter(Boolean).map(
      (text) => String.fromCharCode(...new TextEncoder().encode(text)));
    // So much may be the beginning of a stop text.
    this.reserve = Math.max(1, ...this.stop.map((text) => text.length)) - 1;
    this.held = "";
    // A character may need several tokens.
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  }

  push(token) {
    this.held += this.tokenBytes[token] ?? "";
    const found = this.stop.map((text) => this.held.indexOf(text)).filter((i) => i >= 0);
    if (!found.length) return this.#show(Math.max(0, this.held.length - this.reserve));
    this.stopped = true;
    return this.#show(Math.min(...found), true);
  }

  finish() {
    return this.stopped ? "" : this.#show(this.held.length, true);
  }

  #show(end, isLast = false) {
    const bytes = bytesOf(this.held.slice(0, end));
    this.held = this.held.slice(end);
    return this.decoder.decode(bytes, { stream: !isLast });
  }
}

/** The bytes that a string of characters from 0 to 255 holds. */
export function bytesOf(text) {
  return Uint8Array.from(text, (character) => character.charCodeAt(0));
}

/** With how many of the same ids two texts begin. */
export function commonLength(one, other) {
  let count = 0;
  while (count < one.length && count < other.length && one[count] === other[count]) count++;
  return count;
}
