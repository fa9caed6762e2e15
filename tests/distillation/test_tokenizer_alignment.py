"""Claims about teacher and student with different tokenizers."""

import functools
import itertools
import json
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_tf.distillation import tokenizer_alignment
from gpt_tf.distillation.tokenizer_alignment import (
    VocabularyMap,
    align,
    derive_tokenizer,
    is_derived,
    shared_tokens,
)
from gpt_tf.errors import InputError, InputTypeError
from gpt_tf.text.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    CharacterTokenizer,
    load_tokenizer,
    tokenizer_from_json,
)

# Once for each pair.
pieces_of = functools.cache(tokenizer_alignment.pieces_of)
map_of = functools.cache(VocabularyMap)

TEXTS = ["def low(lower):\n    return lowest\n", "größer 中文 low lower lowest\n"] * 9
OTHER_TEXTS = ["the slow flow of growth: 文 returned\n", "größte Wellen\n"] * 9


def edited(tokenizer, change):
    """Make a tokenizer of which the JSON was changed."""
    content = json.loads(tokenizer.to_json())
    change(content)
    return tokenizer_from_json(json.dumps(content))


def with_end_last(tokenizer):
    """Number the tokens as GPT-2 does: the end of text is the last."""

    def change(content):
        last = len(content["model"]["vocab"]) - 1
        for token in content["model"]["vocab"]:
            content["model"]["vocab"][token] -= 1
        content["model"]["vocab"][END_OF_TEXT] = last
        content["added_tokens"][0]["id"] = last

    return edited(tokenizer, change)


def with_merges(*pairs):
    """Make a tokenizer of the 256 bytes and these merges."""

    def change(content):
        content["model"]["merges"] = [pair.split() for pair in pairs]
        for pair in pairs:
            names = content["model"]["vocab"]
            names.setdefault(pair.replace(" ", ""), len(names))

    return edited(derive_tokenizer(TEACHER, 257), change)


TEACHER = BPETokenizer.train(TEXTS, 285)
STUDENT = derive_tokenizer(TEACHER, 270)
GPT2_TEACHER = with_end_last(TEACHER)
GPT2_STUDENT = derive_tokenizer(GPT2_TEACHER, 270)
BYTES = derive_tokenizer(TEACHER, 257)
OTHER = BPETokenizer.train(OTHER_TEXTS, 290)
CHARACTER = CharacterTokenizer.train([*TEXTS, *OTHER_TEXTS, "abc"])
PAIRS = {
    "derived": (TEACHER, STUDENT),
    "gpt2": (GPT2_TEACHER, GPT2_STUDENT),
    "same": (TEACHER, TEACHER),
    "renumbered": (TEACHER, GPT2_STUDENT),
}
MAP = map_of(TEACHER, STUDENT)

derived_pairs = pytest.mark.parametrize(
    ("teacher", "student"), PAIRS.values(), ids=PAIRS.keys()
)
any_pairs = pytest.mark.parametrize(
    ("teacher", "student"),
    [(TEACHER, STUDENT), (TEACHER, OTHER), (OTHER, CHARACTER), (CHARACTER, OTHER)],
    ids=["derived", "unrelated", "to character", "from character"],
)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
some_text = st.text(sorted(set("".join(TEXTS))), max_size=60)
words = st.lists(
    st.sampled_from("low lower lowest größer 中文 return def\n".split(" ")), max_size=20
).map(" ".join)
texts = st.one_of(any_text, some_text, words)
documents = st.lists(st.one_of(some_text, words), min_size=1, max_size=4)


def stream_of(tokenizer, texts):
    return [i for text in texts for i in [*tokenizer.encode(text), end(tokenizer)]]


def end(tokenizer):
    return tokenizer.end_of_text_id


def rows_of(count, size, seed=0):
    """Make probabilities, some of them large and some 0."""
    generator = np.random.default_rng(seed)
    rows = generator.dirichlet(np.full(size, 0.1), count)
    return np.where(rows < 1e-6, 0.0, rows).astype(np.float32)


# Deriving a tokenizer


def cut(teacher, student, ids):
    return [piece for token in ids for piece in pieces_of(teacher, student)[token]]


@derived_pairs
@given(texts)
def test_student_tokens_are_the_pieces_of_teacher_tokens(teacher, student, text):
    assert student.encode(text) == cut(teacher, student, teacher.encode(text))


