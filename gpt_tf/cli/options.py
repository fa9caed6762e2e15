"""Options of commands, made from the settings that they fill.

A setting's type, default and description are stated in its configuration; here they
become an option of the same name, with `-` for `_`.
"""

import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import pydantic
import typer

from gpt_tf.advisor.constraints import PREFERENCES, SCENARIOS, Budgets
from gpt_tf.distillation.config import DistillationConfig
from gpt_tf.text.config import AugmentationConfig
from gpt_tf.training.config import RunOptions, TrainingConfig
from gpt_tf.workflow.config import OptimizationConfig

# What several commands have.
MODEL_OR_FILE = "A .tflite or .litertlm, or a run's or model's folder."
Files = Annotated[list[Path], typer.Argument(help=MODEL_OR_FILE)]
Report = Annotated[
    Path | None, typer.Option("--out", help="Write the report there, as JSON.")
]
Scenario = Annotated[
    str, typer.Option(help=f"{', '.join(SCENARIOS)}; all but the last have budgets.")
]
Prefer = Annotated[
    str | None,
    typer.Option(
        help=f"What is to be best within the budgets: {', '.join(PREFERENCES)}. The "
        "scenario's if not given."
    ),
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopK = Annotated[int | None, typer.Option(help="Among so many tokens.")]
TopP = Annotated[float | None, typer.Option(help="Among tokens of this probability.")]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1 makes repetition less likely.")
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Speculate = Annotated[
    str,
    typer.Option(
        help="lookup: what the text repeats is foreseen, where that saves time; none. "
        "Of a file; the text is the same."
    ),
]
DraftFile = Annotated[
    Path | None,
    typer.Option(
        "--draft", help="A smaller file with the same tokenizer, which writes ahead."
    ),
]
WeightCache = Annotated[
    str,
    typer.Option(
        help="Where a file's packed weights are kept: disk (the user's cache folder; "
        "of 16 MB and more), memory, or none, a copy for each signature."
    ),
]

# The panels of `--help`, each with the first of its fields.
_PANELS = {
    TrainingConfig: {
        "corpus": "Text",
        "init_from": "Model",
        "batch_size": "Training",
        "validate_every": "Validation, checkpoints and samples",
        "precision": "Computation",
    },
    AugmentationConfig: {"bpe_dropout": "Augmentation"},
    DistillationConfig: {"teacher": "Student", "loss": "Distillation"},
    OptimizationConfig: {
        "corpus": "Text",
        "model": "Models",
        "evaluated_tokens": "Measurements",
    },
    RunOptions: {"workers": "Workers"},
    Budgets: {"max_perplexity_increase": "Budgets"},
}


def options_of(
    kind: type,
    parameter: str,
    names: Iterable[str] | None = None,
    *,
    spelled: dict[str, str] | None = None,
    helps: dict[str, str] | None = None,
    defaults: bool = True,
) -> Callable:
    """Give a command the options that fill a configuration.

    Args:
        kind: The configuration, or a dataclass whose docstring describes its fields.
        parameter: Parameter of the command that takes a dict of the fields that were
            given.
        names: Fields that are options; all but dicts unless given.
        spelled: Options that are not called as their field: `{"modes": "--mode"}`.
        helps: Help of options that is not their field's description.
        defaults: Whether the fields' defaults are those of the command.

    Example:
        >>> @app.command()
        ... @options_of(TrainingConfig, "course")
        ... def train(out: Path, course: dict): ...
    """
    spelled, helps = spelled or {}, helps or {}
    stated, panels = _stated(kind), _PANELS.get(kind, {})
    panel, options = None, []
    for name, field in stated.items():
        panel = panels.get(name, panel)
        read = _type_of(field)
        if read is dict or (names is not None and name not in names):
            continue
        option = typer.Option(
            *([spelled[name]] if name in spelled else []),
            help=helps.get(name) or _help_of(field),
            show_default=_shown(field["default"]) if defaults else False,
            rich_help_panel=panel,
        )
        options.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[read | None, option],
            )
        )

    def decorate(command):
        @functools.wraps(command)
        def run(**given):
            values = {option.name: given.pop(option.name) for option in options}
            fields = {
                name: _value_of(stated[name], value)
                for name, value in values.items()
                if value is not None and value != []
            }
            return command(**given, **{parameter: fields})

        signature = inspect.signature(command)
        own = [p for p in signature.parameters.values() if p.name != parameter]
        run.__signature__ = signature.replace(parameters=[*own, *options])
        run.__annotations__ = {p.name: p.annotation for p in (*own, *options)}
        return run

    return decorate


_TYPES = {
    "boolean": bool,
    "integer": int,
    "number": float,
    "object": dict,
    "string": str,
}


def _stated(kind):
    """Return the JSON schema of each field; a docstring may describe it too."""
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(kind), re.M)
    described = {name: " ".join(text.split()) for name, text in entries}
    schema = pydantic.TypeAdapter(kind).json_schema()
    return {
        name: {"description": described.get(name, ""), **field}
        for name, field in schema["properties"].items()
    }


def _alternatives(field):
    return [one for one in field.get("anyOf", [field]) if one["type"] != "null"]


def _type_of(field):
    """Return what the command line reads: a list where there may be several."""
    first, *others = _alternatives(field)
    of_items = [one["items"]["type"] for one in others if one["type"] == "array"]
    is_list = first["type"] == "array" or first["type"] in of_items
    read = _TYPES[first.get("items", first)["type"]]
    return list[read] if is_list else read


def _value_of(field, value):
    """Return a field's value; one of several that may be one is that one."""
    if not isinstance(value, list):
        return value
    is_several = _alternatives(field)[0]["type"] == "array"
    return tuple(value) if is_several or len(value) > 1 else value[0]


def _help_of(field):
    text = field["description"]
    for one in _alternatives(field):
        if names := one.get("items", one).get("enum"):
            text = f"{text[:-1]}: {', '.join(names[:-1])} or {names[-1]}."
    several = typing.get_origin(_type_of(field)) is list
    return text + " May be repeated." * several


def _shown(default):
    if default is None:
        return False
    if isinstance(default, bool):
        return "yes" if default else "no"
    several = default if isinstance(default, list) else [default]
    return ", ".join(repr(v) if v != str(v).strip() else str(v) for v in several)
