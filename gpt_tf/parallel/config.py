"""What can be said of devices without TensorFlow: strategies, schedules, meshes."""

from typing import Literal

from gpt_tf.settings import arguments

Strategy = Literal["auto", "one_device", "mirrored", "multi_worker", "tpu"]
Schedule = Literal["1f1b", "gpipe"]
AXES = ("batch", "model", "sequence")


def parse_mesh(text):
    """Read the sizes of a mesh from a text.

    Args:
        text: `"2x2"`, parts of batch and model; `"2x2x2"`, of batch, model and
            sequence; or by name, `"batch=2,sequence=2"`.

    Returns:
        A dict of the three sizes.

    Raises:
        InputError: The text means no mesh.

    Example:
        >>> parse_mesh("1x2")
        {'batch': 1, 'model': 2, 'sequence': 1}
    """
    sizes = dict.fromkeys(AXES, 1)
    try:
        if "=" in text:
            pairs = [part.split("=") for part in text.split(",")]
            given = {name.strip(): int(size) for name, size in pairs}
            if len(given) != len(pairs):
                raise ValueError
        else:
            parts = [int(size) for size in text.lower().split("x")]
            if len(parts) > len(AXES):
                raise ValueError
            given = dict(zip(AXES, parts, strict=False))
        if not given.keys() <= sizes.keys() or min(given.values()) < 1:
            raise ValueError
    except (AttributeError, TypeError, ValueError):
        arguments.refuse(
            "mesh",
            text,
            "parts of batch and model such as 2x2, of batch, model and sequence such "
            "as 1x2x2, or names such as batch=2,sequence=2",
        )
    return {**sizes, **given}
