"""Running a file's signatures over a cache that is as large as the text needs.

LiteRT computes with every row of the cache, filled or not, so speed follows its
capacity. Here the capacity in use starts small and grows in steps; a growth copies
the rows once. Between growths nothing is copied: the same buffers are bound as cache
input and output of every signature. A loaded model may have several sessions, texts
with a cache each.
"""

import functools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from ai_edge_litert.tensor_buffer import TensorBuffer

from gpt_tf.edge import weight_cache as packed_weights
from gpt_tf.errors import DamagedFileError
from gpt_tf.export import litert, signatures
from gpt_tf.generation.sampler import log_softmax
from gpt_tf.native_logs import end_quietly, quiet

# Rows by which the capacity in use grows. GPT-2 small on 2 cores: a row that is not
# needed costs 0.01 ms a token, a growth 2 ms at 64 rows, 10 at 256 and 30 at 1024.
GROWTH = 64

# A call of so many tokens is worth a growth of its own: it attends to all rows there
# are. GPT-2 small on 2 cores: 256 tokens take 84 ms with 256 rows, and 145 with 1024.
_LONG_CALL = 256

# The part of a decode step that one more position adds in a prefill. GPT-2 small on 2
# cores, dynamic_int8: 1/30 at 64 rows, 1/38 at 960.
_COST_PER_POSITION = 1 / 32


class Executor:
    """One loaded model for any number of sessions.

    The sessions share weights and signatures; each has a cache of its own. To run
    them in turn costs time where their capacities differ: LiteRT then lays its memory
    out anew, 0.5 ms for GPT-2 small, where a token takes 8 to 16.

    Args:
        model: Name or bytes of a `.tflite` that was verified.
        facts: The file's own facts, from its seal.
        num_threads: Threads that compute.
        name: How messages call the file.
        weight_cache: Where packed weights are kept, one of `weight_cache.KINDS`.
    """

    def __init__(
        self,
        model: str | bytes,
        facts: dict,
        num_threads: int,
        name: str,
        weight_cache: str = "memory",
    ):
        config = facts["config"]
        self.limit = facts["capacity"]
        self.dtype = np.dtype(facts["cache_dtype"])
        self.heads = config.get("num_kv_heads", config["num_heads"])
        self.head_dim = config["head_dim"]
        self.cache_names = signatures.caches(config["num_layers"])
        # LiteRT goes on reading it.
        self._data = model
        self._pool = []
        load = functools.partial(self._load, num_threads)
        is_file = isinstance(model, str)
        size_bytes = os.path.getsize(model) if is_file else len(model)
        try:
            packed_weights.load(load, weight_cache, facts["sha256"], size_bytes)
        except RuntimeError as error:
            raise DamagedFileError(
                f"LiteRT cannot open {name}: {error}. Export it again, or install the "
                "version of ai-edge-litert that it was exported with."
            ) from None
        end_quietly()

    def _load(self, num_threads, cache_name):
        with quiet():
            self._open(num_threads, cache_name)
            # The first run sets up what later ones use.
            session = self.session()
            session.run(self.decode, [0])
            session.close()

    def _open(self, num_threads, cache_name):
        self.model = litert.compiled(self._data, num_threads, cache_name)
        found = {
            name: Signature(self.model, name, names)
            for name, names in self.model.get_signature_list().items()
        }
        self.decode = found[signatures.DECODE]
        # By their lengths, ascending.
        lengths = signatures.lengths_of(found)
        self.prefills = {
            length: found[signatures.prefill(length)] for length in lengths
        }
        lengths = signatures.lengths_of(found, "score")
        self.scores = {length: found[signatures.score(length)] for length in lengths}
        sizes = signatures.lengths_of(found, "decode_batch")
        self.batches = {size: found[signatures.decode_batch(size)] for size in sizes}

    def session(self) -> "Session":
        """Begin a session with an empty cache."""
        return Session(self)

    def acquire(self, capacity: int) -> "_Cache":
        """Take a cache of this capacity from the pool, or make one."""
        for index, cache in enumerate(self._pool):
            if cache.capacity == capacity:
                return self._pool.pop(index)
        return self._new_cache(capacity)

    def release(self, cache: "_Cache") -> None:
        """Put a cache into the pool."""
        if self._pool is None:  # closed
            return
        # Small ones are kept for other texts, half as many rows as are possible.
        kept = sorted([*self._pool, cache], key=lambda cache: cache.capacity)
        while sum(cache.capacity for cache in kept) > self.limit // 2:
            kept.pop()
        self._pool = kept

    def close(self) -> None:
        """Free model and buffers; the sessions are of no use afterwards."""
        self._pool = self.model = self._data = None
        self.prefills = self.scores = self.batches = self.decode = None

    def _new_cache(self, capacity):
        self.decode.resize(capacity)
        # What is hidden is multiplied by 0, so it must be finite.
        blank = np.zeros(self.heads * capacity * self.head_dim, self.dtype)
        buffers = {}
        for name in self.cache_names:
            buffers[name] = self.decode.input_buffer(name)
            buffers[name].write(blank)
        return _Cache(capacity, buffers, {})


