"""Claims about tokenizers: what goes in comes out, whatever it is."""

import json
import subprocess
import sys
import unicodedata

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.text.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    CharacterTokenizer,
    TokenizerWarning,
    load_tokenizer,
    tokenizer_from_json,
)

TEXTS = ["def low(lower):\n    return lowest\n", "größer 中文 low lower lowest\n"] * 9

# Any text that UTF-8 can hold: lone surrogates are not text.
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
some_text = st.text(alphabet=sorted(set("".join(TEXTS))), max_size=200)

BPE = BPETokenizer.train(TEXTS, 285)
CHARACTER = CharacterTokenizer.train(TEXTS)

both = pytest.mark.parametrize("tokenizer", [BPE, CHARACTER], ids=["bpe", "character"])
quick = settings(max_examples=settings().max_examples // 2)


# Round trips


@given(st.one_of(st.binary(max_size=200), any_text.map(str.encode)))
@quick
def test_bpe_gives_back_any_bytes(data):
    ids = BPE.encode_bytes(data)
    assert BPE.decode_bytes(ids) == data
    assert all(0 <= token < BPE.vocab_size for token in ids)
    text = data.decode("utf-8", "replace")
    assert BPE.decode(ids) == text
    if text.encode() == data:
        assert ids == BPE.encode(text)


def test_lone_surrogates_become_question_marks():
    assert BPE.decode(BPE.encode("a\ud800b")) == "a?b"


@given(some_text)
@quick
def test_characters_give_back_known_text(text):
    ids = CHARACTER.encode(text)
    assert len(ids) == len(text)
    assert CHARACTER.decode(ids) == text
    assert CHARACTER.encode_bytes(text.encode()) == ids


@both
def test_a_batch_equals_its_texts_one_by_one(tokenizer):
    texts = ["low", "", "lowest\n", "größer"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(t) for t in texts]


# The end of text


@both
def test_the_end_of_text_is_text_but_in_a_prompt(tokenizer, tmp_path):
    if tokenizer is CHARACTER:
        tokenizer = CharacterTokenizer.train([*TEXTS, END_OF_TEXT])
    tokenizer.save(tmp_path)
    end = tokenizer.end_of_text_id
    for same in (tokenizer, load_tokenizer(tmp_path)):
        ids = same.encode(f"low{END_OF_TEXT}er")
        assert end not in ids and same.decode(ids) == f"low{END_OF_TEXT}er"
        prompt = same.encode(f"low{END_OF_TEXT}", special=True)
        assert prompt == [*same.encode("low"), end] and same.decode(prompt) == "low"


def test_character_ids_follow_the_alphabet_and_end_with_the_end_of_text():
    tokenizer = CharacterTokenizer.train(["ba", "c"])
    assert tokenizer.encode("abc") == [0, 1, 2]
    assert tokenizer.end_of_text_id == 3 == tokenizer.vocab_size - 1
    without = CharacterTokenizer.train(["ba"], end_of_text=False)
    assert (without.end_of_text_id, without.vocab_size) == (None, 2)


# Training


def test_training_is_the_same_in_another_process():
    code = (
        "import sys, json; from gpt_tf.text.tokenizer import BPETokenizer; "
        "print(BPETokenizer.train(json.load(sys.stdin), 285).fingerprint())"
    )
    for threads in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(TEXTS),
            env={"RAYON_NUM_THREADS": threads, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == BPE.fingerprint()


def test_a_vocabulary_is_as_large_as_the_text_supports():
    largest = BPETokenizer.train(["low lower lowest"], 5000)
    assert 257 < largest.vocab_size < 300
    assert len(largest.encode(" lowest")) == 1
    same = BPETokenizer.train(["low lower lowest"], largest.vocab_size)
    assert same.fingerprint() == largest.fingerprint()
    smaller = BPETokenizer.train(["low lower lowest"], largest.vocab_size - 1)
    assert smaller.vocab_size == largest.vocab_size - 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CharacterTokenizer.train([""]), "expects text"),
        (lambda: CHARACTER.encode("loß!"), "lacks '!', at position 3"),
        (lambda: CHARACTER.encode(f"l{END_OF_TEXT}!", special=True), "at position 14"),
        (lambda: CHARACTER.encode_bytes(b"l\xff"), "0xff at offset 1"),
        (lambda: BPE.decode([-1]), "Token ids run from 0"),
        (lambda: CHARACTER.decode([CHARACTER.vocab_size]), "Token ids run from 0"),
    ],
)
def test_what_has_no_ids_or_text_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


