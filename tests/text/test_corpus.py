"""Claims about where text comes from and how it is split."""

import hashlib
import subprocess
import sys
import sysconfig
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.text import corpus as corpora
from gpt_tf.text.corpus import CorpusWarning, open_corpus


@pytest.fixture
def folder(tmp_path):
    """A folder of 30 different files in two levels."""
    root = tmp_path / "books"
    for index in range(30):
        path = root / f"shelf{index % 3}" / f"book{index:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"This is book {index}.\nIt ends here.\n", "utf-8")
    return root


def names(corpus, split):
    return [document.name for document in corpus.documents(split)]


def text_of(corpus, split):
    return "".join(document.text for document in corpus.documents(split))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_and_tokenizer_import_without_tensorflow():
    code = (
        "import sys, gpt_tf.text.corpus, gpt_tf.text.tokenizer; "
        "sys.exit('tensorflow' in sys.modules or 'tf_keras' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Splitting


def test_every_file_is_in_exactly_one_split(folder):
    corpus = open_corpus(folder, validation_fraction=0.3)
    train, validation = names(corpus, "train"), names(corpus, "validation")
    assert 0 < len(validation) < len(train)
    expected = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.txt"))
    assert sorted(train + validation) == expected


def test_split_does_not_depend_on_where_the_folder_lies(folder, tmp_path):
    moved = tmp_path / "elsewhere" / "other name"
    before = open_corpus(folder)
    held, fingerprint = names(before, "validation"), before.describe()["sha256"]
    moved.parent.mkdir()
    folder.rename(moved)
    after = open_corpus(moved)
    assert names(after, "validation") == held
    assert after.describe()["sha256"] == fingerprint


def test_split_is_the_same_on_every_machine(folder):
    held = names(open_corpus(folder, validation_fraction=0.3), "validation")
    expected = [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob("*.txt"))
        if int(
            hashlib.sha256(path.relative_to(folder).as_posix().encode()).hexdigest(), 16
        )
        < 0.3 * 2**256
    ]
    assert held == expected


def test_a_file_keeps_its_split_when_others_come(folder):
    before = set(names(open_corpus(folder, validation_fraction=0.3), "validation"))
    for index in range(30):
        write(folder / "new" / f"{index}.txt", f"New text {index}.\n")
    after = set(names(open_corpus(folder, validation_fraction=0.3), "validation"))
    assert {name for name in after if not name.startswith("new")} == before


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_neither_side_is_empty_with_few_files(folder, fraction):
    corpus = open_corpus(folder, validation_fraction=fraction)
    train, validation = names(corpus, "train"), names(corpus, "validation")
    assert min(len(train), len(validation)) == 1
    ranked = sorted(train + validation, key=corpora._share)
    assert validation == [ranked[0]] if fraction < 0.5 else train == [ranked[-1]]


def test_one_file_is_cut_at_a_line_end_near_the_fraction(tmp_path):
    lines = [f"line {index} of the text\n" for index in range(1000)]
    path = write(tmp_path / "one.txt", "".join(lines))
    corpus = open_corpus(path, validation_fraction=0.2)
    train, validation = text_of(corpus, "train"), text_of(corpus, "validation")
    assert train + validation == "".join(lines)
    assert train.endswith("\n")
    assert len(validation) / len(train + validation) == pytest.approx(0.2, abs=0.002)


@given(
    text=st.text(alphabet="ab é中\n", min_size=2, max_size=60),
    fraction=st.floats(0.05, 0.95),
)
@settings(deadline=None, max_examples=150)
def test_position_split_keeps_every_character_once(tmp_path_factory, text, fraction):
    path = write(tmp_path_factory.mktemp("cut") / "one.txt", text)
    try:
        corpus = open_corpus(path, validation_fraction=fraction)
    except InputError as error:
        assert "text" in str(error)
        return
    assert text_of(corpus, "train") + text_of(corpus, "validation") == text
    assert text_of(corpus, "train").strip()
    assert text_of(corpus, "validation").strip()


def test_one_line_with_blank_lines_after_it_is_cut_within_the_line(tmp_path):
    path = write(tmp_path / "one.txt", "word " * 50 + "\n\n")
    assert text_of(open_corpus(path), "validation").strip()


def test_copies_of_a_file_are_kept_once_and_noticed(folder):
    write(folder / "copies" / "a.txt", "This is book 3.\nIt ends here.\n")
    notices = []
    corpus = open_corpus(folder, on_notice=notices.append)
    texts = [d.text for s in corpora.SPLITS for d in corpus.documents(s)]
    assert len(texts) == len(set(texts)) == 30
    assert len(notices) == 1 and "copies" in notices[0]


def test_a_folder_of_copies_is_split_by_position(tmp_path):
    for index in range(5):
        write(tmp_path / "same" / f"{index}.txt", "first line\nsecond line\n")
    corpus = open_corpus(tmp_path / "same", on_notice=lambda line: None)
    assert text_of(corpus, "train") == "first line\n"
    assert text_of(corpus, "validation") == "second line\n"


