// The model's signatures, run by LiteRT.js over one cache of keys and values.
//
// The contract is that of gpt_tf/export/signatures.py. LiteRT.js cannot resize inputs,
// so the cache has all the rows of the file always.

const MASKED = -1e9;
// The part of a decode step that one more position adds in a prefill, as in session.py.
const COST_PER_POSITION = 1 / 32;
const MOST_THREADS = 4;
// Between the logits of WebGPU and WebAssembly, as a part of their range.
const LARGEST_DIFFERENCE = 0.01;
const SIMD = "AGFzbQEAAAABBQFgAAF7AwIBAAoKAQgAQQD9D/1iCw==";

/** Load LiteRT.js, with threads where the page may have them.
 *
 * @param {object} runtime `litert`, `wasm` (URLs) and `threads` (whether it may).
 * @returns {Promise<{litert: object, library: object, threads: number}>}
 */
export async function loadRuntime(runtime) {
  if (!WebAssembly.validate(Uint8Array.from(atob(SIMD), (c) => c.charCodeAt(0))))
    throw new Error(
      "This page expects a browser with SIMD in WebAssembly. Received: one without. " +
      "Use Chrome or Edge from 91, Firefox from 89 or Safari from 16.4.");
  const library = await import(runtime.litert);
  const cores = Math.min(MOST_THREADS, globalThis.navigator?.hardwareConcurrency ?? 1);
  if (runtime.threads && globalThis.crossOriginIsolated && cores > 1) {
    try {
      const litert = await startRuntime(library, runtime.wasm, { threads: true });
      return { litert, library, threads: cores };
    } catch {
      // Threads need relaxed SIMD, too. One thread does without.
    }
  }
  return { litert: await startRuntime(library, runtime.wasm), library, threads: 1 };
}

/** Start LiteRT.js, which in a worker would look for its WASM beside worker.js. */
function startRuntime(library, folder, options) {
  globalThis.Module = {
    locateFile: (name) => folder + name,
    mainScriptUrlOrBlob: `${folder}litert_wasm_threaded_internal.js`,
    printErr: (line) => /^(ERROR|FATAL)/.test(line) && console.error(line),
  };
  return library.loadLiteRt(folder, options);
}

/** A loaded model and the text in its cache. */
export class Engine {
  /**
   * @param {object} runtime As from `loadRuntime`.
   * @param {Uint8Array} bytes The `.tflite`.
   * @param {object} facts `config`, `capacity` and `prefill_lengths` of model.json.
   * @param {string} accelerator `"wasm"` or `"webgpu"`.
   */
  static async load({ litert, library, threads }, bytes, facts, accelerator = "wasm") {
    const engine = Object.assign(new Engine(), { litert, threads, accelerator });
    engine.Tensor = library.Tensor;
    engine.model = await library.loadAndCompile(bytes, {
      accelerator, cpuOptions: { numThreads: threads }, gpuOptions: { precision: "fp32" },
    });
    engine.capacity = facts.capacity;
    engine.lengths = facts.prefill_lengths;
    engine.ids = [];
    const { config } = facts;
    const heads = config.num_kv_heads ?? config.num_heads;
    const shape = [1, heads, facts.capacity, config.head_dim];
    engine.caches = {};
    for (let block = 0; block < config.num_layers; block++)
      for (const kind of ["k", "v"])
        engine.caches[`kv_cache_${kind}_${block}`] = new engine.Tensor(
          new Float32Array(shape[1] * shape[2] * shape[3]), shape);
    // The first run sets up what later ones use.
    await engine.decode(0);
    engine.ids = [];
    return engine;
  }

  /** Bytes of the memory that WebAssembly has. */
  get memory() {
    return this.litert.liteRtWasm.HEAPU8.byteLength;
  }

  /** Free its memory. */
  close() {
    Object.values(this.caches).forEach((tensor) => tensor.delete());
    this.model.delete();
  }

