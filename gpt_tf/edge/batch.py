"""Decoding several texts in one call of the model.

A token reads every weight once, so eight texts in one call cost far less than eight
calls. The file must have been exported with `batch_sizes`. Any texts may be put
together in any step: each row of the call is bound to the cache of its text.
"""

import numpy as np

from gpt_tf.edge.session import Executor, Session
from gpt_tf.export import signatures


class BatchDecoder:
    """Runs the signatures `decode_batch_<N>` of a file over any of its sessions.

    Args:
        executor: The loaded model.

    Attributes:
        largest: Number of texts that one call may decode; 1 where the file has no
            signature for more.
    """

    def __init__(self, executor: Executor):
        self.largest = max(executor.batches, default=1)
        self._executor = executor
        self._spare = None  # the cache of all rows that are free
        self._places = {
            size: (_places(signature.inputs), _places(signature.outputs))
            for size, signature in executor.batches.items()
        }

    def decode(self, sessions: list[Session], tokens: list[int]) -> np.ndarray:
        """Run a token of each text; the sessions do not take the tokens over.

        So nothing has changed where it is interrupted: the caller appends each token
        to `Session.ids` when its logits have arrived.

        Args:
            sessions: From 2 to `largest`, each with room for a token.
            tokens: One of each.

        Returns:
            The logits of what follows each, `(N, V)` float32.
        """
        executor, count = self._executor, len(sessions)
        signature = next(one for size, one in executor.batches.items() if size >= count)
        for session in sessions:
            session.reserve(1)
        capacity = max(session.capacity for session in sessions)
        for session in sessions:
            session.grow(capacity)
        signature.resize(capacity)
        rows = [self._row(session) for session in sessions]
        if count < signature.length:
            rows += [self._row(self._free(capacity))] * (signature.length - count)
        places = [session.position for session in sessions]
        signature.tokens[:count], signature.tokens[count:] = tokens, 0
        signature.positions[:count], signature.positions[count:] = places, 0
        signature.token_buffer.write(signature.tokens)
        signature.position_buffer.write(signature.positions)
        shared = {
            signatures.TOKENS: signature.token_buffer,
            signatures.POSITIONS: signature.position_buffer,
            signatures.LOGITS: signature.logits_buffer,
        }
        rows.append(shared)
        inputs, outputs = self._places[signature.length]
        executor.model.run_by_index(
            signature.index,
            [rows[row][name] for row, name in inputs],
            [rows[row][name] for row, name in outputs],
        )
        return signature.read(count).copy()

    def _row(self, session):
        """Return the buffers of one row by their names when it is alone."""
        cache, call = session.bound()
        call.show(session.position)
        call.mask_buffer.write(call.mask)
        return {signatures.MASK: call.mask_buffer, **cache.buffers}

    def _free(self, capacity):
        """Return the session that free rows write to; nobody reads it."""
        if self._spare is None:
            self._spare = self._executor.session()
        self._spare.reserve(capacity)  # it may have been larger for longer texts
        return self._spare

    def close(self) -> None:
        """Release what free rows wrote to."""
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.close()


def _places(names):
    """Return of each name the row that it is of, and what it is called there.

    What all rows share is of the last one, -1.
    """
    parts = (name.partition(signatures.ROW) for name in names)
    return [(int(row) if row else -1, name) for name, _, row in parts]
