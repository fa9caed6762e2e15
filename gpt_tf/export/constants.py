"""A model's weights in the form in which a file of each mode stores them."""

import dataclasses

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.export import signatures
from gpt_tf.export.flatbuffer import Grid, Type
from gpt_tf.models.decoding import parts_of
from gpt_tf.quantization.modes import MODES, Mode
from gpt_tf.quantization.weights import SMALLEST_SCALE, quantize_array

INT4_BLOCK = 32
_INT4_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix as the file stores it.

    Attributes:
        values: Its numbers; int4 ones packed, two to a byte.
        kind: A `TensorType`.
        shape: (outputs, inputs), or (rows, width) of a table.
        grid: Its `Grid`, or None.
    """

    values: np.ndarray
    kind: int
    shape: tuple
    grid: Grid | None

    @property
    def size_bytes(self) -> int:
        """Bytes of the numbers and of their scales."""
        scales = 0 if self.grid is None else self.grid.scales.nbytes
        return self.values.nbytes + scales


def store(values: np.ndarray, form: str, name: str, per_channel=True) -> Matrix:
    """Return a matrix `(outputs, inputs)` in a form of `Mode.kernels`.

    Args:
        values: Its numbers.
        form: A form.
        name: What an error calls it.
        per_channel: Whether an int8 matrix has a scale per output channel; if not,
            one scale.

    Raises:
        InputError: A value is NaN or infinite.
    """
    values = np.ascontiguousarray(values, np.float32)
    _refuse_infinite(values, name)
    if form in ("float16", "int4"):
        _refuse_large(values, form, name)
    if form == "float32":
        return Matrix(values, Type.FLOAT32, values.shape, None)
    if form == "float16":
        return Matrix(values.astype(np.float16), Type.FLOAT16, values.shape, None)
    if form == "int8":
        axis = 0 if per_channel else None
        integers, scales = quantize_array(values, 8, axis=axis, name=name)
        scales = scales.reshape(-1)
        grid = Grid(scales, np.zeros(len(scales), np.int64))
        return Matrix(integers, Type.INT8, values.shape, grid)
    if values.shape[1] % INT4_BLOCK:
        raise InputError(
            f"The mode int4 stores blocks of {INT4_BLOCK} inputs. Received: {name} "
            f"with {values.shape[1]} inputs. Use a model whose embedding_dim, heads "
            f"together and feedforward_dim are multiples of {INT4_BLOCK}, or "
            "dynamic_int8."
        )
    return _int4(values)


def _refuse_infinite(values, name):
    if not np.isfinite(values).all():
        raise InputError(
            f"Exporting expects finite weights. Received: NaN or infinity in {name}. "
            "Train with a lower learning rate, or in float32."
        )


def _refuse_large(values, form, name):
    most = float(np.finfo(np.float16).max)
    if np.abs(values).max(initial=0.0) > most:
        raise InputError(
            f"The mode {form} expects weights up to {most:.0f}, the largest number of "
            f"float16. Received: {np.abs(values).max():.3g} in {name}. Use float32 or "
            "dynamic_int8."
        )


def _rows_times(matrix, rows, factors):
    """Return rows of an int8 matrix, multiplied through their scales."""
    scales = matrix.grid.scales
    scales = scales[rows] * factors if len(scales) > 1 else scales * factors[:1]
    values = matrix.values[rows]
    grid = Grid(scales, np.zeros(len(scales), np.int64))
    return Matrix(values, matrix.kind, values.shape, grid)


def _int4(values):
    """Quantise in blocks, each with the scale of the smallest squared error.

    With 15 steps only, cutting off a block's largest value often costs less than
    making all steps coarser.
    """
    rows, width = values.shape
    blocks = values.reshape(rows, width // INT4_BLOCK, INT4_BLOCK)
    largest = np.abs(blocks).max(axis=2) / 7
    best = np.full(largest.shape, np.inf, np.float32)
    scales = np.zeros(largest.shape, np.float16)
    integers = np.zeros(blocks.shape, np.int8)
    for share in _INT4_SHARES:
        # The file holds scales as float16, so the integers are chosen for those.
        tried = (largest * share).astype(np.float16)
        divisor = np.where(tried == 0, np.float16(1), tried).astype(np.float32)
        steps = np.clip(np.rint(blocks / divisor[..., None]), -7, 7)
        errors = ((steps * divisor[..., None] - blocks) ** 2).sum(axis=2)
        better = errors < best
        best[better], scales[better] = errors[better], tried[better]
        integers[better] = steps[better]
    halves = (integers.view(np.uint8) & 15).reshape(-1, 2)
    packed = halves[:, 0] | (halves[:, 1] << 4)  # the first in the low half
    grid = Grid(scales, np.zeros(1, np.int64), 0, INT4_BLOCK)
    return Matrix(packed, Type.INT4, values.shape, grid)


@dataclasses.dataclass(frozen=True, eq=False)
class Constants:
    """All that a graph needs to know of a model.

    Attributes:
        mode: The `Mode`.
        sizes: `GPTModel`'s configuration, and `head_dim`.
        matrices: `Matrix` by name, `"block_0/qkv_kernel"` for example. A tied head
            has none of its own.
        vectors: float32 `(n,)` by name; `"head/mask"`, where token ids are ruled out,
            is added to the logits.
        ranges: (minimum, maximum) of activations by name.
        grids: Grids of activations that were asked for, so that one activation has
            one grid in all graphs.
    """

    mode: Mode
    sizes: dict
    matrices: dict
    vectors: dict
    ranges: dict
    grids: dict = dataclasses.field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes that the parameters need in this mode, their scales included."""
        vectors = sum(vector.nbytes for vector in self.vectors.values())
        return vectors + sum(matrix.size_bytes for matrix in self.matrices.values())

    def activation_grid(self, name: str) -> Grid:
        """Return the grid of an activation, int8 or int16 as the mode has it.

        The residual of `everything` is int16. The grid of int8 holds 0 exactly and
        is that of TensorFlow's fake quantisation; that of int16 is symmetric.

        Raises:
            InputError: The activation's range is not known or not finite.
        """
        if name not in self.grids:
            self.grids[name] = self._new_grid(name)
        return self.grids[name]

    def _new_grid(self, name):
        if name not in self.ranges:
            raise InputError(
                f"This mode expects a range for the activation {name}. Received: "
                f"ranges of {len(self.ranges)} activations without it. Get them from "
                "`calibrate(model, ids)` or by quantisation-aware training."
            )
        low, high = (float(value) for value in self.ranges[name])
        if not (np.isfinite(low) and np.isfinite(high) and low <= high):
            raise InputError(
                f"The range of the activation {name} expects two finite numbers in "
                f"order. Received: {low} and {high}. Calibrate again."
            )
        low, high = min(low, 0.0), max(high, 0.0)
        if self.integer_of(name) == Type.INT16:
            return symmetric_grid(max(-low, high) / 32767)
        scale = _never_zero((high - low) / 255)
        return affine_grid(scale, int(np.clip(np.rint(-low / scale), 0, 255)) - 128)

    def integer_of(self, name: str) -> int:
        """Return the integer type of an activation."""
        wide = self.mode.activations == "int16" or "residual" in name
        return Type.INT16 if wide or "embedding" in name else Type.INT8


