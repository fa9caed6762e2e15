"""Claims about teacher and student with different tokenizers."""

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
    end_offsets,
    is_derived,
    pieces_of,
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
MAP = VocabularyMap(TEACHER, STUDENT)

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


@derived_pairs
@given(texts)
def test_student_tokens_are_the_pieces_of_teacher_tokens(teacher, student, text):
    pieces = pieces_of(teacher, student)
    cut = [piece for token in teacher.encode(text) for piece in pieces[token]]
    assert student.encode(text) == cut


@given(st.binary(max_size=60))
def test_pieces_hold_for_bytes_that_are_no_text(data):
    pieces = pieces_of(TEACHER, STUDENT)
    cut = [piece for token in TEACHER.encode_bytes(data) for piece in pieces[token]]
    assert STUDENT.encode_bytes(data) == cut


def test_pieces_of_another_cut_are_not_the_student_tokens():
    pieces = pieces_of(TEACHER, derive_tokenizer(TEACHER, 268))
    cut = [piece for token in TEACHER.encode(TEXTS[0]) for piece in pieces[token]]
    assert STUDENT.encode(TEXTS[0]) != cut


@pytest.mark.parametrize("size", [257, 258, 271, 284, 285])
@pytest.mark.parametrize("teacher", [TEACHER, GPT2_TEACHER], ids=["first", "last"])
def test_a_derived_tokenizer_has_exactly_the_size_asked_for(teacher, size):
    student = derive_tokenizer(teacher, size)
    assert student.vocab_size == size == len(student.backend.get_vocab())
    assert is_derived(teacher, student)
    assert is_derived(student, teacher) == (size == teacher.vocab_size)


@pytest.mark.parametrize("size", [257, 270, 285])
def test_deriving_equals_training_a_smaller_vocabulary(size):
    trained = BPETokenizer.train(TEXTS, size)
    assert derive_tokenizer(TEACHER, size).fingerprint() == trained.fingerprint()


def test_deriving_all_tokens_changes_nothing():
    for teacher in (TEACHER, GPT2_TEACHER):
        assert derive_tokenizer(teacher, 285).fingerprint() == teacher.fingerprint()


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


@given(st.text("abcdxy", max_size=12))
def test_pieces_hold_where_two_merges_make_one_token(text):
    teacher = with_merges("a b", "b c", "a bc", "abc d", "x y", "ab c")
    student = derive_tokenizer(teacher, 261)
    pieces = pieces_of(teacher, student)
    cut = [piece for token in teacher.encode(text) for piece in pieces[token]]
    assert student.encode(text) == cut


def test_a_token_that_the_student_has_but_cannot_reach_is_cut():
    teacher = with_merges("a b", "b c", "a bc", "abc d", "x y", "ab c")
    student = derive_tokenizer(teacher, 261)
    assert len(teacher.encode("abcd")) == 1
    assert [student.decode([i]) for i in student.encode("abcd")] == ["ab", "c", "d"]


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


@pytest.mark.parametrize("size", [256, 286, -1])
def test_a_size_out_of_range_is_refused(size):
    with pytest.raises(InputError, match=rf"257 to 285.*Received: {size}\."):
        derive_tokenizer(TEACHER, size)


def test_characters_cannot_be_derived_from():
    with pytest.raises(InputTypeError, match="Received: CharacterTokenizer"):
        derive_tokenizer(CHARACTER, 30)


def test_merges_that_do_not_decide_alone_are_refused():
    content = json.loads(TEACHER.to_json())
    content["model"]["ignore_merges"] = True
    teacher = tokenizer_from_json(json.dumps(content))
    with pytest.raises(InputError, match="ignore_merges"):
        derive_tokenizer(teacher, 270)
    assert not is_derived(teacher, STUDENT)


def test_merges_in_the_wrong_order_are_refused():
    teacher = with_merges("a b", "ab c")

    def change(content):
        content["model"]["merges"].reverse()

    with pytest.raises(InputError, match="'ab' \\+ 'c' too early, as merge 0"):
        derive_tokenizer(edited(teacher, change), 258)


# Whether a tokenizer is derived


