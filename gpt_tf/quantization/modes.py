"""The modes in which a file stores weights and computes."""

import dataclasses

import numpy as np

# Below it float32 loses digits, and the runtimes of devices read 0.
SMALLEST_SCALE = np.finfo(np.float32).tiny


@dataclasses.dataclass(frozen=True)
class Mode:
    """How a mode stores weights and computes.

    Args:
        kernels: `"float32"`, `"float16"`, `"int8"` per output channel, or `"int4"` in
            blocks of 32 inputs per output channel.
        tables: The same for the token and the position table (a row is a channel)
            and with it the head.
        activations: `None` for real numbers (with int8 and int4 kernels each row is
            quantised as it comes), `"int8"` or `"int16"` for ranges fixed beforehand.
        everything: Whether residuals, GELU, attention's products and the caches are
            integers too.
    """

    kernels: str
    tables: str
    activations: str | None = None
    everything: bool = False


MODES = {
    "float32": Mode("float32", "float32"),
    "float16": Mode("float16", "float16"),
    "dynamic_int8": Mode("int8", "int8"),
    "int8": Mode("int8", "int8", "int8"),
    "int8_full": Mode("int8", "int8", "int8", everything=True),
    "int16x8": Mode("int8", "int8", "int16"),
    "int4": Mode("int4", "int8"),
}