def affine_grid(scale: float, zero_point: int) -> Grid:
    """Return a grid with one scale and one zero point."""
    return Grid(np.array([scale], np.float32), np.array([zero_point], np.int64))


def symmetric_grid(scale: float) -> Grid:
    """Return a grid with one scale, around 0."""
    return affine_grid(_never_zero(scale), 0)


def _never_zero(scale):
    return scale if scale >= SMALLEST_SCALE else 1.0


def constants_of(
    model, mode: str, ranges=None, per_channel=True, suppressed=()
) -> Constants:
    """Take the weights out of a float model, in the form of a mode.

    The queries' share of the QKV product is divided by the root of the head width
    here, so that no graph has to.

    Args:
        model: A `GPTModel`.
        mode: A key of `MODES`.
        ranges: (minimum, maximum) by activation, for modes with fixed activations.
        per_channel: As for `store`.
        suppressed: Token ids that the file is to rule out.

    Raises:
        InputError: A weight is not finite, or does not fit the mode.
    """
    form = MODES[mode]
    parts = parts_of(model)
    first = parts.blocks[0]
    sizes = {
        key: value for key, value in model.get_config().items() if key != "name"
    } | {"head_dim": first.head_dim}
    matrices, vectors = {}, {}
    inner = first.num_heads * first.head_dim

    def keep(name, values, kind=form.kernels):
        matrices[name] = store(values, kind, name, per_channel)

    for name in ("token_table", "position_table"):
        values = getattr(parts.embedding, name).numpy()
        keep(f"embedding/{name}", values, form.tables)
    for block in parts.blocks:
        for name in ("attention_norm", "feedforward_norm"):
            for part in ("gamma", "beta"):
                key = f"{block.name}/{name}_{part}"
                vectors[key] = getattr(block, f"{name}_{part}").numpy()
        kernel, bias = block.qkv_kernel.numpy().T, block.qkv_bias.numpy()
        pieces = {"qkv": slice(None)}
        if form.activations is not None or not per_channel:
            # Grids of their own, so that the queries' may be the finer one.
            pieces = {
                name: slice(index * inner, (index + 1) * inner)
                for index, name in enumerate(("query", "key", "value"))
            }
        root = np.ones(3 * inner, np.float32)
        root[:inner] /= np.sqrt(first.head_dim)
        if form.kernels == "int8":
            whole = store(kernel, "int8", f"{block.name}/qkv_kernel", per_channel)
        for name, rows in pieces.items():
            key = f"{block.name}/{name}"
            vectors[f"{key}_bias"] = (bias * root)[rows]
            if form.kernels == "int8":
                # The integers are those of the model's own kernel.
                matrices[f"{key}_kernel"] = _rows_times(whole, rows, root[rows])
            else:
                keep(f"{key}_kernel", (kernel * root[:, None])[rows])
        for name in ("output", "up", "down"):
            key = f"{block.name}/{name}"
            keep(f"{key}_kernel", getattr(block, f"{name}_kernel").numpy().T)
            vectors[f"{key}_bias"] = getattr(block, f"{name}_bias").numpy()
    vectors["final_norm/gamma"] = parts.norm.gamma.numpy()
    vectors["final_norm/beta"] = parts.norm.beta.numpy()
    if parts.head.kernel is not None:
        keep("head/kernel", parts.head.kernel.numpy(), form.tables)
    if len(suppressed):
        vectors["head/mask"] = np.zeros(sizes["vocab_size"], np.float32)
        vectors["head/mask"][suppressed] = signatures.MASKED
    for name, vector in vectors.items():
        _refuse_infinite(vector, name)
    return Constants(form, sizes, matrices, vectors, dict(ranges or {}))
