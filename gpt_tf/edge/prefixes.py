"""Prompts that begin alike: what one has computed is copied for the next.

Only whole calls of the model are copied, of the same lengths from the first on, so that
nothing is rounded otherwise than it would be alone.

Reference: Kwon et al., "Efficient Memory Management for Large Language Model Serving
with PagedAttention", arXiv:2309.06180 (shared prefix).
"""

import itertools

# A shorter prompt is not kept for others.
FEWEST_TOKENS = 64


class PrefixCache:
    """The caches of prompts that are done, for an `EdgeScheduler`.

    Args:
        most: Number of caches that are kept; 0: nothing is copied either.

    Attributes:
        kept: Their requests, the one last used last.
    """

    def __init__(self, most: int):
        self.kept = []
        self._most = most

    def copy(self, request, others) -> None:
        """Copy for a request the calls that come next and that another has made.

        Args:
            request: With calls that are to come.
            others: The requests that are not done.
        """
        if not self._most:
            return
        others = [one for one in (*others, *self.kept) if one._session is not None]
        found = [(*_in_common(request, other), other) for other in others]
        tokens, calls, source = max(found, key=lambda one: one[0])
        if tokens <= request._session.position:
            return
        rows = source._session.rows(tokens)
        request._session.fill(request._state.pending[:tokens], rows)
        for _ in range(calls - len(request._past)):
            request._calls.popleft()
        request._past = source._past[:calls]
        if source in self.kept:
            self.kept.remove(source)
            self.kept.append(source)

    def keep(self, request) -> None:
        """Keep the cache of a request that is done, if it may serve others.

        Those whose prompt it has too are released, or the one last used first.
        """
        if not self._most or sum(n for _, n in request._past) < FEWEST_TOKENS:
            return
        before = self.kept
        kept = [one for one in before if not _covers(request, one)]
        self.kept = [*kept, request][-self._most :]
        for one in before:
            if one not in self.kept:
                one.close()

    def close(self) -> None:
        """Release the caches."""
        while self.kept:
            self.kept.pop().close()


def _in_common(request, other):
    """Return how many tokens and calls two prompts share, from the first call on.

    Calls of `request` that are to come count, of `other` only those that were made.
    """
    ids, tokens, calls = request._state.pending, 0, 0
    lengths = itertools.chain((length for length, _ in request._past), request._calls)
    for length, (their_length, count) in zip(lengths, other._past, strict=False):
        end = tokens + count
        same = (
            length == their_length
            and count == min(length, len(ids) - 1 - tokens)
            and ids[tokens:end] == other._session.ids[tokens:end]
        )
        if not same:
            break
        tokens, calls = end, calls + 1
    return tokens, calls


def _covers(request, other):
    """Return whether a cache begins with all that another one's prompt gave."""
    tokens = sum(count for _, count in other._past)
    return (
        request._past[: len(other._past)] == other._past
        and request._session.ids[:tokens] == other._session.ids[:tokens]
    )
