"""Choosing the next token from logits, in NumPy alone.

Keras models and the edge runtime share these, so that one seed gives one text in
both wherever their logits agree.
"""

import dataclasses

import numpy as np

from gpt_tf.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How tokens are chosen.

    Args:
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Choose among this many likeliest tokens, at least 1, or None.
        top_p: Choose among the likeliest tokens that together have this
            probability, in (0, 1], or None.
        repetition_penalty: Above 1 makes tokens that occurred less likely; 1 is off.
        seed: Seed of the choices; None takes a new one each time.

    Reference: Holtzman et al., "The Curious Case of Neural Text Degeneration",
    arXiv:1904.09751 (top-p); Keskar et al., "CTRL", arXiv:1909.05858 (penalty).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        checks = (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or None"),
            (
                "top_p",
                self.top_p is None or 0 < self.top_p <= 1,
                "above 0 and at most 1, or None",
            ),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        )
        for name, good, expected in checks:
            if not good:
                raise InputError(
                    f"`{name}` expects a value {expected}. "
                    f"Received: {getattr(self, name)!r}."
                )

    def generators(self, num_rows: int) -> list[np.random.Generator]:
        """Return a random generator per row; row `i` depends on seed and `i` only."""
        sequence = np.random.SeedSequence(self.seed)
        if self.seed is not None:
            seeds = [np.random.SeedSequence([self.seed, i]) for i in range(num_rows)]
        else:
            seeds = sequence.spawn(num_rows)
        return [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]

    def choose(self, logits: np.ndarray, seen, generator: np.random.Generator) -> int:
        """Choose a token.

        Args:
            logits: `(V,)`, any float type.
            seen: Ids that occurred so far, for the repetition penalty.
            generator: Source of randomness.

        Returns:
            The token's id.
        """
        logits = np.array(logits, np.float64)
        if self.repetition_penalty != 1.0 and len(seen):
            ids = np.unique(np.asarray(seen, np.int64))
            chosen = logits[ids]
            logits[ids] = np.where(
                chosen > 0,
                chosen / self.repetition_penalty,
                chosen * self.repetition_penalty,
            )
        if self.temperature == 0:
            return int(np.argmax(logits))
        probabilities = self._probabilities(logits / self.temperature)
        return int(
            np.searchsorted(
                np.cumsum(probabilities), generator.random() * probabilities.sum()
            )
        )

    def _probabilities(self, logits):
        if self.top_k is not None and self.top_k < len(logits):
            smallest = np.partition(logits, -self.top_k)[-self.top_k]
            logits = np.where(logits >= smallest, logits, -np.inf)
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        if self.top_p is not None and self.top_p < 1:
            order = np.argsort(-probabilities, kind="stable")
            before = np.cumsum(probabilities[order]) - probabilities[order]
            probabilities[order[before >= self.top_p]] = 0.0
        return probabilities