def test_only_first_merges_and_the_same_rules_are_derived():
    def no_words(content):
        content["pre_tokenizer"]["use_regex"] = False

    assert is_derived(TEACHER, GPT2_STUDENT)
    assert not is_derived(TEACHER, OTHER)
    assert not is_derived(STUDENT, TEACHER)
    assert not is_derived(TEACHER, edited(STUDENT, no_words))
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


def test_every_token_of_a_derived_student_is_shared():
    assert (shared_tokens(TEACHER, STUDENT) == np.arange(270)).all()


def test_an_end_of_text_that_the_teacher_lacks_is_not_shared():
    teacher = CharacterTokenizer.train(TEXTS, end_of_text=False)
    assert shared_tokens(teacher, CHARACTER)[end(CHARACTER)] == -1


# Where tokens end


def test_tokens_end_where_their_bytes_do():
    ids = [*CHARACTER.encode("aß中"), end(CHARACTER), *CHARACTER.encode("b")]
    assert end_offsets(CHARACTER, ids).tolist() == [1, 3, 6, 7, 8]
    assert end_offsets(CHARACTER, []).shape == (0,)


@given(documents)
def test_streams_of_the_same_documents_end_at_the_same_place(texts):
    size = sum(len(text.encode()) + 1 for text in texts)
    for tokenizer in (TEACHER, GPT2_STUDENT, OTHER, CHARACTER):
        offsets = end_offsets(tokenizer, stream_of(tokenizer, texts))
        assert offsets[-1] == size and (np.diff(offsets) > 0).all()


@pytest.mark.parametrize("ids", [[[1, 2]], [0.5], [285], [-1], 3])
def test_what_are_no_ids_is_refused(ids):
    with pytest.raises(InputError, match="Received"):
        end_offsets(TEACHER, ids)


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


def test_the_first_teacher_token_is_predicted_by_nothing():
    ids = TEACHER.encode("low")
    assert len(ids) == 1
    found = align(ids, BYTES.encode("low"), TEACHER, BYTES)
    assert found.teacher_index.tolist() == [-1, -1, -1]
    assert not found.at_boundary.any() and not found.inside.any()


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


def test_alignment_takes_arrays_as_token_files_hold_them():
    ids = np.array(stream_of(TEACHER, TEXTS[:2]), np.uint16)
    found = align(ids, ids, TEACHER, TEACHER)
    assert found.teacher_index.tolist() == [*range(len(ids) - 1), -1]
    assert found.at_boundary[:-1].all() and not found.at_boundary[-1]
    assert not found.inside.any()


def test_no_text_is_aligned_with_no_text():
    assert [len(array) for array in align([], [], TEACHER, OTHER)] == [0, 0, 0]


def test_texts_without_ends_are_aligned():
    tokenizer = CharacterTokenizer.train(TEXTS, end_of_text=False)
    found = align(
        TEACHER.encode("low ß"), tokenizer.encode("low ß"), TEACHER, tokenizer
    )
    assert found.at_boundary.any()


LOW, END = TEACHER.encode("low"), [end(TEACHER)]


@pytest.mark.parametrize(
    ("teacher_ids", "student_ids", "words"),
    [
        (LOW, OTHER.encode("lov"), "3 bytes in 1 parts and 3 .* part 0 differs"),
        (LOW, OTHER.encode("lows"), "3 bytes in 1 parts and 4"),
        (LOW + END, OTHER.encode("low"), "in 2 parts and .* goes on longer"),
        (LOW + END, [end(OTHER), *OTHER.encode("low")], "part 0 differs"),
        (LOW + END, [*OTHER.encode("low"), *OTHER.encode_bytes(b"\0")], "1 parts"),
    ],
    ids=["other", "longer", "no end", "moved end", "a byte for the end"],
)
def test_streams_of_different_texts_are_refused(teacher_ids, student_ids, words):
    with pytest.raises(InputError, match=words):
        align(teacher_ids, student_ids, TEACHER, OTHER)


def test_foreign_ids_are_not_aligned():
    with pytest.raises(InputError, match=r"0 to 269\. Received: 280"):
        align([280], [280], TEACHER, STUDENT)


# Windows


# Probabilities


