"""Claims about where text comes from and how it is split."""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_tf.errors import InputError
from gpt_tf.text import corpus as corpora
from gpt_tf.text.corpus import open_corpus


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


# Splitting


def test_split_does_not_depend_on_where_the_folder_lies(folder, tmp_path):
    moved = tmp_path / "elsewhere" / "other name"
    before = open_corpus(folder)
    held, fingerprint = names(before, "validation"), before.describe()["sha256"]
    moved.parent.mkdir()
    folder.rename(moved)
    after = open_corpus(moved)
    assert names(after, "validation") == held
    assert after.describe()["sha256"] == fingerprint


def by_hash(folder):
    """Return the names of a folder's files in the order of their SHA-256."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")]
    return sorted(found, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def test_of_many_files_the_hash_of_its_name_alone_decides(folder):
    few = set(names(open_corpus(folder, validation_fraction=0.3), "validation"))
    for index in range(970):
        write(folder / "more" / f"{index}.txt", f"This is text {index:03}.\nIt ends.\n")
    held = names(open_corpus(folder, validation_fraction=0.3), "validation")
    ranked = by_hash(folder)
    assert sorted(held) == sorted(ranked[: len(held)])
    last, following = (
        int(hashlib.sha256(ranked[rank].encode()).hexdigest(), 16)
        for rank in (len(held) - 1, len(held))
    )
    assert last < 0.3 * 2**256 < following
    # Most stay in their split when others come.
    assert len(few & set(held)) > 5


@pytest.mark.parametrize("fraction", [0.0001, 0.9999])
def test_neither_side_is_empty_with_few_files(folder, fraction):
    corpus = open_corpus(folder, validation_fraction=fraction)
    sizes = [len(text_of(corpus, split)) for split in ("train", "validation")]
    assert 0 < min(sizes) < 36


def held_share(corpus):
    sizes = {s: len(text_of(corpus, s).encode()) for s in corpora.SPLITS}
    return sizes["validation"] / sum(sizes.values())


@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=30),
    fraction=st.floats(0.05, 0.95),
)
@settings(max_examples=settings().max_examples // 4)
def test_the_share_asked_for_is_held_out_by_size(tmp_path_factory, sizes, fraction):
    folder = tmp_path_factory.mktemp("sizes")
    sizes = [*sizes, 100]  # a line is less than two points
    for index, size in enumerate(sizes):
        lines = (f"{index:02} {line:06}\n" for line in range(size))
        write(folder / f"{index}.txt", "".join(lines))
    corpus = open_corpus(folder, validation_fraction=fraction)
    assert held_share(corpus) == pytest.approx(fraction, abs=0.0201)
    texts = [(d.name, d.text) for s in corpora.SPLITS for d in corpus.documents(s)]
    assert "".join(sorted("".join(t for _, t in texts).splitlines(True))) == "".join(
        (folder / f"{index}.txt").read_text() for index in range(len(sizes))
    )
    # At most one document is in two parts, and it is cut at a line end.
    assert len(texts) <= len(sizes) + 1
    assert all(text.endswith("\n") for _, text in texts)


def test_beside_a_cut_file_small_ones_lie_on_both_sides(tmp_path):
    write(tmp_path / "f" / "book.txt", "a line of the book\n" * 10_000)
    for index in range(60):
        write(tmp_path / "f" / f"note{index}.txt", f"note {index}\n" * 9)
    corpus = open_corpus(tmp_path / "f")
    assert held_share(corpus) == pytest.approx(0.1, abs=0.02)
    train, validation = names(corpus, "train"), names(corpus, "validation")
    assert set(train) & set(validation) == {"book.txt"}
    assert 40 < len(train) < 60 and 1 < len(validation) < 20


@pytest.mark.parametrize("sizes", [[500, 85, 300, 115], [70, 95, 835], [835, 95, 70]])
def test_documents_stay_whole_where_that_comes_near_enough(tmp_path, sizes):
    for index, size in enumerate(sizes):
        write(tmp_path / "f" / f"{index}.txt", f"line {index}\n" * size)
    corpus = open_corpus(tmp_path / "f")
    assert sorted(names(corpus, "train") + names(corpus, "validation")) == [
        f"{index}.txt" for index in range(len(sizes))
    ]
    assert held_share(corpus) == pytest.approx(0.1, abs=0.02)


def test_a_line_without_an_end_near_by_is_cut_within(tmp_path, notices):
    open_corpus(write(tmp_path / "two.txt", "ab"))
    assert len(notices) == 1 and "50.0%" in notices[0]
    path = write(tmp_path / "long.txt", "short\n" + "word " * 1000 + "\nshort\n")
    assert held_share(open_corpus(path)) == pytest.approx(0.1, abs=0.001)


# Names that say what a text is for


def folder_of(root, *names):
    for index, name in enumerate(names):
        write(root / name, f"This is text {index}.\n" * (100 if index == 0 else 10))
    return root


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        (["wiki.train.tokens"], ["wiki.valid.tokens"], ["wiki.test.tokens"]),
        (["train.txt"], ["test.txt"], []),
        (["book.txt", "train.txt"], ["DEV.txt"], []),
        (["book.txt"], ["my-validation_set.txt"], []),
        (["train/a.txt", "train/deep/b.txt"], ["val/a.txt"], ["test/a.txt"]),
        (["data/train-00000-of-00002.txt"], ["data/dev-00000-of-00001.txt"], []),
        (["src/a.py", "src/train.py", "src/test_a.py"], ["test/b.py"], []),
        (["test/train.txt"], ["test/valid.txt"], ["test/other.txt"]),
    ],
)
def test_names_of_train_validation_and_test_are_respected(
    tmp_path, train, validation, test, notices
):
    folder = folder_of(tmp_path / "f", *train, *validation, *test)
    corpus = open_corpus(folder, validation_fraction=0.4)
    assert sorted(names(corpus, "train")) == sorted(train)
    assert sorted(names(corpus, "validation")) == sorted(validation)
    assert len(notices) == 1 and validation[0] in notices[0]
    assert not test or test[0] in notices[0]


@pytest.mark.parametrize(
    "found",
    [
        ["train.txt", "notes.txt"],  # nothing is held out by name
        ["valid.txt", "test.txt"],  # nothing is left to train on
        ["src/train.py", "src/test_it.py", "src/val.py"],  # programs
        ["contest.txt", "trainer.txt", "valid8.txt"],  # no words of their own
        ["train-and-test.txt", "notes.txt"],  # says both
    ],
)
def test_names_that_divide_nothing_leave_it_to_the_share(tmp_path, found, notices):
    folder = folder_of(tmp_path / "f", *found)
    corpus = open_corpus(folder)
    assert held_share(corpus) == pytest.approx(0.1, abs=0.02)
    assert not notices
    assert {*names(corpus, "train"), *names(corpus, "validation")} == set(found)


# Validation text that is named


def test_the_named_text_is_held_out_and_all_else_trained_on(tmp_path):
    folder = folder_of(tmp_path / "f", "a.txt", "b.txt", "c/d.txt")
    corpus = open_corpus(folder, validation=folder / "c")
    assert names(corpus, "train") == ["a.txt", "b.txt"]
    assert names(corpus, "validation") == ["d.txt"]
    write(folder / "wiki.test.txt", "By name no text to train on.\n")
    corpus = open_corpus([folder, folder / "c"], validation=folder / "b.txt")
    assert names(corpus, "train") == ["a.txt", "c/d.txt"]
    assert names(corpus, "validation") == ["b.txt"]
    assert "wiki.test.txt" in corpus.notices[-1]


def test_copies_of_the_named_text_are_not_trained_on(tmp_path, folder, notices):
    copy = write(tmp_path / "copy.txt", "This is book 3.\nIt ends here.\n")
    corpus = open_corpus(folder, validation=copy)
    assert len(names(corpus, "train")) == 29
    assert "shelf0/book03.txt" not in names(corpus, "train")
    assert len(notices) == 1 and "book03.txt" in notices[0]


# Documents within a file


def test_a_separator_ends_documents_and_belongs_to_none(tmp_path, notices):
    texts = [f"text {index}\nof two lines\n" for index in range(200)]
    path = write(tmp_path / "one.txt", "<|end|>".join([*texts, ""]))
    corpus = open_corpus(path, separator="<|end|>")
    found = [d for s in corpora.SPLITS for d in corpus.documents(s)]
    assert [document.text for document in found] == texts
    assert all(document.ends for document in found)
    assert len(names(corpus, "validation")) == pytest.approx(20, abs=1)
    assert corpus.describe()["separator"] == "<|end|>"
    assert not notices
    corpus = open_corpus(path, separator="</s>")
    for _ in range(2):
        list(corpus.documents("train"))
    assert len(notices) == 1 and "</s>" in notices[0]


def test_a_document_too_long_for_the_share_is_cut_at_a_line_end(tmp_path):
    long = "a line\n" * 1000
    path = write(tmp_path / "one.txt", f"{long}<|end|>{long}")
    corpus = open_corpus(path, separator="<|end|>")
    train, validation = list(corpus.documents("train")), text_of(corpus, "validation")
    assert [len(d.text) > 0 and d.ends for d in train] == [True, True]
    assert validation == "a line\n" * (len(validation) // 7)
    assert held_share(corpus) == pytest.approx(0.1, abs=0.02)


@given(
    text=st.text(alphabet="ab\n-", max_size=60),
    separator=st.sampled_from(["-", "--", "\n-", "a-\n"]),
    piece=st.integers(1, 9),
)
@settings(max_examples=settings().max_examples // 2)
def test_separators_are_found_whatever_the_pieces(
    tmp_path_factory, text, separator, piece
):
    path = write(tmp_path_factory.mktemp("pieces") / "data", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE_BYTES", piece)
        found = list(
            corpora._read(corpora._Part("data", path), lambda line: None, separator)
        )
    whole = [""]
    for document in found:
        whole[-1] += document.text
        if document.ends:
            whole.append("")
    assert whole.pop() == ""
    expected = [part for part in text.split(separator) if part.strip()]
    assert [part for part in whole if part.strip()] == expected


@given(
    text=st.text(alphabet="ab é中\n", min_size=2, max_size=60),
    fraction=st.floats(0.05, 0.95),
)
@settings(max_examples=settings().max_examples // 2)
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


def test_copies_of_a_file_are_kept_once_and_noticed(folder, notices):
    write(folder / "copies" / "a.txt", "This is book 3.\nIt ends here.\n")
    corpus = open_corpus([folder, folder / "shelf0" / "book00.txt"])
    texts = [d.text for s in corpora.SPLITS for d in corpus.documents(s)]
    assert len(texts) == len(set(texts)) == 30
    assert len(notices) == 1 and "copies" in notices[0]


def test_fingerprint_changes_with_a_byte_and_with_a_name(folder):
    before = open_corpus(folder).describe()["sha256"]
    assert open_corpus(folder).describe()["sha256"] == before
    book = folder / "shelf1" / "book01.txt"
    book.rename(book.with_name("book99.txt"))
    renamed = open_corpus(folder).describe()["sha256"]
    write(book.with_name("book99.txt"), "This is book 1.\nIt ends hers.\n")
    assert len({before, renamed, open_corpus(folder).describe()["sha256"]}) == 3


# Reading


def test_hidden_blank_and_binary_files_of_a_folder_are_skipped(folder, notices):
    write(folder / ".git" / "config", "hidden")
    write(folder / ".hidden.txt", "hidden")
    write(folder / "blank.txt", " \n\n")
    write(folder / "empty.txt", "")
    write(folder / "picture.png", b"\x89PNG\0\0 binary")
    (folder / "shelf0" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "self.txt").symlink_to(folder / "self.txt")
    corpus = open_corpus(folder)
    assert corpus.describe()["files"] == 30
    assert len(notices) == 1 and "picture.png" in notices[0]


def test_folders_may_be_nested_deeper_than_calls(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(1500):
        os.mkdir("d")
        os.chdir("d")
    Path("deepest.txt").write_text("words of the deepest file\n" * 9)
    monkeypatch.chdir(tmp_path)
    Path("first.txt").write_text("other words\n" * 9)
    try:
        corpus = open_corpus(tmp_path, whole=True)
        names = [part.name for part in corpus.parts["validation"]]
    finally:  # pytest's own way to remove it recurses
        subprocess.run(["rm", "-r", tmp_path / "d"], check=True)
    assert names == ["first.txt", "d/" * 1500 + "deepest.txt"]


def test_undecodable_bytes_are_replaced_and_reported_once(tmp_path, notices):
    path = write(tmp_path / "bad.txt", "é one\n".encode() + b"t\xffw\xfeo\nthree\n")
    corpus = open_corpus(path, validation_fraction=0.3)
    for _ in range(2):
        text = text_of(corpus, "train") + text_of(corpus, "validation")
    assert text == "é one\nt\ufffdw\ufffdo\nthree\n"
    assert len(notices) == 1 and corpus.notices == notices
    assert "bad.txt: 2 undecodable bytes" in notices[0]


def test_byte_order_mark_is_stripped_at_the_start_only(tmp_path):
    path = write(tmp_path / "bom.txt", "\ufeffone\n\ufefftwo\nthree\n")
    corpus = open_corpus(path, validation_fraction=0.3)
    assert text_of(corpus, "train") == "one\n\ufefftwo\n"


@given(data=st.binary(max_size=80), piece=st.integers(1, 9))
@settings(max_examples=settings().max_examples // 2)
def test_reading_in_pieces_equals_reading_at_once(tmp_path_factory, data, piece):
    path = write(tmp_path_factory.mktemp("pieces") / "data", data)
    part = corpora._Part("data", path)
    at_once = "".join(d.text for d in corpora._read(part, lambda line: None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "PIECE_BYTES", piece)
        documents = list(corpora._read(part, lambda line: None))
    assert "".join(d.text for d in documents) == at_once
    assert [d.ends for d in documents] == [False] * (len(documents) - 1) + [True]


# Bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is none"),
        (" \n\t\n", "a blank file"),
        (b"text\0more", "a binary file"),
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


def test_other_bad_arguments_are_refused(folder):
    for source, message in (
        ([], "at least one path"),
        ("/dev/null", "a device or a pipe"),
        (write(folder / "blank" / "a.txt", "\n").parent, "there are none"),
    ):
        with pytest.raises(InputError, match=message):
            open_corpus(source)
    with pytest.raises(InputError, match="train"):
        open_corpus(folder, validation=folder)
    corpus = open_corpus(folder)
    with pytest.raises(InputError, match="split"):
        list(corpus.documents("test"))
    shutil.rmtree(folder)
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
    corpus = open_corpus("python-stdlib", validation_fraction=0.25)
    assert sorted(names(corpus, "train") + names(corpus, "validation")) == sorted(kept)
    assert corpus.describe()["python"] == sys.version.split()[0]
    (tmp_path / "empty").mkdir()
    paths = {"stdlib": str(tmp_path / "empty")}
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


def test_shakespeare_is_downloaded_once_and_checked(stand_in, tmp_path):
    path, sha256 = stand_in
    with pytest.raises(InputError, match=r"not be downloaded.*python-stdlib"):
        corpora.download_shakespeare((tmp_path / "absent.txt").as_uri())
    with pytest.raises(InputError, match="hash"):
        corpora.download_shakespeare(path.as_uri(), "0" * 64)
    found = corpora.download_shakespeare(path.as_uri(), sha256)
    assert found.read_bytes() == path.read_bytes()
    path.unlink()
    assert corpora.download_shakespeare(path.as_uri(), sha256) == found


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
