// The page: what is typed goes to the model, what comes back is shown.

import { GPT } from "./gpt_tf.js";

const $ = (id) => document.getElementById(id);
const seconds = (ms) => (ms < 1000 ? `${ms.toFixed(0)} ms` : `${(ms / 1000).toFixed(1)} s`);
const megabytes = (bytes) => `${(bytes / 1e6).toPrecision(3)} MB`;

let gpt;
let messages = [];
let isStopped = true;

// Loading

async function load() {
  const begun = performance.now();
  $("loading").classList.remove("failed");
  $("retry").hidden = true;
  $("progress").hidden = false;
  say("Loading the model.");
  try {
    gpt = await GPT.load("./", { onProgress: showProgress });
  } catch (error) {
    $("loading").classList.add("failed");
    $("progress").hidden = true;
    $("retry").hidden = false;
    return say(error.message);
  }
  const { name, prompt, config, mode, contextLength, size, threads, canChat, memory } = gpt.about;
  document.title = $("name").textContent = name;
  $("about").textContent =
    `${config.num_layers} blocks of ${config.embedding_dim}, ${mode}, ${megabytes(size)}, ` +
    `context of ${contextLength} tokens. It runs on this device: nothing that you write ` +
    "leaves it.";
  document.body.classList.toggle("chat", canChat);
  $("prompt-label").textContent = canChat ? "Message" : "Beginning";
  $("go").textContent = canChat ? "Send" : "Write";
  $("anew").textContent = canChat ? "New chat" : "Clear";
  $("system-label").hidden = !canChat;
  $("maxNewTokens").value = canChat ? 512 : 128;
  $("memory").textContent = megabytes(memory);
  $("prompt").value ||= prompt;
  $("progress").hidden = true;
  for (const id of ["text", "form"]) $(id).hidden = false;
  say(
    `Ready in ${seconds(performance.now() - begun)}, on WebAssembly with ` +
    (threads > 1 ? `${threads} threads.` : "one thread." + reason()));
  document.body.dataset.ready = "yes";
}

function reason() {
  return globalThis.crossOriginIsolated
    ? ""
    : " More are possible where the server sends Cross-Origin-Opener-Policy and " +
      "Cross-Origin-Embedder-Policy, as gpt-tf web --serve does.";
}

function showProgress({ loaded, total }) {
  $("progress").value = loaded / total;
  // A screen reader is told the beginning and the end.
  if (loaded === total) say("The model is here; it is being set up.");
}

function say(text) {
  $("status").textContent = text;
}

// Writing

async function write() {
  const prompt = $("prompt").value;
  if (!isStopped || (gpt.about.canChat && !prompt.trim())) return;
  isStopped = false;
  $("stop").disabled = false;
  $("go").disabled = true;
  const place = beginTurn(prompt);
  try {
    await follow(gpt.about.canChat ? messages : prompt, place);
  } catch (error) {
    add(place, "notice", `${error.message}`);
    speech.say(error.message);
  }
  isStopped = true;
  $("stop").disabled = true;
  $("go").disabled = false;
}

function beginTurn(prompt) {
  if (!gpt.about.canChat) {
    $("output").replaceChildren();
    add($("output"), "given", prompt);
    return $("output");
  }
  if (!messages.length && $("system").value)
    messages.push({ role: "system", content: $("system").value });
  messages.push({ role: "user", content: prompt });
  $("prompt").value = "";
  add($("output"), "turn given", prompt, "div");
  return add($("output"), "turn", "", "div");
}

