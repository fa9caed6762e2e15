// What LiteRT.js expects of a browser, in Node: the model runs in the program's thread.

import { readFile } from "node:fs/promises";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname } from "node:path";
import { fileURLToPath } from "node:url";
import vm from "node:vm";

/** Return what stands for a worker. */
export async function startWorker() {
  globalThis.self ??= globalThis;
  globalThis.importScripts ??= runScript;
  const fetchFromNetwork = globalThis.fetch;
  globalThis.fetch = async (url, options) =>
    String(url).startsWith("file:")
      ? new Response(await readFile(new URL(url)))
      : fetchFromNetwork(url, options);
  const { serve } = await import("./model.js");
  const worker = { onmessage() {}, terminate() {} };
  worker.postMessage = serve((data) => worker.onmessage({ data }));
  return worker;
}

function runScript(url) {
  const file = fileURLToPath(url);
  const code =
    "(function(require, __filename, __dirname) {" + readFileSync(file, "utf8") +
    "; globalThis.ModuleFactory = ModuleFactory; })";
  vm.runInThisContext(code, file)(createRequire(file), file, dirname(file));
}