# Files


@both
def test_saved_tokenizers_load_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "folder")
    tokenizer.save(tmp_path / "named.json")
    for path in ("folder", "folder/tokenizer.json", "named.json"):
        loaded = load_tokenizer(tmp_path / path)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint() == tokenizer.fingerprint()
        assert loaded.end_of_text_id == tokenizer.end_of_text_id
        assert loaded.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


@both
def test_hugging_face_reads_tokenizer_json(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS[:2]:
        ids = tokenizer.encode(text)
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids) == text
    assert theirs.encode(END_OF_TEXT).ids == [tokenizer.end_of_text_id]


def test_gpt2_files_round_trip(tmp_path):
    BPE.backend.model.save(str(tmp_path))
    loaded = load_tokenizer(tmp_path)
    assert loaded.backend.get_vocab() == BPE.backend.get_vocab()
    assert loaded.end_of_text_id == BPE.end_of_text_id
    for text in (*TEXTS[:2], END_OF_TEXT, "\0\x7f é"):
        assert loaded.encode(text) == BPE.encode(text)


def foreign_with(**parts):
    """Return `BPE`'s file with another normalizer, pre-tokenizer, or added token."""
    backend = tokenizers.Tokenizer.from_str(BPE.to_json())
    if "token" in parts:
        backend.add_tokens([parts.pop("token")])
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend.to_str()


def in_bytes(part):
    return pre_tokenizers.Sequence([part, pre_tokenizers.ByteLevel(False)])


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Lowercase()},
        {"normalizer": normalizers.NFKC()},
        {
            "normalizer": normalizers.Sequence(
                [normalizers.NFC(), normalizers.Replace("x", "")]
            )
        },
        {"pre_tokenizer": in_bytes(pre_tokenizers.Split("~", "removed"))},
        {"pre_tokenizer": in_bytes(pre_tokenizers.WhitespaceSplit())},
        {"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)},
        {"token": tokenizers.AddedToken("<name>", lstrip=True)},
    ],
    ids=str,
)
def test_what_changes_text_is_used_as_it_is_with_a_warning(parts):
    with pytest.warns(TokenizerWarning, match="give back the text"):
        found = tokenizer_from_json(foreign_with(**parts))
    assert found.kind == "foreign"


