"""Logits as probabilities, and the choice of a next token, in NumPy alone."""

import dataclasses
import math

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.settings import arguments

_FIRST_SORTED = 256


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How tokens are chosen.

    Args:
        temperature: Divides the logits; 0 always takes the most likely token.
        top_k: Choose among this many most likely tokens, at least 1, or None. Of
            tokens that are equally likely, those with the lowest ids come first.
        top_p: Choose among the fewest most likely tokens that together have this
            probability, in (0, 1], or None.
        repetition_penalty: Above 1 makes tokens that occurred less likely; 1 is off.
        seed: Seed of the choices, at least 0; None takes a new one each time.
        suppress_tokens: `(n,)` ids that are never chosen.

    Reference: Holtzman et al., "The Curious Case of Neural Text Degeneration",
    arXiv:1904.09751 (top-p); Keskar et al., "CTRL", arXiv:1909.05858 (penalty).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    suppress_tokens: np.ndarray = dataclasses.field(
        default=(), repr=False, compare=False
    )

    def __post_init__(self):
        arguments.number("temperature", self.temperature, least=0)
        arguments.integer("top_k", self.top_k, 1, or_none=True)
        arguments.number("top_p", self.top_p, above=0, most=1, or_none=True)
        arguments.number("repetition_penalty", self.repetition_penalty, above=0)
        arguments.integer("seed", self.seed, most=math.inf, or_none=True)

    def generators(self, num_rows: int) -> list[np.random.Generator]:
        """Return a random generator per row; row `i` depends on seed and `i` only."""
        if self.seed is None:
            seeds = np.random.SeedSequence().spawn(num_rows)
        else:
            seeds = [np.random.SeedSequence([self.seed, i]) for i in range(num_rows)]
        return [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]

    def choose(self, logits: np.ndarray, seen, generator: np.random.Generator) -> int:
        """Choose a token.

        Args:
            logits: `(V,)`, any float type.
            seen: The ids that occurred so far, for the repetition penalty.
            generator: Source of randomness.

        Returns:
            The token's id.

        Raises:
            InputError: A logit is NaN or infinite; `-inf`, which rules a token out,
                is allowed where another token is left.
        """
        if self.temperature == 0 and self.repetition_penalty == 1.0:
            token = int(np.argmax(logits))  # of a NaN, where there is one
            if np.isfinite(logits[token]) and token not in self.suppress_tokens:
                return token
        logits = np.array(logits, np.float64)
        if len(self.suppress_tokens):
            logits[self.suppress_tokens] = -np.inf
        if not np.isfinite(logits.max()):
            raise InputError(
                "Choosing a token expects finite logits. "
                f"Received: {logits.max()} as the largest. The model's weights "
                "contain NaN or Inf: train with a lower learning rate, or in float32."
            )
        if self.repetition_penalty != 1.0 and len(seen):
            ids = np.fromiter(seen, np.int64, len(seen))
            chosen = logits[ids]
            logits[ids] = np.where(
                chosen > 0,
                chosen / self.repetition_penalty,
                chosen * self.repetition_penalty,
            )
        if self.temperature == 0:
            return int(np.argmax(logits))
        # Their own last sum as the total: another order of addition may exceed it.
        sums = np.cumsum(self._probabilities(logits))
        return int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))

    def _probabilities(self, logits):
        if self.top_k is not None and self.top_k < len(logits):
            smallest = np.partition(logits, -self.top_k)[-self.top_k]
            kept = logits > smallest
            kept[np.flatnonzero(logits == smallest)[: self.top_k - kept.sum()]] = True
            logits = np.where(kept, logits, -np.inf)
        with np.errstate(over="ignore"):  # a minute temperature
            # In place: pages that are new each time take as long as the numbers.
            logits -= logits.max()
            logits /= self.temperature
            probabilities = np.exp(logits, out=logits)
        probabilities /= probabilities.sum()
        if self.top_p is not None and self.top_p < 1:
            order = self._nucleus(probabilities)
            kept = np.zeros_like(probabilities)
            kept[order] = probabilities[order]
            return kept
        return probabilities

    def _nucleus(self, probabilities):
        """Return the fewest most likely tokens that together have `top_p`.

        Sorting a whole vocabulary takes longer than a step of the model, and a few
        likely tokens nearly always are enough: so ever more of them are sorted.
        """
        count = _FIRST_SORTED
        while True:
            candidates = np.arange(len(probabilities))
            if count < len(probabilities):
                smallest = np.partition(probabilities, -count)[-count]
                candidates = np.flatnonzero(probabilities >= smallest)
            order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
            sums = np.cumsum(probabilities[order])
            if sums[-1] >= self.top_p or len(order) == len(probabilities):
                return order[: np.searchsorted(sums, self.top_p) + 1]
            count *= 8


def log_softmax(logits) -> np.ndarray:
    """Return the log-probabilities of logits `(..., V)`, in float64.

    Example:
        >>> np.exp(log_softmax([0.0, 0.0]))
        array([0.5, 0.5])
    """
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