class Session:
    """One text in a cache of its own.

    Args:
        executor: The model that runs it.

    Attributes:
        ids: The tokens in the cache; what was interrupted is not among them.
        limit: Largest number of them.
    """

    def __init__(self, executor: Executor):
        self.ids = []
        self.limit = executor.limit
        self._executor = executor
        self._cache = executor.acquire(min(GROWTH, executor.limit))

    @property
    def position(self) -> int:
        """Number of tokens in the cache; a smaller one may be set, to go on from."""
        return len(self.ids)

    @position.setter
    def position(self, value):
        del self.ids[value:]

    @property
    def capacity(self) -> int:
        """Rows of the cache in use."""
        return self._cache.capacity

    @property
    def row_shape(self) -> tuple[int, int, int]:
        """What a token has in the caches: their number, `G` heads, of `D` values."""
        executor = self._executor
        return len(executor.cache_names), executor.heads, executor.head_dim

    @property
    def dtype(self) -> np.dtype:
        """Type of the caches' values."""
        return self._executor.dtype

    def reset(self) -> None:
        """Empty the cache."""
        self.ids = []

    def prefill(self, ids: Sequence[int]) -> None:
        """Append tokens to the cache; they must have room in it."""
        for signature, chunk in self._chunks(ids, self._executor.prefills):
            self.run(signature, chunk)

    def decode(self, token: int) -> np.ndarray:
        """Append a token and return the logits of the next one, `(V,)` float32."""
        return self.verify([token], 1)[0].copy()

    def score(self, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Append tokens; yield the logits of each, in pieces `(n, V)` float32."""
        for signature, chunk in self._chunks(ids, self._executor.scores):
            yield self.run(signature, chunk).copy()

    def verify(self, ids: Sequence[int], length: int) -> np.ndarray:
        """Append tokens, at most `length`, by one call; return their logits.

        They are `(n, V)` float32, in all bits those that `decode` gives, and hold
        until the next call.
        """
        self.reserve(length)
        executor = self._executor
        return self.run(executor.scores[length] if length > 1 else executor.decode, ids)

    def log_probabilities(self, ids: Sequence[int]) -> np.ndarray:
        """Return those of all tokens of a text but the first, `(N - 1,)` float32.

        Of a text of any length; the cache is empty before and after.
        """
        scores, known = np.zeros(len(ids) - 1, np.float32), 0
        while known < len(scores):
            begin = max(0, known - self.limit // 2)
            # Behind the last token nothing is asked for.
            end = min(begin + self.limit, len(scores))
            self.reset()
            self.prefill(ids[begin:known])
            for logits in self.score(ids[known:end]):
                after = known + len(logits)
                places = np.arange(len(logits)), ids[known + 1 : after + 1]
                scores[known:after] = log_softmax(logits)[places]
                known = after
        self.reset()
        return scores

    def plan(self, count: int, most: float = math.inf) -> tuple[int, ...]:
        """Make room for tokens and return the lengths of the calls that prefill them.

        Args:
            count: Number of tokens.
            most: Largest length that may be chosen, at least 1.
        """
        chosen = self._choose(count, self._executor.prefills, most)
        self._reserve_for(chosen, count)
        return chosen

    def _choose(self, count, by_length, most=math.inf):
        lengths = tuple(length for length in by_length if length <= most)
        return plan(count, self.limit - self.position, lengths)

    def _reserve_for(self, calls, count):
        """Make room for calls that append so many tokens."""
        # The next token has its row too, so that it does not make the cache grow.
        free = self.limit - self.position
        self.reserve(max(min(count + 1, free), sum(calls)))

    def step(self, ids: Sequence[int], length: int) -> None:
        """Append tokens, at most `length`, by one of the calls that `plan` chose."""
        executor = self._executor
        self.run(executor.prefills.get(length, executor.decode), ids)

    def run(self, signature: "Signature", chunk) -> np.ndarray | None:
        """Run a chunk, filled up to the signature's length; return what comes out."""
        call = self._call(signature)
        position, count = self.position, len(chunk)
        signature.tokens[:count] = chunk
        signature.tokens[count:] = 0
        signature.positions[:] = np.arange(position, position + signature.length)
        call.show(position)
        signature.token_buffer.write(signature.tokens)
        signature.position_buffer.write(signature.positions)
        call.mask_buffer.write(call.mask)
        self._executor.model.run_by_index(signature.index, call.inputs, call.outputs)
        self.ids += chunk
        return signature.read(count)

    def rows(self, count: int) -> Iterator[np.ndarray]:
        """Yield the first rows `(G, count, D)` of each cache, in the file's order."""
        executor, cache = self._executor, self._cache
        shape = executor.heads, cache.capacity, executor.head_dim
        for name in executor.cache_names:
            values = cache.buffers[name].read(math.prod(shape), executor.dtype)
            yield values.reshape(shape)[:, :count]

    def fill(self, ids: Sequence[int], rows: Iterable[np.ndarray]) -> None:
        """Replace the text by another, whose rows of each cache were computed before.

        `plan` has made room for it.

        Args:
            ids: The tokens.
            rows: As `rows` yields them, of as many tokens.
        """
        self.reset()
        self._write(self._cache, rows, len(ids))
        self.ids = list(ids)

    def close(self) -> None:
        """Release the cache, for other sessions."""
        cache, self._cache = self._cache, None  # never released twice
        if cache is not None:
            self._executor.release(cache)

    def _chunks(self, ids, by_length):
        """Cut tokens into pieces, each with the signature that runs it next."""
        calls, begin = self._choose(len(ids), by_length), 0
        for index, length in enumerate(calls):
            if length >= _LONG_CALL and index + 1 < len(calls):
                self.reserve(length)
            else:
                self._reserve_for(calls[index:], len(ids) - begin)
            signature = by_length.get(length, self._executor.decode)
            yield signature, ids[begin : begin + length]
            begin += length

    def bound(self) -> tuple["_Cache", "_Call"]:
        """Return the cache, and the call that decodes with it."""
        return self._cache, self._call(self._executor.decode)

    def reserve(self, rows: int) -> None:
        """Grow the cache, or shrink an empty one, to so many more rows."""
        rows += self.position
        capacity = min(-(-rows // GROWTH) * GROWTH, self._executor.limit)
        if not self.position and capacity < self.capacity:
            self._take(capacity)
        self.grow(capacity)

    def grow(self, capacity: int) -> None:
        """Give the cache at least so many rows."""
        if capacity > self.capacity:
            self._take(capacity)

    def _take(self, capacity):
        old, new = self._cache, self._executor.acquire(capacity)
        if self.position:
            self._write(new, self.rows(self.position), self.position)
        self._cache = new
        self._executor.release(old)

    def _write(self, cache, rows, count):
        executor = self._executor
        shape = executor.heads, cache.capacity, executor.head_dim
        whole = np.zeros(shape, executor.dtype)
        for name, values in zip(executor.cache_names, rows, strict=True):
            whole[:, :count] = values
            cache.buffers[name].write(whole)

    def _call(self, signature):
        cache = self._cache
        signature.resize(cache.capacity)
        if signature.name not in cache.calls:
            cache.calls[signature.name] = _Call(signature, cache)
        return cache.calls[signature.name]


@functools.lru_cache(maxsize=1024)
def plan(count: int, free: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Choose lengths of calls that process tokens at the least cost.

    A call computes all of its length; a last one may be longer than what is left.

    Args:
        count: Number of tokens.
        free: Positions that are free, at least `count`.
        lengths: Lengths that are possible; 1 always is.

    Returns:
        The lengths, falling.

    Example:
        >>> plan(75, 100, (1, 8, 64))
        (64, 8, 8)
    """
    lengths = sorted({1, *lengths})
    largest = lengths[-1]
    whole = max(0, count // largest - 1)
    # The cheapest way for each number of tokens that may be left, from none on.
    best = [(0.0, ())]
    for left in range(1, count - whole * largest + 1):
        best.append(
            min(
                (1 + length * _COST_PER_POSITION + cost, (length, *rest))
                for length in lengths
                if length - left <= free - count
                for cost, rest in [best[max(0, left - length)]]
            )
        )
    return (largest,) * whole + tuple(sorted(best[-1][1], reverse=True))


class _Cache(NamedTuple):
    """Keys and values of all blocks, and the calls that are bound to them."""

    capacity: int
    buffers: dict[str, TensorBuffer]
    calls: dict[str, "_Call"]


class Signature:
    """One signature: the buffers that do not depend on the capacity.

    Args:
        model: The `CompiledModel`.
        name: The signature's.
        names: Those of its inputs and outputs.
    """

    def __init__(self, model, name, names):
        self.name = name
        self.inputs, self.outputs = names["inputs"], names["outputs"]
        self.index = model.get_signature_index(name)
        shapes = model.get_input_tensor_details(name)
        self.length = int(shapes[signatures.TOKENS]["shape"][1])
        self.tokens = np.zeros(self.length, np.int32)
        self.positions = np.zeros(self.length, np.int32)
        self._model = model
        self._capacity = None
        self._shapes = [list(shapes[name]["shape"]) for name in self.inputs]
        self.token_buffer = self.input_buffer(signatures.TOKENS)
        self.position_buffer = self.input_buffer(signatures.POSITIONS)
        self.logits_buffer = None
        if signatures.LOGITS in self.outputs:
            shape = model.get_output_tensor_details(name)[signatures.LOGITS]["shape"]
            # LiteRT writes to where NumPy reads.
            self._logits = _aligned(self.length * int(shape[-1]))
            self.logits_buffer = TensorBuffer.create_from_host_memory(self._logits)

    def input_buffer(self, name):
        return self._model.create_input_buffer_by_name(self.name, name)

    def read(self, count):
        """Return the first rows of the logits, or None where none come out."""
        if self.logits_buffer is None:
            return None
        return self._logits.reshape(self.length, -1)[:count]

    def resize(self, capacity):
        """Give mask and caches this many rows."""
        if capacity == self._capacity:
            return
        self._capacity = None  # an interruption leaves some in the old size
        for index, (name, shape) in enumerate(
            zip(self.inputs, self._shapes, strict=True)
        ):
            if name.startswith(signatures.MASK):
                shape[3] = capacity
            elif name.startswith("kv_cache"):
                shape[2] = capacity
            else:
                continue
            self._model.resize_input_tensor(index, shape, self.index, strict=False)
        self._capacity = capacity


class _Call:
    """A signature with buffers of one capacity, ready to run."""

    def __init__(self, signature, cache):
        self.mask_buffer = signature.input_buffer(signatures.MASK)
        self.mask = np.zeros((signature.length, cache.capacity), np.float32)
        self._position = None
        buffers = {
            signatures.TOKENS: signature.token_buffer,
            signatures.POSITIONS: signature.position_buffer,
            signatures.MASK: self.mask_buffer,
            signatures.LOGITS: signature.logits_buffer,
            **cache.buffers,
        }
        self.inputs = [buffers[name] for name in signature.inputs]
        self.outputs = [buffers[name] for name in signature.outputs]

    def show(self, position):
        """Let the tokens from a position on see the rows up to their own."""
        before, self._position = self._position, None  # not known if interrupted
        if len(self.mask) == 1 and position - 1 == before:
            self.mask[0, position] = 0
        else:
            length, capacity = self.mask.shape
            positions = np.arange(position, position + length)
            self.mask[:] = signatures.mask(positions, capacity)[0, 0]
        self._position = position


def _aligned(count):
    """Return float32 memory that LiteRT can use as it is: from a multiple of 64 on."""
    spare = 64 // np.dtype(np.float32).itemsize
    memory = np.zeros(count + spare, np.float32)
    begin = -memory.ctypes.data % 64 // memory.itemsize
    return memory[begin : begin + count]