  /** Append tokens to the cache; they must have room in it. */
  async prefill(ids) {
    let begin = 0;
    const free = this.capacity - this.ids.length;
    for (const length of plan(ids.length, free, this.lengths)) {
      const name = this.lengths.includes(length) ? `prefill_${length}` : "decode";
      await this.#run(name, ids.slice(begin, begin + length), length);
      begin += length;
    }
  }

  /** Append a token; return the logits of the next one, a Float32Array. */
  decode(id) {
    return this.#run("decode", [id], 1);
  }

  async #run(name, ids, length) {
    const { Tensor, capacity } = this;
    const position = this.ids.length;
    const tokens = new Int32Array(length);
    tokens.set(ids);
    const positions = tokens.map((_, row) => position + row);
    const mask = new Float32Array(length * capacity).fill(MASKED);
    for (let row = 0; row < length; row++)
      mask.fill(0, row * capacity, row * capacity + position + row + 1);
    const inputs = {
      tokens: new Tensor(tokens, [1, length]),
      input_pos: new Tensor(positions, [length]),
      mask: new Tensor(mask, [1, 1, length, capacity]),
    };
    try {
      const outputs = await this.model.signatures[name].run({ ...inputs, ...this.caches });
      const { logits, ...caches } = outputs;
      Object.values(this.caches).forEach((tensor) => tensor.delete());
      this.caches = caches;
      this.ids.push(...ids);
      const values = await logits?.data();
      logits?.delete();
      return values;
    } finally {
      Object.values(inputs).forEach((tensor) => tensor.delete());
    }
  }
}

/** Return a model on WebGPU in the place of one on WebAssembly, if both agree.
 *
 * They are asked for the logits behind a few tokens. What WebGPU cannot compute whole, or
 * computes otherwise, is refused.
 */
export async function onGPU(engine, runtime, bytes, facts) {
  const refuse = (received) => {
    throw new Error(
      `WebGPU expects to give WebAssembly's logits. Received: ${received}. Load the model ` +
      "without it.");
  };
  if (!runtime.litert.getWebGpuDevice()) refuse("no GPU that this browser may use");
  const gpu = await Engine.load(runtime, bytes, facts, "webgpu").catch((error) =>
    refuse(error?.message ?? error));
  if (!gpu.model.isFullyAccelerated) refuse("a part that only WebAssembly computes");
  const prompt = Array.from({ length: 9 }, (_, i) => (7 + 13 * i) % facts.config.vocab_size);
  for (const one of [engine, gpu]) await one.prefill(prompt.slice(0, -1));
  const [expected, received] = [
    await engine.decode(prompt.at(-1)), await gpu.decode(prompt.at(-1))];
  // -1e9 of ids without a token has no part in the range.
  const known = expected.filter((logit) => logit > MASKED / 2);
  const range = Math.max(...known) - Math.min(...known);
  const apart = Math.max(...expected.map((logit, id) => Math.abs(logit - received[id])));
  if (!(apart <= LARGEST_DIFFERENCE * range))
    refuse(`a difference of ${apart} in a range of ${range}`);
  engine.close();
  gpu.ids = [];
  return gpu;
}

/** Choose lengths of calls that process tokens at the least cost; as in session.py.
 *
 * @param {number} count Number of tokens.
 * @param {number} free Positions that are free, at least `count`.
 * @param {number[]} given Lengths that are possible; 1 always is.
 */
export function plan(count, free, given) {
  const lengths = [...new Set([1, ...given])].sort((a, b) => a - b);
  const largest = lengths.at(-1);
  const whole = Math.max(0, Math.floor(count / largest) - 1);
  const best = [{ cost: 0, calls: [] }];
  for (let left = 1; left <= count - whole * largest; left++) {
    let found = { cost: Infinity };
    for (const length of lengths) {
      const rest = best[Math.max(0, left - length)];
      const cost = 1 + length * COST_PER_POSITION + rest.cost;
      if (length - left <= free - count && cost < found.cost)
        found = { cost, calls: [length, ...rest.calls] };
    }
    best.push(found);
  }
  const rest = [...best.at(-1).calls].sort((a, b) => b - a);
  return [...new Array(whole).fill(largest), ...rest];
}
