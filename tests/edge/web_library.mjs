// Asks `gpt_tf.js` in Node: {requests: [[prompt, options]]} on standard input.
//
//     node web_library.mjs FOLDER < requests.json

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const { GPT } = await import(pathToFileURL(`${process.argv[2]}/gpt_tf.js`));
const answers = [];
try {
  const gpt = await GPT.load();
  answers.push(gpt.about);
  for (const [prompt, options] of JSON.parse(readFileSync(0, "utf8")).requests) {
    try {
      const steps = [];
      for await (const step of gpt.steps(prompt, options)) steps.push(step);
      const text = steps.map((step) => step.text).join("");
      answers.push({ text, first: steps[0], ids: steps.map((step) => step.token.id) });
    } catch (error) {
      answers.push({ error: error.message });
    }
  }
} catch (error) {
  answers.push({ error: error.message });
}
console.log(JSON.stringify(answers));
