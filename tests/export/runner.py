"""Runs exported files for the tests, by LiteRT's plain interpreter.

Masks and positions are written out here once more, so that a fault of
`gpt_tf.export.signatures` or of `verify` is not mended by itself.
"""

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

OPERATORS = {v: k for k, v in vars(schema.BuiltinOperator).items() if k[0] != "_"}
TYPES = {v: k for k, v in vars(schema.TensorType).items() if k[0] != "_"}


def content_of(path_or_data):
    """Return the objects of a `.tflite`."""
    data = path_or_data
    if not isinstance(data, (bytes, bytearray)):
        data = path_or_data.read_bytes()
    return schema.ModelT.InitFromPackedBuf(data)


def operations_of(content):
    """Yield signature, operator, version, input and output tensors, and options."""
    for graph in content.subgraphs:
        for operation in graph.operators:
            code = content.operatorCodes[operation.opcodeIndex]
            yield (
                graph.name.decode(),
                OPERATORS[code.builtinCode],
                code.version,
                [graph.tensors[i] if i >= 0 else None for i in operation.inputs],
                [graph.tensors[i] for i in operation.outputs],
                operation.builtinOptions,
            )


def mask_of(start, length, capacity):
    mask = np.full((1, 1, length, capacity), -1e9, np.float32)
    for row in range(length):
        mask[0, 0, row, : start + row + 1] = 0
    return mask


class Runner:
    """Feeds tokens to a file's signatures, one call after the other."""

    def __init__(self, path):
        self.interpreter = Interpreter(model_path=str(path), num_threads=2)
        self.names = sorted(self.interpreter.get_signature_list())
        details = self.runner("decode").get_input_details()
        self.blank = {
            name: np.zeros(detail["shape"], detail["dtype"])
            for name, detail in details.items()
            if name.startswith("kv_cache")
        }
        self.capacity = self.blank["kv_cache_k_0"].shape[2]
        self.clear()

    def clear(self):
        self.caches, self.position = self.blank, 0

    def runner(self, name):
        return self.interpreter.get_signature_runner(name)

    def run(self, name, ids, count=None):
        """Run a signature; of its tokens, `count` belong to the text."""
        ids = np.asarray(ids, np.int32)
        positions = np.arange(self.position, self.position + len(ids), dtype=np.int32)
        outputs = self.runner(name)(
            tokens=ids[None],
            input_pos=positions,
            mask=mask_of(self.position, len(ids), self.capacity),
            **self.caches,
        )
        logits = outputs.pop("logits", None)
        self.caches = outputs
        self.position += len(ids) if count is None else count
        return None if logits is None else logits[0]

    def decode(self, ids):
        """Decode one after the other; logits `(N, V)`."""
        return np.concatenate([self.run("decode", [token]) for token in ids])

    def score(self, ids, filler=0):
        """Score in chunks from the start; logits `(N, V)`."""
        self.clear()
        lengths = (name.removeprefix("score_") for name in self.names)
        span, rows = max(int(length) for length in lengths if length.isdigit()), []
        name = f"score_{span}"
        for start in range(0, len(ids), span):
            chunk = list(ids[start : start + span])
            padded = chunk + [filler] * (span - len(chunk))
            rows.append(self.run(name, padded, len(chunk))[: len(chunk)])
        return np.concatenate(rows)
