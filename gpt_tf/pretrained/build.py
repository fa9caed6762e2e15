"""From a family's configuration and tensors to a `GPTModel`.

A reader gives a `Description`, for which no weight is read and TensorFlow is not
needed; `build` reads the weights.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gpt_tf.models.sizes import checked_config, weight_shapes
from gpt_tf.pretrained.families import Family
from gpt_tf.pretrained.tensors import Tensor

if TYPE_CHECKING:
    from gpt_tf.models.gpt import GPTModel
    from gpt_tf.text.tokenizer import Tokenizer

_DEFAULTS = {
    "feedforward_dim": None,
    "dropout": 0.0,
    "tie_embeddings": True,
    "layer_norm_epsilon": 1e-5,
}


@dataclasses.dataclass(frozen=True)
class Description:
    """A GPT in a file, of which no weight was read.

    Args:
        family: Says where each weight is.
        arguments: `GPTModel`'s.
        tensors: By the family's names.
        files: Those of the weights.
        read_tokenizer: Returns the tokenizer, or None where none belongs to it.
        read_model: Builds the model, given arguments to replace, where another
            library reads the weights.
    """

    family: Family
    arguments: dict
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]
    read_tokenizer: "Callable[[], Tokenizer | None]"
    read_model: "Callable[[dict], GPTModel] | None" = None

    def check(self) -> dict:
        """Return the model's configuration; refuse tensors that do not fit it."""
        if self.read_model is None:
            _checked(self.family, self.arguments, self.tensors)
        return config_of(self.arguments)

    def open(self, changes: dict) -> "GPTModel":
        """Return the model, with arguments replaced."""
        if self.read_model is not None:
            return self.read_model(changes)
        return build(self.family, self.arguments, self.tensors, changes)


def config_of(arguments: dict) -> dict:
    """Return a model's configuration, checked, of the arguments of a family's."""
    return checked_config({**_DEFAULTS, **arguments})


def build(
    family: Family,
    arguments: dict,
    tensors: Mapping[str, Tensor],
    changes: dict | None = None,
) -> "GPTModel":
    """Build a `GPTModel` and read its weights, one after the other.

    Args:
        family: Says where each weight is.
        arguments: `GPTModel`'s, as `family.arguments` returns them.
        tensors: By the family's names, with or without its prefix.
        changes: Arguments to replace. Of learned positions, a shorter context takes
            the first.

    Raises:
        InputError: An argument is out of its range, or memory cannot hold the model.
        DamagedFileError: A tensor is missing or has another shape. This is known
            before the model is built.
    """
    from gpt_tf.models.gpt import GPTModel

    changed = {**arguments, **(changes or {})}
    config = config_of(changed)
    room = max(config["context_length"], arguments["context_length"])
    places, tensors = _checked(family, {**changed, "context_length": room}, tensors)
    shapes = weight_shapes(config)
    model = GPTModel(**config)
    for name, variable in variables_of(model).items():
        variable.assign(places[name].read(tensors, shapes[name], config["num_heads"]))
    model.__dict__["is_pretrained"] = True
    return model


def _checked(family, arguments, tensors):
    """Return places of weights and tensors, which fit the configuration."""
    tensors = {name.removeprefix(family.prefix): t for name, t in tensors.items()}
    shapes = weight_shapes(config_of(arguments))
    # The last block first: a configuration of a million of them ends here.
    places = {name: family.place_of(name) for name in shapes}
    for name in reversed(shapes):
        places[name].check(tensors, shapes[name])
    return places, tensors


def variables_of(model: "GPTModel") -> dict:
    """Return a model's variables by the names of `weight_shapes`."""
    found = {}
    for name in weight_shapes(model.get_config()):
        layer, _, weight = name.partition("/")
        found[name] = getattr(model.get_layer(layer), weight)
    return found
