"""Fine-tuning on rows: what is learnt, LoRA, resume, and what is refused."""

import itertools
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf

import gpt_tf
from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.models.cached_forward import logits_at
from gpt_tf.pretrained.adapter import fingerprint_of
from gpt_tf.pretrained.build import variables_of
from gpt_tf.quantization.weights import dequantize, quantize_array
from gpt_tf.text.dataset import RowWindows, TokenFile
from gpt_tf.text.tokenizer import load_tokenizer
from gpt_tf.training import loop
from gpt_tf.training.lora import LoraGPT
from gpt_tf.training.run_folder import load_model, read_run

pytestmark = pytest.mark.usefixtures("eagerly")

WORDS = "quick brown fox jumps over lazy dog runs away again".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows that ask for a word after the one that is named."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"prompt": f"the {one} {' '.join(WORDS[:place])}:", "completion": f" {other}"}
        for place, (one, other) in enumerate(itertools.pairwise(WORDS))
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def fit(trained, data):
    """Fine-tune the tiny run silently, by few steps."""

    def run(out, lora=None, **options):
        options = {"jit_compile": "off", "checkpoint_every": 1, **options}
        options |= {"strategy": "one_device", "verbose": False, "batch_size": 4}
        options = {"steps": 4, **options}
        return loop.finetune(trained.out, data, out, lora, **options)

    return run


@pytest.fixture(scope="module")
def fitted(fit, tmp_path_factory):
    """A finished run by LoRA."""
    return fit(tmp_path_factory.mktemp("runs") / "lora", {"rank": 3, "alpha": 9.0})