/** Show a text as it comes, and how fast. */
async function follow(prompt, place) {
  const begun = performance.now();
  let first, text = "", count = 0, waiting = [];
  for (const id of ["first", "rate", "count"]) $(id).textContent = "–";
  const onBegin = ({ seed, notices }) => {
    $("drawn").textContent = seed;
    for (const notice of notices) add(place, "notice", `${notice}\n`);
  };
  try {
    for await (const step of gpt.steps(prompt, { ...options(), onBegin })) {
      const now = performance.now();
      first ??= now;
      count += 1;
      waiting.push(step);
      if (step.text) {
        const shown = add(place, "token", step.text);
        shown.steps = waiting;
        $("tokens").hidden = false;
        waiting = [];
        text += step.text;
        speech.add(step.text);
        $("text").scrollTop = $("text").scrollHeight;
      }
      $("first").textContent = seconds(first - begun);
      $("count").textContent = count;
      $("memory").textContent = megabytes(step.memory);
      if (count > 1) $("rate").textContent = ((count - 1) / (now - first) * 1000).toFixed(1);
      if (isStopped) break;
    }
  } finally {
    speech.flush();
    if (gpt.about.canChat)
      if (text) messages.push({ role: "assistant", content: text });
      else messages.pop();
  }
}

function options() {
  const value = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const stop = $("stopText").value.replaceAll("\\n", "\n").replaceAll("\\t", "\t");
  return {
    temperature: value("temperature"), topP: value("topP"), seed: value("seed"),
    maxNewTokens: value("maxNewTokens"), stop: stop ? [stop] : [],
  };
}

function add(place, kind, text, tag = "span") {
  const element = document.createElement(tag);
  element.className = kind;
  element.textContent = text;
  place.append(element);
  return element;
}

// A screen reader is told whole sentences and lines.
const speech = {
  held: "",
  add(text) {
    this.held += text;
    const end = this.held.search(/[.!?\n]\s*$/);
    if (end >= 0) this.flush();
  },
  flush() {
    if (this.held.trim()) this.say(this.held);
    this.held = "";
  },
  say(text) {
    while ($("spoken").childElementCount > 20) $("spoken").firstElementChild.remove();
    add($("spoken"), "", text, "p");
  },
};

// Tokens

function choose(token) {
  document.querySelector("#output .chosen")?.classList.remove("chosen");
  token.classList.add("chosen");
  $("tokens-hint").hidden = true;
  $("candidates").replaceChildren(...token.steps.map(candidatesOf));
}

function candidatesOf({ token, others }) {
  const list = document.createElement("ol");
  const all = [token, ...others].sort((a, b) => b.probability - a.probability);
  for (const one of all) {
    const item = add(list, one === token ? "taken" : "", "", "li");
    item.style.setProperty("--share", `${100 * one.probability}%`);
    add(item, "", visible(one.text));
    add(item, "", `${(100 * one.probability).toPrecision(3)} %`);
    if (one === token) add(item, "unseen", "was taken");
  }
  return list;
}

function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
}

function walk(event) {
  const tokens = [...document.querySelectorAll("#output .token")];
  const chosen = tokens.findIndex((token) => token.classList.contains("chosen"));
  const last = tokens.length - 1;
  const place = {
    ArrowRight: Math.min(chosen + 1, last), ArrowLeft: Math.max(chosen - 1, 0),
    Home: 0, End: last,
  }[event.key];
  if (place === undefined || last < 0) return;
  event.preventDefault();
  choose(tokens[place]);
  tokens[place].scrollIntoView({ block: "nearest" });
}

// What starts all that

$("retry").addEventListener("click", load);
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  write();
});
$("stop").addEventListener("click", () => (isStopped = true));
$("anew").addEventListener("click", () => {
  isStopped = true;
  messages = [];
  $("output").replaceChildren();
  $("candidates").replaceChildren();
});
$("prompt").addEventListener("keydown", (event) => {
  const isSent = event.ctrlKey || event.metaKey || (gpt.about.canChat && !event.shiftKey);
  if (event.key !== "Enter" || !isSent || event.isComposing) return;
  event.preventDefault();
  $("form").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") isStopped = true;
});
$("text").addEventListener("keydown", walk);
for (const kind of ["pointerover", "click"])
  $("output").addEventListener(kind, (event) => {
    const token = event.target.closest(".token");
    if (token) choose(token);
  });

load();