@given(st.binary(max_size=60))
def test_pieces_hold_for_bytes_that_are_no_text(data):
    ids = TEACHER.encode_bytes(data)
    assert STUDENT.encode_bytes(data) == cut(TEACHER, STUDENT, ids)


@pytest.mark.parametrize("size", [257, 271, 285])
@pytest.mark.parametrize("teacher", [TEACHER, GPT2_TEACHER], ids=["first", "last"])
def test_a_derived_tokenizer_has_exactly_the_size_asked_for(teacher, size):
    student = derive_tokenizer(teacher, size)
    assert student.vocab_size == size == len(student.backend.get_vocab())
    assert is_derived(teacher, student)
    assert is_derived(student, teacher) == (size == teacher.vocab_size)


def test_deriving_equals_training_a_smaller_vocabulary():
    trained = BPETokenizer.train(TEXTS, 270)
    assert STUDENT.fingerprint() == trained.fingerprint()


def test_ids_keep_the_order_of_the_teacher():
    assert (end(STUDENT), end(GPT2_TEACHER), end(GPT2_STUDENT)) == (0, 284, 269)
    for student in (STUDENT, GPT2_STUDENT):
        shared = shared_tokens(GPT2_TEACHER, student)
        assert (np.diff(shared[shared != 284]) > 0).all()


def test_gpt2_files_can_be_derived_from(tmp_path):
    GPT2_TEACHER.backend.model.save(str(tmp_path))
    teacher = load_tokenizer(tmp_path)
    student = derive_tokenizer(teacher, 270)
    assert student.encode(TEXTS[1]) == GPT2_STUDENT.encode(TEXTS[1])
    student.backend.model.save(str(tmp_path))
    assert is_derived(teacher, load_tokenizer(tmp_path))


TWO_WAYS = with_merges("a b", "b c", "a bc", "abc d", "x y", "ab c")
FEWER_WAYS = derive_tokenizer(TWO_WAYS, 261)


@given(st.text("abcdxy", max_size=12))
def test_pieces_hold_where_two_merges_make_one_token(text):
    pieces = cut(TWO_WAYS, FEWER_WAYS, TWO_WAYS.encode(text))
    assert FEWER_WAYS.encode(text) == pieces


def test_a_further_merge_of_a_kept_token_is_kept():
    teacher = with_merges("a b", "b c", "a bc", "ab c")
    assert derive_tokenizer(teacher, 260).fingerprint() == teacher.fingerprint()


def test_further_added_tokens_are_kept():
    def change(content):
        token = dict(content["added_tokens"][0], id=285, content="<|user|>")
        content["added_tokens"].append(token)

    teacher = edited(TEACHER, change)
    student = derive_tokenizer(teacher, 271)
    assert student.backend.token_to_id("<|user|>") == 270
    assert pieces_of(teacher, student)[285] == (270,)
    assert not is_derived(teacher, STUDENT)


def test_ids_without_a_token_are_not_carried_over():
    teacher = edited(TEACHER, widen)
    student = derive_tokenizer(teacher, 285)
    assert (teacher.vocab_size, student.vocab_size) == (288, 285)
    pieces = pieces_of(teacher, student)
    assert pieces[284:] == [(), (), (), (284,)]
    assert shared_tokens(teacher, student)[284] == 287
    assert list(shared_tokens(student, teacher)[284:]) == [-1, -1, -1, 284]


def widen(content):
    """Leave three ids without a token."""
    names = content["model"]["vocab"]
    names[max(names, key=names.get)] += 3


def test_a_post_processor_that_names_ids_is_left_out():
    def change(content):
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {},
        }

    student = derive_tokenizer(edited(TEACHER, change), 270)
    assert student.fingerprint() == STUDENT.fingerprint()


def ignore_merges(content):
    content["model"]["ignore_merges"] = True


def reverse_merges(content):
    content["model"]["merges"].reverse()


@pytest.mark.parametrize(
    ("make", "size", "error", "message"),
    [
        (lambda: CHARACTER, 30, InputTypeError, "Received: CharacterTokenizer"),
        (lambda: edited(TEACHER, ignore_merges), 270, InputError, "ignore_merges"),
        (
            lambda: edited(with_merges("a b", "ab c"), reverse_merges),
            *(258, InputError, "'ab' \\+ 'c' too early, as merge 0"),
        ),
    ],
)
def test_what_cannot_be_derived_is_refused(make, size, error, message):
    with pytest.raises(error, match=message):
        derive_tokenizer(make(), size)


# Whether a tokenizer is derived


