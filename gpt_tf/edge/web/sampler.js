// The choice of a next token: gpt_tf/generation/sampler.py, in JavaScript.
//
// The random numbers are those of NumPy's `Generator(PCG64(SeedSequence([seed, 0])))`,
// bit for bit, so that a seed gives the text that it gives in Python.

const MASK_64 = (1n << 64n) - 1n;
const MASK_128 = (1n << 128n) - 1n;
const PCG_MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;

/** NumPy's PCG64, seeded as by `SeedSequence(entropy)`.
 *
 * Reference: O'Neill, "PCG: A Family of Simple Fast Space-Efficient Statistically Good
 * Algorithms for Random Number Generation" (2014); numpy/random/src/pcg64.
 */
export class PCG64 {
  /** @param {(number|bigint)[]} entropy Integers, at least 0. */
  constructor(entropy) {
    const [high, low, highStep, lowStep] = seedWords(entropy);
    this.increment = ((((highStep << 64n) | lowStep) << 1n) | 1n) & MASK_128;
    this.state = (this.increment + ((high << 64n) | low)) & MASK_128;
    this.advance();
  }

  advance() {
    this.state = (this.state * PCG_MULTIPLIER + this.increment) & MASK_128;
  }

  /** The next number in [0, 1), of 53 random bits. */
  random() {
    this.advance();
    const mixed = ((this.state >> 64n) ^ this.state) & MASK_64;
    const turn = this.state >> 122n;
    const bits = ((mixed >> turn) | (mixed << (64n - turn))) & MASK_64;
    return Number(bits >> 11n) / 2 ** 53;
  }
}

/** Four numbers of 64 bits, as NumPy's `SeedSequence.generate_state` makes them. */
function seedWords(entropy) {
  const words = entropy.flatMap(wordsOf);
  const hash = hasher(0x43b0d7e5, 0x931e8875);
  const pool = [0, 1, 2, 3].map((i) => hash(words[i] ?? 0));
  const mixIn = (to, word) => {
    const mixed = Math.imul(0xca01f9dd, pool[to]) - Math.imul(0x4973f715, word);
    pool[to] = (mixed ^ (mixed >>> 16)) >>> 0;
  };
  for (let from = 0; from < 4; from++)
    for (let to = 0; to < 4; to++) if (from !== to) mixIn(to, hash(pool[from]));
  for (const word of words.slice(4))
    for (let to = 0; to < 4; to++) mixIn(to, hash(word));
  const output = hasher(0x8b51f9dd, 0x58f38ded);
  const halves = [0, 1, 2, 3, 4, 5, 6, 7].map((i) => BigInt(output(pool[i % 4])));
  return [0, 2, 4, 6].map((i) => (halves[i + 1] << 32n) | halves[i]);
}

function hasher(constant, multiplier) {
  return (value) => {
    value ^= constant;
    constant = Math.imul(constant, multiplier);
    value = Math.imul(value, constant);
    return (value ^ (value >>> 16)) >>> 0;
  };
}

/** The 32-bit words of an integer, the lowest first. */
function wordsOf(integer) {
  let rest = BigInt(integer);
  const words = [];
  do {
    words.push(Number(rest & 0xffffffffn));
    rest >>= 32n;
  } while (rest);
  return words;
}

/** How tokens are chosen; see `gpt_tf.generation.sampler.Sampler`. */
export class Sampler {
  /**
   * @param {object} options `temperature` (0 takes the most likely token), `topK`,
   *     `topP`, `repetitionPenalty`, `seed` (an integer; a new one if left out).
   * @param {number[]} suppressed Ids that are never chosen.
   */
  constructor(options, suppressed = []) {
    this.temperature = number("temperature", options.temperature ?? 1, (n) => n >= 0);
    this.topK = options.topK ?? null;
    if (this.topK !== null) integer("topK", this.topK, 1);
    this.topP = number("topP", options.topP ?? 1, (n) => n > 0 && n <= 1);
    this.penalty = number(
      "repetitionPenalty", options.repetitionPenalty ?? 1, (n) => n > 0);
    this.seed = options.seed ?? Math.floor(Math.random() * 2 ** 32);
    if (typeof this.seed !== "bigint") integer("seed", this.seed, 0);
    this.suppressed = suppressed;
    this.generator = new PCG64([this.seed, 0]);
  }

