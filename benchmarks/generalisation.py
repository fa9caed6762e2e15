"""What augmentation does for a model that has little text: trained on 10 % of it.

    python benchmarks/generalisation.py [--text FILE] [--quick]

The same model is trained on a tenth of a text, with and without each augmentation of
`gpt_tf.text.augment`, often enough that without any it learns its text by heart. It is
tested on the other nine tenths, and on a text of another kind: one of Shakespeare on
Python's sources, and the other way round. Bits per byte compare across both, for the
byte-level tokenizer, learnt from the tenth as well, can read any text. Both texts have
a megabyte: all of tiny Shakespeare, and so much of Python's standard library.

Every cell is measured along its course, and at the point where it is best on a part of
the held-out text that the test does not contain, as one stops a training in practice.
Cells stay in `--folder`, and what was measured there is not trained again.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
from harness import ROOT, console, finish, print_machine

COURSE = {
    "validation_fraction": 0.9,
    "vocab_size": 1024,
    "embedding_dim": 128,
    "num_layers": 2,
    "num_heads": 4,
    "context_length": 64,
    "batch_size": 16,
    "steps": 700,
    "learning_rate": 5e-3,
    "warmup_steps": 40,
    "validate_every": 100,
    "validation_batches": 1,
    "checkpoint_every": 0,
}
QUICK = {**COURSE, "embedding_dim": 32, "num_layers": 1, "vocab_size": 300}
QUICK |= {"steps": 20, "warmup_steps": 2, "validate_every": 10, "jit_compile": "off"}

# Of each text that is tested on: this many pieces of so many characters.
PIECES, PIECE_CHARACTERS = 24, 1000

NONE, TEACHER, WRITTEN = "no augmentation", "model's dropout 0.2", "teacher's text"


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to train.

    Args:
        name: As it stands in the table.
        augmentation: Fields of an `AugmentationConfig`.
        changes: Other fields of a `TrainingConfig`.
    """

    name: str
    augmentation: dict = dataclasses.field(default_factory=dict)
    changes: dict = dataclasses.field(default_factory=dict)


NOISE = {"bpe_dropout": 0.1, "token_dropout": 0.1, "token_replacement": 0.1}
WAYS = (
    Way(NONE),
    Way("fixed offsets", {"random_offsets": False}),
    Way("BPE dropout 0.1", {"bpe_dropout": 0.1}),
    Way("token dropout 0.1", {"token_dropout": 0.1}),
    Way("token replacement 0.1", {"token_replacement": 0.1}),
    Way("mixed documents 0.5", {"mix_documents": 0.5}),
    # Before its own text: the teacher is the same seed's.
    Way(TEACHER, changes={"dropout": 0.2}),
    Way(WRITTEN),
    Way("all but the teacher's", {**NOISE, "mix_documents": 0.5}),
)


class Text:
    """A text in a folder or file, and what of it is tested on.

    Args:
        name: As it stands in tables.
        path: What `gpt_tf.train` takes as corpus.
    """

    def __init__(self, name, path):
        from gpt_tf.text.corpus import open_corpus

        self.name, self.path = name, str(path)
        fraction = COURSE["validation_fraction"]
        corpus = open_corpus(self.path, validation_fraction=fraction)
        texts = {
            split: "".join(document.text for document in corpus.documents(split))
            for split in ("train", "validation")
        }
        self.size_bytes = {k: len(text.encode()) for k, text in texts.items()}
        # Pieces of the two lie between each other.
        held = _pieces(texts["validation"], 2 * PIECES)
        self.tests = {
            "train": "\n".join(_pieces(texts["train"], PIECES)),
            "choice": "\n".join(held[::2]),
            "held-out": "\n".join(held[1::2]),
        }
        self.sha256 = corpus.describe()["sha256"]


def _pieces(text, count):
    starts = np.linspace(0, len(text) - PIECE_CHARACTERS, count).astype(int)
    return [text[start : start + PIECE_CHARACTERS] for start in starts]


