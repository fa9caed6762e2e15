"""What a student keeps of its teacher: trained alone, and distilled in many ways.

    python benchmarks/distillation.py [--text FILE] [--parts shakespeare,stdlib,article]

A teacher of 6 layers, 384 wide, is trained on Shakespeare until another round at a
smaller rate improves its validation loss by less than 1 %; on Python's sources, of
which there are more, a smaller one for a fixed number of steps. Students
of at most half its parameters are then trained on the same text with the same number
of tokens: alone, alone from the teacher's layers, and in each way that `gpt-tf distil`
offers. All three are tuned by the same search over the learning rate, which is part of
the run: it is chosen on the first half of the held-out text, and what is reported is
measured on the second. All runs stay in `--folder`, and what was measured there is not
trained again.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
from harness import (
    RESULTS,
    ROOT,
    Contender,
    console,
    cut_windows,
    file_log_probs,
    finish,
    print_machine,
    provenance,
    repeat,
    take_turns,
)

TEACHER = {
    "vocab_size": 1024,
    "embedding_dim": 384,
    "num_layers": 6,
    "num_heads": 6,
    "context_length": 128,
    "dropout": 0.2,
    "batch_size": 16,
    "steps": 2000,
    "learning_rate": 1e-3,
    "warmup_steps": 100,
    "validate_every": 100,
    "validation_batches": 1000,
    "patience": 3,
    "checkpoint_every": 100,
    "keep_checkpoints": 1,
}
AGAIN = {
    "batch_size": 16,
    "context_length": 128,
    "steps": 800,
    "learning_rate": 6e-4,
    "final_learning_rate": 3e-5,
    "warmup_steps": 20,
    "validate_every": 100,
    "validation_batches": 1000,
    "checkpoint_every": 200,
    "keep_checkpoints": 1,
}
STUDENT = {"num_layers": 3, "feedforward_dim": 1024}
ARTICLE_TEACHER = {
    **TEACHER,
    "vocab_size": 10000,
    "embedding_dim": 512,
    "num_heads": 8,
    "dropout": 0.1,
    "steps": 250,
    "learning_rate": 6e-4,
    "warmup_steps": 50,
    "validate_every": 50,
    "checkpoint_every": 50,
}
ARTICLE_STUDENT = {
    "num_layers": 4,
    "embedding_dim": 256,
    "num_heads": 6,
    "vocab_size": 5000,
}
RATES = (5e-4, 1.5e-3, 3e-3)
LOSSES = ("reverse_kl", "jensen_shannon", "skewed_kl")
SMALL_TEACHER = {
    **TEACHER,
    "embedding_dim": 128,
    "num_layers": 4,
    "num_heads": 4,
    "dropout": 0.0,
    "steps": 3000,
    "learning_rate": 4e-3,
    "validate_every": 500,
    "validation_batches": 100,
    "checkpoint_every": 500,
}
SMALL_STUDENT = {"num_layers": 2, "feedforward_dim": 256}
COURSE = {
    "dropout": 0.0,
    "batch_size": 16,
    "context_length": 128,
    "warmup_steps": 40,
    "validate_every": 200,
    "validation_batches": 1000,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
}


@dataclasses.dataclass(frozen=True)
class Way:
    """A way to come to a student.

    Args:
        name: As it stands in the table.
        distillation: Fields of a `DistillationConfig`, or None for a student alone.
        changes: Fields of `TrainingConfig`.
        source: Name of the run whose beginning, or with `end` whose result, it takes.
        end: Whether it goes on from the result.
    """

    name: str
    distillation: dict | None = None
    changes: dict = dataclasses.field(default_factory=dict)
    source: str | None = None
    end: bool = False


class Study:
    """A teacher, its text and its students.

    Args:
        name: Names the folder.
        corpus: As for `gpt_tf.train`.
        teacher: Configuration of the teacher.
        student: Sizes of the student.
        folder: Where the runs are kept.
        steps: Optimiser steps of every student.
        again: Configuration of the teacher's further rounds, or None for none.
    """

    def __init__(self, name, corpus, teacher, student, folder, steps, again=None):
        from gpt_tf.training import loop

        self.name, self.student, self.steps = name, student, steps
        self.corpus, self.folder = corpus, folder / name
        self.teacher_run = self._trained("teacher", teacher)
        while again is not None:
            source = self.teacher_run
            name = f"teacher-{'again-' * source.name.count('again')}again"
            found = self._trained(name, {**again, "init_from": str(source), "seed": 7})
            gain = _best_loss(source) - _best_loss(found)
            if gain > 0:
                self.teacher_run = found
            if gain < 0.01:
                break
        self.teacher, self.tokenizer = loop.load_model(self.teacher_run)
        self.reference = None

    def _trained(self, name, config):
        from gpt_tf.training import loop

        path = self.folder / name
        if not (path / "model").is_dir():
            console.print(f"{self.name}: training the {name}")
            loop.train(None, path, corpus=self.corpus, overwrite=True, **config)
        return path

    def run(self, way, seed=0):
        """Train a student, unless it is there; return what was measured."""
        out = self.folder / f"{_slug(way.name)}-{seed}"
        wanted, teacher = self._key(way, seed), self.teacher_run.name
        run = self.run_of(way, seed)
        if run is not None:
            return {**self._compared(run), "name": way.name}
        console.print(f"{self.name}: {way.name}, seed {seed}")
        began = time.perf_counter()
        result = self._train(way, out, seed)
        seconds = time.perf_counter() - began
        found = {
            "way": wanted,
            "name": way.name,
            "teacher": teacher,
            "seed": seed,
            "parameters": result.model.count_params(),
            "training_seconds": seconds,
            **self.measure(result.model, result.tokenizer, out),
        }
        console.print(
            f"  perplexity {found['perplexity']:.3f}, "
            f"{found['bits_per_byte']:.4f} bits per byte, {seconds:.0f} s"
        )
        (out / "measured.json").write_text(json.dumps(found), "utf-8")
        return found

    def _key(self, way, seed):
        what = dataclasses.replace(way, name="")
        taught = way.distillation is not None or way.source is not None
        teacher = self.teacher_run.name
        facts = [what, seed, self.steps, self.student, COURSE]
        facts += [teacher] if taught and teacher != "teacher" else []
        return hashlib.sha256(repr(tuple(facts)).encode()).hexdigest()

    def run_of(self, way, seed):
        """Return the folder of a student that is there, or None."""
        wanted = self._key(way, seed)
        for measured in self.folder.glob(f"*-{seed}/measured.json"):
            if json.loads(measured.read_text("utf-8"))["way"] == wanted:
                return measured.parent
        return None

    def _compared(self, run):
        """Return what was measured, beside this teacher and not an earlier one."""
        found = json.loads((run / "measured.json").read_text("utf-8"))
        is_compared = found.get("teacher", "teacher") == self.teacher_run.name
        if is_compared and "search_nats" in found:
            return found
        from gpt_tf.training import loop

        found |= {"teacher": self.teacher_run.name}
        found |= self.measure(*loop.load_model(run), run)
        (run / "measured.json").write_text(json.dumps(found), "utf-8")
        return found

    def _train(self, way, out, seed):
        from gpt_tf.training import loop

        course = {
            **COURSE,
            "corpus": self.corpus,
            "seed": 100 + seed,
            "steps": self.steps,
            **way.changes,
        }
        course["final_learning_rate"] = course["learning_rate"] / 10
        options = {"overwrite": True, "verbose": False}
        if way.source is not None:
            source = self.folder / f"{_slug(way.source)}-{seed}"
            course["init_from"] = str(source if way.end else source / "initial")
        if way.distillation is not None:
            sizes = {} if way.source else self.student
            return loop.distil(
                self.teacher_run,
                out,
                {**sizes, **way.distillation},
                **options,
                **course,
            )
        if way.source is None:
            course |= self._fresh()
        return loop.train(None, out, **options, **course)

    def _fresh(self):
        """Sizes and tokenizer of a student that never saw the teacher."""
        sizes = {
            name: self.student.get(name, getattr(self.teacher, name))
            for name in ("num_layers", "embedding_dim", "num_heads")
        }
        if "feedforward_dim" in self.student:
            sizes["feedforward_dim"] = self.student["feedforward_dim"]
        vocab_size = self.student.get("vocab_size", self.tokenizer.vocab_size)
        path = self.folder / f"tokenizer-{vocab_size}"
        if not path.is_dir():
            from gpt_tf.distillation.tokenizer_alignment import derive_tokenizer

            tokenizer = self.tokenizer
            if vocab_size != tokenizer.vocab_size:
                tokenizer = derive_tokenizer(tokenizer, vocab_size)
            path.mkdir()
            tokenizer.save(path)
        return {**sizes, "tokenizer": str(path)}

    def measure(self, model, tokenizer, run):
        """Measure a model on the second half of the held-out text.

        Of the first half, by which learning rates are chosen, the loss alone:
        `search_nats`.
        """
        from gpt_tf.generation.sampler import log_softmax
        from gpt_tf.text.dataset import TokenFile, Windows

        ids = TokenFile.open(run / "data" / "validation.tokens").tokens
        searched, reported = np.array_split(ids, 2)

        def batches(tokens, model):
            windows = Windows(tokens, model.context_length, 16, shuffle=False)
            for step in range(windows.steps_per_epoch):
                inputs, labels, weights = windows.batch(step)
                found = log_softmax(model.predict_on_batch(inputs))
                losses = -np.take_along_axis(found, labels[..., None], -1)[..., 0]
                yield found, losses, weights

        chosen_by = np.zeros(2)
        for _, losses, weights in batches(searched, model):
            chosen_by += (losses * weights).sum(), weights.sum()
        is_teachers = model.vocab_size == self.teacher.vocab_size
        if is_teachers and self.reference is None:
            self.reference = [found for found, *_ in batches(reported, self.teacher)]
        sums = np.zeros(4)
        for step, (found, losses, weights) in enumerate(batches(reported, model)):
            sums[0] += (losses * weights).sum()
            sums[1] += weights.sum()
            if is_teachers:
                wanted = self.reference[step]
                same = found.argmax(-1) == wanted.argmax(-1)
                divergence = (np.exp(wanted) * (wanted - found)).sum(-1)
                sums[2] += (same * weights).sum()
                sums[3] += (divergence * weights).sum()
        nats = sums[0] / sums[1]
        size = len(tokenizer.decode_bytes(reported.tolist()))
        return {
            "search_nats": float(chosen_by[0] / chosen_by[1]),
            "nats": float(nats),
            "perplexity": float(math.exp(nats)),
            "bits_per_byte": float(sums[0] / math.log(2) / size),
            "agreement": float(sums[2] / sums[1]) if is_teachers else None,
            "divergence_nats": float(sums[3] / sums[1]) if is_teachers else None,
        }

    def best_rate(self, name, distillation, source=None):
        """Search the learning rate with seed 0; return the best one, and all rows."""
        ways = [
            Way(f"{name}, rate {rate:g}", distillation, {"learning_rate": rate}, source)
            for rate in RATES
        ]
        found = [self.run(way) for way in ways]
        best = int(np.argmin([row["search_nats"] for row in found]))
        console.print(f"{self.name}: {name} is best at a rate of {RATES[best]:g}")
        return RATES[best], found

    def knowledge(self, passes):
        """Extract the teacher's knowledge, once."""
        from gpt_tf.training import loop

        path = self.folder / f"knowledge-of-{self.teacher_run.name}"
        if not (path / "manifest.json").is_file():
            began = time.perf_counter()
            loop.extract_knowledge(self.teacher_run, path, passes=passes)
            console.print(f"  extracted in {time.perf_counter() - began:.0f} s")
        return str(path)