def test_only_first_merges_and_the_same_rules_are_derived():
    def no_words(content):
        content["pre_tokenizer"]["use_regex"] = False

    assert is_derived(TEACHER, GPT2_STUDENT)
    assert not is_derived(TEACHER, OTHER)
    assert not is_derived(STUDENT, TEACHER)
    assert not is_derived(TEACHER, edited(STUDENT, no_words))
    assert not is_derived(edited(TEACHER, ignore_merges), STUDENT)
    assert not is_derived(CHARACTER, CHARACTER)


@pytest.mark.parametrize("student", [OTHER, CHARACTER], ids=["bpe", "character"])
def test_pieces_of_another_tokenizer_are_refused(student):
    for make in (pieces_of, VocabularyMap):
        with pytest.raises(InputError, match="Use `derive_tokenizer"):
            make(TEACHER, student)


# Tokens of both


@derived_pairs
def test_pieces_join_to_the_bytes_of_their_token(teacher, student):
    for token, pieces in enumerate(pieces_of(teacher, student)):
        assert student.decode_bytes(pieces) == teacher.decode_bytes([token])
    assert pieces_of(teacher, student)[end(teacher)] == (end(student),)


@any_pairs
def test_shared_tokens_have_the_same_bytes(teacher, student):
    shared = shared_tokens(teacher, student)
    assert shared.shape == (student.vocab_size,) and shared.dtype == np.int64
    assert shared[end(student)] == end(teacher)
    all_bytes = [teacher.decode_bytes([i]) for i in range(teacher.vocab_size)]
    for token, found in enumerate(shared):
        if token != end(student):
            data = student.decode_bytes([token])
            assert all_bytes[found] == data if found >= 0 else data not in all_bytes
    assert (shared >= 0).sum() >= 20


def test_an_end_of_text_that_the_teacher_lacks_is_not_shared():
    teacher = CharacterTokenizer.train(TEXTS, end_of_text=False)
    assert shared_tokens(teacher, CHARACTER)[end(CHARACTER)] == -1


# Alignment


def test_alignment_of_a_text_by_hand():
    teacher = with_merges("a b", "ab a", "b b")
    student = derive_tokenizer(teacher, 258)  # has "ab"
    texts = ["abab", "bbaba"]
    teacher_ids, student_ids = stream_of(teacher, texts), stream_of(student, texts)
    assert "|".join(map(teacher.decode, zip(teacher_ids))) == "ab|ab||bb|aba|"
    assert "|".join(map(student.decode, zip(student_ids))) == "ab|ab||b|b|ab|a|"
    found = align(teacher_ids, student_ids, teacher, student)
    assert found.teacher_index.tolist() == [0, 1, 2, 2, 3, 3, 4, -1]
    assert found.at_boundary.astype(int).tolist() == [1, 1, 1, 0, 1, 0, 1, 0]
    assert found.inside.tolist() == [0, 0, 0, 1, 0, 1, 0, 0]


@any_pairs
@given(documents)
def test_the_teacher_is_where_the_next_student_token_starts(teacher, student, texts):
    teacher_ids, student_ids = stream_of(teacher, texts), stream_of(student, texts)
    found = align(teacher_ids, student_ids, teacher, student)
    assert all(len(array) == len(student_ids) for array in found)
    teacher_spans = spans_of(teacher, teacher_ids)
    starts = [start for start, _ in spans_of(student, student_ids)]
    for j, (i, at_boundary, inside) in enumerate(zip(*found, strict=True)):
        covering = [
            (index, start)
            for index, (start, stop) in enumerate(teacher_spans)
            if j + 1 < len(starts) and start <= starts[j + 1] < stop
        ]
        if not covering or covering[0][0] == 0:
            assert (i, at_boundary, inside) == (-1, False, 0)
        else:
            index, start = covering[0]
            assert i == index - 1
            assert at_boundary == (start == starts[j + 1])
            assert inside == sum(start <= s < starts[j + 1] for s in starts)


def spans_of(tokenizer, ids):
    """The bytes of each token, from and to, counted one by one."""
    spans, place = [], 0
    for token in ids:
        size = len(tokenizer.decode_bytes([token])) + (token == end(tokenizer))
        spans.append((place, place + size))
        place += size
    return spans


LOW, END = TEACHER.encode("low"), [end(TEACHER)]


