"""Run what was written, before anyone else does.

A file is opened by LiteRT's own interpreter, every signature is run on text, and the
logits are held against those of the Keras model. What does not pass never gets its
final name.
"""

import mmap

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from gpt_tf.errors import InputError
from gpt_tf.export import integrity, signatures, structure
from gpt_tf.export.constants import Constants
from gpt_tf.export.graph import FLOAT_ISLANDS
from gpt_tf.export.reader import BrokenError
from gpt_tf.export.tflite_writer import Model, Type
from gpt_tf.generation.sampler import log_softmax

# A file may be larger than its parameters by this factor and the graphs' bytes.
SIZE_FACTOR = 1.02
GRAPH_BYTES = 1 << 17

# Mean Kullback-Leibler divergence from the Keras model, in nats, above which a file
# is taken for broken. Rounding alone gave 0.03 nats at most (int4) where it was tried;
# another activation function gives 0.35, missing positions 0.8.
LARGEST_DIVERGENCE = {
    "float32": 1e-4,
    "float16": 1e-2,
    "dynamic_int8": 0.1,
    "int16x8": 0.1,
    "int8": 0.2,
    "int8_full": 0.3,
    "int4": 0.3,
}
_GREEDY_TOKENS = 8
MOST_TOKENS = 128


class VerificationError(InputError):
    """The file that was written does not compute what the model computes."""


def verify(path, model: Model, constants: Constants, mode: str, reference, ids) -> dict:
    """Check a `.tflite` against the Keras model that it was made of.

    Args:
        path: The file.
        model: What was written to it.
        constants: The weights in it.
        mode: Its mode.
        reference: The Keras model, called as `reference(ids)`.
        ids: Token ids `(N,)`, a text to run; its first 128 or fewer are used.

    Returns:
        What was measured: signatures run, operators, size, largest difference of a
        logit, mean divergence in nats, top-1 agreement.

    Raises:
        VerificationError: A check failed.
    """
    size = path.stat().st_size
    most = constants.size_bytes * SIZE_FACTOR + GRAPH_BYTES
    _require(
        size <= most,
        f"a size of at most {most:,.0f} bytes",
        f"{size:,} bytes",
    )
    if mode == "int8_full":
        _check_islands(model)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        try:
            structure.check(data, integrity.read_seal(data, verify=False))
        except BrokenError as error:
            _require(False, "a graph that LiteRT can run", error)
    runner = _Runner(path, constants)
    expected = sorted(graph.signature for graph in model.subgraphs)
    _require(sorted(runner.names) == expected, expected, sorted(runner.names))
    length = min(len(ids), runner.capacity, MOST_TOKENS)
    ids = np.asarray(ids[:length], np.int32)
    wanted = reference(ids[None]).numpy()[0]  # (N, V)
    if "head/mask" in constants.vectors:
        wanted = wanted + constants.vectors["head/mask"]
    found = {}
    for kind in ("score", "prefill"):
        for span in signatures.lengths_of(runner.names, kind):
            found |= getattr(runner, f"run_{kind}")(span, ids)
    # Without a text longer than the shortest prefill, decode alone.
    found |= runner.run_prefill(None, ids[: _GREEDY_TOKENS + 1])
    limit = LARGEST_DIVERGENCE[mode]
    for way, divergence in _divergences(found, wanted).items():
        _require(
            divergence <= limit,  # which NaN is not
            f"a divergence from the Keras model of at most {limit} nats",
            f"{divergence:.3g} by {way}",
        )
    return {
        **_compare(found, wanted),
        "size_bytes": size,
        "parameter_bytes": constants.size_bytes,
        "size_ratio": size / constants.size_bytes,
        "operators": model.operators(),
        "signatures": expected,
        "tokens": int(length),
    }


def _require(good, expected, received):
    if not good:
        raise VerificationError(
            f"Verifying the exported file expects {expected}. Received: {received}. "
            "The file was not kept; another mode may fit this model better."
        )


def _check_islands(model):
    """See that only documented operations compute with real numbers."""
    for graph in model.subgraphs:
        for name, outputs in graph.results():
            if any(tensor.type == Type.FLOAT32 for tensor in outputs):
                _require(name in FLOAT_ISLANDS, "integer operations", name)