def test_a_file_named_twice_counts_once(folder):
    file = folder / "shelf0" / "book00.txt"
    corpus = open_corpus([folder, file, file], on_notice=lambda line: None)
    assert corpus.describe()["files"] == 30


def test_folders_of_the_same_name_are_all_described(tmp_path):
    for side in "ab":
        write(tmp_path / side / "x" / "f.txt", f"text of {side}\n")
    corpus = open_corpus([tmp_path / "a" / "x", tmp_path / "b" / "x"])
    assert corpus.describe()["files"] == 2
    assert corpus.describe()["size_bytes"] == 20


def test_fingerprint_changes_with_a_byte_and_with_a_name(folder):
    before = open_corpus(folder).describe()["sha256"]
    assert open_corpus(folder).describe()["sha256"] == before
    book = folder / "shelf1" / "book01.txt"
    book.rename(book.with_name("book99.txt"))
    renamed = open_corpus(folder).describe()["sha256"]
    write(book.with_name("book99.txt"), "This is book 1.\nIt ends hers.\n")
    assert len({before, renamed, open_corpus(folder).describe()["sha256"]}) == 3


# Reading


def test_hidden_blank_and_binary_files_of_a_folder_are_skipped(folder):
    write(folder / ".git" / "config", "hidden")
    write(folder / ".hidden.txt", "hidden")
    write(folder / "blank.txt", " \n\n")
    write(folder / "empty.txt", "")
    write(folder / "picture.png", b"\x89PNG\0\0 binary")
    notices = []
    corpus = open_corpus(folder, on_notice=notices.append)
    assert corpus.describe()["files"] == 30
    assert len(notices) == 1 and "picture.png" in notices[0]


def test_loops_of_links_do_no_harm(folder):
    (folder / "shelf0" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "self.txt").symlink_to(folder / "self.txt")
    assert open_corpus(folder).describe()["files"] == 30


def test_undecodable_bytes_are_replaced_and_reported_once(tmp_path):
    path = write(tmp_path / "bad.txt", "é one\n".encode() + b"t\xffw\xfeo\nthree\n")
    notices = []
    corpus = open_corpus(path, validation_fraction=0.3, on_notice=notices.append)
    for _ in range(2):
        text = text_of(corpus, "train") + text_of(corpus, "validation")
    assert text == "é one\nt\ufffdw\ufffdo\nthree\n"
    assert len(notices) == 1
    assert "bad.txt: 2 undecodable bytes" in notices[0]
    assert notices[0].endswith("offset 8")


def test_notices_are_warnings_unless_taken(tmp_path):
    corpus = open_corpus(write(tmp_path / "bad.txt", b"one\ntwo\xff\nthree\n"))
    with pytest.warns(CorpusWarning, match="offset 7"):
        list(corpus.documents("train"))


