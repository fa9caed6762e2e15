// A model in the folder that `gpt-tf web` wrote: loaded, and asked for text.
//
// It runs where it is imported: in worker.js, or in node.js.

import { fetchJSON, fetchModel } from "./download.js";
import { Engine, loadRuntime, onGPU } from "./engine.js";
import { Sampler, integer, mostLikely } from "./sampler.js";
import { Detokenizer, SequenceState, commonLength } from "./sequence.js";
import { TextCodec } from "./tokenizer.js";

const FORMAT = "gpt_tf.web/1";
const CANDIDATES = 6;

/** Answer calls of methods, one after another: they share a cache.
 *
 * @param {(answer: object) => void} send Takes `{id, result}`, `{id, error}` or
 *     `{id, progress}`.
 * @returns {(call: {id: number, method: string, values: any[]}) => void}
 */
export function serve(send) {
  let model;
  let turn = Promise.resolve();
  const answer = async ({ id, method, values }) => {
    try {
      if (method === "load") {
        model = await Model.load(...values, (progress) => send({ id, progress }));
        send({ id, result: model.about() });
      } else {
        send({ id, result: await model[method](...values) });
      }
    } catch (error) {
      send({ id, error: error?.message ?? `LiteRT.js stopped: ${error}` });
    }
  };
  return (call) => void (turn = turn.then(() => answer(call)));
}

class Model {
  /** Load what the folder at a URL holds.
   *
   * @param {string} url The folder.
   * @param {string} accelerator `"wasm"` or `"webgpu"`.
   * @param {(progress: {loaded: number, total: number}) => void} onProgress
   */
  static async load(url, accelerator, onProgress) {
    const at = (name) => new URL(name, url);
    const facts = await fetchJSON(at("model.json"));
    if (facts.format !== FORMAT)
      throw new Error(
        `model.json expects the format ${FORMAT}. Received: ${facts.format}. Make the ` +
        "folder again with gpt-tf web.");
    const runtime = { ...facts.runtime };
    for (const name of ["litert", "wasm", "tokenizers", "jinja"])
      runtime[name] = at(runtime[name]).href;
    const total = facts.model.size;
    const [loaded, bytes, json, tokenBytes, tokenizers, jinja] = await Promise.all([
      loadRuntime(runtime),
      fetchModel(at(facts.model.file), facts.model, (n) => onProgress({ loaded: n, total })),
      fetchJSON(at("tokenizer.json")),
      fetchJSON(at("token_bytes.json")),
      import(runtime.tokenizers),
      facts.chat && import(runtime.jinja),
    ]);
    const model = new Model();
    model.facts = facts;
    model.codec = new TextCodec(
      facts, json, tokenBytes, tokenizers.Tokenizer, jinja?.Template);
    model.engine = await Engine.load(loaded, bytes, facts);
    if (accelerator === "webgpu") model.engine = await onGPU(model.engine, loaded, bytes, facts);
    model.sequences = new Map();
    model.begun = 0;
    return model;
  }

  /** What the page shows of it. */
  about() {
    const { name, prompt, config, mode, capacity, chat, model } = this.facts;
    return {
      name, prompt, config, mode, contextLength: capacity, canChat: Boolean(chat),
      size: model.size, memory: this.engine.memory,
      accelerator: this.engine.accelerator, threads: this.engine.threads,
    };
  }

  /** Begin a sequence.
   *
   * @param {string | number[] | object[]} prompt A text, ids, or messages of a chat.
   * @param {object} options As of `GPT.stream`.
   */
  begin(prompt, options) {
    const isChat = Array.isArray(prompt) && typeof prompt[0] === "object";
    const contextLength = this.facts.capacity;
    const asked = {
      contextLength,
      maxNewTokens: integer("maxNewTokens", options.maxNewTokens ?? (isChat ? 512 : 64), 0),
      stop: [options.stop ?? []].flat(),
    };
    const made = isChat
      ? this.codec.conversation(prompt, asked)
      : { ids: typeof prompt === "string" ? this.codec.encode(prompt) : prompt, notices: [] };
    const { ids, maxNewTokens, stop } = { ...asked, ...made };
    if (!ids.length) throw new RangeError("The prompt is empty. Give it one token at least.");
    for (const id of ids)
      if (integer("A token", id, 0) >= this.facts.config.vocab_size)
        throw new RangeError(`Token ids end before ${this.facts.config.vocab_size}. Received: ${id}.`);
    if (ids.length > contextLength)
      made.notices.push(
        `The prompt of ${ids.length} tokens is longer than the context of ` +
        `${contextLength}; its beginning was cut off.`);
    const { suppressed, end_ids: endIds } = this.facts.tokenizer;
    const sampler = new Sampler(options, suppressed);
    const detokenizer = new Detokenizer(this.codec.tokenBytes, stop);
    const limits = { contextLength, maxNewTokens, endIds };
    const state = new SequenceState(ids, sampler, detokenizer, limits);
    this.sequences.set(++this.begun, { state, reuse: isChat });
    return {
      id: this.begun, promptTokens: ids.length, seed: sampler.seed, notices: made.notices,
    };
  }

  /** Compute the next token of a sequence; null behind the last.
   *
   * @returns {Promise<{text: string, token: object, others: object[]} | null>} The text
   *     that can be shown now, the token, and the most likely others.
   */
  async step(id) {
    const { state, reuse } = this.sequences.get(id) ?? { state: { finished: true } };
    if (state.finished) return null;
    const { engine } = this;
    const before = state.ids.slice(-state.windowLength, -1);
    // Another sequence may have used the cache.
    const known = commonLength(engine.ids, before);
    if (known !== before.length || engine.ids.length !== before.length) state.keep();
    let logits;
    if (state.needsPrefill) {
      const window = state.pending;
      engine.ids.length = reuse ? commonLength(engine.ids, window.slice(0, -1)) : 0;
      await engine.prefill(window.slice(engine.ids.length, -1));
      logits = await engine.decode(window.at(-1));
    } else {
      logits = await engine.decode(state.pending[0]);
    }
    const { token, text } = state.push(logits);
    const shown = mostLikely(logits, CANDIDATES, token).map(
      (one) => ({ ...one, text: this.codec.textOf(one.id) }));
    return {
      text,
      token: shown.find((one) => one.id === token),
      others: shown.filter((one) => one.id !== token).slice(0, CANDIDATES - 1),
      memory: engine.memory,
    };
  }

  /** Forget a sequence. */
  end(id) {
    this.sequences.delete(id);
  }
}