def shakespeare(given):
    from gpt_tf.text.corpus import download_shakespeare

    return Text("Shakespeare", given or download_shakespeare())


def stdlib(folder, size_bytes):
    """Copy sources of the standard library, in a fixed random order.

    Of each side of the split so many that it has its share of the size. Files keep
    their paths, and so their sides.
    """
    from gpt_tf.text.corpus import open_corpus

    fraction = COURSE["validation_fraction"]
    corpus = open_corpus("python-stdlib", validation_fraction=fraction)
    shutil.rmtree(folder, ignore_errors=True)
    for split, share in (("train", 1 - fraction), ("validation", fraction)):
        texts = {}
        for document in corpus.documents(split):
            texts[document.name] = texts.get(document.name, "") + document.text
        room = size_bytes * share
        for name in sorted(
            texts, key=lambda n: hashlib.sha256(n[::-1].encode()).digest()
        ):
            size = len(texts[name].encode())
            if size > room:
                continue
            room -= size
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(texts[name], "utf-8")
    return Text("Python's sources", folder)


class Study:
    """All ways to train on a tenth of a text.

    Args:
        text: The text.
        other: Text of another kind.
        course: Configuration that all ways have.
        folder: Where the runs are kept.
    """

    def __init__(self, text, other, course, folder):
        self.text, self.course = text, course
        self.folder = folder / _slug(text.name)
        self.tests = {**text.tests, "other": other.tests["held-out"]}

    def cell(self, way, seed):
        """Train one way with one seed, unless it is there; return its course."""
        out = self.folder / f"{_slug(way.name)}-{seed}"
        facts = [dataclasses.asdict(way), seed, self.course, self.text.sha256]
        facts += [sorted(self.tests.items())]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        file = out / "measured.json"
        if file.is_file() and (found := json.loads(file.read_text()))["key"] == key:
            return found
        augmentation = way.augmentation
        if way.name == WRITTEN:
            teacher = self.folder / f"{_slug(TEACHER)}-{seed}"
            augmentation = {"teacher": str(teacher)}
            augmentation["written_tokens"] = _tokens(teacher)
        began = time.perf_counter()
        points = self._train(out, way, augmentation, seed)
        found = {
            "key": key,
            "name": way.name,
            "seed": seed,
            "points": points,
            "training_tokens": _tokens(out),
            "seconds": time.perf_counter() - began,
        }
        file.write_text(json.dumps(found), "utf-8")
        best = best_of(found)
        console.print(
            f"  {self.text.name}, {way.name}, seed {seed}: best after {best['step']} "
            f"steps, held-out {best['held-out']:.4f}, other {best['other']:.4f} bits "
            f"per byte, {found['seconds']:.0f} s"
        )
        return found

    def _train(self, out, way, augmentation, seed):
        import tf_keras as keras

        from gpt_tf.training import loop

        keras.backend.clear_session()
        points = []
        callback = _Measure(self.tests, out, self.course, points)
        loop.train(
            None,
            out,
            corpus=self.text.path,
            seed=100 + seed,
            augmentation=augmentation or None,
            strategy="one_device",
            overwrite=True,
            verbose=False,
            callbacks=[callback.of_keras()],
            **{**self.course, **way.changes},
        )
        shutil.rmtree(out / "checkpoints")
        return points


