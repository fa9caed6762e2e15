// Runs the model beside the page, which never freezes.
//
// It is no module, because LiteRT.js loads its WASM by `importScripts`.

const module = import("./model.js");
let model;
let turn = Promise.resolve();

onmessage = ({ data: { id, method, values } }) => {
  // One call after another: they share a cache.
  turn = turn.then(() => answer(id, method, values));
};

async function answer(id, method, values) {
  try {
    if (method === "load") {
      const { Model } = await module;
      model = await Model.load(...values, (progress) => postMessage({ id, progress }));
      postMessage({ id, result: model.about() });
    } else {
      postMessage({ id, result: await model[method](...values) });
    }
  } catch (error) {
    postMessage({ id, error: error?.message ?? `LiteRT.js stopped: ${error}` });
  }
}
