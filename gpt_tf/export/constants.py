"""What a graph has to know of a model's weights: their names, shapes, scales."""

import dataclasses

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.export.types import QuantParams, Type
from gpt_tf.models.sizes import weight_shapes
from gpt_tf.quantization.modes import MODES, SMALLEST_SCALE, Mode

INT4_BLOCK = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix as the file stores it."""

    values: np.ndarray  # int4 ones packed, two to a byte
    kind: int  # a `TensorType`
    shape: tuple  # (outputs, inputs), or (rows, width) of a table
    quant: QuantParams | None

    @property
    def size_bytes(self) -> int:
        """Bytes of the numbers and of their scales."""
        scales = 0 if self.quant is None else self.quant.scales.nbytes
        return self.values.nbytes + scales


@dataclasses.dataclass(frozen=True, eq=False)
class Constants:
    """All that a graph needs to know of a model.

    Attributes:
        mode: The `Mode`.
        sizes: `GPTModel`'s configuration, and `head_dim`.
        matrices: `Matrix` by name, `"block_0/qkv_kernel"` for example. A tied head
            has none of its own.
        vectors: float32 `(n,)` by name; `"head/mask"`, where token ids are ruled out,
            is added to the logits; `"head/outliers"` is 1 at channels that the head
            multiplies apart from the others, where it does.
        ranges: (minimum, maximum) of activations by name.
        quant_params: Those asked for so far, so that all graphs have the same.
    """

    mode: Mode
    sizes: dict
    matrices: dict
    vectors: dict
    ranges: dict
    quant_params: dict = dataclasses.field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes that the parameters need in this mode, their scales included."""
        vectors = sum(vector.nbytes for vector in self.vectors.values())
        return vectors + sum(matrix.size_bytes for matrix in self.matrices.values())

    def activation_params(self, name: str) -> QuantParams:
        """Return how an activation is quantised, int8 or int16 as the mode has it.

        int8 represents 0 exactly, as TensorFlow's fake quantisation does; int16 is
        symmetric.

        Raises:
            InputError: The activation's range is not known or not finite.
        """
        if name not in self.quant_params:
            self.quant_params[name] = self._new_params(name)
        return self.quant_params[name]

    def _new_params(self, name):
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
            return per_tensor(_never_zero(max(-low, high) / 32767), 0)
        scale = _never_zero((high - low) / 255)
        return per_tensor(scale, int(np.clip(np.rint(-low / scale), 0, 255)) - 128)

    def integer_of(self, name: str) -> int:
        """Return the integer type of an activation."""
        wide = self.mode.activations == "int16" or "residual" in name
        return Type.INT16 if wide or "embedding" in name else Type.INT8

    def integer_bias(self, bias, input_params: QuantParams, matrix_params: QuantParams):
        """Return a bias as int32, and the parameters that sums of products have."""
        # In double precision: a bias of int32 may have more digits than float32.
        scales = input_params.scale * matrix_params.scales.astype(np.float64)
        limit = 2**31 - 1
        integers = np.clip(np.rint(bias / scales), -limit, limit).astype(np.int32)
        zeros = np.zeros(len(scales), np.int64)
        return integers, QuantParams(scales.astype(np.float32), zeros)


def offsets_of(kernel: str) -> str:
    """Return what the offsets `(M, C / 32)` of a kernel's int4 blocks are called."""
    return kernel.replace("_kernel", "_offsets")


def qkv_pieces(sizes: dict, mode: Mode, per_channel: bool) -> dict[str, slice]:
    """Return the products that a graph computes query, key and value by.

    Args:
        sizes: As `Constants.sizes`.
        mode: The file's.
        per_channel: Whether int8 weights have a scale per output channel.

    Returns:
        `"qkv"` alone, or each of the three by itself, to its columns in the model's
        kernel. They are apart where the queries' scale may be the finer one, or where
        there are fewer keys than queries.
    """
    heads = sizes["num_heads"]
    inner, shared = (
        count * sizes["head_dim"] for count in (heads, sizes.get("num_kv_heads", heads))
    )
    if mode.activations is None and per_channel and inner == shared:
        return {"qkv": slice(0, 3 * inner)}
    return {
        "query": slice(0, inner),
        "key": slice(inner, inner + shared),
        "value": slice(inner + shared, inner + 2 * shared),
    }


