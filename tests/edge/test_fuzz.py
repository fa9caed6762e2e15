"""Two hundred random corruptions of each kind of file: refused, and nothing dies."""

import random

import pytest

from gpt_tf import artifacts
from gpt_tf.edge import EdgeGPT
from gpt_tf.errors import DamagedFileError, InputError

CORRUPTIONS = 200


def truncate(data, generator):
    return data[: generator.randrange(len(data))]


def flip_a_bit(data, generator):
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    return data


def blank_a_range(data, generator):
    begin = generator.randrange(len(data))
    end = min(len(data), begin + generator.randrange(1, 4000))
    data[begin:end] = bytes(end - begin)
    return data


def scramble_a_range(data, generator):
    begin = generator.randrange(len(data))
    end = min(len(data), begin + generator.randrange(1, 400))
    data[begin:end] = generator.randbytes(end - begin)
    return data


def append(data, generator):
    return data + generator.randbytes(generator.randrange(1, 99))


def drop_a_range(data, generator):
    begin = generator.randrange(len(data))
    del data[begin : begin + generator.randrange(1, 4000)]
    return data


def make_foreign(data, generator):
    head = generator.choice([b"", data[:8], data[:64], b"PK\3\4", b"GGUF"])
    return head + generator.randbytes(generator.randrange(3000))


WAYS = (
    truncate,
    flip_a_bit,
    blank_a_range,
    scramble_a_range,
    append,
    drop_a_range,
    make_foreign,
)


def corruptions(path, seed):
    """Overwrite a file with one corruption after the other."""
    sound = path.read_bytes()
    generator = random.Random(seed)
    for index in range(CORRUPTIONS):
        way = WAYS[index % len(WAYS)]
        damaged = bytes(way(bytearray(sound), generator))
        if damaged != sound:
            path.write_bytes(damaged)
            yield f"{index} {way.__name__}"


@pytest.mark.parametrize("kind", ["tflite", "litertlm"])
def test_every_corruption_is_refused_by_the_manifest(copied, kind):
    path = copied(kind)
    for what in corruptions(path, seed=1):
        with pytest.raises(DamagedFileError, match=rf"gpt\.{kind}"):
            EdgeGPT(path)
            pytest.fail(what)


@pytest.mark.parametrize("kind", ["tflite", "litertlm"])
def test_without_its_manifest_every_corrupt_file_is_refused(copied, kind):
    path = copied(kind)
    artifacts.file_manifest_path(path).unlink()
    for what in corruptions(path, seed=2):
        with pytest.raises(DamagedFileError, match=rf"gpt\.{kind}"):
            EdgeGPT(path)
            pytest.fail(what)


def test_corrupt_tokenizers_are_refused_or_unharmed(copied, exported):
    path = copied("tflite", "tokenizer.json")
    beside = path.with_name("tokenizer.json")
    refused = 0
    for _ in corruptions(beside, seed=4):
        try:
            with EdgeGPT(path) as gpt:
                assert gpt.tokenizer.fingerprint() == exported.tokenizer.fingerprint()
        except InputError as error:
            assert "tokenizer.json" in str(error)
            refused += 1
    assert refused > CORRUPTIONS // 2
