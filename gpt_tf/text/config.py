"""The settings of text, which are read without TensorFlow, NumPy or tokenizers."""

from typing import ClassVar, Literal

from pydantic import Field

from gpt_tf.errors import InputError
from gpt_tf.settings.configuration import (
    Configuration,
    CountOrZero,
    PathText,
    Rate,
    configuration,
)

_RATES = ("bpe_dropout", "token_dropout", "token_replacement", "mix_documents")


@configuration
class AugmentationConfig(Configuration):
    """Which augmentations a training has, and how strong they are.

    Raises:
        InputError: A value is of another type, or out of its range.

    Example:
        >>> AugmentationConfig(bpe_dropout=0.1).changes_windows
        True

    Reference: Provilkov, Emelianenko and Voita, "BPE-Dropout", arXiv:1910.13267;
    Xie et al., "Data Noising as Smoothing in Neural Network Language Models",
    arXiv:1703.02573, sections 3.2 and 3.3, for dropout and replacement.
    """

    title: ClassVar[str] = "An augmentation config"

    bpe_dropout: Rate = Field(
        0.0,
        description="Share of merges left out: the same text in other tokens. The "
        "published choice is 0.1. Windows keep their number of tokens, and hold less "
        "text.",
    )
    token_dropout: Rate = Field(
        0.0,
        description="Share of input tokens that are blanked: each becomes the "
        "end-of-text token, or the commonest one. Targets stay.",
    )
    token_replacement: Rate = Field(
        0.0,
        description="Share of input tokens exchanged for others. Targets stay.",
    )
    replacement: Literal["unigram", "uniform"] = Field(
        "unigram",
        description="What they are exchanged for: tokens as frequent as in the "
        "training text, or any.",
    )
    mix_documents: Rate = Field(
        0.0,
        description="Share of windows that, from a random place on, go on with text of "
        "a random other place.",
    )
    random_offsets: bool = Field(
        True, description="Cut windows at other places in each epoch."
    )
    teacher: PathText | None = Field(
        None, description="Trained run or model that writes text to read."
    )
    written_tokens: CountOrZero = Field(
        0,
        description="Tokens of text that the teacher writes, before training, to be "
        "read with the real text.",
    )

    def __post_init__(self):
        count = self.written_tokens
        if bool(count) != (self.teacher is not None):
            raise InputError(
                "Text of a teacher expects both `teacher`, a trained run's folder, and "
                f"`written_tokens`, above 0. Received: teacher={self.teacher!r} and "
                f"written_tokens={count}. Give both or none."
            )

    @property
    def changes_windows(self) -> bool:
        """Whether a window is read otherwise than it stands in the text."""
        return any(getattr(self, name) for name in _RATES)

    def check_fits(self, tokenizer) -> None:
        """Refuse BPE dropout for a tokenizer that merges nothing, by `InputError`."""
        if self.bpe_dropout and getattr(tokenizer, "kind", None) != "bpe":
            raise InputError(
                "`bpe_dropout` expects a bpe tokenizer, whose merges it leaves out. "
                f"Received: a {tokenizer.kind} tokenizer. Use `token_dropout`, or a "
                "bpe tokenizer."
            )
