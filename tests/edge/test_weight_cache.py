import errno
import subprocess
import sys

import numpy as np
import pytest

from gpt_tf import artifacts
from gpt_tf.edge import EdgeGPT, weight_cache
from gpt_tf.errors import InputError
from tests.edge.conftest import VOCAB_SIZE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux keeps files")

IDS = list(range(VOCAB_SIZE - 8))

# Opens a model with its weights on the disk.
SCRIPT = """
import sys
from gpt_tf.edge import EdgeGPT, weight_cache
weight_cache.SMALLEST_BYTES = 0
with EdgeGPT(sys.argv[1]) as gpt:
    print(gpt.generate("abc", seed=1))
"""


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(weight_cache, "SMALLEST_BYTES", 0)
    return tmp_path / "caches" / "gpt_tf" / "weights"


def logits(path, kind="disk"):
    with EdgeGPT(path, weight_cache=kind) as gpt:
        return gpt.logits(IDS)


@pytest.fixture(scope="module")
def expected(exported):
    return logits(exported.litertlm, "memory")


def test_packed_weights_are_kept_and_used_again(exported, expected, caches):
    for kind in ("none", "memory"):
        np.testing.assert_array_equal(logits(exported.litertlm, kind), expected)
    assert not caches.exists()
    np.testing.assert_array_equal(logits(exported.litertlm), expected)
    (made,) = caches.iterdir()
    before = made.stat().st_ino, made.read_bytes()
    with EdgeGPT(exported.litertlm) as gpt:
        np.testing.assert_array_equal(gpt.logits(IDS), expected)
        with open("/proc/self/maps") as maps:
            assert str(made) in maps.read()
    assert list(caches.iterdir()) == [made]
    assert (made.stat().st_ino, made.read_bytes()) == before


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def emptied(path):
    path.write_bytes(b"")


def changed(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def writable(path):
    path.chmod(0o666)


@pytest.mark.parametrize("harm", [cut, emptied, changed, writable])
def test_a_file_that_is_not_as_it_was_made_is_made_anew(
    exported, expected, caches, harm
):
    logits(exported.litertlm)
    (made,) = caches.glob("*.xnnpack")
    content = made.read_bytes()
    made.chmod(0o600)
    harm(made)
    np.testing.assert_array_equal(logits(exported.litertlm), expected)
    assert made.read_bytes() == content
    assert list(caches.iterdir()) == [made]


def test_another_model_or_version_has_a_file_of_its_own(exported, caches, monkeypatch):
    logits(exported.litertlm)
    (first,) = caches.iterdir()
    logits(exported.tflite)
    monkeypatch.setattr(weight_cache.metadata, "version", lambda name: "another")
    logits(exported.litertlm)
    found = set(caches.iterdir())
    assert len(found) == 3 and first in found
    # Of more than there may be, the last one stays.
    monkeypatch.setattr(weight_cache, "MOST_BYTES", 1)
    monkeypatch.setattr(weight_cache.metadata, "version", lambda name: "a third")
    logits(exported.litertlm)
    assert len(list(caches.iterdir())) == 1


def test_what_a_killed_process_left_is_removed(exported, caches):
    caches.mkdir(parents=True)
    left = artifacts.partial_path(caches / "anything")
    left.write_bytes(b"half")
    logits(exported.litertlm)
    assert not left.exists() and len(list(caches.iterdir())) == 1


def full(source, target):
    target.write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_weights_stay_in_memory_where_no_file_can_be_made(
    exported, expected, caches, monkeypatch, capfd
):
    with artifacts.locked(caches):  # another process makes one
        np.testing.assert_array_equal(logits(exported.litertlm), expected)
    assert not caches.exists()
    monkeypatch.setattr(weight_cache.shutil, "copyfile", full)
    np.testing.assert_array_equal(logits(exported.litertlm), expected)
    assert not caches.exists()
    monkeypatch.setenv("XDG_CACHE_HOME", str(exported.litertlm))  # a file
    np.testing.assert_array_equal(logits(exported.litertlm), expected)
    assert capfd.readouterr() == ("", "")


def run(path):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_processes_that_make_it_at_once_all_write_the_right_text(exported, caches):
    with EdgeGPT(exported.litertlm, weight_cache="memory") as gpt:
        text = gpt.generate("abc", seed=1)
    several = [run(exported.litertlm) for _ in range(4)]
    assert [one.communicate() for one in several] == [(text + "\n", "")] * 4
    assert len(list(caches.iterdir())) == 1


def test_no_other_place_is_known(exported):
    with pytest.raises(InputError, match="weight_cache"):
        EdgeGPT(exported.litertlm, weight_cache="tape")