def _best_loss(run):
    history = json.loads((run / "history.json").read_text("utf-8"))
    return min(row["loss"] for row in history["validations"])


def _slug(name):
    return "".join(c if c.isalnum() else "-" for c in name).strip("-")


# The studies


def study_text(name, corpus, arguments):
    """One text, a teacher and all ways."""
    small = name == "stdlib"
    teacher, student = (SMALL_TEACHER, SMALL_STUDENT) if small else (TEACHER, STUDENT)
    steps = arguments.steps[name]
    again = None if small else AGAIN
    study = Study(name, corpus, teacher, student, arguments.folder, steps, again)
    seeds = arguments.seeds
    stored = {"knowledge": study.knowledge(passes=1 if small else 4)}
    alone_rate, alone_search = study.best_rate("alone", None)
    rate, search = study.best_rate("distilled, stored", stored)
    at = {"learning_rate": rate}
    distilled, inherited = Way("distilled", {}, at), "alone, from the teacher's layers"
    study.run(distilled)  # it cuts the layers that the next ones begin with
    layers_rate, layers_search = study.best_rate(inherited, None, distilled.name)
    layers_at = {"learning_rate": layers_rate}
    ways = [
        (Way("alone", None, {"learning_rate": alone_rate}), seeds),
        (distilled, seeds),
        (Way("distilled, stored", stored, at), seeds),
        (Way(inherited, None, layers_at, distilled.name), seeds),
    ]
    if not arguments.few:
        ways += [(way, 1) for way in other_ways(stored, at)]
    integers = quantised_ways(stored, rate, steps) if small else []
    ways += [(way, seeds) for way in integers]
    rows = [study.run(way, seed) for way, count in ways for seed in range(count)]
    teacher = study.measure(study.teacher, study.tokenizer, study.teacher_run)
    teacher |= {"name": "teacher", "parameters": study.teacher.count_params()}
    speeds = decode_speeds(study)
    summary = summarise(teacher, rows, speeds)
    found = {
        "teacher": teacher,
        "rows": rows,
        "searches": {
            "alone": alone_search,
            "distilled": search,
            inherited: layers_search,
        },
        "speeds": speeds,
        "summary": summary,
        "steps": steps,
    }
    if integers:
        unfinished = "distilled, four fifths"
        integers = [way for way in integers if way.name != unfinished]
        whole = Way("distilled, stored", stored, at)
        found["int8_files"] = int8_files(study, whole, integers, seeds)
    return found


