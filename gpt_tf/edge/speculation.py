"""Generating several tokens a step on a device, where text lets itself be foreseen.

What proposes and when it pays is `gpt_tf.generation.speculation`; here its calls are
made: `score_<T>` verifies, and a smaller file writes ahead.
"""

import time

from gpt_tf.edge.session import Executor, Session
from gpt_tf.export import signatures
from gpt_tf.generation import sequence, speculation


class Speculator:
    """Takes the steps of the texts of one model, and learns what pays.

    Args:
        executor: The model that is to write.
        looks_up: Whether the text itself is searched for what may follow.
        draft: An open `EdgeGPT` with the same tokens that writes ahead, or None.

    Attributes:
        paces: By `"lookup"` and `"draft"`: when it pays.
    """

    def __init__(self, executor: Executor, looks_up: bool, draft=None):
        lengths = [n for n in executor.scores if 1 < n <= signatures.LONGEST_VERIFIED]
        self.paces = {}
        if looks_up:
            self.paces["lookup"] = speculation.Pace(lengths)
        if draft is not None:
            self.paces["draft"] = speculation.Pace(lengths)
            self._draft, self._draft_session = draft, draft.new_session()

    def begin(self, session: Session, state: sequence.SequenceState) -> "_Text":
        """Return what takes the steps of one text."""
        made = {"lookup": lambda: speculation.PromptLookup(state.ids)}
        made["draft"] = lambda: _Ahead(self._draft, self._draft_session, state)
        sources = [(pace, made[name]()) for name, pace in self.paces.items()]
        return _Text(session, state, sources)


class _Text:
    """Takes the steps of one text, each of one token or several."""

    def __init__(self, session, state, sources):
        self._session, self._state, self._sources = session, state, sources

    def step(self) -> list:
        """Add one token or several; return the pieces that can be shown now."""
        session, state = self._session, self._state
        for pace, source in self._sources:
            began = time.perf_counter()
            most = min(session.limit - session.position, state.remaining)
            length = pace.length(most) if source.ready() else 1
            if length > 1:
                proposed = source.propose(length - 1)
                logits = session.verify([*state.pending, *proposed], length)
                seconds = time.perf_counter() - began
                pieces, accepted = speculation.verify(state, logits, proposed)
                session.position -= len(proposed) - accepted
                pace.record(length, accepted, seconds)
                return pieces
        began = time.perf_counter()
        (logits,) = session.verify(state.pending, 1)
        seconds = time.perf_counter() - began
        for pace, _ in self._sources:
            pace.record(1, 0, seconds)
        return state.push(logits)


class _Ahead:
    """Proposes what a draft writes behind one text, as the text's model will draw."""

    def __init__(self, draft, session, state):
        self._draft, self._session, self._state = draft, session, state

    def ready(self):
        """Return whether the text has room in the draft's context."""
        return self._state.window_length < self._session.limit

    def propose(self, count):
        """Return the next `count` tokens, or as many as there is room for."""
        state, session = self._state, self._session
        text = state.ids[-state.window_length :]
        with self._draft.one_thread:
            session.position = len(text) - 1
            if session.ids != text[: session.position]:
                session.position = sequence.common_length(session.ids, text)
            session.prefill(text[session.position : -1])
            choose, proposed = state.rehearsal(self._draft.suppressed_ids), []
            while len(proposed) < count and session.position < session.limit:
                logits = session.decode((proposed or text)[-1])
                proposed.append(choose(logits))
        return proposed