def per_tensor(scale: float, zero_point: int) -> QuantParams:
    """Return parameters with one scale and one zero point for the whole tensor."""
    return QuantParams(np.array([scale], np.float32), np.array([zero_point], np.int64))


def _never_zero(scale):
    return scale if scale >= SMALLEST_SCALE else 1.0


class _Outline(Constants):
    """Constants without values: every activation has parameters of its own."""

    def _new_params(self, name):
        return per_tensor(1.0, 0)

    def integer_bias(self, bias, input_params, matrix_params):
        return _all(0, np.int32, *bias.shape), dataclasses.replace(matrix_params)


def outline(
    mode: str,
    sizes: dict,
    per_channel: bool,
    masked: bool,
    outliers: bool = False,
    has_offsets: bool = False,
) -> Constants:
    """Return the constants of a model of these sizes without their values.

    A graph of them has every name, shape and type of the model's own.

    Args:
        mode: A key of `MODES`.
        sizes: `GPTModel`'s configuration, and `head_dim`.
        per_channel: Whether int8 weights have a scale per output channel.
        masked: Whether the file rules out token ids.
        outliers: Whether the head multiplies some channels apart.
        has_offsets: Whether blocks of int4 have an offset beside their step.

    Example:
        >>> outline("int8", sizes, True, False).matrices["block_0/up_kernel"].shape
        (512, 128)
    """
    form = MODES[mode]
    kernels, tables, vectors = {}, {}, {}
    for name, shape in weight_shapes(sizes).items():
        layer, _, weight = name.partition("/")
        if layer in ("embedding", "head"):
            tables[name] = shape
        elif weight.startswith("qkv_"):
            for piece, rows in qkv_pieces(sizes, form, per_channel).items():
                count = rows.stop - rows.start
                if weight == "qkv_kernel":
                    kernels[f"{layer}/{piece}_kernel"] = (count, shape[0])
                else:
                    vectors[f"{layer}/{piece}_bias"] = count
        elif weight.endswith("_kernel"):
            kernels[name] = shape[::-1]
        else:
            (vectors[name],) = shape
    if masked:
        vectors["head/mask"] = sizes["vocab_size"]
    if outliers:
        vectors["head/outliers"] = sizes["embedding_dim"]
    matrices = {
        name: _empty(shape, kind, per_channel)
        for kind, group in ((form.tables, tables), (form.kernels, kernels))
        for name, shape in group.items()
    }
    if has_offsets:
        matrices |= {
            offsets_of(name): _empty((rows, columns // INT4_BLOCK), "int8", True)
            for name, (rows, columns) in kernels.items()
        }
    vectors = {name: _all(0, np.float32, length) for name, length in vectors.items()}
    return _Outline(form, sizes, matrices, vectors, {})


def _empty(shape, form, per_channel):
    """Return a matrix of a form of `Mode.kernels`, all zeros."""
    rows, columns = shape
    if form == "int8":
        count = rows if per_channel else 1
        quant = QuantParams(_all(1, np.float32, count), _all(0, np.int64, count))
        return Matrix(_all(0, np.int8, *shape), Type.INT8, shape, quant)
    if form == "int4":
        scales = _all(1, np.float16, rows, columns // INT4_BLOCK)
        quant = QuantParams(scales, _all(0, np.int64, 1), 0, INT4_BLOCK)
        return Matrix(_all(0, np.uint8, rows * columns // 2), Type.INT4, shape, quant)
    kind = Type.FLOAT16 if form == "float16" else Type.FLOAT32
    return Matrix(_all(0, np.dtype(form), *shape), kind, shape, None)


def _all(value, dtype, *shape):
    """Return an array of one value, which takes no memory."""
    return np.broadcast_to(np.array(value, dtype), shape)
