"""Random corruptions of each kind of file: refused, and nothing dies."""

import random

import pytest

from gpt_tf import artifacts
from gpt_tf.edge import EdgeGPT
from gpt_tf.edge.loader import open_artefact
from gpt_tf.errors import DamagedFileError, InputError


def flip_a_bit(data, generator):
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return data


def replace_a_range(data, generator):
    """By zeros, by anything, or by nothing."""
    begin = generator.randrange(len(data))
    end = min(len(data), begin + generator.randrange(1, 4000))
    length = end - begin
    new = generator.choice([bytes(length), generator.randbytes(length), b""])
    return data[:begin] + new + data[end:]


def make_foreign(data, generator):
    head = generator.choice([b"", data[:8], data[:64], b"PK\3\4", b"GGUF"])
    return head + generator.randbytes(generator.randrange(3000))


WAYS = (
    flip_a_bit,
    replace_a_range,
    replace_a_range,
    make_foreign,
    lambda data, generator: data[: generator.randrange(len(data))],
    lambda data, generator: data + generator.randbytes(generator.randrange(1, 99)),
)


def corruptions(path, seed, count):
    """Overwrite a file with one corruption after the other."""
    sound = path.read_bytes()
    generator = random.Random(seed)
    for index in range(count):
        damaged = bytes(WAYS[index % len(WAYS)](bytearray(sound), generator))
        if damaged != sound:
            path.write_bytes(damaged)
            yield index


@pytest.mark.parametrize("kind", ["tflite", "litertlm"])
@pytest.mark.parametrize("has_manifest", [True, False])
def test_every_corrupt_file_is_refused(copied, kind, has_manifest):
    path = copied(kind)
    if not has_manifest:
        artifacts.file_manifest_path(path).unlink()
    for index in corruptions(path, 1 + has_manifest, 200):
        with pytest.raises(DamagedFileError, match=rf"gpt\.{kind}"):
            EdgeGPT(path)
            pytest.fail(str(index))


def test_corrupt_tokenizers_are_refused_or_unharmed(copied, exported):
    path = copied("tflite", "tokenizer.json")
    refused = 0
    for _ in corruptions(path.with_name("tokenizer.json"), 4, 60):
        try:
            found = open_artefact(path).tokenizer
            assert found.fingerprint() == exported.tokenizer.fingerprint()
        except InputError as error:
            assert "tokenizer.json" in str(error)
            refused += 1
    assert refused > 30
