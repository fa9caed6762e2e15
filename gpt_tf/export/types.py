"""How a `.tflite` stores numbers: their types, scales and zero points.

Without the schema of TensorFlow Lite, which takes a fifth of a second to import and is
only needed to write or check a graph.
"""

import dataclasses

import numpy as np

from gpt_tf.errors import InputError

_LARGEST_BYTES = (1 << 31) - (1 << 24)  # flatbuffers count in signed 32 bits


class Type:
    """The `TensorType` of `schema.fbs`, those that are written."""

    FLOAT32 = 0
    FLOAT16 = 1
    INT32 = 2
    INT16 = 7
    INT8 = 9
    INT4 = 17


@dataclasses.dataclass(frozen=True, eq=False)
class QuantParams:
    """How integers stand for real numbers: `scale * (integer - zero_point)`.

    Args:
        scales: `(n,)` float32, one, or one per place along `axis`.
        zero_points: `(n,)` int64.
        axis: The axis along which they differ, where there are several.
        block_size: Length of the blocks along the last axis that share a scale, or
            None. `scales` then are float16 `(rows, blocks)`.
    """

    scales: np.ndarray
    zero_points: np.ndarray
    axis: int = 0
    block_size: int | None = None

    @property
    def scale(self) -> float:
        """The scale of the whole tensor, if there is only one."""
        return float(self.scales[0])

    @property
    def zero_point(self) -> int:
        """The zero point of the whole tensor, if there is only one."""
        return int(self.zero_points[0])


def refuse_large(size_bytes: int) -> None:
    """Refuse more bytes than a flatbuffer may have."""
    if size_bytes > _LARGEST_BYTES:
        raise InputError(
            f"A .tflite file expects at most 2 GB. Received: {size_bytes / 1e9:.1f} GB "
            "of weights. Choose a mode with smaller weights, dynamic_int8 for example."
        )
