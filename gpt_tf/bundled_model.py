"""The small model that comes along, so that the first sentence needs no training."""

from pathlib import Path

from gpt_tf.errors import InputError

NAME = "python-student.litertlm"


def shipped_model() -> Path:
    """Return the file of the model that comes with gpt_tf, in the package or the clone.

    It writes what looks like Python; `saved_models/README.md` says how it was made.

    Example:
        >>> gpt = gpt_tf.EdgeGPT(shipped_model())
    """
    package = Path(__file__).resolve().parent
    places = [package / "saved_models" / NAME, package.parent / "saved_models" / NAME]
    for place in places:
        if place.is_file():
            return place
    raise InputError(
        f"The model that comes with gpt_tf is expected at {places[0]}; it is not "
        "there. Name another with --model, or install gpt_tf again."
    )