def _compare(found, wanted):
    """Compare logits by (way, position) with those that are wanted, `(N, V)`."""
    pairs = [(logits, wanted[position]) for (_, position), logits in found.items()]
    # What is ruled out has no digits left to compare.
    known = ~(pairs[0][1] < signatures.MASKED / 2)
    return {
        "largest_logit_difference": float(
            np.max([np.abs(logits - target)[known].max() for logits, target in pairs])
        ),
        "divergence_nats": float(np.mean([_divergence(*pair) for pair in pairs])),
        "top1_agreement": float(
            np.mean([logits.argmax() == target.argmax() for logits, target in pairs])
        ),
        "positions": len(pairs),
    }


def _divergences(found, wanted):
    """Return the mean divergence of each way, so that none hides behind others."""
    ways = {}
    for (way, position), logits in found.items():
        ways.setdefault(way, []).append(_divergence(logits, wanted[position]))
    return {way: float(np.mean(values)) for way, values in ways.items()}


def _divergence(logits, target):
    p, q = log_softmax(target), log_softmax(logits)
    divergence = (np.exp(p) * (p - q)).sum()
    return 0.0 if divergence < 0 else divergence  # by rounding; NaN stays NaN


class _Runner:
    """Runs a file's signatures plainly, caches in and out as arrays."""

    def __init__(self, path, constants):
        try:
            self.interpreter = Interpreter(model_path=str(path), num_threads=2)
        except (ValueError, RuntimeError) as error:
            raise VerificationError(
                f"LiteRT cannot open the exported file: {error}. It was not kept."
            ) from None
        self.names = list(self.interpreter.get_signature_list())
        self.runners = {}
        decode = self._runner(signatures.DECODE)
        self.blank = {
            name: np.zeros(detail["shape"], detail["dtype"])
            for name, detail in decode.get_input_details().items()
            if name.startswith("kv_cache")
        }
        layers = constants.sizes["num_layers"]
        _require(
            sorted(self.blank) == sorted(signatures.caches(layers)),
            f"the caches of {layers} blocks",
            sorted(self.blank),
        )
        self.capacity = self.blank[signatures.key_cache(0)].shape[2]

    def _runner(self, name):
        if name not in self.runners:
            self.runners[name] = self.interpreter.get_signature_runner(name)
        return self.runners[name]

    def call(self, name, ids, start, caches):
        """Run a signature; return logits `(T, V)` or None, and the new caches."""
        positions = np.arange(start, start + len(ids), dtype=np.int32)
        outputs = self._runner(name)(
            **{
                signatures.TOKENS: ids[None],
                signatures.POSITIONS: positions,
                signatures.MASK: signatures.mask(positions, self.capacity),
            },
            **caches,
        )
        logits = outputs.pop(signatures.LOGITS, None)
        return (None if logits is None else logits[0]), outputs

    def run_score(self, span, ids):
        """Score a text in chunks; return logits by (signature, position)."""
        found, caches, name = {}, self.blank, signatures.score(span)
        for start in range(0, len(ids), span):
            if start + span > self.capacity:
                break
            chunk = ids[start : start + span]
            padded = np.zeros(span, np.int32)
            padded[: len(chunk)] = chunk
            logits, caches = self.call(name, padded, start, caches)
            for offset in range(len(chunk)):
                found[name, start + offset] = logits[offset]
        return found

    def run_prefill(self, span, ids):
        """Prefill but for the end, which is decoded; a last chunk is filled up."""
        found, caches, position, way = {}, self.blank, 0, signatures.DECODE
        if span is not None:
            name = signatures.prefill(span)
            way = f"{way} after {name}"
            most = max(1, min(len(ids) - 2, 4 * span))
            while position < most and position + span <= self.capacity:
                chunk = ids[position : min(position + span, most)]
                padded = np.zeros(span, np.int32)
                padded[: len(chunk)] = chunk
                _, caches = self.call(name, padded, position, caches)
                position += len(chunk)
        stop = min(len(ids), position + _GREEDY_TOKENS)
        for place in range(position, stop):
            token = ids[place : place + 1]
            logits, caches = self.call(signatures.DECODE, token, place, caches)
            found[way, place] = logits[0]
        return found
