// A GPT that `gpt-tf web` wrote, in a browser or in Node: load it, stream text.
//
//     import { GPT } from "./gpt_tf.js";
//     const gpt = await GPT.load("./");
//     for await (const piece of gpt.stream("def ", { seed: 7 })) document.body.append(piece);

/** A loaded model, which computes in a worker of its own. */
export class GPT {
  #worker;
  #waiting = new Map();
  #count = 0;
  #broken;

  /** Load the model of a folder that `gpt-tf web` wrote.
   *
   * @param {string} url The folder, relative to the page; in Node to this file.
   * @param {object} options `onProgress`, called with `{loaded, total}` in bytes;
   *     `accelerator`, `"wasm"` or `"webgpu"`. The latter is refused where its logits do
   *     not agree with WebAssembly's.
   * @returns {Promise<GPT>} With `about`: its `name`, `prompt` (an example), `config`,
   *     `mode`, `contextLength`, `canChat`, `size`, `accelerator`, `threads` and `memory` in bytes.
   */
  static async load(url = "./", { onProgress = () => {}, accelerator = "wasm" } = {}) {
    const gpt = new GPT();
    gpt.#worker = await startWorker();
    gpt.#worker.onmessage = ({ data }) => gpt.#receive(data);
    gpt.#worker.onerror = (event) => gpt.#fail(event.message ?? "The worker did not start.");
    try {
      const place = new URL(url, globalThis.document?.baseURI ?? import.meta.url);
      gpt.about = await gpt.#call("load", [place.href, accelerator], onProgress);
    } catch (error) {
      gpt.close();
      throw error;
    }
    return gpt;
  }

  /** Continue a prompt, piece by piece.
   *
   * To stop, leave the loop.
   *
   * @param {string | number[] | object[]} prompt A text, token ids, or the messages of a
   *     chat: `[{role: "user", content: "Good morning."}]`.
   * @param {object} options `maxNewTokens`, `temperature`, `topK`, `topP`,
   *     `repetitionPenalty`, `seed`, `stop` (a text or several), as of `EdgeGPT.generate`:
   *     where the logits agree, a seed gives the same text. `onBegin`, called with
   *     `{promptTokens, seed, notices}`.
   * @yields {string} Pieces of text, none of them empty.
   */
  async *stream(prompt, options = {}) {
    for await (const { text } of this.steps(prompt, options)) if (text) yield text;
  }

  /** As `stream`, token by token.
   *
   * @yields {{text: string, token: object, others: object[], memory: number}} The text
   *     that can be shown now, perhaps none; the token and the five others that were most
   *     likely, each with `id`, `text` and `probability` (at temperature 1).
   */
  async *steps(prompt, { onBegin = () => {}, ...options } = {}) {
    const begun = await this.#call("begin", [prompt, options]);
    onBegin(begun);
    try {
      for (let step; (step = await this.#call("step", [begun.id])); ) yield step;
    } finally {
      this.#worker.postMessage({ id: 0, method: "end", values: [begun.id] });
    }
  }

  /** The whole text that `stream` gives. */
  async generate(prompt, options) {
    let text = "";
    for await (const piece of this.stream(prompt, options)) text += piece;
    return text;
  }

  /** Free its memory; it is of no use afterwards. */
  close() {
    this.#worker.terminate();
    this.#fail("The model was closed.");
  }

  #call(method, values, onProgress) {
    if (this.#broken) return Promise.reject(new Error(this.#broken));
    const id = ++this.#count;
    this.#worker.postMessage({ id, method, values });
    return new Promise((resolve, reject) =>
      this.#waiting.set(id, { resolve, reject, onProgress }));
  }

  #receive({ id, result, error, progress }) {
    const waiting = this.#waiting.get(id);
    if (!waiting) return;
    if (progress) return waiting.onProgress(progress);
    this.#waiting.delete(id);
    if (error === undefined) waiting.resolve(result);
    else waiting.reject(new Error(error));
  }

  #fail(message) {
    this.#broken = message;
    for (const { reject } of this.#waiting.values()) reject(new Error(message));
    this.#waiting.clear();
  }
}

async function startWorker() {
  if (globalThis.process?.versions?.node) return (await import("./node.js")).startWorker();
  return new Worker(new URL("worker.js", import.meta.url));
}