def test_the_loss_is_of_answers_only(fit, trained, tmp_path):
    result = fit(tmp_path / "run", steps=1, validation_fraction=0.5)
    tokens = TokenFile.open(result.out / "data" / "validation.tokens")
    end = result.tokenizer.end_of_text_id
    losses, accuracies = [], []
    for row in np.split(tokens.tokens, np.flatnonzero(tokens.tokens == end) + 1)[:-1]:
        ids = row.astype("int32")
        text = result.tokenizer.decode(ids)
        prompt = text[: text.index(":") + 1]
        read = len(result.tokenizer.encode(prompt))
        logits = result.model(ids[None, :-1])[0].numpy().astype("float64")
        logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
        places = np.arange(read - 1, len(ids) - 1)
        losses += list(-logits[places, ids[read:]])
        accuracies += list(logits[places].argmax(-1) == ids[read:])
    (validation,) = result.history["validations"]
    assert validation["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert validation["token_accuracy"] == pytest.approx(np.mean(accuracies))
    assert len(losses) < tokens.count / 2


def test_logits_at_places_are_the_model_s(make_model, windows_of):
    model, (x, _) = make_model(), windows_of(2, 9)
    places = np.array([[3, 0], [8, 8]], "int32")
    found = logits_at(model, x, places)
    expected = np.take_along_axis(model(x).numpy(), places[..., None], 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_it_learns_the_task(fit, trained, tmp_path):
    result = fit(tmp_path / "run", steps=60, learning_rate=1e-2, validate_every=30)
    first, last = (row["train_loss"] for row in result.history["validations"])
    assert last < first / 2


def test_lora_starts_as_the_base_and_moves_adapters_only(make_model, windows_of):
    base, x = make_model(), windows_of(4, 9)
    before = [v.numpy() for v in base.weights]
    lora = LoraGPT(base, {"rank": 2})
    np.testing.assert_array_equal(lora(x[0]), make_model()(x[0]))
    assert lora.count_params() == sum(
        2 * sum(v.shape)
        for name, v in variables_of(base).items()
        if name.endswith("_kernel")
    )
    lora.compile(gpt_tf.AdamW(0.05))
    lora.fit(*x, epochs=2, verbose=0)
    for old, variable in zip(before, base.weights, strict=True):
        np.testing.assert_array_equal(old, variable)
    assert all(np.any(b) for _, b in lora.adapters.values())
    assert len(lora.optimizer.variables) == 1 + 2 * len(lora.trainable_variables)


@pytest.mark.parametrize("form", [{}, {"norm": "rms", "activation": "swiglu"}])
def test_merged_and_unmerged_compute_the_same(make_model, windows_of, form):
    lora = LoraGPT(make_model(**form), {"rank": 2, "alpha": 7.0})
    generator = np.random.default_rng(0)
    for matrix in lora.trainable_weights:
        matrix.assign(generator.normal(size=matrix.shape) * 0.3)
    x, _ = windows_of(4, 9)
    merged = lora.merged()
    largest = np.abs(lora(x)).max()
    np.testing.assert_allclose(lora(x), merged(x), atol=1e-5 * largest)
    assert np.abs(merged(x) - make_model(**form)(x)).max() > 0.1 * largest
    # One weight of an adapter more, and they differ.
    matrix.assign_add(np.eye(*matrix.shape) * 0.01)
    assert np.abs(lora(x) - merged(x)).max() > 1e-5 * largest


def test_a_base_in_int8_is_the_base_with_rounded_kernels(make_model, windows_of):
    form = {"norm": "rms", "activation": "swiglu"}
    rounded, x = make_model(**form), windows_of(4, 9)
    fingerprint = fingerprint_of(rounded)
    for name, kernel in variables_of(rounded).items():
        if name.endswith("_kernel"):
            kernel.assign(dequantize(*quantize_array(kernel, axis=1)))
    one = LoraGPT(rounded, {"rank": 2})
    other = LoraGPT(make_model(**form), {"rank": 2, "base": "int8"})
    assert other.base_fingerprint == fingerprint
    kernels = [v for n, v in variables_of(other.gpt).items() if n.endswith("_kernel")]
    assert {v.dtype for v in kernels} == {tf.int8}
    for mine, theirs in zip(other.weights, one.weights, strict=True):
        mine.assign(theirs)
    for lora in (one, other):
        lora.compile(gpt_tf.AdamW(0.05), run_eagerly=False, jit_compile=lora is other)
        lora.fit(*x, epochs=3, verbose=0)
    for mine, theirs in zip(other.weights, one.weights, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)
    merged, expected = other.merged(), one.merged()
    assert type(merged) is gpt_tf.GPTModel
    np.testing.assert_allclose(merged(x[0]), other(x[0]), atol=1e-5)
    np.testing.assert_allclose(merged(x[0]), expected(x[0]), atol=1e-3)
    assert np.abs(merged(x[0]) - make_model(**form)(x[0])).max() > 0.1


def test_a_run_by_lora_leaves_a_plain_model_and_peft_s_folder(fitted, trained):
    assert type(fitted.model) is gpt_tf.GPTModel
    model, tokenizer = load_model(fitted.out)
    ids = np.array([tokenizer.encode("the quick brown:")], "int32")
    np.testing.assert_array_equal(model(ids), fitted.model(ids))
    opened = gpt_tf.open_model(trained.out, adapter=fitted.out / "adapter")
    np.testing.assert_allclose(opened.model(ids), model(ids), atol=1e-5)
    assert np.abs(model(ids) - trained.model(ids)).max() > 1e-3
    with pytest.raises(InputError, match="other weights"):
        gpt_tf.open_model(fitted.out, adapter=fitted.out / "adapter")
    # Checkpoints hold adapters, and no weight of the base.
    (folder, *_) = (fitted.out / "checkpoints").iterdir()
    adapters = sum(b.size for b in map(np.asarray, LoraGPT(model, {"rank": 3}).weights))
    assert (folder / "state.safetensors").stat().st_size < 12 * adapters + 10_000


@pytest.mark.parametrize(
    "lora",
    [None, {"rank": 3, "alpha": 9.0}, {"rank": 2, "base": "int8"}],
    ids=["full", "lora", "lora on int8"],
)
def test_a_run_is_resumed_bit_for_bit(
    fit, fitted, lora, have_same_weights, cut, tmp_path
):
    whole = fitted
    if lora != {"rank": 3, "alpha": 9.0}:
        whole = fit(tmp_path / "whole", lora, keep_checkpoints=3)
    shutil.copytree(whole.out, tmp_path / "cut")
    cut(tmp_path / "cut", keep=[3])
    again = loop.finetune(None, out=tmp_path / "cut", resume=True, verbose=False)
    assert have_same_weights(whole, again)
    assert again.validation_loss == whole.validation_loss


def test_a_fine_tuned_run_is_distilled_and_quantised_on_its_rows(
    fitted, data, prepared_only, tmp_path
):
    loop.distil(fitted.out, tmp_path / "student", {"num_layers": 1})
    loop.quantize(fitted.out, tmp_path / "quantised", steps=2)
    for name in ("student", "quantised"):
        config = read_run(tmp_path / name)
        assert (config.data, config.lora) == (str(data), None)
        path = tmp_path / name / "data" / "train.tokens"
        assert RowWindows(TokenFile.open(path), 4).num_windows == 8


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lora": {"rank": 0}}, "rank"),
        ({"lora": {"rank": 2, "dropout": 0.1}}, "dropout"),
        ({"augmentation": {"bpe_dropout": 0.1}}, "augmentation"),
        ({"mesh": "1x1"}, "mesh"),
        ({"context_length": 5}, "line"),
        ({"epochs": 0}, "epochs"),
        ({"context_length": 1000}, "context_length"),
        ({"validation_fraction": 0.99}, "validation_fraction"),
    ],
)
def test_what_does_not_go_with_rows_is_refused(fit, options, named, tmp_path):
    with pytest.raises(InputError, match=named):
        fit(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_broken_line_leaves_an_older_run_as_it_was(trained, fitted, tmp_path):
    out = shutil.copytree(fitted.out, tmp_path / "run")
    before = artifacts.sha256_of(out / "run.json")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "a"}\n{"text": ')
    with pytest.raises(InputError, match="line 3"):
        loop.finetune(trained.out, tmp_path / "rows.jsonl", out, overwrite=True)
    assert artifacts.sha256_of(out / "run.json") == before
    assert load_model(out)[1] is not None


def test_a_quantised_base_is_refused_for_lora(make_model):
    aware = gpt_tf.quantize_aware(make_model(num_layers=1))
    with pytest.raises(InputError, match="float GPTModel"):
        LoraGPT(aware, {"rank": 2})


def test_conversations_are_learnt_and_the_run_keeps_their_template(
    trained, prepared_only, tmp_path
):
    base = shutil.copytree(trained.out / "model", tmp_path / "base")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}.{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    config = {"chat_template": template}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    rows = [
        {
            "messages": [
                {"role": "user", "content": "the fox"},
                {"role": "assistant", "content": answer},
            ]
        }
        for answer in ("runs", "jumps", "is lazy")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    loop.finetune(base, tmp_path / "rows.jsonl", tmp_path / "run", context_length=24)
    tokenizer = load_tokenizer(tmp_path / "run")
    assert tokenizer.chat_template.source == template
    windows = RowWindows(TokenFile.open(tmp_path / "run/data/train.tokens"), 1)
    learnt = tokenizer.decode(windows.tokens[windows.is_learnt])
    assert sorted(learnt.strip(".").split(".")) in (
        ["is lazy", "jumps"],
        ["is lazy", "runs"],
        ["jumps", "runs"],
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "ROWS"], "line 2"),
        (["--data", "ROWS", "--lora-alpha", "2"], "--lora-rank"),
        (["--data", "missing.jsonl"], "missing.jsonl"),
        ([], "--data"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    command, trained, options, said, tmp_path
):
    (tmp_path / "rows.jsonl").write_text('{"text": "a fox"}\n{"text": 5}')
    options = [str(tmp_path / "rows.jsonl") if o == "ROWS" else o for o in options]
    run = tmp_path / "run"
    result = command("finetune", "--model", trained.out, "--out", run, *options)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert said in result.err
    assert not run.exists()
