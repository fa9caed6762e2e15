// Runs the model beside the page, which never freezes.
//
// It is no module, because LiteRT.js loads its WASM by `importScripts`.

const service = import("./model.js").then(
  ({ serve }) => serve(postMessage),
  (error) => ({ id }) => postMessage({ id, error: error.message }),
);

onmessage = async ({ data }) => (await service)(data);
