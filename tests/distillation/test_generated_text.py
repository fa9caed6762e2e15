import itertools

import numpy as np
import pytest

from gpt_tf.distillation import generated_text
from gpt_tf.distillation.generated_text import repetition, written_documents
from gpt_tf.errors import InputError
from gpt_tf.text.dataset import TokenFile


@pytest.fixture
def written(trained):
    """Let the tiny trained model write."""
    tokens = TokenFile.open(trained.out / "data" / "train.tokens").tokens

    def write(num_tokens, **options):
        options = {"prompt_length": 8, "batch_size": 4, "max_repetition": 1.0} | options
        return list(
            written_documents(
                trained.model, trained.tokenizer, tokens, num_tokens, **options
            )
        )

    return write


def test_so_many_tokens_are_written_and_the_same_again(trained, written):
    documents = written(200, seed=3)
    assert trained.model.context_length == 32
    assert 7 <= len(documents) <= 12  # 32 tokens each, or fewer where a text ended
    assert documents == written(200, seed=3)
    assert documents != written(200, seed=4)


def test_each_document_begins_with_real_text(trained, written):
    tokens = TokenFile.open(trained.out / "data" / "train.tokens").tokens
    text = trained.tokenizer.decode(tokens.tolist())
    for document in written(60, seed=1):
        start = trained.tokenizer.encode(document.text)[:4]
        assert trained.tokenizer.decode(start) in text


def test_the_text_goes_on_as_the_teacher_would(trained, written):
    document = written(20, seed=1, temperature=0.0)[0]
    ids = trained.tokenizer.encode(document.text)
    logits = trained.model.predict(np.array([ids]), verbose=0)[0]
    likeliest = logits.argmax(-1)[8:-1]
    assert (
        likeliest == np.array(ids[9:])
    ).mean() > 0.7  # but where tokens fell together


def test_what_repeats_itself_is_left_out(written, monkeypatch):
    shares = itertools.cycle([0.0, 0.5, 0.2])
    seen = []

    def next_share(ids):
        seen.append(next(shares))
        return seen[-1]

    monkeypatch.setattr(generated_text, "repetition", next_share)
    documents = written(200, seed=3, max_repetition=0.2)
    assert len(documents) == sum(share <= 0.2 for share in seen)
    assert len(seen) > len(documents)


def test_repetition_is_the_share_of_runs_seen_before():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert repetition([1] * 8) == pytest.approx(4 / 5)
    assert repetition([1, 2]) == 0.0


def test_a_teacher_that_only_repeats_itself_ends_with_a_message(written, monkeypatch):
    monkeypatch.setattr(generated_text, "repetition", lambda ids: 1.0)
    with pytest.raises(InputError, match="repeats itself in over 20%"):
        written(50, max_repetition=0.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_length": 0}, "`prompt_length`"),
        ({"prompt_length": 32}, "shorter than the context"),
        ({"max_repetition": 1.5}, "`max_repetition`"),
    ],
)
def test_numbers_out_of_range_are_refused(written, options, message):
    with pytest.raises(InputError, match=message):
        written(10, **options)


def test_progress_rises(written):
    seen = []
    written(150, on_progress=seen.append)
    assert all(a < b for a, b in itertools.pairwise(seen))
    assert seen[-1] >= 150