def test_clean_text_gives_no_notice(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(open_corpus(folder).documents("train"))


def test_byte_order_mark_is_stripped_at_the_start_only(tmp_path):
    path = write(tmp_path / "bom.txt", "\ufeffone\n\ufefftwo\nthree\n")
    corpus = open_corpus(path)
    assert text_of(corpus, "train") == "one\n\ufefftwo\n"


@given(data=st.binary(max_size=80), piece=st.integers(1, 9))
@settings(deadline=None, max_examples=150)
def test_reading_in_pieces_equals_reading_at_once(tmp_path_factory, data, piece):
    path = write(tmp_path_factory.mktemp("pieces") / "data", data)
    part = corpora._Part("data", path)
    at_once = "".join(d.text for d in corpora._read(part, lambda line: None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE_BYTES", piece)
        documents = list(corpora._read(part, lambda line: None))
    assert "".join(d.text for d in documents) == at_once
    assert [d.ends for d in documents] == [False] * (len(documents) - 1) + [True]


def test_a_large_file_comes_in_pieces_cut_at_line_ends(tmp_path):
    line = "a line of forty characters, more or less\n"
    path = write(tmp_path / "large.txt", line * (10 * 1024 * 1024 // len(line)))
    documents = list(open_corpus(path).documents("train"))
    assert len(documents) > 2
    assert max(len(d.text) for d in documents) <= corpora.PIECE_BYTES + len(line)
    assert all(d.text.endswith("\n") for d in documents[:-1])
    assert [d.ends for d in documents] == [False] * (len(documents) - 1) + [True]
    assert sum(len(d.text) for d in documents) == pytest.approx(
        0.9 * path.stat().st_size, rel=1e-4
    )


# Bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is none"),
        ("", "it is empty"),
        (" \n\t\n", "nothing but white space"),
        (b"text\0more", "binary file"),
        ("\n" * 20_000, "white space"),
    ],
)
def test_unusable_files_are_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "file.txt"
    if content is not None:
        write(path, content)
    with pytest.raises(InputError, match=message) as caught:
        open_corpus(path)
    assert "\n" not in str(caught.value)


def test_folder_without_text_is_refused(tmp_path):
    write(tmp_path / "f" / "blank.txt", "\n")
    with pytest.raises(InputError, match=r"text files in .*; there are none"):
        open_corpus(tmp_path / "f")


@pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan")])
def test_fractions_outside_0_and_1_are_refused(folder, fraction):
    with pytest.raises(InputError, match="validation_fraction"):
        open_corpus(folder, validation_fraction=fraction)


def test_other_bad_arguments_are_refused(folder):
    with pytest.raises(InputError, match="at least one path"):
        open_corpus([])
    with pytest.raises(InputError, match="cannot read"):
        open_corpus("x" * 5000)
    with pytest.raises(InputError, match="device or a pipe"):
        open_corpus("/dev/null")
    with pytest.raises(InputError, match="split"):
        open_corpus(folder).documents("test")


def test_a_file_that_vanished_is_an_input_error(tmp_path):
    path = write(tmp_path / "file.txt", "one\ntwo\nthree\n")
    other = write(tmp_path / "other.txt", "four\nfive\nsix\n")
    corpus = open_corpus([path, other])
    path.unlink()
    other.unlink()
    with pytest.raises(InputError, match="cannot read"):
        list(corpus.documents("train"))


# Named corpora


def test_stdlib_leaves_out_tests_and_foreign_packages(tmp_path, monkeypatch):
    kept = ["a.py", "unittest/case.py", "json/b.py", "idlelib/c.py"]
    left_out = [
        "test/d.py",
        "json/tests/e.py",
        "idlelib/idle_test/f.py",
        "lib2to3/tests/g.py",
        "site-packages/h.py",
        "dist-packages/i.py",
        "config-3.11-x86_64/j.py",
        "__pycache__/k.py",
        "notes.txt",
    ]
    for name in kept + left_out:
        write(tmp_path / name, f"# {name}\nx = 1\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = open_corpus("python-stdlib", validation_fraction=0.3)
    assert sorted(names(corpus, "train") + names(corpus, "validation")) == sorted(kept)


def test_stdlib_splits_disjointly_and_names_its_python():
    corpus = open_corpus("python-stdlib")
    train, validation = names(corpus, "train"), names(corpus, "validation")
    assert len(train) > len(validation) > 20
    assert not set(train) & set(validation)
    folders = {part for name in train + validation for part in name.split("/")[:-1]}
    assert "json" in folders
    assert not folders & {"test", "tests", "idle_test", "site-packages"}
    assert corpus.describe()["python"] == sys.version.split()[0]


def test_absent_stdlib_is_said(tmp_path, monkeypatch):
    paths = {"stdlib": str(tmp_path / "python311.zip")}
    monkeypatch.setattr(sysconfig, "get_paths", lambda: paths)
    with pytest.raises(InputError, match="ships without them"):
        open_corpus("python-stdlib")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A small local Shakespeare, and a home of its own for Keras' downloads."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("KERAS_HOME", raising=False)
    # Without ~/.keras, Keras would store in /tmp/.keras, which all tests share.
    (tmp_path / "home" / ".keras").mkdir(parents=True)
    path = write(tmp_path / "input.txt", "First Citizen:\nSpeak.\n" * 507)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def test_shakespeare_is_downloaded_and_checked(stand_in):
    path, sha256 = stand_in
    found = corpora.download_shakespeare(path.as_uri(), sha256)
    assert found.read_bytes() == path.read_bytes()
    path.unlink()
    assert corpora.download_shakespeare(path.as_uri(), sha256) == found


def test_another_text_than_shakespeare_is_refused_and_removed(stand_in):
    path, sha256 = stand_in
    with pytest.raises(DamagedFileError, match="SHA-256"):
        corpora.download_shakespeare(path.as_uri(), "0" * 64)
    assert corpora.download_shakespeare(path.as_uri(), sha256).is_file()


def test_failed_download_names_the_way_out(stand_in, tmp_path):
    with pytest.raises(InputError, match=r"not be downloaded.*python-stdlib"):
        corpora.download_shakespeare((tmp_path / "absent.txt").as_uri())


def test_shakespeare_is_cut_where_nanogpt_cuts_it(stand_in, monkeypatch):
    path, _ = stand_in
    monkeypatch.setattr(corpora, "download_shakespeare", lambda: path)
    corpus, text = open_corpus("shakespeare"), path.read_text()
    cut = int(len(text) * 0.9)
    assert text[cut - 1] != "\n"  # or a cut at a line end would pass as well
    assert text_of(corpus, "train") == text[:cut]
    assert text_of(corpus, "validation") == text[cut:]


@pytest.mark.network
def test_the_real_shakespeare_has_the_known_sha256(stand_in):
    assert corpora.download_shakespeare().stat().st_size == 1_115_394
