"""Run what was written, before anyone else does.

A file's structure is checked, LiteRT opens it, every signature is run on text, and the
logits are held against those of the Keras model. What does not pass never gets its
final name.
"""

import mmap

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.export import integrity, litert, signatures, structure
from gpt_tf.export.constants import Constants
from gpt_tf.export.reader import BrokenError
from gpt_tf.export.tflite_writer import Model
from gpt_tf.generation.sampler import log_softmax
from gpt_tf.native_logs import end_quietly

# A file may be larger than its parameters by this factor and the graphs' bytes.
SIZE_FACTOR = 1.02
GRAPH_BYTES = 1 << 17

# Mean Kullback-Leibler divergence from the Keras model, in nats, above which a file
# is taken for broken. Rounding alone gave 0.03 nats at most (int4) on models trained
# here; another activation function gives 0.35, missing positions 0.8. int4 to the
# nearest of a model with large channels can be as bad (SmolLM2: 0.78) and is refused.
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
_MOST_CHUNKS = 4  # of one signature
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
    _require(size <= most, f"a size of at most {most:,.0f} bytes", f"{size:,} bytes")
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        try:
            structure.check(data, integrity.read_seal(data, verify=False))
        except BrokenError as error:
            _require(False, "a graph that LiteRT can run", error)
    runner = _Runner(path)
    length = min(len(ids), runner.capacity, MOST_TOKENS)
    ids = np.asarray(ids[:length], np.int32)
    wanted = reference(ids[None]).numpy()[0]  # (N, V)
    if "head/mask" in constants.vectors:
        wanted = wanted + constants.vectors["head/mask"]
    found = {}
    for span in signatures.lengths_of(runner.names, "score"):
        found |= runner.run_score(span, ids)
    for span in signatures.lengths_of(runner.names):
        found |= runner.run_prefill(span, ids)
    for texts in signatures.lengths_of(runner.names, "decode_batch"):
        found |= runner.run_batch(texts, ids)
    # Without a text longer than the shortest prefill, decode alone.
    found |= runner.run_decode(ids, 0, runner.blank)
    end_quietly()
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
        "signatures": sorted(runner.names),
        "tokens": int(length),
    }


def _require(good, expected, received):
    if not good:
        raise VerificationError(
            f"Verifying the exported file expects {expected}. Received: {received}. "
            "The file was not kept; another mode may fit this model better."
        )


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

    def __init__(self, path):
        try:
            self.model = litert.compiled(str(path), num_threads=2)
        except RuntimeError as error:
            raise VerificationError(
                f"LiteRT cannot open the exported file: {error}. It was not kept."
            ) from None
        self.names = self.model.get_signature_list()
        details = self.model.get_input_tensor_details(signatures.DECODE)
        self.blank = {
            name: np.zeros(detail["shape"], detail["dtype"])
            for name, detail in details.items()
            if name.startswith("kv_cache")
        }
        self.capacity = self.blank[signatures.key_cache(0)].shape[2]

    def run(self, name, arrays):
        """Run a signature on arrays by their names; return its outputs likewise."""
        index = self.model.get_signature_index(name)
        inputs = self.model.create_input_buffers(index)
        outputs = self.model.create_output_buffers(index)
        for key, buffer in zip(self.names[name]["inputs"], inputs, strict=True):
            buffer.write(arrays[key])
        self.model.run_by_index(index, inputs, outputs)
        details, found = self.model.get_output_tensor_details(name), {}
        for key, buffer in zip(self.names[name]["outputs"], outputs, strict=True):
            shape, dtype = details[key]["shape"], np.dtype(details[key]["dtype"])
            found[key] = buffer.read(int(np.prod(shape)), dtype).reshape(shape)
        return found

    def call(self, name, ids, start, caches, length):
        """Run tokens, filled up to a length; return logits or None, and new caches."""
        tokens = np.zeros((1, length), np.int32)
        tokens[0, : len(ids)] = ids
        positions = np.arange(start, start + length, dtype=np.int32)
        mask = signatures.mask(positions, self.capacity)
        inputs = {signatures.TOKENS: tokens, signatures.POSITIONS: positions}
        outputs = self.run(name, {**inputs, signatures.MASK: mask, **caches})
        logits = outputs.pop(signatures.LOGITS, None)
        return (None if logits is None else logits[0]), outputs  # (T, V)

    def run_score(self, span, ids):
        """Score a text in some chunks; return logits by (signature, position)."""
        found, caches, name = {}, self.blank, signatures.score(span)
        most = min(len(ids), self.capacity - span + 1, _MOST_CHUNKS * span)
        for start in range(0, most, span):
            chunk = ids[start : start + span]
            logits, caches = self.call(name, chunk, start, caches, span)
            for offset in range(len(chunk)):
                found[name, start + offset] = logits[offset]
        return found

    def run_prefill(self, span, ids):
        """Prefill but for the end, which is decoded; a last chunk is filled up."""
        caches, position, name = self.blank, 0, signatures.prefill(span)
        most = max(1, min(len(ids) - 2, _MOST_CHUNKS * span))
        while position < most and position + span <= self.capacity:
            chunk = ids[position : min(position + span, most)]
            _, caches = self.call(name, chunk, position, caches, span)
            position += len(chunk)
        return self.run_decode(ids, position, caches, f" after {name}")

    def run_decode(self, ids, start, caches, after=""):
        """Decode some tokens; return logits by (way, position)."""
        found = {}
        for place in range(start, min(len(ids), start + _GREEDY_TOKENS)):
            token = ids[place : place + 1]
            logits, caches = self.call(signatures.DECODE, token, place, caches, 1)
            found[signatures.DECODE + after, place] = logits[0]
        return found

    def run_batch(self, size, ids):
        """Decode the text in every row, each a token behind the one before it.

        So rows have different positions, and some are free: at first, and at the end.
        """
        name, found = signatures.decode_batch(size), {}
        count = min(len(ids), _GREEDY_TOKENS, signatures.BATCH_CAPACITY)
        capacity = min(self.capacity, signatures.BATCH_CAPACITY)
        caches = {
            signatures.of_row(cache, row): blank[:, :, :capacity]
            for cache, blank in self.blank.items()
            for row in range(size)
        }
        for step in range(count + size - 1):
            places = step - np.arange(size)
            in_use = (places >= 0) & (places < count)
            positions = np.where(in_use, places, 0).astype(np.int32)
            masks = {
                signatures.of_row(signatures.MASK, row): signatures.mask(
                    positions[row : row + 1], capacity
                )
                for row in range(size)
            }
            tokens = np.asarray(ids, np.int32)[positions][None]
            inputs = {signatures.TOKENS: tokens, signatures.POSITIONS: positions}
            caches = self.run(name, {**inputs, **masks, **caches})
            logits = caches.pop(signatures.LOGITS)[0]
            for row in np.flatnonzero(in_use):
                way = f"{name}, row {row}"
                found[way, int(places[row])] = logits[row]
        return found