@pytest.mark.parametrize(
    ("teacher_ids", "student_ids"),
    [
        (LOW, OTHER.encode("lov")),
        (LOW, OTHER.encode("lows")),
        (LOW + END, OTHER.encode("low")),
        (LOW + END, [end(OTHER), *OTHER.encode("low")]),
        (LOW + END, [*OTHER.encode("low"), *OTHER.encode_bytes(b"\0")]),
    ],
    ids=["other", "longer", "no end", "moved end", "a byte for the end"],
)
def test_streams_of_different_texts_are_refused(teacher_ids, student_ids):
    with pytest.raises(InputError, match="tokens of the same text were expected"):
        align(teacher_ids, student_ids, TEACHER, OTHER)


def test_foreign_ids_are_not_aligned():
    with pytest.raises(InputError, match=r"0 to 269\. Received: 280"):
        align([280], [280], TEACHER, STUDENT)


# Probabilities


def shares_of(vocabulary_map, rows, nodes):
    """Return the probabilities of all student tokens, and what is missing to 1."""
    size = vocabulary_map.student_vocab_size
    ids, values, rest = vocabulary_map.top_k(rows, np.arange(len(rows)), nodes, size)
    known = np.zeros((len(rows), size))
    np.put_along_axis(known, ids, values, axis=1)
    return known, rest


def node_of(vocabulary_map, prefix):
    """Return the node of pieces already seen."""
    node = 0
    for token in prefix:
        tokens = vocabulary_map._nodes[node].tokens.tolist()
        node = vocabulary_map._nodes[node].children[tokens.index(token)]
    return node


def stated(teacher, student, row, prefix):
    """The student's next token, token by token as `VocabularyMap` says it."""
    known = np.zeros(student.vocab_size)
    for token, pieces in enumerate(pieces_of(teacher, student)):
        if len(pieces) > len(prefix) and pieces[: len(prefix)] == tuple(prefix):
            known[pieces[len(prefix)]] += row[token]
    return known / (known.sum() or 1.0)


