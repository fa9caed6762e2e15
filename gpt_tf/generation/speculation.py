"""Proposing tokens that a model verifies together, where that saves time.

A step of a model costs little more for a few tokens than for one, for it reads the
same weights. So some next tokens are proposed, one call gives the logits behind each of
them, and the tokens are then chosen as ever: with the same logits and the same random
numbers. A proposal that is what was chosen saves a step, and any other one ends there.
The text is the one that is generated without proposals, token by token, whatever is
proposed and however often: speed is all that changes.

A draft proposes by the random numbers that its proposals will be verified with. Of what
is sampled, Leviathan's rule accepts more; but with it a seed's text would depend on
what was proposed, and that depends on time.

Reference: Leviathan et al., "Fast Inference from Transformers via Speculative
Decoding", arXiv:2211.17192; Daliri et al., "Coupling without Communication and
Drafter-Invariant Speculative Decoding", arXiv:2408.07978, for proposals that are chosen
by the random numbers of what they propose; prompt lookup,
github.com/apoorvumang/prompt-lookup-decoding.
"""

import collections
import itertools
from collections.abc import Sequence

import numpy as np

from gpt_tf.generation.sequence import SequenceState

# Tokens that have to occur again before what followed them is proposed.
NGRAM = 3

# The estimate of acceptance weighs what was found by this power of its age in tokens.
_DECAY = 0.9
_FIRST_ACCEPTANCE = 0.5
# What is foreseen has to be so much faster, and what is tried nevertheless and fails
# may take this share of the time.
_LEAST_GAIN = 1.05
_TRIAL_SHARE = 0.01
_REMEMBERED = 5  # durations of a length; the shortest counts


class PromptLookup:
    """Proposes what followed the last tokens where they occurred before.

    Args:
        ids: The text, prompt and new tokens; whoever generates appends to it.

    Example:
        >>> lookup = PromptLookup([1, 2, 3, 4, 5, 1, 2, 3])
        >>> lookup.ready() and lookup.propose(2)
        [4, 5]
    """

    def __init__(self, ids: Sequence[int]):
        self._ids = ids
        self._after = {}  # by n-gram: the place behind the last one before the end
        self._known = NGRAM
        self._place = None

    def ready(self) -> bool:
        """Return whether the last tokens occurred before."""
        ids, end = self._ids, len(self._ids)
        for place in range(self._known, end):
            self._after[tuple(ids[place - NGRAM : place])] = place
        self._known = max(self._known, end)
        self._place = self._after.get(tuple(ids[-NGRAM:]))
        return self._place is not None

    def propose(self, count: int) -> list[int]:
        """Return the `count` tokens that followed, where `ready` has found them."""
        ids, place = self._ids, self._place
        # What reaches the end of the text repeats itself.
        return [ids[place + i % (len(ids) - place)] for i in range(count)]


class Pace:
    """Decides how many tokens one call is to verify, by what that saved so far.

    Of every length it remembers what a step took, and of the proposals what part was
    accepted. The length with the most tokens per second is chosen. Where no length is
    faster than one token a step, proposals are tried so rarely that they cost at most
    1 % of the time.

    Args:
        lengths: Numbers of tokens that one call can verify, each at least 2: one whose
            logits are wanted anyway, and the proposals.

    Attributes:
        acceptance: Estimate of the probability that a proposal is accepted where the
            one before it was.
    """

    def __init__(self, lengths: Sequence[int]):
        self.acceptance = _FIRST_ACCEPTANCE
        self._lengths = sorted(lengths)
        self._seconds = collections.defaultdict(
            lambda: collections.deque(maxlen=_REMEMBERED)
        )
        self._met = collections.Counter()
        self._debt = 0.0  # seconds that trials lost and that are not made up for
        self._pays = False

    def length(self, most: int) -> int:
        """Return how many tokens, at most `most`, the next call is to verify.

        1 is an ordinary step.
        """
        if self._debt > 0 and not self._pays:  # told apart at once, in most steps
            return 1
        lengths = [length for length in self._lengths if length <= most]
        if not lengths or not self._seconds[1]:
            return 1
        best = max(lengths, key=lambda n: self._speed(n, self.acceptance))
        least = _LEAST_GAIN * self._speed(1, 0.0)
        self._pays = self._speed(best, self.acceptance) > least
        if self._pays:
            return best
        if self._debt > 0:
            return 1
        return max(lengths, key=lambda n: self._speed(n, _FIRST_ACCEPTANCE))

    def record(self, length: int, accepted: int, seconds: float) -> None:
        """Learn from a step.

        Args:
            length: Number of tokens that it verified, 1 for an ordinary one.
            accepted: How many of the `length - 1` proposals were accepted.
            seconds: What it took, the proposals included.
        """
        for outcome in [1.0] * accepted + [0.0] * (accepted < length - 1):
            self.acceptance += (1 - _DECAY) * (outcome - self.acceptance)
        self._met[length] += 1
        if self._met[length] == 1:  # the first sets up what later ones use
            return
        self._seconds[length].append(seconds)
        lost = -_TRIAL_SHARE * seconds
        if length > 1 and self._seconds[1]:
            lost = seconds - (1 + accepted) * min(self._seconds[1])
            self._pays = True  # perhaps; to be found out
        self._debt = max(0.0, self._debt + lost)

    def _speed(self, length, acceptance):
        """Return the tokens per second that are to be expected."""
        tokens = sum(acceptance**i for i in range(length))
        return tokens / self._cost(length)

    def _cost(self, length):
        known = self._seconds[length]
        if known:
            return min(known)
        # As a rule; the first measurements correct it.
        return min(self._seconds[1]) * (1 + (length - 1) / 12)


def verify(
    state: SequenceState, logits: np.ndarray, proposed: Sequence[int]
) -> tuple[list, int]:
    """Choose tokens for as long as they are the proposed ones, and one more.

    Args:
        state: A sequence.
        logits: `(n + 1, V)`: of the sequence's pending token, and of each of the
            proposed ones if those before it are right.
        proposed: `n` token ids.

    Returns:
        The pieces that can be shown now, and how many proposed tokens are part of the
        text that the next logits are wanted for.
    """
    pieces, accepted = [], 0
    for row, token in itertools.zip_longest(logits, proposed):
        pieces += state.push(row)
        if state.finished or state.needs_prefill or state.pending != [token]:
            break
        accepted += 1
    return pieces, accepted
