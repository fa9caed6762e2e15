import itertools

import numpy as np
import pytest

from gpt_tf.distillation import generated_text
from gpt_tf.distillation.generated_text import repetition, written_documents
from gpt_tf.errors import InputError
from gpt_tf.text.dataset import TokenFile


@pytest.fixture
def written(trained, monkeypatch):
    """Let the tiny trained model write, which repeats itself a lot."""
    tokens = TokenFile.open(trained.out / "data" / "train.tokens").tokens
    monkeypatch.setattr(generated_text, "_BATCH_SIZE", 4)
    monkeypatch.setattr(generated_text, "_MAX_REPETITION", 1.0)

    def write(num_tokens, **options):
        given = trained.model, trained.tokenizer, tokens, num_tokens
        return list(written_documents(*given, **{"prompt_length": 8, **options}))

    return write


def test_so_many_tokens_go_on_from_real_text_and_the_same_again(trained, written):
    documents = written(200, seed=3)
    assert trained.model.context_length == 32
    assert 7 <= len(documents) <= 12  # 32 tokens each, or fewer where a text ended
    assert documents == written(200, seed=3)
    assert documents != written(200, seed=4)
    tokens = TokenFile.open(trained.out / "data" / "train.tokens").tokens
    text = trained.tokenizer.decode(tokens.tolist())
    for document in documents:
        start = trained.tokenizer.encode(document.text)[:4]
        assert trained.tokenizer.decode(start) in text


def test_the_text_goes_on_as_the_teacher_would(trained, written, monkeypatch):
    monkeypatch.setattr(generated_text, "_TOP_P", 1e-9)
    ids = trained.tokenizer.encode(written(20, seed=1)[0].text)
    logits = trained.model.predict(np.array([ids]), verbose=0)[0]
    is_top_1 = logits.argmax(-1)[8:-1] == np.array(ids[9:])
    assert is_top_1.mean() > 0.7  # but where tokens fell together


def test_what_repeats_itself_is_left_out(written, monkeypatch):
    shares = itertools.cycle([0.0, 0.5, 0.2])
    seen = []

    def next_share(ids):
        seen.append(next(shares))
        return seen[-1]

    monkeypatch.setattr(generated_text, "repetition", next_share)
    monkeypatch.setattr(generated_text, "_MAX_REPETITION", 0.2)
    documents = written(200, seed=3)
    assert len(documents) == sum(share <= 0.2 for share in seen)
    assert len(seen) > len(documents)


def test_repetition_is_the_share_of_runs_seen_before():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition([1] * 8) == pytest.approx(4 / 5)
    assert repetition([1, 2]) == 0.0


def test_a_teacher_that_only_repeats_itself_ends_with_a_message(written, monkeypatch):
    monkeypatch.setattr(generated_text, "repetition", lambda ids: 1.0)
    monkeypatch.setattr(generated_text, "_MAX_REPETITION", 0.2)
    with pytest.raises(InputError, match="repeats itself in over 20%"):
        written(50)


@pytest.mark.parametrize("prompt_length", [0, 32])
def test_beginnings_of_another_length_are_refused(written, prompt_length):
    with pytest.raises(InputError, match="shorter than the context"):
        written(10, prompt_length=prompt_length)
