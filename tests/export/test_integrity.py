import random

import pytest

from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export import integrity, signatures

FACTS = {"mode": "int8", "config": {"num_layers": 2}, "name": "\u00e9\u4e2d"}


def sealed(before=b"TFL3", after=b"weights", **facts):
    data = bytearray(before + integrity.blank_seal(**(facts or FACTS)) + after)
    integrity.seal(data)
    return data


@pytest.mark.parametrize("kind", [bytes, bytearray])
def test_a_sealed_file_gives_back_its_facts(kind):
    facts = integrity.read_seal(kind(sealed()))
    assert facts.pop("format") == "gpt_tf.tflite/1"
    assert len(facts.pop("sha256")) == signatures.SEAL_DIGITS
    assert facts == FACTS


@pytest.mark.parametrize("place", [0, 1, 2**20])
def test_the_seal_is_found_wherever_it_lies(place):
    for data in (sealed(bytes(place)), sealed(after=bytes(place))):
        assert integrity.read_seal(data)["mode"] == "int8"


def test_any_altered_bit_and_any_missing_end_is_noticed():
    data = sealed()
    generator = random.Random(7)
    for index in range(len(data)):
        altered = bytearray(data)
        altered[index] ^= 1 << generator.randrange(8)
        with pytest.raises(DamagedFileError, match=r"^[^\n]*small\.tflite"):
            integrity.read_seal(altered, "small.tflite")
        with pytest.raises(DamagedFileError, match=r"small\.tflite"):
            integrity.read_seal(data[:index], "small.tflite")


def test_a_foreign_file_is_refused_as_such():
    with pytest.raises(DamagedFileError, match="without gpt_tf's seal"):
        integrity.read_seal(b"TFL3" * 1000)
    with pytest.raises(DamagedFileError, match="an empty file"):
        integrity.read_seal(b"")


def test_what_has_no_blank_seal_is_not_sealed():
    for data in (bytearray(b"TFL3"), sealed()):
        with pytest.raises(InputError, match="blank seal"):
            integrity.seal(data)
