// Opens the page in headless Chromium and does what people do; prints JSON.
//
//     node web_page.mjs NODE_MODULES SCENARIO URL [FOLDER] < given.json

import { mkdtempSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";

const [modules, scenario, url, folder] = process.argv.slice(2);
const given = JSON.parse(readFileSync(0, "utf8") || "{}");
const { chromium } = createRequire(`${modules}/`)("playwright-core");

async function open(options = {}, flags = []) {
  const context = await chromium.launchPersistentContext(mkdtempSync(join(tmpdir(), "page-")), {
    executablePath: given.chromium, headless: true, ...options,
    args: [
      "--no-sandbox", "--disable-quic", "--no-first-run",
      "--disable-background-networking", "--disable-component-update", "--disable-sync",
      ...(flags.join().includes("webgpu") ? [] : ["--disable-gpu"]), ...flags,
    ],
  });
  const page = context.pages()[0] ?? (await context.newPage());
  page.setDefaultTimeout(300_000); // the machine may be busy
  page.errors = [];
  page.on("pageerror", (error) => page.errors.push(String(error)));
  return page;
}

async function load(page) {
  await page.goto(url);
  await loaded(page);
}

async function loaded(page) {
  await page.waitForFunction(
    () => document.body.dataset.ready || document.querySelector(".failed"));
  return page.textContent("#status");
}

async function write(page, prompt, settings = {}) {
  await page.evaluate(() => (document.getElementById("settings").open = true));
  for (const [id, value] of Object.entries(settings)) await page.fill(`#${id}`, `${value}`);
  await page.fill("#prompt", prompt);
  await page.click("#go");
  await page.waitForFunction(() => !document.getElementById("go").disabled);
  return page.textContent("#output");
}

const scenarios = {
  async library() {
    const page = await open();
    await load(page);
    return page.evaluate(async (requests) => {
      const { GPT } = await import("./gpt_tf.js");
      const gpt = await GPT.load("./");
      const texts = [];
      for (const [prompt, options] of requests) texts.push(await gpt.generate(prompt, options));
      gpt.close();
      return { texts, about: gpt.about };
    }, given.requests);
  },

  async status() {
    const page = await open({}, given.flags ?? []);
    await load(page);
    const failed = (await page.locator(".failed").count()) > 0;
    return { status: await page.textContent("#status"), failed, errors: page.errors };
  },

  async again() {
    const page = await open();
    await load(page);
    const first = await page.textContent("#status");
    await page.click("#retry");
    await page.waitForFunction(() => document.body.dataset.ready);
    return { first, second: await page.textContent("#status") };
  },

  async kept() {
    const page = await open();
    const fetched = [];
    page.context().on("request", (request) => fetched.push(request.url()));
    await load(page);
    const count = () => fetched.filter((one) => one.includes("model.tflite")).length;
    const first = count();
    await load(page);
    return { first, second: count() - first, kept: await page.evaluate(async () =>
      (await (await caches.open("gpt_tf")).keys()).map((request) => request.url)) };
  },

  async people() {
    const page = await open({ viewport: { width: 390, height: 844 } });
    await load(page);
    const text = await write(page, given.prompt, given.settings);
    const status = await page.textContent("#status");
    await page.locator("#text").focus();
    for (const key of ["Home", "ArrowRight"]) await page.keyboard.press(key);
    const chosen = await page.textContent("#output .chosen");
    const candidates = await page.locator("#candidates li").allTextContents();
    const taken = await page.locator("#candidates .taken").count();
    const speed = await page.locator("#speed dd").allTextContents();
    const spoken = await page.textContent("#spoken");
    await page.fill("#maxNewTokens", "100000");
    await page.focus("#prompt");
    await page.keyboard.press("Control+Enter");
    await page.waitForFunction(() => Number(document.getElementById("count").textContent) > 20);
    await page.keyboard.press("Escape");
    await page.waitForFunction(() => !document.getElementById("go").disabled);
    const stopped = Number(await page.textContent("#count"));
    const wide = await page.evaluate(() => document.documentElement.scrollWidth);
    const unnamed = await page.evaluate(() =>
      [...document.querySelectorAll("input, textarea, button, progress, section")]
        .filter((one) => !(one.labels?.length || one.textContent.trim() ||
          one.ariaLabel || one.getAttribute("aria-labelledby"))).length);
    return { text, status, chosen, candidates, taken, speed, spoken, stopped, wide, unnamed,
      errors: page.errors };
  },

  async chat() {
    const page = await open();
    await load(page);
    await page.evaluate(() => (document.getElementById("settings").open = true));
    for (const [id, value] of Object.entries(given.settings)) await page.fill(`#${id}`, `${value}`);
    for (const message of given.messages) {
      await page.fill("#prompt", message);
      await page.press("#prompt", "Enter");
      await page.waitForFunction(() => !document.getElementById("go").disabled);
    }
    return page.locator("#output .turn").allTextContents();
  },

  async webgpu() {
    const page = await open({}, [
      "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]);
    await page.goto(url);
    return page.evaluate(async ({ prompt, options }) => {
      const { GPT } = await import("./gpt_tf.js");
      try {
        const gpt = await GPT.load("./", { accelerator: "webgpu" });
        return { about: gpt.about, text: await gpt.generate(prompt, options) };
      } catch (error) {
        return { error: error.message };
      }
    }, given);
  },

  async pictures() {
    for (const [name, width, height, colorScheme] of given.pictures) {
      const page = await open({ viewport: { width, height }, colorScheme });
      await load(page);
      await page.evaluate(() => (document.getElementById("settings").open = true));
      await write(page, given.prompt, given.settings);
      await page.locator("#output .token").nth(given.token ?? 9).hover();
      await page.evaluate(() => (document.getElementById("settings").open = false));
      await page.screenshot({ path: `${folder}/${name}.png`, fullPage: true });
      await page.context().close();
    }
  },
};

const result = (await scenarios[scenario]()) ?? null;
console.log(JSON.stringify(result));
process.exit(0);
