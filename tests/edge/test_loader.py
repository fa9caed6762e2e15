import json
import struct
import zlib
from pathlib import Path

import flatbuffers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt_tf import artifacts
from gpt_tf.edge import EdgeGPT, session
from gpt_tf.edge.loader import open_artefact, read_sections
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export import integrity
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
    assert bundle.facts == plain.facts == integrity.read_seal(bundle.model)
    fingerprint = exported.tokenizer.fingerprint()
    assert plain.tokenizer.fingerprint() == fingerprint
    assert bundle.tokenizer.fingerprint() == fingerprint


def test_the_sections_are_those_of_google_s_own_reader(exported):
    from litert_lm_builder import litertlm_header_schema_py_generated as schema

    data = exported.litertlm.read_bytes()
    root = schema.LiteRTLMMetaData.GetRootAs(data[32:], 0)
    sections = root.SectionMetadata()
    expected = {}
    for index in range(sections.ObjectsLength()):
        section = sections.Objects(index)
        if section.DataType() in (MODEL, TOKENIZER):
            expected[section.DataType()] = section.BeginOffset(), section.EndOffset()
    assert len(expected) == 2
    assert read_sections(data, "gpt.litertlm") == expected


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

    monkeypatch.setattr(session.CompiledModel, "from_file", refuse)
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


def bundle_with(exported, tokenizer=None, model=None, sections=None):
    """Build a `.litertlm` by hand."""
    from litert_lm_builder import DType, Metadata
    from litert_lm_builder import litertlm_header_schema_py_generated as schema

    if tokenizer is None:
        text = exported.tokenizer.to_json().encode()
        tokenizer = struct.pack("<Q", len(text)) + zlib.compress(text)
    model = exported.tflite.read_bytes() if model is None else model
    begin = 1024
    objects = []
    for kind, content in ((MODEL, model), (TOKENIZER, tokenizer)):
        end = begin + len(content)
        objects.append(
            schema.SectionObjectT(dataType=kind, beginOffset=begin, endOffset=end)
        )
        begin = end
    objects = objects if sections is None else sections(objects)
    entry = Metadata("gpt_tf", integrity.blank_seal(BUNDLE_PREFIX), DType.STRING)
    root = schema.LiteRTLMMetaDataT(
        systemMetadata=schema.SystemMetadataT(entries=[entry.to_key_value_pair()]),
        sectionMetadata=schema.SectionMetadataT(objects=objects),
    )
    builder = flatbuffers.Builder(0)
    builder.Finish(root.Pack(builder))
    header = bytes(builder.Output())
    front = b"LITERTLM" + struct.pack("<IIIIQ", 1, 0, 0, 0, 32 + len(header)) + header
    return resealed(front.ljust(1024, b"\0") + model + tokenizer, BUNDLE_PREFIX)


def test_a_bundle_built_by_hand_opens(exported, tmp_path):
    (tmp_path / "gpt.litertlm").write_bytes(bundle_with(exported))
    assert open_artefact(tmp_path / "gpt.litertlm").tokenizer.vocab_size == 31


TEXT = json.dumps({"version": "1.0"}).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": b"abc"}, "cannot be unpacked"),
        ({"tokenizer": struct.pack("<Q", 9) + b"no zlib"}, "cannot be unpacked"),
        ({"tokenizer": struct.pack("<Q", 1 << 40) + b"x"}, "claims to have"),
        (
            {"tokenizer": struct.pack("<Q", 2) + zlib.compress(TEXT)},
            "the 2 bytes that it states",
        ),
        (
            {"tokenizer": struct.pack("<Q", len(TEXT)) + zlib.compress(TEXT)},
            "cannot be read as a tokenizer",
        ),
        (
            {"tokenizer": struct.pack("<Q", 1) + zlib.compress(b"\xff")},
            "cannot be unpacked",
        ),
        ({"model": b"x" * 2000}, "without gpt_tf's seal"),
        ({"sections": lambda found: found[:1]}, "a Hugging Face tokenizer"),
        ({"sections": lambda found: found[1:]}, "a model"),
        ({"sections": lambda found: []}, "a model"),
        ({"sections": lambda found: found + found[:1]}, "several sections"),
    ],
)
def test_a_bundle_with_a_wrong_part_is_refused(exported, tmp_path, changes, message):
    path = tmp_path / "gpt.litertlm"
    path.write_bytes(bundle_with(exported, **changes))
    with pytest.raises(DamagedFileError, match=message) as caught:
        open_artefact(path)
    assert str(path) in str(caught.value)


@given(data=st.data())
def test_any_damage_to_the_header_is_refused_or_harmless(exported, data):
    sound = exported.litertlm.read_bytes()
    (end,) = struct.unpack_from("<Q", sound, 24)
    damaged = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_sections(damaged, "gpt.litertlm")
    except DamagedFileError as error:
        assert "gpt.litertlm" in str(error)
        return
    assert all(32 < begin < end <= len(sound) for begin, end in found.values())
