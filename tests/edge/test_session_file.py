import numpy as np
import pytest

from gpt_tf.edge import EdgeGPT, session_file
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export import integrity
from tests.edge.conftest import CONTEXT, VOCAB_SIZE
from tests.edge.test_runtime import random_ids

PROMPT = random_ids(13)


@pytest.fixture
def saved(gpt, tmp_path):
    gpt.reset()
    gpt.prefill(PROMPT)
    gpt.save_session(tmp_path / "prompt.session")
    return tmp_path / "prompt.session"


def test_a_loaded_session_gives_the_logits_of_its_prompt_without_a_prefill(
    gpt, exported, saved, monkeypatch
):
    logits = [gpt.decode(token) for token in (3, 4)]
    with EdgeGPT(exported.litertlm) as other:
        other.prefill([1, 2])
        assert other.load_session(saved) == len(PROMPT) == other.position
        monkeypatch.setattr(other._session, "step", None)
        monkeypatch.setattr(other._session, "prefill", None)
        found = [other.decode(token) for token in (3, 4)]
    np.testing.assert_array_equal(found, logits)


def test_generate_goes_on_from_a_loaded_session_and_from_no_other(
    gpt, saved, monkeypatch
):
    options = {"max_new_tokens": 5, "seed": 4}
    other = [(token + 1) % VOCAB_SIZE for token in PROMPT]
    half, less = [*PROMPT[:7], *other[7:9]], [*PROMPT[:5], *other[5:]]
    # A prompt, and how many of its tokens are to be prefilled; the last is decoded.
    cases = [([*PROMPT, 5], 0), (PROMPT, 0), (half, 1), (less, 12), (PROMPT, 12)]
    alone = [gpt.generate(ids, **options) for ids, _ in cases]
    read, prefill = [], gpt._session.prefill
    monkeypatch.setattr(
        gpt._session, "prefill", lambda ids: read.append(len(ids)) or prefill(ids)
    )
    gpt.load_session(saved)
    assert [gpt.generate(ids, **options) for ids, _ in cases] == alone
    assert read == [count for _, count in cases]
    gpt._loaded = []


def test_a_file_that_is_no_session_of_this_model_is_refused(
    gpt, exported, saved, tmp_path
):
    good, bad = saved.read_bytes(), tmp_path / "bad.session"
    begin = good.rfind(session_file.PREFIX)

    def sealed(rows, **facts):
        seal = integrity.blank_seal(session_file.PREFIX, **facts)
        data = bytearray(rows + seal)
        integrity.seal(data, session_file.PREFIX)
        return bytes(data)

    altered = bytes([good[0] ^ 1]) + good[1:]
    model, spoilt = gpt._sha256, np.full(begin // 4, np.nan, np.float32).tobytes()
    assert sealed(good[:begin], model=model, ids=PROMPT) == good
    cases = [
        b"",
        b"\x80\x04.",
        good[:-1],
        altered,
        good + b"\0" * (1 << 22),
        exported.tflite.read_bytes(),
        sealed(good[:begin], model=model, ids=PROMPT[1:]),
        sealed(good[:begin], model=model, ids=[-1, *PROMPT[1:]]),
        sealed(good[:begin], model=model, ids="0123456789012"),
        sealed(
            good[: begin // 13] * (CONTEXT + 1), model=model, ids=[0] * (CONTEXT + 1)
        ),
        sealed(b"", model=model, ids=[]),
        sealed(spoilt, model=model, ids=PROMPT),
    ]
    gpt.reset()
    gpt.prefill([1, 2, 3])
    for data in cases:
        bad.write_bytes(data)
        with pytest.raises(DamagedFileError, match=r"bad\.session"):
            gpt.load_session(bad)
    bad.write_bytes(sealed(good[:begin], model="0" * 64, ids=PROMPT))
    for path in (bad, tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="Expected a session"):
            gpt.load_session(path)
    assert gpt.position == 3
    gpt.reset()
    with pytest.raises(InputError, match="an empty one"):
        gpt.save_session(bad)