def other_ways(stored, at):
    """Return each other choice that `gpt-tf distil` offers, by itself."""
    features = [("forward_kl", 1.0), ("hidden_states", 0.1)]
    attention = [("forward_kl", 1.0), ("attention_transfer", 0.1)]
    choices = {
        "fresh weights": {**stored, "init": "fresh"},
        "temperature 2": {**stored, "temperature": 2.0},
        "alpha 0.5": {**stored, "alpha": 0.5},
        "first layers": {**stored, "layers": "first"},
        "by importance": {**stored, "layers": "importance"},
        **{loss: {**stored, "loss": loss} for loss in LOSSES},
        "and hidden states": {"loss": features},
        "and attention": {"loss": attention},
        "on-policy 0.25": {"on_policy_fraction": 0.25},
        "and written text": {"written_tokens": 100_000},
    }
    return [Way(f"distilled, {name}", fields, at) for name, fields in choices.items()]


def quantised_ways(stored, rate, steps):
    """Integers and distillation at once, or one after the other, in equal steps."""
    late = {"learning_rate": rate / 20, "warmup_steps": 5, "steps": steps // 5}
    late["quantization"] = {}
    early = {"learning_rate": rate, "steps": steps - steps // 5}
    whole = {"learning_rate": rate, "quantization": {}}
    first = "distilled, four fifths"
    return [
        Way("QAT and distilled at once", stored, whole),
        Way(first, stored, early),
        Way("distilled, then QAT", None, late, first, end=True),
        Way("distilled, then QAT and distilled", stored, late, first, end=True),
    ]


def int8_files(study, whole, others, seeds, num_windows=250):
    """Measure int8 files on held-out windows, the float one first.

    Args:
        study: Their study.
        whole: The way whose float student is quantised after training.
        others: Ways with quantisation-aware training.
        seeds: Number of seeds.
        num_windows: Windows that are measured.

    Returns:
        A dict per file: name, seed, nats per token, its ratio of perplexities to the
        float file of the same seed.
    """
    from gpt_tf.edge import EdgeGPT
    from gpt_tf.export.from_run import export_trained
    from gpt_tf.text.dataset import TokenFile

    held_out = TokenFile.open(study.teacher_run / "data" / "validation.tokens").tokens
    length = COURSE["context_length"]
    windows = cut_windows(held_out, length, num_windows)

    def nats_of(way, mode, seed):
        run = study.run_of(way, seed)
        path = study.folder / f"{run.name}-{mode}.litertlm"
        export_trained(run, path, mode)
        with EdgeGPT(path) as gpt:
            found = file_log_probs(gpt, windows)
        return -float(np.take_along_axis(found, windows[:, 1:, None], -1).mean())

    rows = []
    floats = {seed: nats_of(whole, "float32", seed) for seed in range(seeds)}
    files = {"distilled, then post-training": whole}
    files |= {way.name: way for way in others}
    for name, way in files.items():
        for seed, base in floats.items():
            nats = nats_of(way, "int8", seed)
            ratio = math.exp(nats - base)
            rows.append({"name": name, "seed": seed, "nats": nats, "ratio": ratio})
    return rows


def study_article(corpus, arguments):
    """The article's pair: 10000/512/6/8 teaches 5000/256/4/6."""
    study = Study(
        "article",
        corpus,
        ARTICLE_TEACHER,
        ARTICLE_STUDENT,
        arguments.folder,
        arguments.steps["article"],
    )
    alone_rate, alone_search = study.best_rate("alone", None)
    derived = {"alpha": 0.3}
    rate, search = study.best_rate("distilled, derived tokenizer", derived)
    at = {"learning_rate": rate}
    fresh = {**derived, "init": "fresh"}
    ways = [
        (Way("alone", None, {"learning_rate": alone_rate}), arguments.seeds),
        (Way("distilled, derived tokenizer", derived, at), arguments.seeds),
        (Way("distilled, derived, fresh weights", fresh, at), 1),
    ]
    rows = [study.run(way, seed) for way, count in ways for seed in range(count)]
    teacher = study.measure(study.teacher, study.tokenizer, study.teacher_run)
    teacher |= {"name": "teacher", "parameters": study.teacher.count_params()}
    summary = summarise(teacher, rows, None)
    return {
        "teacher": teacher,
        "rows": rows,
        "searches": {"alone": alone_search, "distilled": search},
        "summary": summary,
        "steps": arguments.steps["article"],
    }


def training_step(kind):
    """Return a function that trains the student so many steps, and their seconds."""
    import tensorflow as tf

    import gpt_tf

    sizes = ("vocab_size", "embedding_dim", "num_layers", "num_heads", "context_length")
    teacher = gpt_tf.GPTModel(**{name: TEACHER[name] for name in sizes})
    student = gpt_tf.make_student(teacher, **STUDENT)
    generator = np.random.default_rng(1)
    shape = (COURSE["batch_size"], COURSE["context_length"])
    tokens, labels = generator.integers(0, 1024, (2, *shape)).astype("int32")
    model, inputs = student, tokens
    if kind != "alone":
        taught_by = teacher if kind == "live" else None
        model = gpt_tf.Distiller(teacher=taught_by, student=student)
    if kind == "stored":
        log_probs = np.full((*shape, 33), np.log(1 / 33), "float32")
        ids = generator.permuted(np.tile(np.arange(1024), (*shape, 1)), axis=-1)
        inputs = {
            "tokens": tokens,
            "teacher_ids": ids[..., :32].astype("int32"),
            "teacher_log_probs": log_probs,
        }
    model.compile(optimizer=gpt_tf.AdamW(1e-4))
    tensors = tf.nest.map_structure(tf.constant, (inputs, labels))
    return repeat(lambda: model.train_on_batch(*tensors))


def step_times():
    """A step of the student alone, with the teacher, and from its store, in turn.

    A virtual machine that is halted now and then makes steps of either kind longer by
    whole time slices; the tenth percentile is what they need when it is not.
    """
    kinds = ("alone", "live", "stored")
    found = take_turns([Contender(k, training_step, (k,)) for k in kinds], 12, 4)
    rows = {
        measured.name: {**measured.as_dict(), "p10_ms": measured.percentile_ms(10)}
        for measured in found
    }
    return rows


def decode_speeds(study):
    """Tokens per second of teacher and student, in turn: Keras, and the int8 file."""
    import gpt_tf
    from gpt_tf.edge import EdgeGPT
    from gpt_tf.export.from_run import export_trained
    from gpt_tf.text.dataset import TokenFile
    from gpt_tf.training import loop

    runs = {"teacher": study.teacher_run, "student": study.folder / "distilled-0"}
    models = {name: loop.load_model(run)[0] for name, run in runs.items()}
    held_out = TokenFile.open(study.teacher_run / "data" / "validation.tokens")
    prompt = [int(token) for token in held_out.tokens[:16]]
    found = {f"{kind}/{name}": [] for kind in ("keras", "int8") for name in runs}
    engines, bytes_of = {}, {}
    for name, run in runs.items():
        path = study.folder / f"{name}.litertlm"
        manifest = export_trained(run, path, "int8")
        engines[name] = EdgeGPT(path)
        bytes_of[name] = manifest["size_bytes"]
    for turn in range(6):
        for name in runs:
            calls = {
                "keras": lambda name=name: gpt_tf.generate(
                    models[name], prompt, max_new_tokens=96, temperature=0
                ),
                "int8": lambda name=name: engines[name].generate(
                    prompt, max_new_tokens=96, temperature=0
                ),
            }
            for kind, call in calls.items():
                began = time.perf_counter()
                count = len(call())
                seconds = time.perf_counter() - began
                if turn:  # the first compiles
                    found[f"{kind}/{name}"].append(count / seconds)
    for engine in engines.values():
        engine.close()
    speeds = {key: float(np.median(values)) for key, values in found.items()}
    return {**speeds, "int8_bytes": bytes_of}


def summarise(teacher, rows, speeds):
    """The promises, in numbers: means and spreads over the seeds."""
    by_name = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    ways = {}
    for name, found in by_name.items():
        nats = np.array([row["nats"] for row in found])
        bits = np.array([row["bits_per_byte"] for row in found])
        ways[name] = {
            "seeds": len(found),
            "perplexity": float(np.exp(nats).mean()),
            "perplexity_spread": float(np.ptp(np.exp(nats))),
            "bits_per_byte": float(bits.mean()),
            "bits_per_byte_spread": float(np.ptp(bits)),
            "bits_of_teacher": float(bits.mean() / teacher["bits_per_byte"]),
        }
        # Nothing of this has a meaning between different tokens.
        if found[0]["agreement"] is not None:
            ways[name]["of_teacher"] = float(np.exp(nats - teacher["nats"]).mean())
            ways[name]["agreement"] = float(np.mean([r["agreement"] for r in found]))
            ways[name]["divergence_nats"] = float(
                np.mean([r["divergence_nats"] for r in found])
            )
    return {"ways": ways, "speeds": speeds}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", default="shakespeare", help="a file, offline")
    parser.add_argument("--parts", default="steps,shakespeare,article,stdlib")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--few", action="store_true", help="only the main ways")
    parser.add_argument("--shakespeare-steps", type=int, default=400)
    parser.add_argument("--stdlib-steps", type=int, default=600)
    parser.add_argument("--article-steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "distillation")
    arguments = parser.parse_args()
    arguments.steps = {
        "shakespeare": arguments.shakespeare_steps,
        "stdlib": arguments.stdlib_steps,
        "article": arguments.article_steps,
    }
    print_machine()
    path = RESULTS / "distillation.json"
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    studies, steps = before.get("studies", {}), before.get("steps")
    for part in arguments.parts.split(","):
        if part == "steps":
            steps = step_times()
        elif part == "article":
            studies[part] = study_article(arguments.text, arguments)
        else:
            corpus = arguments.text if part == "shakespeare" else "python-stdlib"
            studies[part] = study_text(part, corpus, arguments)
        if part in studies:  # the others may be of earlier runs
            studies[part]["commit"] = provenance()["commit"]
        finish("distillation", {"studies": studies, "steps": steps})


if __name__ == "__main__":
    main()
