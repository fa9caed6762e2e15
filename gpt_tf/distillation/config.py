"""What a student is, and how it learns from its teacher, as values for a file."""

import dataclasses

from gpt_tf.configuration import Configuration
from gpt_tf.errors import InputError

_LAYERS = ("evenly", "every_second", "first", "last", "first_and_last", "importance")


@dataclasses.dataclass(frozen=True)
class DistillationConfig(Configuration):
    """A student cut from a teacher, and the losses that train it.

    Args:
        teacher: Folder of the teacher's run or model.
        knowledge: Folder of the teacher's stored knowledge. The teacher is then not
            loaded while the student trains. None: the teacher runs along.
        num_layers, embedding_dim, num_heads, feedforward_dim, vocab_size: Sizes of the
            student, as for `make_student`; None takes the teacher's. A smaller
            `vocab_size` means a tokenizer derived from the teacher's.
        layers: Which blocks the student takes, as for `make_student`.
        init: `"teacher"` or `"fresh"`, as for `make_student`.
        loss: Name of a distillation loss, or pairs of name and weight.
        alpha: Share of the student's own loss, in [0, 1].
        temperature: Above 0; divides the logits of both.
        on_policy_fraction: Share of the steps in which the student writes the text
            that the teacher judges, in [0, 1].
        written_tokens: Tokens of text that the teacher writes, to be mixed with the
            real text; 0 for none.

    Raises:
        InputError: A value is none of these.

    Example:
        >>> DistillationConfig("runs/teacher", num_layers=3).alpha
        0.1
    """

    title = "A distillation config"

    teacher: str | None = None
    knowledge: str | None = None
    num_layers: int | None = None
    embedding_dim: int | None = None
    num_heads: int | None = None
    feedforward_dim: int | None = None
    vocab_size: int | None = None
    layers: str | tuple[int, ...] = "evenly"
    init: str = "teacher"
    loss: str | tuple = "forward_kl"
    alpha: float = 0.1
    temperature: float = 1.0
    on_policy_fraction: float = 0.0
    written_tokens: int = 0

    def __post_init__(self):
        super().__post_init__()
        for name in ("teacher", "knowledge"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else str(value))
        for name in ("layers", "loss"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(map(_frozen, value)))
        for name in ("alpha", "on_policy_fraction"):
            value = getattr(self, name)
            self._check(name, 0.0 <= value <= 1.0, "from 0 to 1")
        finite = 0.0 < self.temperature < float("inf")
        self._check("temperature", finite, "above 0 and finite")
        self._check("written_tokens", self.written_tokens >= 0, "at least 0")
        self._check("init", self.init in ("teacher", "fresh"), "of teacher, fresh")
        named = isinstance(self.layers, tuple) or self.layers in _LAYERS
        self._check("layers", named, f"of {', '.join(_LAYERS)}, or a list of numbers")
        for name in ("num_layers", "embedding_dim", "num_heads", "feedforward_dim"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "at least 1, or None")
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


def _frozen(value):
    return tuple(value) if isinstance(value, list) else value