def stated(teacher, student, row, prefix, count_ended=False):
    """The student's next token, token by token as `VocabularyMap` says it."""
    known, ended = np.zeros(student.vocab_size), 0.0
    for token, pieces in enumerate(pieces_of(teacher, student)):
        if pieces[: len(prefix)] == tuple(prefix):
            if len(pieces) > len(prefix):
                known[pieces[len(prefix)]] += row[token]
            elif count_ended:
                ended += row[token]
    total = known.sum() + ended
    return (known / total, ended / total) if total else (known, 1.0)


@pytest.mark.parametrize("count_ended", [False, True])
@derived_pairs
def test_all_probabilities_are_as_stated(teacher, student, count_ended):
    vocabulary_map = VocabularyMap(teacher, student)
    prefixes = {p[:i] for p in pieces_of(teacher, student) for i in range(len(p))}
    assert vocabulary_map.num_nodes == len(prefixes)
    nodes = np.array([vocabulary_map.node_of(prefix) for prefix in prefixes])
    assert sorted(nodes) == list(range(len(prefixes)))
    rows = rows_of(len(nodes), teacher.vocab_size).astype(np.float64)
    known, rest = vocabulary_map.to_student(rows, nodes, count_ended=count_ended)
    for i, prefix in enumerate(prefixes):
        expected = stated(teacher, student, rows[i], prefix, count_ended)
        np.testing.assert_allclose(known[i], expected[0], rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(rest[i], expected[1], rtol=1e-12, atol=1e-15)


def test_one_changed_probability_is_noticed():
    rows = rows_of(1, 285).astype(np.float64)
    expected = stated(TEACHER, STUDENT, rows[0], ())[0]
    rows[0, 40] += 1e-9
    known, _ = MAP.to_student(rows, [0])
    assert not np.allclose(known[0], expected, rtol=1e-12, atol=1e-15)


@given(
    st.integers(0, 99),
    st.booleans(),
    st.lists(st.integers(-1, 8), max_size=9),
    st.data(),
)
def test_what_is_known_and_the_rest_sum_to_one(seed, count_ended, nodes, data):
    nodes = np.array(nodes, np.int64)
    rows = rows_of(len(nodes), 285, seed)
    options = {"count_ended": count_ended}
    known, rest = MAP.to_student(rows, nodes, **options)
    assert known.min(initial=0) >= 0 and rest.min(initial=0) >= 0
    np.testing.assert_allclose(known.sum(axis=1) + rest, 1.0, rtol=1e-12)
    k = data.draw(st.integers(1, 270))
    ids, values, rest = MAP.top_k(rows, nodes, k, **options)
    assert values.min(initial=0) >= 0 and rest.min(initial=0) >= 0
    np.testing.assert_allclose(values.sum(axis=1) + rest, 1.0, rtol=1e-12)
    assert all(len(set(row)) == k for row in ids)
    np.testing.assert_array_equal(values, np.take_along_axis(known, ids, axis=1))
    np.testing.assert_array_equal(values, -np.sort(-known, axis=1)[:, :k])


def chains(row, count_ended):
    """Multiply the shares of each teacher token's pieces, and of its end."""
    products = []
    for pieces in pieces_of(TEACHER, STUDENT):
        nodes = [MAP.node_of(pieces[:depth]) for depth in range(len(pieces) + 1)]
        rows = np.tile(row, (len(nodes), 1))
        known, rest = MAP.to_student(rows, nodes, count_ended=count_ended)
        steps = known[np.arange(len(pieces)), list(pieces)]
        # Where no token goes on, this one ends for certain.
        products.append(np.prod(steps) * rest[-1])
    return products


def test_the_chain_over_pieces_gives_back_each_teacher_token():
    row = rows_of(1, 285).astype(np.float64) + 1e-4
    row /= row.sum()
    np.testing.assert_allclose(chains(row, count_ended=True), row[0], rtol=1e-12)


def test_the_chain_needs_the_tokens_that_ended():
    row = rows_of(1, 285).astype(np.float64) + 1e-4
    row /= row.sum()
    assert not np.allclose(chains(row, count_ended=False), row[0], rtol=1e-12)


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
    vocabulary_map, pieces = (
        VocabularyMap(teacher, student),
        pieces_of(teacher, student),
    )
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


def mean_targets(process, count_ended):
    """Where the loss is smallest, and what the student's next token really is.

    The rest has the student's own shape: it does not move the minimum.
    """
    vocabulary_map, runs = process
    targets, truth = defaultdict(float), defaultdict(float)
    for probability, tokens, rows, nodes in runs:
        known, _ = vocabulary_map.to_student(rows, nodes, count_ended=count_ended)
        for depth, token in enumerate(tokens):
            targets[tokens[:depth]] += probability * known[depth]
            truth[tokens[:depth]] += probability * np.eye(258)[token]
    contexts = sorted(truth)
    as_rows = [np.array([sums[c] for c in contexts]) for sums in (targets, truth)]
    return [rows / rows.sum(axis=1, keepdims=True) for rows in as_rows]


def test_the_mean_target_is_the_teacher_given_what_the_student_sees(process):
    found, truth = mean_targets(process, count_ended=False)
    np.testing.assert_allclose(found, truth, rtol=1e-12, atol=1e-15)


def test_counting_ended_tokens_would_bias_the_student(process):
    found, truth = mean_targets(process, count_ended=True)
    assert np.abs(found - truth).max() > 0.05


# The largest of them


def test_short_rows_are_filled_with_tokens_of_probability_0():
    node = MAP.node_of(STUDENT.encode("low"))
    row = rows_of(1, 285)
    known, _ = MAP.to_student(row, [node])
    count = np.count_nonzero(known)
    assert 0 < count < 9
    ids, values, rest = MAP.top_k(row, [node], 9)
    assert (values[0, :count] > 0).all() and not values[0, count:].any()
    assert len(set(ids[0])) == 9 and rest[0] == pytest.approx(0.0, abs=1e-15)


def test_what_top_k_leaves_out_is_the_rest():
    known, _ = MAP.to_student(rows_of(5, 285), np.zeros(5, int))
    _, _, rest = MAP.top_k(rows_of(5, 285), np.zeros(5, int), 3)
    assert rest.min() > 0.01
    np.testing.assert_allclose(rest, np.sort(known)[:, :-3].sum(axis=1), rtol=1e-12)


@pytest.mark.parametrize("k", [0, 271])
def test_k_out_of_range_is_refused(k):
    with pytest.raises(InputError, match=f"`k` expects 1 to 270.*Received: {k}"):
        MAP.top_k(rows_of(1, 285), [0], k)


def test_nothing_is_known_where_there_is_no_teacher():
    known, rest = MAP.to_student(rows_of(2, 285), [-1, 0])
    assert rest.tolist() == [1.0, 0.0] and not known[0].any()
    ids, values, rest = MAP.top_k(rows_of(1, 285), [-1], 4)
    assert rest[0] == 1.0 and not values.any() and len(set(ids[0])) == 4


@pytest.mark.parametrize("count_ended", [False, True])
def test_tokens_of_probability_0_say_nothing(count_ended):
    row = np.zeros((1, 285))
    row[0, TEACHER.encode("low")] = 1.0
    node = MAP.node_of(STUDENT.encode("low"))
    known, rest = MAP.to_student(row, [node], count_ended=count_ended)
    assert not known.any() and rest[0] == 1.0


def test_ids_without_a_token_have_no_share():
    teacher = edited(TEACHER, widen)
    vocabulary_map = VocabularyMap(teacher, STUDENT)
    row = np.full((1, 288), 1 / 288)
    known, rest = vocabulary_map.to_student(row, [0])
    assert known.sum() == pytest.approx(1.0) and rest[0] == 0.0
    _, rest = vocabulary_map.to_student(row, [0], count_ended=True)
    assert rest[0] == pytest.approx(3 / 288)


def test_rows_do_not_depend_on_what_is_computed_beside_them(monkeypatch):
    rows, nodes = rows_of(40, 285), np.arange(40) % 9 - 1
    whole = [*MAP.to_student(rows, nodes), *MAP.top_k(rows, nodes, 7)]
    monkeypatch.setattr(tokenizer_alignment, "_SORT_VALUES", 600)
    parts = [*MAP.to_student(rows, nodes), *MAP.top_k(rows, nodes, 7)]
    alone = [MAP.top_k(rows[i : i + 1], nodes[i : i + 1], 7) for i in range(40)]
    alone = [np.concatenate(arrays) for arrays in zip(*alone, strict=True)]
    for one, other in zip(whole + whole[2:], parts + alone, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("rows", "nodes", "words"),
    [
        (np.ones((2, 270)), [0, 0], "all 285 teacher tokens"),
        (np.ones((2, 285)), [0], "one node for each row"),
        (np.ones((1, 285)), [[0]], "one node for each row"),
        (-np.ones((1, 285)), [0], "Received: -1.0 to -1.0. Take the softmax"),
        (np.full((1, 285), np.nan), [0], "0 or more"),
        (np.full((1, 285), np.inf), [0], "0 or more"),
        (np.ones((1, 285)), [MAP.num_nodes], "Nodes run from -1"),
        (np.ones((1, 285)), [-2], "Nodes run from -1"),
    ],
)
def test_rows_that_cannot_be_carried_over_are_refused(rows, nodes, words):
    with pytest.raises(InputError, match=words):
        MAP.to_student(rows, nodes)
    with pytest.raises(InputError, match=words):
        MAP.top_k(rows, nodes, 3)


# Nodes


@derived_pairs
@given(documents)
def test_the_node_is_what_is_seen_of_the_teacher_token(teacher, student, texts):
    vocabulary_map = MAP if student is STUDENT else VocabularyMap(teacher, student)
    teacher_ids, student_ids = stream_of(teacher, texts), stream_of(student, texts)
    alignment = align(teacher_ids, student_ids, teacher, student)
    nodes = vocabulary_map.nodes_for(student_ids, alignment)
    for j, (i, at_boundary, inside) in enumerate(zip(*alignment, strict=True)):
        if i < 0:
            assert nodes[j] == -1
        else:
            seen = student_ids[j + 1 - inside : j + 1]
            assert nodes[j] == vocabulary_map.node_of(seen)
            assert (nodes[j] == 0) == at_boundary


def test_the_text_itself_is_possible():
    ids, student_ids = stream_of(TEACHER, TEXTS), stream_of(STUDENT, TEXTS)
    alignment = align(ids, student_ids, TEACHER, STUDENT)
    nodes = MAP.nodes_for(student_ids, alignment)
    rows = np.eye(285)[[*ids[1:], ids[0]]][alignment.teacher_index]
    known, _ = MAP.to_student(rows, nodes)
    nexts = np.array(student_ids[1:])
    has_teacher = alignment.teacher_index[:-1] >= 0
    assert has_teacher.mean() > 0.9 and (nodes > 0).any()
    assert (known[np.arange(len(nexts)), nexts][has_teacher] == 1.0).all()


def test_pieces_that_begin_no_token_have_no_node():
    assert MAP.node_of([]) == 0
    assert MAP.node_of(STUDENT.encode("qq")) == -1
    assert MAP.node_of([end(STUDENT)]) == -1
    assert {MAP.node_of([token]) for token in range(270, 2700)} == {-1}


def test_the_alignment_of_another_text_is_refused():
    ids = STUDENT.encode("low lower")
    alignment = align(ids, ids, STUDENT, STUDENT)
    with pytest.raises(InputError, match="alignment of 1 student tokens"):
        MAP.nodes_for(ids[:1], alignment)


def test_a_text_that_is_cut_otherwise_has_no_node_there():
    teacher = with_merges("l o", "o w")
    student = derive_tokenizer(teacher, 258)
    text = [teacher.backend.token_to_id(token) for token in ("a", "l", "ow", "a")]
    alignment = align(text, student.encode("alowa"), teacher, student)  # a lo w a
    nodes = VocabularyMap(teacher, student).nodes_for(
        student.encode("alowa"), alignment
    )
    assert nodes.tolist() == [0, -1, 0, -1]
    # Bytes, where the teacher's tokens begin with longer pieces.
    ids = BYTES.encode("lowlow")
    alignment = align(LOW * 2, ids, TEACHER, STUDENT)
    nodes = MAP.nodes_for(ids, alignment)
    assert nodes.tolist() == [-1, -1, 0, -1, -1, -1]
