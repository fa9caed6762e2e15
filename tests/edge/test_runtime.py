import itertools
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf

import gpt_tf
from gpt_tf.edge import EdgeGPT, EdgeScheduler, runtime, session
from gpt_tf.errors import InputError
from gpt_tf.export import signatures
from gpt_tf.export.tflite import export_tflite
from gpt_tf.generation.sampler import Sampler, log_softmax
from gpt_tf.generation.sequence import GenerationNotice
from gpt_tf.quantization.calibration import calibrate
from tests.edge.conftest import CONTEXT, VOCAB_SIZE, small_model

OPTIONS = [
    {"temperature": 0},
    {"seed": 2, "temperature": 0.7, "top_k": 5, "repetition_penalty": 1.3},
    {"seed": 3, "top_p": 0.8},
]


def random_ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, count).tolist()


def keras_logits(model, ids):
    return model(np.array([ids], "int32")).numpy()[0]


# Logits


@pytest.mark.parametrize("length", [1, 2, 12, CONTEXT])
def test_prefill_and_decode_give_the_logits_of_a_full_forward(gpt, exported, length):
    ids = random_ids(length)
    full = keras_logits(exported.model, ids)
    for split in {0, length // 2, length - 1}:
        gpt.reset()
        assert gpt.prefill(ids[:split]) == split
        for index in range(split, length):
            logits = gpt.decode(ids[index])
            assert logits.shape == (VOCAB_SIZE,) and logits.dtype == np.float32
            np.testing.assert_allclose(logits, full[index], atol=2e-5)
        assert gpt.position == length


def test_logits_of_a_whole_text_are_those_of_a_full_forward(gpt, exported):
    ids = list(range(1, 16))
    gpt.reset()
    found = np.concatenate([gpt.logits(ids[:6]), gpt.logits([]), gpt.logits(ids[6:])])
    assert gpt.position == len(ids)
    np.testing.assert_allclose(found, keras_logits(exported.model, ids), atol=1e-4)


def test_a_row_that_is_missing_from_the_cache_breaks_the_equality(gpt, exported):
    ids = random_ids(9)
    gpt.reset()
    gpt.prefill([*ids[:3], ids[3] ^ 1, *ids[4:8]])
    full = keras_logits(exported.model, ids)
    assert np.abs(gpt.decode(ids[8]) - full[8]).max() > 1e-3


def test_logits_stay_what_they_are_when_the_model_goes_on(gpt):
    gpt.reset()
    first = gpt.decode(1)
    kept = first.copy()
    gpt.decode(2)
    np.testing.assert_array_equal(first, kept)


def test_the_capacity_follows_the_text_and_changes_nothing(exported, monkeypatch):
    ids, found = random_ids(CONTEXT), []
    for growth in (CONTEXT, 5, 4):
        monkeypatch.setattr(session, "GROWTH", growth)
        with EdgeGPT(exported.tflite) as gpt:
            steps = [(gpt.decode(token), gpt._session.capacity) for token in ids]
            found.append([logits for logits, _ in steps])
            if growth != 4:
                continue
            expected = [4 * (i // 4 + 1) for i in range(CONTEXT)]
            assert [capacity for _, capacity in steps] == expected
            # What is kept for the next text is at most half as large again.
            free = [cache.capacity for cache in gpt._executor._pool]
            assert 0 < sum(free) <= CONTEXT // 2
            made = []
            monkeypatch.setattr(session.Executor, "_new_cache", made.append)
            gpt.reset()
            gpt.decode(1)
            assert gpt._session.capacity == 4 and not made
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


def test_a_long_prompt_grows_with_its_calls_and_gives_the_same(exported, monkeypatch):
    ids, found = random_ids(CONTEXT - 1), []
    monkeypatch.setattr(session, "GROWTH", 4)
    for long_call in (8, CONTEXT):
        monkeypatch.setattr(session, "_LONG_CALL", long_call)
        with EdgeGPT(exported.tflite) as gpt, monkeypatch.context() as patch:
            capacities, run = [], session.Session.run

            def watched(self, signature, chunk, run=run, seen=capacities):
                seen.append(self.capacity)
                return run(self, signature, chunk)

            patch.setattr(session.Session, "run", watched)
            gpt.prefill(ids[:-1])
            found.append(gpt.decode(ids[-1]))
            if long_call == 8:
                assert capacities[:3] == [8, 16, 24]
            assert capacities[-1] == CONTEXT
    np.testing.assert_array_equal(*found)


# Generation


def test_the_same_seed_gives_the_same_text_as_keras(gpt, exported):
    prompts = ["a", "hello there", "x.\n"]
    # Long enough for the oldest half to be dropped three times.
    options = {"max_new_tokens": 45, **OPTIONS[1]}
    expected = gpt_tf.generate(
        exported.model, prompts, tokenizer=exported.tokenizer, **options
    )
    assert gpt.generate(prompts, **options) == expected
    assert gpt.generate(b"a", **options) == expected[0]


@pytest.fixture(scope="module")
def forward(exported):
    return tf.function(exported.model)


def each_alone(forward, rows, count, sampler):
    """Continue prompts without a cache, a mask or a window in common."""
    sources = sampler.generators(len(rows))
    texts = [list(row) for row in rows]
    windows = [row[-CONTEXT:] for row in rows]
    for _ in range(count):
        padded = [window + [0] * (CONTEXT - len(window)) for window in windows]
        logits = forward(tf.constant(padded)).numpy()
        for row, window in enumerate(windows):
            values = logits[row, len(window) - 1]
            token = sampler.choose(values, texts[row], sources[row])
            texts[row].append(token)
            windows[row] = window + [token]
            if len(window) == CONTEXT:
                windows[row] = windows[row][-CONTEXT // 2 :]
    # The end of a text is the last id.
    ends = [[*text[-count:], VOCAB_SIZE - 1].index(VOCAB_SIZE - 1) for text in texts]
    return [text[-count:][:end] for text, end in zip(texts, ends, strict=True)]


@pytest.mark.filterwarnings("ignore::gpt_tf.generation.sequence.GenerationNotice")
@pytest.mark.parametrize("options", OPTIONS)
def test_rows_of_any_lengths_are_each_as_if_alone_in_every_engine(
    gpt, exported, forward, options
):
    draw = np.random.default_rng(len(options))
    rows = [random_ids(draw.integers(1, 2 * CONTEXT), seed) for seed in range(3)]
    # Long enough for each window to slide twice, and for the cache to shift.
    wanted = each_alone(forward, rows, 40, Sampler(**options))
    options = {"max_new_tokens": 40, **options}
    tokenizer = exported.tokenizer
    by_keras = gpt_tf.generate(exported.model, rows, tokenizer=tokenizer, **options)
    assert by_keras == wanted
    assert gpt.generate(rows, **options) == wanted
    with EdgeScheduler(gpt, max_chunk=8) as scheduler:
        requests = [scheduler.submit(row, **options) for row in rows]
        found = [request.result() for request in requests]
    assert found == [gpt.generate(row, **options) for row in rows]
    assert found[0] == wanted[0]


def test_ids_without_a_token_are_never_chosen(tmp_path, exported):
    model = small_model(vocab_size=VOCAB_SIZE + 33, num_layers=1)
    options = {"max_new_tokens": 15, "seed": 3, "temperature": 2.0}
    assert max(gpt_tf.generate(model, [1], **options)) >= VOCAB_SIZE  # it would
    export_tflite(model, tmp_path / "gpt.tflite", "float32")  # without its tokenizer
    with EdgeGPT(tmp_path / "gpt.tflite", exported.tokenizer) as gpt:
        for prompt in ("b", [1]):
            wanted = gpt_tf.generate(
                model, prompt, tokenizer=exported.tokenizer, **options
            )
            assert len(wanted) == 15
            assert prompt == "b" or max(wanted) < VOCAB_SIZE
            assert gpt.generate(prompt, **options) == wanted
            assert EdgeScheduler(gpt).submit(prompt, **options).result() == wanted


def test_streamed_pieces_join_to_the_generated_text_and_streams_take_turns(gpt):
    options = {"max_new_tokens": 40, "temperature": 0}
    prompts = [[1, 2, 3], random_ids(15), "abc"]
    alone = [gpt.generate(prompt, **options) for prompt in prompts]
    streams = [gpt.stream(prompt, **options) for prompt in prompts]
    *ids, text = map(list, zip(*itertools.zip_longest(*streams), strict=True))
    assert ids == alone[:2]
    pieces = [piece for piece in text if piece is not None]
    assert "".join(pieces) == alone[2] and len(pieces) > 1


def test_stop_texts_end_the_generation(gpt, monkeypatch):
    prompts, options = ["abc", "fox"], {"max_new_tokens": 30, "seed": 5}
    whole = gpt.generate(prompts, **options)
    options["stop"] = [whole[0][6:8], whole[1][2:4]]
    calls, decode = [], gpt._session.decode
    monkeypatch.setattr(
        gpt._session, "decode", lambda token: calls.append(token) or decode(token)
    )
    cut = gpt.generate(prompts, **options)
    for text, short in zip(whole, cut, strict=True):
        ends = [text.index(stop) for stop in options["stop"] if stop in text]
        assert short == text[: min(ends)]
    assert len(calls) <= 8 + 4  # and nothing more was computed


def test_a_cache_that_is_full_ends_the_text_if_asked(exported):
    options = {"max_new_tokens": 100, "temperature": 0}
    with EdgeGPT(exported.tflite, when_full="stop") as gpt:
        for count in (1, 7, CONTEXT):
            ids = random_ids(count)
            new = gpt.generate(ids, **options)
            # Every row is used, and the token behind the last one is known.
            assert len(new) == CONTEXT - count + 1
            logits = keras_logits(exported.model, [*ids, *new[:-1]])
            assert new == logits[count - 1 :].argmax(axis=1).tolist()


def test_a_loop_of_ones_own_slides_as_generate_does(gpt):
    expected = gpt.generate([1, 2, 3], max_new_tokens=60, temperature=0)
    gpt.reset()
    gpt.prefill([1, 2])
    token, found = 3, []
    for _ in range(60):
        token = int(gpt.decode(token).argmax())
        found.append(token)
    assert found == expected


def test_a_long_prompt_is_cut_on_the_left_with_a_notice(gpt, exported):
    prompt = random_ids(40)
    with pytest.warns(GenerationNotice, match="of 40 tokens .* 24; its beginning"):
        ids = gpt.generate(prompt, max_new_tokens=5, temperature=0)
    assert ids == gpt.generate(prompt[-CONTEXT:], max_new_tokens=5, temperature=0)


def test_a_file_of_shorter_context_sees_no_more_than_it_holds(tmp_path, exported):
    path = tmp_path / "short.tflite"
    export_tflite(exported.model, path, "float32", context_length=10)
    with EdgeGPT(path) as gpt:
        assert gpt.context_length == 10
        ids = random_ids(10)
        gpt.prefill(ids[:9])
        wanted = keras_logits(exported.model, ids)[9]
        np.testing.assert_allclose(gpt.decode(ids[9]), wanted, atol=2e-5)
        with pytest.raises(InputError, match="expects `tokenizer`"):
            gpt.generate("abc")


@pytest.fixture(scope="module")
def wide():
    """A model that is exported in every mode, and the ranges of its activations."""
    model = small_model(num_heads=4, embedding_dim=32)
    return model, calibrate(model, np.array([random_ids(CONTEXT)]), method="minmax")


@pytest.mark.parametrize("mode", signatures.MODES)
def test_every_mode_runs_as_the_cache_grows(tmp_path, monkeypatch, wide, mode):
    (model, ranges), ids = wide, random_ids(CONTEXT)
    path = tmp_path / "gpt.tflite"
    export_tflite(model, path, mode, ranges=ranges, prefill_lengths=(1, 8))
    found = []
    for growth in (4, CONTEXT):
        monkeypatch.setattr(session, "GROWTH", growth)
        with EdgeGPT(path) as gpt:
            gpt.prefill(ids[:11])
            steps = [gpt.decode(token) for token in ids[11:]]
            gpt.rewind(11)
            for begin, length in ((11, 2), (13, 8), (21, 2)):
                # Verified together they are the same in every bit.
                verified = gpt._session.verify(ids[begin : begin + length], length)
                expected = steps[begin - 11 : begin - 11 + length]
                np.testing.assert_array_equal(verified, expected)
            found.append((np.ravel(steps), gpt.score(ids)))
    assert gpt.mode == mode
    logits = keras_logits(model, ids)
    expected = np.ravel(logits[11:]), log_softmax_of(logits, ids)
    least = {"float32": 0.999999, "int4": 0.9}.get(mode, 0.97)
    for one, other, wanted in zip(*found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
        assert np.corrcoef(one, wanted)[0, 1] > least


# Scores


def log_softmax_of(logits, ids):
    return log_softmax(logits)[np.arange(len(ids) - 1), ids[1:]]


@pytest.mark.parametrize("length", [1, 2, 17, CONTEXT, CONTEXT + 1])
def test_score_is_the_log_probability_that_keras_gives(gpt, exported, length):
    ids = random_ids(length)
    scores = gpt.score(ids)
    assert scores.shape == (length - 1,) and scores.dtype == np.float32
    logits = keras_logits(exported.model, ids[:CONTEXT])
    np.testing.assert_allclose(scores, log_softmax_of(logits, ids), atol=3e-5)
    assert gpt.position == 0


def test_a_long_text_is_scored_in_overlapping_windows(gpt, exported):
    ids, half = random_ids(70), CONTEXT // 2
    scores = gpt.score(ids)
    for begin in range(0, 69 - half, half):
        window = ids[begin : begin + CONTEXT + 1]
        logits = keras_logits(exported.model, window[:CONTEXT])
        expected = log_softmax_of(logits, window)
        new = half if begin else 0
        np.testing.assert_allclose(
            scores[begin + new : begin + len(expected)], expected[new:], atol=3e-5
        )


# Bad requests


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda gpt: gpt.generate([]), "Prompt 0 is empty"),
        (lambda gpt: gpt.generate([VOCAB_SIZE]), f"0 to {VOCAB_SIZE - 1}"),
        (lambda gpt: gpt.generate("A"), "lacks 'A'"),
        (lambda gpt: gpt.generate([1], temperature=-1), "temperature"),
        (lambda gpt: gpt.generate([[1], [2]], stream=True), "one prompt"),
        (lambda gpt: gpt.decode(VOCAB_SIZE), "Token ids run"),
        (lambda gpt: gpt.prefill([1, -1]), "Token ids run"),
        (lambda gpt: gpt.score([]), "is empty"),
        (lambda gpt: gpt.score(["a", "b"]), "one text"),
        (lambda gpt: EdgeGPT("a.tflite", num_threads=0), "num_threads"),
        (lambda gpt: EdgeGPT("a.tflite", when_full="wrap"), "when_full"),
    ],
)
def test_bad_calls_are_refused(gpt, call, message):
    with pytest.raises(InputError, match=message):
        call(gpt)


def test_the_context_ends_where_the_cache_ends(exported):
    with EdgeGPT(exported.tflite, when_full="stop") as gpt:
        with pytest.raises(InputError, match=r"room for 24 more\. Received: 25"):
            gpt.prefill(random_ids(CONTEXT + 1))
        gpt.prefill(random_ids(CONTEXT))
        with pytest.raises(InputError, match="room for 0 more"):
            gpt.prefill([1])
        with pytest.raises(InputError, match="cache is full"):
            gpt.decode(1)
        assert gpt.prefill([]) == CONTEXT
        gpt.reset()
        assert gpt.position == 0
        gpt.decode(1)


def test_a_closed_model_says_so(exported):
    gpt = EdgeGPT(exported.tflite)
    stream = gpt.stream("abc", max_new_tokens=6, seed=1)
    next(stream)
    gpt.close()
    gpt.close()
    for call in (
        lambda: next(stream),
        lambda: gpt.generate([1]),
        lambda: gpt.decode(1),
        lambda: gpt.score([1, 2]),
        gpt.reset,
    ):
        with pytest.raises(InputError, match="was closed"):
            call()


# Threads, memory, noise


def test_the_number_of_threads_changes_no_text(gpt, exported):
    assert 1 <= gpt.num_threads == runtime.default_threads() <= 4
    wanted = gpt.generate("abc", temperature=0)
    for num_threads in (1, 3):
        with EdgeGPT(exported.tflite, num_threads=num_threads) as other:
            assert other.num_threads == num_threads
            assert other.generate("abc", temperature=0) == wanted


def test_it_runs_without_tensorflow_and_without_a_word(gpt, exported, tmp_path):
    code = (
        "import sys\n"
        "from gpt_tf.edge import EdgeGPT\n"
        f"gpt = EdgeGPT({str(exported.litertlm)!r})\n"
        "print(gpt.generate('abc', max_new_tokens=20, temperature=0))\n"
        "print(len(gpt.score('the fox')))\n"
        "heavy = {'tensorflow', 'keras', 'tf_keras', 'litert_lm_builder'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert result.returncode == 0 and result.stderr == ""
    expected = gpt.generate("abc", max_new_tokens=20, temperature=0)
    assert result.stdout == f"{expected}\n6\n[]\n"
    # The packed weights are shared in memory and not in a file.
    assert not list(tmp_path.iterdir())
