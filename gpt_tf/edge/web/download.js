// Files of the folder: fetched, checked, and the model kept by the browser.

const CACHE = "gpt_tf";

/** Fetch a file whole, or say what went wrong.
 *
 * @param {URL} url
 * @param {(loaded: number) => void} onProgress Is told the bytes that have come.
 * @returns {Promise<Uint8Array>}
 */
async function fetchBytes(url, size, onProgress) {
  const response = await fetchFile(url);
  const bytes = new Uint8Array(size);
  const reader = response.body.getReader();
  let loaded = 0;
  const broken = () => new Error(
    `The download of ${nameOf(url)} ended after ${loaded} of ${size} bytes. Check the ` +
    "connection and load it again.");
  for (;;) {
    const { done, value } = await reader.read().catch(() => { throw broken(); });
    if (done) break;
    if (loaded + value.length > size) throw changed(url);
    bytes.set(value, loaded);
    onProgress((loaded += value.length));
  }
  if (loaded < size) throw broken();
  return bytes;
}

async function fetchFile(url) {
  const response = await fetch(url, { cache: "no-cache" }).catch((error) => {
    throw new Error(
      `${nameOf(url)} cannot be fetched: ${error.message}. Check the connection and ` +
      "load it again.");
  });
  if (!response.ok)
    throw new Error(
      `${nameOf(url)} is expected at ${url}. Received: status ${response.status}. ` +
      "Make the folder again with gpt-tf web.");
  return response;
}

export async function fetchJSON(url) {
  const text = await (await fetchFile(url)).text();
  try {
    return JSON.parse(text);
  } catch {
    throw new Error(
      `${nameOf(url)} expects JSON. Received: something else. Make the folder again ` +
      "with gpt-tf web.");
  }
}

/** Return the model's bytes, from the browser's cache if it has those that are meant.
 *
 * @param {URL} url
 * @param {{size: number, sha256: string}} expected
 * @param {(loaded: number) => void} onProgress
 */
export async function fetchModel(url, expected, onProgress) {
  if (!globalThis.crypto?.subtle)
    throw new Error(
      "This page expects https, or localhost: only there a browser computes the hash " +
      `of the model. Received: ${globalThis.location?.origin}.`);
  const key = new URL(`?sha256=${expected.sha256}`, url);
  const cache = await globalThis.caches?.open(CACHE).catch(() => undefined);
  const kept = await cache?.match(key);
  if (kept) {
    const bytes = new Uint8Array(await kept.arrayBuffer());
    if ((await sha256Of(bytes)) === expected.sha256) return bytes;
  }
  const bytes = await fetchBytes(url, expected.size, onProgress);
  if ((await sha256Of(bytes)) !== expected.sha256) throw changed(url);
  await keep(cache, key, bytes);
  return bytes;
}

async function keep(cache, key, bytes) {
  if (!cache) return;
  for (const other of await cache.keys())
    if (other.url.split("?")[0] === key.href.split("?")[0]) await cache.delete(other);
  // Where there is no room the model is fetched again the next time.
  await cache.put(key, new Response(bytes)).catch(() => {});
}

function changed(url) {
  return new Error(
    `The bytes of ${nameOf(url)} do not have the SHA-256 that model.json states: it was ` +
    "changed, or belongs to another page. Reload the page, or make the folder again " +
    "with gpt-tf web.");
}

async function sha256Of(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function nameOf(url) {
  return url.pathname.split("/").at(-1);
}