class _Measure:
    """Measures bits per byte of texts at each validation."""

    def __init__(self, tests, out, course, points):
        self.tests, self.out, self.course, self.points = tests, out, course, points
        self.windows = {}

    def of_keras(self):
        import tf_keras as keras

        measure = self

        class Callback(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                measure(self.model)

        return Callback()

    def __call__(self, model):
        if not self.windows:
            self._read()
        step = (len(self.points) + 1) * self.course["validate_every"]
        found = {
            name: _nats(model, windows) / math.log(2) / size_bytes
            for name, (windows, size_bytes) in self.windows.items()
        }
        self.points.append({"step": step, **found})

    def _read(self):
        from gpt_tf.text.dataset import Windows
        from gpt_tf.text.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(self.out)
        length = self.course["context_length"]
        for name, text in self.tests.items():
            ids = np.array(tokenizer.encode(text))
            windows = Windows(ids, length, 64, shuffle=False)
            self.windows[name] = (windows, len(text.encode()))


def _nats(model, windows):
    total = 0.0
    for step in range(windows.steps_per_epoch):
        inputs, labels, weights = windows.batch(step)
        logits = model.predict_on_batch(inputs).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        losses = np.log(np.exp(logits).sum(-1))
        losses -= np.take_along_axis(logits, labels[..., None], -1)[..., 0]
        total += (losses * weights).sum()
    return float(total)


def _tokens(run):
    manifest = run / "data" / "train.tokens.json"
    return json.loads(manifest.read_text("utf-8"))["count"]


def best_of(cell):
    """Return the point of a course at which one would have stopped."""
    return min(cell["points"], key=lambda point: point["choice"])


def summarise(cells):
    """Return means over the seeds, and differences from no augmentation, by way."""
    by_way = {}
    for cell in cells:
        by_way.setdefault(cell["name"], {})[cell["seed"]] = cell
    plain = by_way[NONE]
    summary = {}
    for name, found in by_way.items():
        row = {
            "best_step": float(np.mean([best_of(c)["step"] for c in found.values()]))
        }
        for where in ("train", "held-out", "other"):
            for when, of in (("best", best_of), ("last", lambda c: c["points"][-1])):
                values = np.array([of(cell)[where] for cell in found.values()])
                changes = np.array(
                    [
                        100 * (of(cell)[where] / of(plain[seed])[where] - 1)
                        for seed, cell in found.items()
                    ]
                )
                row[f"{where}, {when}"] = {
                    "mean": float(values.mean()),
                    "spread": float(np.ptp(values) / 2),
                    "change_percent": float(changes.mean()),
                    "change_spread": float(np.ptp(changes) / 2),
                    "verdict": verdict(name, changes),
                }
        summary[name] = row
    return summary


def verdict(name, changes):
    """Say what differences of the same seeds show: something only if all agree."""
    if name == NONE:
        return ""
    if len(changes) < 3:
        return "unclear"
    if (changes < 0).all():
        return "helps"
    return "harms" if (changes > 0).all() else "unclear"


def _slug(name):
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="tiny Shakespeare as a file, offline")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a try in two minutes")
    parser.add_argument("--only", help="ways whose names contain this, and none")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "generalisation")
    arguments = parser.parse_args()
    course, folder, seeds = COURSE, arguments.folder, arguments.seeds
    if arguments.quick:
        course, folder, seeds = QUICK, folder / "quick", 1
    print_machine()
    first = shakespeare(arguments.text)
    second = stdlib(folder / "stdlib", sum(first.size_bytes.values()))
    for text in (first, second):
        sizes = ", ".join(f"{k} {v:,} bytes" for k, v in text.size_bytes.items())
        console.print(f"{text.name}: {sizes}")
    only = arguments.only
    ways = [way for way in WAYS if not only or way.name == NONE or only in way.name]
    results = {}
    # All texts seed by seed, so that an early end leaves something of each.
    studies = [
        Study(first, second, course, folder),
        Study(second, first, course, folder),
    ]
    cells = {study.text.name: [] for study in studies}
    for seed in range(seeds):
        for study in studies:
            cells[study.text.name] += [study.cell(way, seed) for way in ways]
    for study, other in zip(studies, studies[::-1], strict=True):
        name = study.text.name
        results[name] = {
            "size_bytes": study.text.size_bytes,
            "other": other.text.name,
            "summary": summarise(cells[name]),
            "cells": cells[name],
        }
    content = {"course": course, "seeds": seeds, "texts": results}
    finish("generalisation", content, keep=not only and not arguments.quick)


if __name__ == "__main__":
    from gpt_tf import InputError

    try:
        main()
    except InputError as error:
        raise SystemExit(f"{error} Name Shakespeare's text with --text.") from None