@derived_pairs
def test_all_probabilities_are_as_stated(teacher, student):
    vocabulary_map = map_of(teacher, student)
    prefixes = {p[:i] for p in pieces_of(teacher, student) for i in range(len(p))}
    nodes = np.array([node_of(vocabulary_map, prefix) for prefix in prefixes])
    assert sorted(nodes) == list(range(len(prefixes)))
    rows = rows_of(len(nodes), teacher.vocab_size).astype(np.float64)
    known, rest = shares_of(vocabulary_map, rows, nodes)
    expected = np.array(
        [
            stated(teacher, student, row, prefix)
            for row, prefix in zip(rows, prefixes, strict=True)
        ]
    )
    np.testing.assert_allclose(known, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(rest, 1 - expected.sum(axis=1), rtol=1e-12, atol=1e-12)
    rows[:, 40] += 1e-6
    other, _ = shares_of(vocabulary_map, rows, nodes)
    assert not np.allclose(other, expected, rtol=1e-12, atol=1e-15)


@given(st.integers(0, 99), st.lists(st.integers(-1, 8), max_size=9), st.data())
def test_what_is_known_and_the_rest_sum_to_one(seed, nodes, data):
    nodes = np.array(nodes, np.int64)
    rows = rows_of(len(nodes), 285, seed)
    known, _ = shares_of(MAP, rows, nodes)
    k = data.draw(st.integers(1, 270))
    ids, values, rest = MAP.top_k(rows, np.arange(len(nodes)), nodes, k)
    assert values.min(initial=0) >= 0 and rest.min(initial=0) >= 0
    np.testing.assert_allclose(values.sum(axis=1) + rest, 1.0, rtol=1e-12)
    assert all(len(set(row)) == k for row in ids)
    np.testing.assert_array_equal(values, np.take_along_axis(known, ids, axis=1))
    np.testing.assert_array_equal(values, -np.sort(-known, axis=1)[:, :k])
    assert (rest[nodes < 0] == 1.0).all()


@pytest.fixture(scope="module")
def process():
    """Text of a teacher whose next token depends on the one before, all of it.

    Yields the map, and for each run of five tokens its probability, the student's
    tokens after the first one, and the target's row and node at each of those.
    """
    teacher = with_merges("a b", "ab a")
    student = derive_tokenizer(teacher, 258)
    names = [teacher.encode(text)[0] for text in ("a", "b", "ab", "aba")]
    table = np.random.default_rng(4).dirichlet(np.ones(4), 4)
    rows = np.zeros((4, teacher.vocab_size))
    rows[:, names] = table
    vocabulary_map, pieces = map_of(teacher, student), pieces_of(teacher, student)
    runs = []
    for run in itertools.product(range(4), repeat=4):
        run = (0, *run)
        probability = np.prod(table[run[:-1], run[1:]])
        ids = [names[i] for i in run]
        student_ids = [piece for token in ids for piece in pieces[token]]
        alignment = align(ids, student_ids, teacher, student)
        nodes = vocabulary_map.nodes_for(student_ids, alignment)[:3]
        given_rows = rows[[run[i] for i in alignment.teacher_index[:3]]]
        runs.append((probability, tuple(student_ids[1:4]), given_rows, nodes))
    return vocabulary_map, runs


def test_the_mean_target_is_the_teacher_given_what_the_student_sees(process):
    """The rest has the student's own shape: it does not move the minimum."""
    vocabulary_map, runs = process
    targets, truth = defaultdict(float), defaultdict(float)
    for probability, tokens, rows, nodes in runs:
        known, _ = shares_of(vocabulary_map, rows, nodes)
        for depth, token in enumerate(tokens):
            targets[tokens[:depth]] += probability * known[depth]
            truth[tokens[:depth]] += probability * np.eye(258)[token]
    contexts = sorted(truth)
    found, wanted = (np.array([x[c] for c in contexts]) for x in (targets, truth))
    found, wanted = (x / x.sum(axis=1, keepdims=True) for x in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-15)


def test_tokens_without_probability_say_nothing_and_fill_short_rows():
    nodes = np.array([node_of(MAP, STUDENT.encode("low"))])
    rows = rows_of(1, 285)
    known, _ = shares_of(MAP, rows, nodes)
    count = np.count_nonzero(known)
    assert 0 < count < 9
    ids, values, rest = MAP.top_k(rows, np.zeros(1, int), nodes, 9)
    assert (values[0, :count] > 0).all() and not values[0, count:].any()
    assert len(set(ids[0])) == 9 and rest[0] == pytest.approx(0.0, abs=1e-15)
    ended = np.zeros((1, 285))
    ended[0, TEACHER.encode("low")] = 1.0
    known, rest = shares_of(MAP, ended, nodes)
    assert not known.any() and rest[0] == 1.0


def test_rows_do_not_depend_on_what_is_computed_beside_them(monkeypatch):
    rows, nodes = rows_of(40, 285), np.arange(40) % 9 - 1
    whole = MAP.top_k(rows, np.arange(40), nodes, 7)
    monkeypatch.setattr(tokenizer_alignment, "_SORT_VALUES", 600)
    parts = MAP.top_k(rows, np.arange(40), nodes, 7)
    alone = [MAP.top_k(rows, np.array([i]), nodes[i : i + 1], 7) for i in range(40)]
    alone = [np.concatenate(arrays) for arrays in zip(*alone, strict=True)]
    for one, two, three in zip(whole, parts, alone, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


# Nodes


@derived_pairs
@given(documents)
def test_the_node_is_what_is_seen_of_the_teacher_token(teacher, student, texts):
    vocabulary_map = map_of(teacher, student)
    teacher_ids, student_ids = stream_of(teacher, texts), stream_of(student, texts)
    alignment = align(teacher_ids, student_ids, teacher, student)
    nodes = vocabulary_map.nodes_for(student_ids, alignment)
    for j, (i, at_boundary, inside) in enumerate(zip(*alignment, strict=True)):
        if i < 0:
            assert nodes[j] == -1
        else:
            seen = student_ids[j + 1 - inside : j + 1]
            assert nodes[j] == node_of(vocabulary_map, seen)
            assert (nodes[j] == 0) == at_boundary


def test_a_text_that_is_cut_otherwise_has_no_node_there():
    teacher = with_merges("l o", "o w")
    student = derive_tokenizer(teacher, 258)
    text = [teacher.backend.token_to_id(token) for token in ("a", "l", "ow", "a")]
    ids = student.encode("alowa")  # a lo w a
    nodes = map_of(teacher, student).nodes_for(ids, align(text, ids, teacher, student))
    assert nodes.tolist() == [0, -1, 0, -1]
    # Bytes, where the teacher's tokens begin with longer pieces.
    ids = BYTES.encode("lowlow")
    alignment = align(LOW * 2, ids, TEACHER, STUDENT)
    nodes = MAP.nodes_for(ids, alignment)
    assert nodes.tolist() == [-1, -1, 0, -1, -1, -1]
