// Measures a model in a page of headless Chromium; called by browser.py.
//
//     node browser.mjs NODE_MODULES CHROMIUM ours|transformers|ready URL < task.json

import { mkdtempSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [modules, executablePath, what, url] = process.argv.slice(2);
const task = JSON.parse(readFileSync(0, "utf8"));
const { chromium } = createRequire(`${modules}/`)("playwright-core");
const context = await chromium.launchPersistentContext(
  mkdtempSync(join(tmpdir(), "browser-")), {
    executablePath,
    args: [
      "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
      "--disable-background-networking", "--disable-component-update", "--disable-sync",
    ],
  });
const page = context.pages()[0];
page.setDefaultTimeout(600_000);

/** Times of tokens: a warm-up, then as many requests as are asked for. */
const measures = {
  async ours({ prompt, newTokens, repetitions }) {
    const { GPT } = await import("./gpt_tf.js");
    const gpt = await GPT.load("./");
    const found = [];
    for (let i = 0; i <= repetitions; i++) {
      const times = [performance.now()];
      const options = { maxNewTokens: newTokens, temperature: 0 };
      for await (const _ of gpt.steps(prompt, options)) times.push(performance.now());
      found.push(times);
    }
    return found;
  },

  async transformers({ prompt, newTokens, repetitions, threads }) {
    const { AutoModelForCausalLM, Tensor, env } = await import("./transformers.min.js");
    Object.assign(env, {
      allowLocalModels: true, allowRemoteModels: false, localModelPath: "./",
      useBrowserCache: false,
    });
    Object.assign(env.backends.onnx.wasm, { numThreads: threads, wasmPaths: "./ort/" });
    const model = await AutoModelForCausalLM.from_pretrained(
      "gpt2", { dtype: "q8", device: "wasm" });
    const input_ids = new Tensor(
      "int64", BigInt64Array.from(prompt.map(BigInt)), [1, prompt.length]);
    const attention_mask = new Tensor(
      "int64", new BigInt64Array(prompt.length).fill(1n), [1, prompt.length]);
    const found = [];
    for (let i = 0; i <= repetitions; i++) {
      const times = [performance.now()];
      let isPrompt = true;
      const streamer = {
        put: () => (isPrompt ? (isPrompt = false) : times.push(performance.now())),
        end() {},
      };
      await model.generate({
        input_ids, attention_mask, streamer, max_new_tokens: newTokens, do_sample: false });
      found.push(times);
    }
    return found;
  },
};

await page.goto(what === "ready" ? url : `${url}style.css`);
let result;
if (what === "ready") {
  await page.waitForFunction(() => document.body.dataset.ready);
  result = await page.evaluate(() => performance.now());
} else {
  result = (await page.evaluate(measures[what], task)).slice(1);
}
console.log(JSON.stringify(result));
process.exit(0);
