"""The modes in which a file stores weights and computes."""

import dataclasses

import numpy as np

# Below it float32 loses digits, and the runtimes of devices read 0.
SMALLEST_SCALE = np.finfo(np.float32).tiny


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a mode stores weights and computes.

    Weights are symmetric. The granularity of int8 is an output channel, or the row of a
    table; that of int4 is a block of 32 inputs of an output channel.

    Args:
        kernels: Dtype of the matrices in the blocks: `"float32"`, `"float16"`, `"int8"`
            or `"int4"`.
        tables: Dtype of the token and the position table, and with it of the head.
        activations: Dtype of static activations, `"int8"` or `"int16"`. None: they are
            float32, and what is multiplied by integer weights is quantised dynamically,
            row by row.
        full: Whether residuals, GELU, attention's products and the caches are integers
            too.
    """

    kernels: str
    tables: str
    activations: str | None = None
    full: bool = False

    @property
    def weight_bits(self) -> int | None:
        """Bits of the matrices' integers, or None where they are no integers."""
        return {"int8": 8, "int4": 4}.get(self.kernels)

    @property
    def quantises_rows(self) -> bool:
        """Whether the head reads real numbers, quantised row by row as they come."""
        return self.tables == "int8" and self.activations is None


MODES = {
    "float32": Mode("float32", "float32"),
    "float16": Mode("float16", "float16"),
    "dynamic_int8": Mode("int8", "int8"),
    "int8": Mode("int8", "int8", "int8"),
    "int8_full": Mode("int8", "int8", "int8", full=True),
    "int16x8": Mode("int8", "int8", "int16"),
    "int4": Mode("int4", "int8"),
}