def test_truncation_padding_and_added_tokens_of_a_foreign_file_spare_text():
    foreign = tokenizers.Tokenizer.from_str(foreign_with(token="<two words é>"))
    foreign.enable_truncation(3)
    foreign.enable_padding(length=200)
    tokenizer = tokenizer_from_json(foreign.to_str())
    assert tokenizer.encode(TEXTS[0]) == BPE.encode(TEXTS[0])
    assert tokenizer.decode([BPE.vocab_size]) == "<two words é>"


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("vocab", {"~~": 2**32 - 1}),
        ("vocab", {"~~": -1}),
        ("continuing_subword_prefix", "longer than any token"),
        ("merges", [["a", "longer than any token"]]),
        ("type", "Unigram"),
    ],
)
def test_models_that_the_library_gives_up_on_are_damaged(part, value):
    """With an id of 32 bits, or with what panics in Rust."""
    content = json.loads(BPE.to_json())
    before = content["model"][part]
    content["model"][part] = {**before, **value} if part == "vocab" else value
    with pytest.raises(DamagedFileError, match="tokenizer"):
        tokenizer_from_json(json.dumps(content))


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Sequence([])},
        {"normalizer": normalizers.ByteLevel(), "pre_tokenizer": None},
        {
            "pre_tokenizer": pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(tokenizers.Regex(r"\d|\s+|\S+"), "isolated"),
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
                ]
            )
        },
        {"token": tokenizers.AddedToken("<name>", lstrip=True, special=True)},
    ],
    ids=["no normalizers", "bytes", "splitters", "special token"],
)
def test_other_ways_to_split_text_give_it_back(parts):
    tokenizer = tokenizer_from_json(foreign_with(**parts))
    for text in (*TEXTS, " a1b22  <name> \r\n cafe\u0301 \u00b2 "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def composing():
    """A tokenizer whose file asks for NFC, as that of GPT-NeoX does."""
    with pytest.warns(TokenizerWarning, match="NFC") as caught:
        tokenizer = tokenizer_from_json(foreign_with(normalizer=normalizers.NFC()))
    assert len(caught) == 1
    return tokenizer


@given(text=st.one_of(any_text, st.text("ae\u0301\u0308\u00e9\u212b \n")))
@quick
def test_composition_is_left_out_and_any_text_comes_back(composing, text):
    assert composing.fingerprint() == BPE.fingerprint()
    assert composing.decode(composing.encode(text)) == text
    # Composed text has the ids that the file gives it.
    theirs = tokenizers.Tokenizer.from_str(foreign_with(normalizer=normalizers.NFC()))
    composed = unicodedata.normalize("NFC", text)
    assert composing.encode(composed) == theirs.encode(composed).ids


def test_dropout_in_a_foreign_file_is_switched_off():
    content = json.loads(BPE.to_json())
    content["model"]["dropout"] = 0.5
    tokenizer = tokenizer_from_json(json.dumps(content))
    for text in TEXTS:
        assert tokenizer.encode(text) == BPE.encode(text)
        assert tokenizer.encode(text + END_OF_TEXT, special=True) == [
            *BPE.encode(text),
            BPE.end_of_text_id,
        ]
    assert tokenizer.fingerprint() == BPE.fingerprint()


# Special tokens


@pytest.fixture(scope="module")
def with_added():
    """A tokenizer with special and other added tokens, and the library's own."""
    theirs = tokenizers.Tokenizer.from_str(BPE.to_json())
    theirs.add_special_tokens(
        ["<user>", "<user>s", tokenizers.AddedToken("<mask>", lstrip=True)]
    )
    theirs.add_tokens(["<name>", tokenizers.AddedToken("low er", single_word=True)])
    return tokenizer_from_json(theirs.to_str()), theirs


pieces = [
    "<user>",
    "<mask>",
    "<name>",
    END_OF_TEXT,
    "low er",
    "low",
    "s",
    " ",
    "\n",
    "é",
]


@given(text=st.lists(st.sampled_from(pieces), max_size=12).map("".join))
@quick
def test_special_tokens_in_a_prompt_have_the_ids_of_the_library(with_added, text):
    tokenizer, theirs = with_added
    assert tokenizer.encode(text, special=True) == theirs.encode(text).ids
    literal = tokenizer.encode(text)
    special = {theirs.token_to_id(t) for t in ("<user>", "<mask>", END_OF_TEXT)}
    assert not special & set(literal)
    assert tokenizer.decode(literal) == text


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            models.WordLevel({"hello": 0, "world": 1}, unk_token="hello"),
            "one character",
        ),
        (models.BPE({"a": 0, "b": 1}, []), "each of the 256 bytes"),
        (models.WordPiece({"a": 0, "[UNK]": 1}), "another kind"),
    ],
)
def test_foreign_tokenizers_are_used_as_they_are_with_a_warning(
    tmp_path, model, message
):
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.warns(TokenizerWarning, match=message):
        found = load_tokenizer(tmp_path)
    assert found.kind == "foreign"
    assert found.vocab_size == 2


@given(st.integers(0, 10_000), st.binary(max_size=3))
@quick
def test_damaged_files_are_refused(tmp_path_factory, cut, tail):
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    content = BPE.to_json().encode()
    path.write_bytes(content[: cut % (len(content) - 1)] + tail)
    with pytest.raises(DamagedFileError, match=r"damaged\.json"):
        load_tokenizer(path)


def test_damaged_gpt2_files_are_refused(tmp_path):
    BPE.backend.model.save(str(tmp_path))
    merges = (tmp_path / "merges.txt").read_text("utf-8")
    (tmp_path / "merges.txt").write_text(merges + "un known\n", "utf-8")
    with pytest.raises(DamagedFileError, match=r"merges\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"vocab\.json"):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_said(tmp_path):
    with pytest.raises(InputError, match="there is none"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="there is none"):
        load_tokenizer(tmp_path / "absent.json")
