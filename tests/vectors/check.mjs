// Computes by the scripts of gpt_tf/edge/web what the vectors hold; prints it as JSON.
//
//     node check.mjs FOLDER_OF_THE_SCRIPTS

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const folder = pathToFileURL(`${process.argv[2]}/`);
const { PCG64, Sampler } = await import(new URL("sampler.js", folder));
const { Detokenizer } = await import(new URL("sequence.js", folder));
const { plan } = await import(new URL("engine.js", folder));
const read = (name) => JSON.parse(readFileSync(new URL(name, import.meta.url), "utf8"));

const sampling = read("sampling.json");
const random = sampling.random.map(({ seed }) => {
  const generator = new PCG64([BigInt(seed), 0]);
  return { seed, numbers: [1, 2, 3, 4].map(() => generator.random()) };
});
const choices = sampling.choices.map(({ options }) => {
  const { top_k: topK, top_p: topP, repetition_penalty: repetitionPenalty } = options;
  const named = { ...options, topK, topP, repetitionPenalty };
  const sampler = new Sampler(named, sampling.suppressed);
  const seen = new Set(sampling.seen);
  const chosen = sampling.logits.map((row) => {
    const token = sampler.choose(Float32Array.from(row), seen);
    seen.add(token);
    return token;
  });
  return { options, chosen };
});
const plans = sampling.plans.map((one) => (
  { ...one, calls: plan(one.count, one.free, one.lengths) }));

const everyByte = Array.from({ length: 256 }, (_, byte) => String.fromCharCode(byte));
const detokenizing = read("detokenizing.json").map(({ bytes, stop }) => {
  const detokenizer = new Detokenizer(everyByte, stop);
  const pieces = [];
  for (const byte of bytes) {
    pieces.push(detokenizer.push(byte.charCodeAt(0)));
    if (detokenizer.stopped) break;
  }
  return { bytes, stop, pieces: [...pieces, detokenizer.finish()] };
});

console.log(JSON.stringify({ sampling: { ...sampling, random, choices, plans }, detokenizing }));
