import itertools
import json
import struct
import zlib
from pathlib import Path

import pytest

from gpt_tf import artifacts
from gpt_tf.edge import EdgeGPT, loader
from gpt_tf.edge.loader import open_artefact, read_sections
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export import integrity, litert
from gpt_tf.export.signatures import BUNDLE_PREFIX
from gpt_tf.text.tokenizer import BPETokenizer, CharacterTokenizer
from tests.export.forged import resealed

MODEL, TOKENIZER = 3, 6
SAVED_MODELS = Path(__file__).parents[2] / "saved_models"


# Sound files


def test_both_files_hold_the_same_model(exported):
    plain, bundle = open_artefact(exported.tflite), open_artefact(exported.litertlm)
    assert plain.model == str(exported.tflite)
    assert bundle.model == exported.tflite.read_bytes()
    assert plain.facts == integrity.read_seal(bundle.model)
    # The hash of a bundle is that of the whole, tokenizer and template among it.
    assert bundle.facts["sha256"] != plain.facts["sha256"]
    assert bundle.facts | {"sha256": 0} == plain.facts | {"sha256": 0}
    fingerprint = exported.tokenizer.fingerprint()
    assert plain.tokenizer.fingerprint() == fingerprint
    assert bundle.tokenizer.fingerprint() == fingerprint


def test_a_tflite_without_a_tokenizer_opens_for_ids(copied, exported):
    path = copied("tflite")
    assert open_artefact(path).tokenizer is None
    given = open_artefact(path, exported.tokenizer)
    assert given.tokenizer is exported.tokenizer
    given = open_artefact(path, exported.folder)
    assert given.tokenizer.fingerprint() == exported.tokenizer.fingerprint()


@pytest.fixture
def bare(copied):
    """One of the files without its manifest."""

    def bare(kind):
        path = copied(kind)
        artifacts.file_manifest_path(path).unlink()
        return path

    return bare


# Files that are refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"TFL", "bytes that begin with b'TFL'"),
        (b"PK\3\4" + bytes(99), "Expected a .tflite or .litertlm"),
        (bytes(4) + b"TFL3" + bytes(999), "without gpt_tf's seal"),
        (b"LITERTLM", "sound header"),
        (b"LITERTLM" + struct.pack("<I", 2) + bytes(99), "version 2"),
        (b"LITERTLM" + struct.pack("<I", 1) + bytes(99), "an end at byte 0"),
    ],
)
def test_foreign_files_are_refused(tmp_path, content, message):
    path = tmp_path / "foreign.tflite"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=message) as caught:
        open_artefact(path)
    assert str(path) in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="nothing"):
        open_artefact(tmp_path / "gpt.tflite")
    with pytest.raises(InputError, match="a folder"):
        open_artefact(tmp_path)


def test_a_sealed_file_of_other_facts_or_without_a_graph_is_refused(exported, tmp_path):
    facts = dict(integrity.read_seal(exported.tflite.read_bytes()))
    del facts["format"], facts["sha256"]
    path = tmp_path / "gpt.tflite"
    for stated, message in (
        ({"mode": "int8"}, r"gpt\.tflite .*possible config"),
        (facts, r"gpt\.tflite the graph that gpt_tf"),
    ):
        data = bytearray(bytes(4) + b"TFL3" + integrity.blank_seal(**stated))
        integrity.seal(data)
        path.write_bytes(data)
        with pytest.raises(DamagedFileError, match=message):
            EdgeGPT(path)


