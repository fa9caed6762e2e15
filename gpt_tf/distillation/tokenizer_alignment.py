"""Teacher and student with different tokenizers, over the same text.

A tokenizer derived from the teacher's cuts each teacher token into pieces, and the
teacher's probabilities are carried over piece by piece. Of any other pair only the
places are found at which both have a token end.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from gpt_tf import artifacts
from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.settings import arguments
from gpt_tf.text.tokenizer import BPETokenizer, Tokenizer, tokenizer_from_json

# Probabilities that are sorted at once: it bounds the memory.
_SORT_VALUES = 1 << 21


def derive_tokenizer(tokenizer: BPETokenizer, vocab_size: int) -> BPETokenizer:
    """Keep the first merges of a tokenizer, for a student of a smaller vocabulary.

    `student.encode(text)` is then the pieces (`pieces_of`) of `teacher.encode(text)`,
    one after the other, for every text:

    1. Byte-pair encoding joins, again and again, the leftmost pair of lowest rank.
       While a pair of the student's merges is left, both do the same. Then the student
       is done, and the teacher goes on: each teacher token is a run of the student's.
    2. No join crosses the border of a token of the result, so the joins within a token,
       and its pieces, are those of its bytes alone.

    Args:
        tokenizer: The teacher's.
        vocab_size: `V` of the student: at least the tokens that no merge makes (256
            bytes, the end of text and other added ones), at most the teacher's.

    Returns:
        A tokenizer of exactly `vocab_size` tokens in the teacher's order, numbered
        without gaps: an end of text that comes first stays the first.

    Raises:
        InputTypeError: The tokenizer is not a `BPETokenizer`.
        InputError: The size is out of range, or the tokenizer's merges cannot be
            cut: they are overruled by whole words, or use tokens that later merges
            make.

    Example:
        >>> teacher = BPETokenizer.train(["low lower lowest " * 9], vocab_size=262)
        >>> derive_tokenizer(teacher, 258).encode("low")
        [257, 87]

    Reference: Sennrich, Haddow and Birch (2016), arXiv:1508.07909, algorithm 1.
    """
    content = _content_of(tokenizer)
    vocabulary = tokenizer.backend.get_vocab()
    kept, count = _first_tokens(content["model"]["merges"], vocabulary, vocab_size)
    new_ids = {token: i for i, token in enumerate(sorted(kept, key=vocabulary.get))}
    content["model"]["vocab"] = new_ids
    content["model"]["merges"] = content["model"]["merges"][:count]
    for token in content["added_tokens"]:
        token["id"] = new_ids[token["content"]]
    # Others name ids of special tokens, which `encode` never adds.
    if (content["post_processor"] or {}).get("type") != "ByteLevel":
        content["post_processor"] = None
    return tokenizer_from_json(artifacts.to_json(content), "the derived tokenizer")


def is_derived(teacher_tokenizer: Tokenizer, student_tokenizer: Tokenizer) -> bool:
    """Return whether the student's merges are the first ones of the teacher's.

    How text is split into words and what tokens are added has to be the same too; the
    ids may differ.
    """
    try:
        teacher = _content_of(teacher_tokenizer)
        student = _content_of(student_tokenizer)
    except InputError:
        return False
    merges = student["model"]["merges"]
    is_prefix = teacher["model"]["merges"][: len(merges)] == merges
    return is_prefix and _rules(teacher) == _rules(student)


def pieces_of(
    teacher_tokenizer: BPETokenizer, student_tokenizer: BPETokenizer
) -> list[tuple[int, ...]]:
    """Return each of the `V_t` teacher tokens as ids of a derived student's tokens.

    An added token such as the end of text is one id, an id without a token is none.

    Raises:
        InputError: The student's tokenizer is not derived from the teacher's.

    Example:
        >>> pieces_of(teacher, derive_tokenizer(teacher, 258))[258]  # "low"
        (257, 87)
    """
    if not is_derived(teacher_tokenizer, student_tokenizer):
        raise InputError(
            "A student tokenizer derived from the teacher's was expected. Received: "
            f"one of {student_tokenizer.vocab_size} tokens whose merges are not the "
            f"first of the teacher's {teacher_tokenizer.vocab_size} tokens. Use "
            "`derive_tokenizer(teacher_tokenizer, vocab_size)`, or "
            "`UniversalLogit()`, which takes any two tokenizers."
        )
    student = student_tokenizer.backend
    pieces = [()] * teacher_tokenizer.vocab_size
    added = teacher_tokenizer.backend.get_added_tokens_decoder()
    for token, index in teacher_tokenizer.backend.get_vocab().items():
        if index in added:
            pieces[index] = (student.token_to_id(token),)
        elif teacher_tokenizer.decode_bytes([index]):
            # Below the splitting into words, which needs whole characters.
            pieces[index] = tuple(piece.id for piece in student.model.tokenize(token))
    return pieces


def shared_tokens(
    teacher_tokenizer: Tokenizer, student_tokenizer: Tokenizer
) -> np.ndarray:
    """Find the teacher token of the same bytes for each student token.

    Returns:
        Teacher ids `(V_s,)` int64, the lowest if there are several, -1 where there
        is none. End of text corresponds to end of text.

    Example:
        >>> shared_tokens(teacher, derive_tokenizer(teacher, 258))[257]
        257
    """
    id_of = {}
    for index, data in enumerate(_token_bytes(teacher_tokenizer)):
        id_of.setdefault(data, index)
    # Without bytes are gaps of a vocabulary, and the end of text.
    id_of.pop(b"", None)
    result = [id_of.get(data, -1) for data in _token_bytes(student_tokenizer)]
    end = student_tokenizer.end_of_text_id
    if end is not None:
        teacher_end = teacher_tokenizer.end_of_text_id
        result[end] = -1 if teacher_end is None else teacher_end
    return np.array(result, np.int64)


class Alignment(NamedTuple):
    """Where the teacher is when the student predicts its next token.

    Student position `j` predicts student token `j + 1`, which starts at a byte that
    lies in some teacher token `i + 1`, which teacher position `i` predicts.

    Attributes:
        teacher_index: `i` for each `j`, `(N_s,)` int64. -1 where there is none: in
            the first teacher token, and at the last student position.
        at_boundary: `(N_s,)` bool: both tokens start at the same byte.
        inside: `(N_s,)` int64: student tokens that start before it in the same
            teacher token. In a derived pair, they are the pieces already seen of it.
    """

    teacher_index: np.ndarray
    at_boundary: np.ndarray
    inside: np.ndarray


def align(
    teacher_ids,
    student_ids,
    teacher_tokenizer: Tokenizer,
    student_tokenizer: Tokenizer,
) -> Alignment:
    """Find for each student position the teacher's position over the same text.

    Args:
        teacher_ids: The text in teacher tokens `(N_t,)`, ends of text included.
        student_ids: The same text in student tokens `(N_s,)`.
        teacher_tokenizer: The one that made `teacher_ids`.
        student_tokenizer: The one that made `student_ids`.

    Raises:
        InputError: The two are not the same text, or there is no token of some id.

    Example:
        >>> align(teacher.encode("low lower"), student.encode("low lower"),
        ...       teacher, student).teacher_index
        array([-1,  0,  0,  0,  0,  1, -1])
    """
    teacher_ids, student_ids = np.asarray(teacher_ids), np.asarray(student_ids)
    teacher_starts = _starts(teacher_tokenizer, teacher_ids)
    student_starts = _starts(student_tokenizer, student_ids)
    teacher_text = _text_of(teacher_tokenizer, teacher_ids)
    student_text = _text_of(student_tokenizer, student_ids)
    if teacher_text != student_text:
        sizes = [
            f"{sum(map(len, text))} bytes in {len(text)} parts"
            for text in (teacher_text, student_text)
        ]
        raise InputError(
            "Teacher and student tokens of the same text were expected, both or "
            f"neither with ends of text. Received: {sizes[0]} and other {sizes[1]}. "
            "Encode the same documents with both tokenizers."
        )
    places = student_starts[1:]
    covering = np.searchsorted(teacher_starts, places, side="right") - 1
    known = (covering > 0) & (places < teacher_starts[-1])
    token_starts = teacher_starts[covering]
    first = np.searchsorted(student_starts, token_starts)
    return Alignment(
        np.where(known, covering - 1, -1),
        known & (token_starts == places),
        np.where(known, np.arange(1, len(places) + 1) - first, 0),
    )


def _starts(tokenizer, ids):
    """Return where in the text each token starts, in bytes, and where the text ends.

    The end of text counts as one byte, so that two streams of the same documents keep
    in step.
    """
    tokenizer.check_ids([int(ids.min()), int(ids.max())])
    sizes = np.array([len(data) for data in _token_bytes(tokenizer)], np.int64)
    if tokenizer.end_of_text_id is not None:
        sizes[tokenizer.end_of_text_id] = 1
    return np.concatenate([[0], np.cumsum(sizes[ids], dtype=np.int64)])


def _text_of(tokenizer, ids) -> list[bytes]:
    """Return the bytes of each document in a stream."""
    ends = np.flatnonzero(ids == tokenizer.end_of_text_id)
    return [tokenizer.decode_bytes(part) for part in np.split(ids, ends)]


class VocabularyMap:
    """The teacher's probabilities as probabilities of a derived student's tokens.

    Where a teacher token starts, the student's next token is `s` with the sum of the
    probabilities of all teacher tokens whose pieces begin with `s`. Within a teacher
    token, of which some pieces are seen, the tokens that begin with those pieces
    remain; those that go on with `s` share what those that go on have together.

    Student contexts do not tell where the teacher's tokens end, so one context meets
    targets of both kinds, and the cross entropy, linear in the target, has its
    minimum at their mean. Each target is the teacher's probability given whether a
    token ended here, so that their mean over the teacher's text is, by the law of
    total probability, its probability given the context alone: forward KL is
    unbiased. A token which would have ended where the text goes on is left out: how
    often tokens end is told by how often boundaries come, and counting it here too
    would make a student believe too much in short tokens.

    Pieces already seen are given as a node: node 0 is the boundary, where none are;
    -1 says that nothing is known. `nodes_for` finds them.

    Args:
        teacher_tokenizer: Of `V_t` ids.
        student_tokenizer: Derived from it, of `V_s` ids.

    Attributes:
        teacher_vocab_size: `V_t`.
        student_vocab_size: `V_s`.

    Raises:
        InputError: The student's tokenizer is not derived from the teacher's.

    Example:
        >>> vocabulary_map = VocabularyMap(teacher, student)
        >>> alignment = align(teacher_ids, student_ids, teacher, student)
        >>> nodes = vocabulary_map.nodes_for(student_ids, alignment)  # (N_s,)
        >>> ids, values, rest = vocabulary_map.top_k(
        ...     probabilities, alignment.teacher_index, nodes, 32)
    """

    def __init__(
        self, teacher_tokenizer: BPETokenizer, student_tokenizer: BPETokenizer
    ):
        pieces = pieces_of(teacher_tokenizer, student_tokenizer)
        self.teacher_vocab_size = teacher_tokenizer.vocab_size
        self.student_vocab_size = student_tokenizer.vocab_size
        # In this order, tokens that begin with the same pieces are neighbours, and
        # one that ends after them comes before those that go on.
        order = sorted(range(len(pieces)), key=pieces.__getitem__)
        self._order = np.array(order)
        self._nodes = _nodes_of([pieces[token] for token in order])
        edges = [
            (parent * self.student_vocab_size + token, child)
            for parent, node in enumerate(self._nodes)
            for token, child in zip(node.tokens, node.children, strict=True)
            if child >= 0
        ]
        beyond_all = len(self._nodes) * self.student_vocab_size, -1
        self._keys, self._children = np.array([*edges, beyond_all], np.int64).T

    def nodes_for(self, student_ids, alignment: Alignment) -> np.ndarray:
        """Return for each student position what is seen of its teacher token.

        Args:
            student_ids: The text in student tokens `(N_s,)`.
            alignment: Its alignment with the teacher's tokens.

        Returns:
            Nodes `(N_s,)` int64: -1 where the teacher predicts nothing, or its
            tokens in this text are not cut as `pieces_of` says.
        """
        student_ids = np.asarray(student_ids)
        nodes = np.where(alignment.at_boundary, 0, -1)
        for depth in range(1, int(alignment.inside.max(initial=0)) + 1):
            rows = np.flatnonzero(alignment.inside == depth)
            keys = nodes[rows - 1] * self.student_vocab_size + student_ids[rows]
            places = np.searchsorted(self._keys, keys)
            is_known = self._keys[places] == keys
            nodes[rows] = np.where(is_known, self._children[places], -1)
        return nodes

    def top_k(
        self, probabilities, rows, nodes, k: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the `k` most probable student tokens.

        Args:
            probabilities: Of the teacher's tokens, `(M, V_t)`, 0 or more.
            rows: Which of the `M` each result is of, `(N,)` integers.
            nodes: What is seen of the teacher's token, `(N,)` integers.
            k: Tokens to keep, 1 to `V_s`.

        Returns:
            ids: `(N, k)` int64, falling in probability, each at most once in a row;
                tokens of probability 0 where no more can follow.
            values: Their probabilities, `(N, k)` float64.
            rest: `(N,)` float64, what is missing to 1: the other tokens; 1 where
                nothing is known, since the node is -1 or all tokens that go on have
                probability 0.
        """
        ids = np.tile(np.arange(k), (len(nodes), 1))
        values = np.zeros((len(nodes), k))
        rest = np.ones(len(nodes))
        for node, chosen in self._groups(nodes):
            columns = self._order[node.start : node.stop]
            goes_on = probabilities.T[np.ix_(columns, rows[chosen])].astype(np.float64)
            shares = np.add.reduceat(goes_on, node.starts, axis=0).T  # (n, S)
            total = shares.sum(axis=1)
            is_known = total > 0
            shares = shares / np.where(is_known, total, 1.0)[:, None]
            largest, others = _largest(shares, k)
            count = largest.shape[1]
            ids[chosen, :count] = node.tokens[largest]
            # The lowest ids that are not among the tokens.
            room = np.arange(len(node.tokens) + k - count)
            ids[chosen, count:] = np.setdiff1d(room, node.tokens)[: k - count]
            values[chosen, :count] = np.take_along_axis(shares, largest, axis=1)
            rest[chosen] = np.where(is_known, 0.0, 1.0) + others
        return ids, values, rest

    def _groups(self, nodes) -> Iterator[tuple["_Node", np.ndarray]]:
        """Yield nodes and the rows at each, in parts that fit the memory."""
        by_node = np.argsort(nodes, kind="stable")
        found, firsts = np.unique(nodes[by_node], return_index=True)
        for index, rows in zip(found, np.split(by_node, firsts[1:]), strict=False):
            if index < 0:
                continue
            node = self._nodes[index]
            size = max(1, _SORT_VALUES // (node.stop - node.start))
            for start in range(0, len(rows), size):
                yield node, rows[start : start + size]


class _Node(NamedTuple):
    """Sorted teacher tokens that begin with the same pieces, and go on after them."""

    start: int  # the first of them
    stop: int  # after the last
    tokens: np.ndarray  # student tokens by which they go on, rising, (S,)
    starts: np.ndarray  # where the teacher tokens of each begin, from `start` on, (S,)
    children: list[int]  # their nodes, -1 where all teacher tokens end


def _nodes_of(pieces: list[tuple[int, ...]]) -> list[_Node]:
    """Make the nodes over sorted pieces; parents before children, 0 is the root."""
    spans = [(0, len(pieces), 0)]
    nodes = []
    for first, stop, depth in spans:  # which grows meanwhile
        start = first
        while start < stop and len(pieces[start]) == depth:
            start += 1
        nexts = [run[depth] for run in pieces[start:stop]]
        starts = [i for i, s in enumerate(nexts) if not i or s != nexts[i - 1]]
        children = []
        for begin, end in zip(starts, [*starts[1:], len(nexts)], strict=True):
            # The shortest come first.
            goes_on = len(pieces[start + end - 1]) > depth + 1
            children.append(len(spans) if goes_on else -1)
            if goes_on:
                spans.append((start + begin, start + end, depth + 1))
        tokens = np.array([nexts[i] for i in starts], np.int64)
        starts = np.array(starts, np.int64)
        nodes.append(_Node(start, stop, tokens, starts, children))
    return nodes


def _largest(values, k):
    """Return the columns of the `k` largest, falling, and the sum of the others."""
    k = min(k, values.shape[1])
    columns = np.argpartition(-values, k - 1, axis=1)
    others = np.take_along_axis(values, columns[:, k:], axis=1).sum(axis=1)
    largest = np.sort(columns[:, :k], axis=1)  # equal ones stay in order
    falling = np.argsort(
        -np.take_along_axis(values, largest, axis=1), axis=1, kind="stable"
    )
    return np.take_along_axis(largest, falling, axis=1), others


def _content_of(tokenizer: Tokenizer) -> dict:
    """Return a `tokenizer.json` whose merges are pairs that alone decide."""
    if not isinstance(tokenizer, BPETokenizer):
        raise InputTypeError(
            "A `BPETokenizer` was expected, whose first merges can be kept. "
            f"Received: {type(tokenizer).__name__}. Train the teacher with bpe."
        )
    content = artifacts.parse_json(tokenizer.to_json())
    model = content["model"]
    if model.get("ignore_merges"):
        raise InputError(
            "A tokenizer whose merges alone decide was expected. Received: one with "
            "ignore_merges=True. Set it to false."
        )
    model["merges"] = [
        list(m) if not isinstance(m, str) else m.split(" ") for m in model["merges"]
    ]
    return content


def _rules(content: dict) -> dict:
    """Return what decides about tokens besides vocabulary and merges."""
    added = [{**token, "id": None} for token in content["added_tokens"]]
    return {
        "model": {**content["model"], "vocab": None, "merges": None},
        "added_tokens": sorted(added, key=lambda token: token["content"]),
        "normalizer": content["normalizer"],
        "pre_tokenizer": content["pre_tokenizer"],
    }


def _first_tokens(merges, vocabulary, vocab_size) -> tuple[set[str], int]:
    """Return the first `vocab_size` tokens, and the number of merges they take."""
    kept = set(vocabulary) - {left + right for left, right in merges}
    arguments.integer(
        "vocab_size",
        vocab_size,
        len(kept),
        len(vocabulary),
        repair="It begins with the tokens that no merge makes, and ends with all of "
        "the teacher's.",
    )
    for count, (left, right) in enumerate(merges):
        if not {left, right} <= kept:
            raise InputError(
                "Merges of tokens that earlier merges make were expected. Received: "
                f"{left!r} + {right!r} too early, as merge {count}. This tokenizer "
                "cannot be cut; train one with `BPETokenizer.train`."
            )
        # Two merges may make the same token.
        if left + right not in kept and len(kept) == vocab_size:
            return kept, count
        kept.add(left + right)
    return kept, len(merges)


def _token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    return [tokenizer.decode_bytes([index]) for index in range(tokenizer.vocab_size)]