  /** Choose a token.
   *
   * @param {Float32Array} given Logits `(V,)`.
   * @param {Set<number>} seen The ids that occurred so far.
   * @returns {number} The token's id.
   */
  choose(given, seen) {
    const logits = Float64Array.from(given);
    for (const id of this.suppressed) logits[id] = -Infinity;
    const top = argmax(logits);
    if (!Number.isFinite(logits[top]))
      throw new RangeError(
        `Choosing a token expects finite logits. Received: ${logits[top]} as the ` +
        "largest. The model's weights contain NaN or Inf.");
    if (this.penalty !== 1)
      for (const id of seen)
        logits[id] = logits[id] > 0 ? logits[id] / this.penalty : logits[id] * this.penalty;
    if (this.temperature === 0) return argmax(logits);
    const weights = this.#probabilities(logits);
    let total = 0;
    for (const weight of weights) total += weight;
    const drawn = this.generator.random() * total;
    let sum = 0;
    for (let id = 0; id < weights.length; id++) if ((sum += weights[id]) > drawn) return id;
    return weights.findLastIndex((weight) => weight > 0);
  }

  #probabilities(logits) {
    if (this.topK !== null && this.topK < logits.length) keepLargest(logits, this.topK);
    const most = logits[argmax(logits)];
    let total = 0;
    for (let id = 0; id < logits.length; id++)
      total += logits[id] = Math.exp((logits[id] - most) / this.temperature);
    for (let id = 0; id < logits.length; id++) logits[id] /= total;
    return this.topP < 1 ? nucleus(logits, this.topP) : logits;
  }
}

/** Leave the largest values, of equal ones those that come first; others are -Inf. */
function keepLargest(logits, count) {
  const smallest = Float64Array.from(logits).sort()[logits.length - count];
  let ties = count;
  for (const logit of logits) if (logit > smallest) ties--;
  for (let id = 0; id < logits.length; id++)
    if (!(logits[id] > smallest || (logits[id] === smallest && ties-- > 0)))
      logits[id] = -Infinity;
}

/** The fewest most likely tokens that together have a probability; others are 0. */
function nucleus(probabilities, topP) {
  // All tokens below this together have less than what may be left out.
  const floor = (1 - topP) / (2 * probabilities.length);
  const order = [];
  for (let id = 0; id < probabilities.length; id++)
    if (probabilities[id] >= floor) order.push(id);
  order.sort((a, b) => probabilities[b] - probabilities[a] || a - b);
  const kept = new Float64Array(probabilities.length);
  let sum = 0;
  for (const id of order) {
    kept[id] = probabilities[id];
    if ((sum += kept[id]) >= topP) break;
  }
  return kept;
}

/** The most likely tokens, with their probabilities at temperature 1.
 *
 * @returns {{id: number, probability: number}[]} Those of `count`, the first the most
 *     likely one, and that of `chosen`, wherever it stands.
 */
export function mostLikely(logits, count, chosen) {
  const most = logits[argmax(logits)];
  let total = 0;
  const best = [];
  for (let id = 0; id < logits.length; id++) {
    total += Math.exp(logits[id] - most);
    if (best.length === count && !(logits[id] > logits[best.at(-1)])) continue;
    const place = best.findIndex((other) => logits[id] > logits[other]);
    best.splice(place < 0 ? best.length : place, 0, id);
    best.length = Math.min(best.length, count);
  }
  return [...new Set([...best, chosen])].map(
    (id) => ({ id, probability: Math.exp(logits[id] - most) / total }));
}

function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

export function integer(name, value, least) {
  if (!Number.isSafeInteger(value) || value < least)
    throw new RangeError(`${name} expects an integer from ${least}. Received: ${value}.`);
  return value;
}

function number(name, value, isGood) {
  if (typeof value !== "number" || !Number.isFinite(value) || !isGood(value))
    throw new RangeError(`${name} expects another number. Received: ${value}.`);
  return value;
}