def test_what_litert_refuses_is_a_damaged_file(copied, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(litert.CompiledModel, "from_file", refuse)
    with pytest.raises(DamagedFileError, match=r"gpt\.tflite: no such operator"):
        EdgeGPT(copied("tflite"))


def test_appended_bytes_and_altered_metadata_are_noticed(bare):
    path = bare("litertlm")
    assert open_artefact(path).facts["mode"] == "float32"
    sound = path.read_bytes()
    altered = sound.replace(b"message.content", b"message.CONTENT", 1)
    for data in (sound + b"\0", altered, sound.replace(b"Authors", b"authors")):
        path.write_bytes(data)
        with pytest.raises(DamagedFileError, match=r"gpt\.litertlm .*SHA-256"):
            open_artefact(path)
    # A right hash says who computed it last, no more.
    path.write_bytes(resealed(altered, BUNDLE_PREFIX))
    assert open_artefact(path).facts["mode"] == "float32"
    path.write_bytes(sound.replace(BUNDLE_PREFIX, BUNDLE_PREFIX.upper()))
    with pytest.raises(DamagedFileError, match=r"gpt\.litertlm"):
        open_artefact(path)


def test_a_bundle_with_a_time_has_a_seal_of_its_model_alone(tmp_path):
    """As gpt_tf wrote them once, those that come along among them."""
    path = tmp_path / "old.litertlm"
    data = bytearray((SAVED_MODELS / "python-student.litertlm").read_bytes())
    assert BUNDLE_PREFIX not in data and b"creation_timestamp" in data[:1024]
    path.write_bytes(data)
    assert open_artefact(path).facts["mode"] == "int8"
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=r"old\.litertlm .*SHA-256"):
        open_artefact(path)


# Tokenizers


def test_a_tokenizer_of_another_model_is_refused(copied, tmp_path):
    other = CharacterTokenizer.train(["abc"])
    for kind in ("tflite", "litertlm"):
        with pytest.raises(InputError, match="do not belong together"):
            open_artefact(copied(kind), other)
    BPETokenizer.train(["low lower lowest " * 9], vocab_size=260).save(tmp_path)
    with pytest.raises(InputError, match=r"31 tokens\. Received: a tokenizer of 260"):
        open_artefact(copied("tflite"))


def test_a_tokenizer_that_is_damaged_or_not_there_is_named(copied, tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    with pytest.raises(DamagedFileError, match=r"tokenizer\.json"):
        open_artefact(copied("tflite"))
    with pytest.raises(InputError, match=r"nowhere\.json"):
        open_artefact(copied("tflite"), tmp_path / "nowhere.json")


# Parts of a bundle


TEXT = json.dumps({"version": "1.0"}).encode()


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (b"abc", "cannot be unpacked"),
        (struct.pack("<Q", 9) + b"no zlib", "cannot be unpacked"),
        (struct.pack("<Q", 1) + zlib.compress(b"\xff"), "cannot be unpacked"),
        (struct.pack("<Q", 1 << 40) + b"x", "claims to have"),
        (struct.pack("<Q", 2) + zlib.compress(TEXT), "the 2 bytes that it states"),
        (struct.pack("<Q", len(TEXT)) + zlib.compress(TEXT), "read as a tokenizer"),
    ],
)
def test_a_tokenizer_that_cannot_be_unpacked_is_refused(packed, message):
    with pytest.raises(DamagedFileError, match=message) as caught:
        loader._unpack_tokenizer(packed, "gpt.litertlm")
    assert "gpt.litertlm" in str(caught.value)


def test_any_damage_to_the_header_is_refused_or_harmless(exported, tmp_path):
    sound = exported.litertlm.read_bytes()
    (end,) = struct.unpack_from("<Q", sound, 24)
    path, messages, with_one = tmp_path / "gpt.litertlm", "", {}
    for place, value in itertools.product(range(end), (0, MODEL, TOKENIZER, 255)):
        damaged = bytearray(sound)
        damaged[place] = value
        try:
            found = read_sections(damaged, "gpt.litertlm")
        except DamagedFileError as error:
            messages += str(error)
        else:
            assert all(32 < begin < end <= len(sound) for begin, end in found.values())
            needed = found.keys() & {MODEL, TOKENIZER}
            with_one |= {kind: damaged for kind in needed if len(needed) == 1}
    assert "several sections of kind 3" in messages
    for kind, name in ((TOKENIZER, "a model"), (MODEL, "a Hugging Face tokenizer")):
        path.write_bytes(resealed(with_one[kind], BUNDLE_PREFIX))
        with pytest.raises(DamagedFileError, match=f"Expected {name} in .*gpt"):
            open_artefact(path)
