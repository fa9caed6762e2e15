"""The settings of `optimize`, read without TensorFlow."""

import os
from typing import ClassVar, Literal

from pydantic import Field

from gpt_tf.explain import FEWEST_PROMPTS
from gpt_tf.pretrained.source import is_name
from gpt_tf.quantization.modes import MODES
from gpt_tf.settings.arguments import LARGEST
from gpt_tf.settings.configuration import (
    Configuration,
    Count,
    CountOrZero,
    PathText,
    Seed,
    configuration,
)
from gpt_tf.text.corpus import check_separator
from gpt_tf.training.config import PRESETS


@configuration
class OptimizationConfig(Configuration):
    """Everything that decides what is made and measured; budgets only choose.

    Example:
        >>> OptimizationConfig(modes=("int8", "int4")).students is None
        True
    """

    title: ClassVar[str] = "An optimisation"

    corpus: PathText | tuple[PathText, ...] | None = Field(
        None,
        description="python-stdlib, shakespeare, or files and folders of text; that of "
        "the model's run if not given.",
    )
    validation: PathText | None = Field(
        None, description="As for train, of a corpus that is given."
    )
    separator: str | None = Field(
        None, description="As for train, of a corpus that is given."
    )
    model: PathText | None = Field(
        None, description="A trained run or model as the teacher; else one is trained."
    )
    data: PathText | None = Field(
        None,
        description="Rows to fine-tune the model on first, as for finetune; all else "
        "is done on them too.",
    )
    lora_rank: Count | None = Field(
        None, description="As for finetune; all weights are trained if not given."
    )
    preset: Literal[tuple(PRESETS)] = Field(
        "quickstart", description="How the teacher is trained."
    )
    steps: Count | None = Field(
        None, description="Optimiser steps of the teacher; the preset's if not given."
    )
    students: tuple[Count, ...] | None = Field(
        None,
        description="Blocks of each student; half and a quarter of the teacher's if "
        "not given.",
    )
    student_steps: Count | None = Field(
        None, description="Optimiser steps of each student; a third of the teacher's."
    )
    modes: tuple[Literal[tuple(MODES)], ...] = Field(
        ("dynamic_int8", "int8", "int4"),
        description="How teacher and students are exported. For int8 a student is "
        "trained on with rounded weights and activations first.",
    )
    context_length: Count | None = Field(
        None, description="Tokens that the files' caches hold; the model's context."
    )
    task: PathText | None = Field(
        None,
        description="Questions that every file answers, as for evaluate, to choose by "
        "with --max-score-drop.",
    )
    evaluated_tokens: int = Field(
        20_000, ge=2, le=LARGEST, description="Held-out tokens to judge by."
    )
    prompt_tokens: int = Field(
        32, ge=2, le=LARGEST, description="Tokens of the request that is timed."
    )
    new_tokens: int = Field(
        32,
        ge=2,
        le=LARGEST,
        description="Tokens that it asks for. If the context has no room for both, "
        "each is half of it.",
    )
    repetitions: Count = Field(20, description="Requests of each file that count.")
    explained_prompts: CountOrZero = Field(
        FEWEST_PROMPTS,
        description="Prompts of the test of explanations, at least 50; 0 for none.",
    )
    seed: Seed = Field(1337, description="Of weights, data order and sampling.")

    def __post_init__(self):
        divided = self.validation is not None or self.separator is not None
        whole = self.corpus is not None or not divided
        self._check("corpus", whole, "beside `validation` and `separator`")
        check_separator(self.separator)
        if self.data is not None:
            self._check("model", self.model, "to fine-tune on `data`")
            self._check("corpus", self.corpus is None, "left out beside `data`")
        self._check("lora_rank", self.data or not self.lora_rank, "beside `data`")
        for name in ("model", "data", "task"):
            path = getattr(self, name)
            if path is not None and not is_name(path):
                object.__setattr__(self, name, os.path.abspath(path))
        prompts = self.explained_prompts
        enough = prompts == 0 or prompts >= FEWEST_PROMPTS
        self._check("explained_prompts", enough, f"of at least {FEWEST_PROMPTS}, or 0")
        for name in ("students", "modes"):
            values = getattr(self, name) or ()
            self._check(name, len(set(values)) == len(values), "with each once")
        self._check("modes", self.modes, "with one mode at least")
