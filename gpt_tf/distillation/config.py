"""What a student is, and how it learns from its teacher, as values for a file."""

from typing import ClassVar, Literal

from pydantic import Field

from gpt_tf.errors import InputError
from gpt_tf.settings.configuration import (
    Configuration,
    Count,
    CountOrZero,
    PathText,
    Positive,
    Share,
    configuration,
)

# Its square multiplies losses in float32.
LARGEST_TEMPERATURE = 1e6
LayerChoice = Literal["evenly", "first", "importance"]


@configuration
class DistillationConfig(Configuration):
    """A student cut from a teacher, and the losses that train it.

    A smaller `vocab_size` means a tokenizer derived from the teacher's.

    Raises:
        InputError: A value is of another type, or out of its range.

    Example:
        >>> DistillationConfig("runs/teacher", num_layers=3).alpha
        0.1
    """

    title: ClassVar[str] = "A distillation config"

    teacher: PathText | None = Field(
        None, description="Folder of the teacher's run or model."
    )
    knowledge: PathText | None = Field(
        None,
        description="Folder of the teacher's stored knowledge, to learn from it "
        "without the teacher.",
    )
    num_layers: Count | None = Field(
        None, description="Blocks; the teacher's if not given."
    )
    embedding_dim: Count | None = Field(
        None, description="Width; the teacher's if not given."
    )
    num_heads: Count | None = Field(
        None, description="Attention heads; the teacher's if not given."
    )
    feedforward_dim: Count | None = Field(
        None, description="Feed-forward width; in the teacher's ratio if not given."
    )
    vocab_size: Count | None = Field(
        None, description="Tokens, the first of the teacher's tokenizer."
    )
    layers: LayerChoice | tuple[CountOrZero, ...] = Field(
        "evenly", description="Blocks to take."
    )
    init: Literal["teacher", "fresh"] = Field(
        "teacher", description="Weights to begin with: the teacher's, or fresh ones."
    )
    loss: str | tuple[tuple[str, Positive], ...] = Field(
        "forward_kl",
        description="forward_kl, reverse_kl, jensen_shannon, total_variation, "
        "skewed_kl, skewed_reverse_kl, universal_logit, hidden_states or "
        "attention_transfer.",
    )
    alpha: Share = Field(0.1, description="Share of the loss by labels.")
    temperature: float = Field(
        1.0, gt=0, le=LARGEST_TEMPERATURE, description="Divides the logits of both."
    )
    on_policy_fraction: Share = Field(
        0.0, description="Share of steps on the student's own text."
    )
    written_tokens: CountOrZero = Field(
        0, description="Tokens of text that the teacher writes first."
    )

    def __post_init__(self):
        stored = self.knowledge is not None
        if stored and (self.on_policy_fraction or self.written_tokens):
            raise InputError(
                "Stored knowledge is of the text that it was extracted from. Received: "
                "`knowledge` with `on_policy_fraction` or `written_tokens`. Leave out "
                "one of the two."
            )

    def student_sizes(self):
        """Return the sizes that were given, as arguments of `make_student`."""
        names = ("num_layers", "embedding_dim", "num_heads", "feedforward_dim")
        sizes = {name: getattr(self, name) for name in (*names, "vocab_size")}
        return {name: value for name, value in sizes.items() if value is not None}

    def compile_arguments(self):
        """Return the arguments of `Distiller.compile` that are stated here."""
        loss = self.loss
        return {
            "distillation_loss": loss if isinstance(loss, str) else list(loss),
            "alpha": self.alpha,
            "temperature": self.temperature,
            "on_policy_fraction": self.on_policy_fraction,
        }
