"""The models that come along, so that the first sentence needs no training."""

from pathlib import Path

from gpt_tf.errors import InputError

NAME = "python-student.litertlm"


def shipped_model(name: str = NAME) -> Path:
    """Return the place of a model that comes with gpt_tf, in the package or the clone.

    They write what looks like Python; `saved_models/README.md` says how each was made.

    Args:
        name: `"python-student.litertlm"`, the smallest file; `"python-small"`, the
            folder of a Keras model with its tokenizer; or `"python-small.litertlm"`,
            the same as a file with int8 weights.

    Raises:
        InputError: There is none of that name.

    Example:
        >>> gpt = gpt_tf.EdgeGPT(gpt_tf.shipped_model())
        >>> model, tokenizer, _ = gpt_tf.open_model(
        ...     gpt_tf.shipped_model("python-small")
        ... )
    """
    package = Path(__file__).resolve().parent
    places = [package / "saved_models" / name, package.parent / "saved_models" / name]
    for place in places:
        if place.exists():
            return place
    raise InputError(
        f"The model that comes with gpt_tf is expected at {places[0]}; it is not "
        "there. Name another with --model, or install gpt_tf again."
    )
