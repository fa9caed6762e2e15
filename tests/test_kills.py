"""A process may be killed at any file operation: nothing is lost, stuck or left behind.

The default test kills what `gpt_tf.artifacts` offers at a sample of its operations. The
slow ones kill it at every one there is, and every command that writes at random. They
are a program too: a number of kills and a seed, or 0 and of how many operations one:

    python tests/test_kills.py 500 1
    python tests/test_kills.py 0 1
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gpt_tf import artifacts
from gpt_tf.workflow.steps import Steps

COUNT = int(os.environ.get("GPT_TF_KILLS", 500))
_KILLED = {-signal.SIGKILL, -signal.SIGALRM}
_HANGS_AFTER_S = 900


@dataclasses.dataclass
class Case:
    """A command to kill.

    Attributes:
        name: Its name.
        run: Does it in a folder; the same again goes on or begins anew.
        state: What can be read in a folder: raises where something is damaged.
        before: Fills the folder that it finds.
        again: What is done after a kill, if not the same.
        fits: Told what was found after a kill, before and after; says whether that
            is well on the way, where it is neither of the two.
        share: Of the kills.
    """

    name: str
    run: Callable[[Path], None]
    state: Callable[[Path], object]
    before: Callable[[Path], None] = lambda folder: None
    again: Callable[[Path], None] | None = None
    fits: Callable[[object, object, object], bool] = lambda found, old, new: False
    share: float = 1.0


# Killing


def _die_at(root, number, generator):
    """Kill this process before its so-manyth file operation below a folder.

    Returns:
        A list whose length is the number of operations so far.
    """
    changing = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
    seen = []

    def count(where, handle=None):
        if isinstance(where, int):
            with contextlib.suppress(OSError):
                where = os.readlink(f"/proc/self/fd/{where}")
        where = os.fsdecode(where)
        # What is relative is named within an open folder, as by `rmtree`.
        if os.path.isabs(where) and not where.startswith(str(root)):
            return
        seen.append(where)
        if len(seen) == number:
            if (
                handle is not None
                and os.path.isfile(where)
                and generator.random() < 0.5
            ):
                size = os.fstat(handle).st_size
                real_truncate(where, generator.randrange(size + 1))  # half of it
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event == "open":
            path, _, flags = arguments
            if flags and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                count(path)
        elif event in changing or event == "fcntl.flock":
            count(arguments[0])

    # Of no matter where the system itself lives on.
    os.fsync, real_truncate = lambda handle: count(handle, handle), os.truncate
    sys.addaudithook(hook)
    return seen


def in_child(work, folder, *, number=None, seconds=None, seed=0):
    """Do something in a folder in a process of its own, and kill that.

    Returns:
        Its exit status, negative for a signal; the number of file operations, where it
        ended by itself; what it printed.
    """
    told, tell = os.pipe()
    with tempfile.TemporaryFile() as log:
        child = os.fork()
        if not child:
            status = 1
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                signal.setitimer(signal.ITIMER_REAL, seconds or _HANGS_AFTER_S)
                seen = _die_at(folder, number, random.Random(seed))
                work(folder)
                os.write(tell, str(len(seen)).encode())
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.close(tell)
        _, status = os.waitpid(child, 0)
        with open(told, "rb") as file:
            operations = int(file.read() or 0)
        log.seek(0)
        said = log.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(status), operations, said


def listing(folder):
    """Return what lies in a folder, but for TensorBoard's files: each start has one."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return sorted(name for name in found if "events.out" not in name)


class Campaign:
    """Kills of one case, each in a folder of its own.

    Attributes:
        operations: File operations of the command.
        kills: How many there were.
        faults: A line for each fault.
    """

    def __init__(self, case, root):
        self.case, self.root = case, root
        self.kills, self.faults = 0, []
        self.template = root / "template"
        self.template.mkdir(parents=True)
        self._do(case.before, self.template)
        self.old = self._state(self.template)
        twin = self._copy("twin")
        began = time.perf_counter()
        self.operations = self._do(case.run, twin)
        self.seconds = time.perf_counter() - began
        self.new, self.listing = self._state(twin), listing(twin)
        if self.new == self.old:
            raise AssertionError(f"{case.name} changes nothing")

    def _do(self, work, folder):
        status, operations, said = in_child(work, folder)
        if status:
            raise AssertionError(f"{self.case.name} ended with {status}:\n{said}")
        return operations

    def _state(self, folder):
        return self.case.state(folder)

    def _copy(self, name):
        return Path(shutil.copytree(self.template, self.root / name, symlinks=True))

    def kill(self, *, number=None, seconds=None, again=None, seed=0):
        """Kill the command, perhaps again, look, do it to the end, and look again."""
        folder = self._copy("killed")
        chance = {"number": number, "seconds": seconds, "again": again, "seed": seed}
        at = {"number": number, "seconds": seconds, "seed": seed}
        status, _, said = in_child(self.case.run, folder, **at)
        if status not in _KILLED:
            if status:  # it is too early to be killed and yet it failed
                self._fault(chance, f"ended with {status}", said)
            shutil.rmtree(folder)
            return
        self.kills += 1
        repeat = self.case.again or self.case.run
        if again is not None:
            self.kills += in_child(repeat, folder, number=again)[0] in _KILLED
        try:
            found = self._state(folder)
            told = found, self.old, self.new
            if found not in told[1:] and not self.case.fits(*told):
                self._fault(chance, f"left something else: {found}")
        except Exception as error:
            self._fault(chance, f"left something damaged: {error!r}")
        status, _, said = in_child(repeat, folder)
        if status:
            self._fault(chance, f"cannot be started again ({status})", said)
        elif (found := self._state(folder)) != self.new:
            self._fault(chance, f"made something else: {found}, not {self.new}")
        elif (left := listing(folder)) != self.listing:
            self._fault(chance, f"left {set(left) ^ set(self.listing)}")
        shutil.rmtree(folder)

    def _fault(self, chance, what, said=""):
        chance = {name: value for name, value in chance.items() if value is not None}
        self.faults.append(f"{self.case.name} {chance}: {what} {said[-2000:]}".strip())


@contextlib.contextmanager
def _next_one_of(folder, names):
    """Lock a copy of a folder, and so see it as the next process there would."""
    seen = folder.with_name("seen")
    if folder.exists():
        shutil.copytree(folder, seen, symlinks=True)
    try:
        with artifacts.locked(seen, names):
            yield seen
    finally:
        shutil.rmtree(seen, ignore_errors=True)


@contextlib.contextmanager
def _settled(folder, name):
    """Settle a copy of a folder as the next process does that writes a name there."""
    with _next_one_of(folder, ()) as seen:
        artifacts.settle(seen / name)
        yield seen


# What `gpt_tf.artifacts` offers

_NAMES = ("run.json", "data", "knowledge", "model", "notes.txt")


def _write_run(folder, seed, names):
    with artifacts.replaced(folder / "run.json", *_NAMES[1:]) as new:
        for name in names:
            (new / name).mkdir()
            (new / name / "numbers").write_text(f"{name} {seed}")
        (new.parent / "scratch").write_text("does not stay")
        artifacts.write_sealed_json(new / "run.json", {"seed": seed, "names": names})


def _start_run(folder, seed, names):
    with artifacts.locked(folder, _NAMES):
        _write_run(folder, seed, names)


def _state_of_run(folder):
    """Return the seed of a run that is whole, as the next process finds it."""
    facts = folder / "run.json"
    before = artifacts.read_json(facts) if facts.exists() else None  # never missing
    with _next_one_of(folder, _NAMES) as seen:
        if before is None:
            return sorted(artifacts.entries(seen)) or None
        for name in before["names"]:
            text = (seen / name / "numbers").read_text()
            if text != f"{name} {before['seed']}":
                raise AssertionError(f"{name} holds {text}")
        rest = artifacts.entries(seen) - {"run.json", *before["names"]}
        return before["seed"], sorted(rest)


def _write_pair(folder, text):
    path = folder / "gpt.tflite"
    with artifacts.replaced(path, "gpt.tflite.json") as new:
        (new / path.name).write_text(text)
        artifacts.write_file_manifest(new / path.name, "tflite")


def _state_of_pair(folder):
    path = folder / "gpt.tflite"
    artifacts.check_file_manifest(path)  # there may be none, but not another's
    return path.read_text()


def _write_folder(folder, text):
    with artifacts.atomic_folder(folder / "model", replace=True) as new:
        (new / "weights").write_text(text)
        artifacts.write_manifest(new, "model", ["weights"])


def _state_of_folder(folder):
    with _settled(folder, "model") as seen:
        artifacts.check_manifest(seen / "model", "model")
        return (seen / "model" / "weights").read_text()


def _fill(folder, power=2):
    from gpt_tf.distillation.teacher_cache import fill

    path = folder / "store"
    artifacts.settle(path)
    with contextlib.suppress(Exception):
        if artifacts.check_manifest(path, "knowledge")["power"] == power:
            return

    def make(step):
        return {"values": np.array([step**power])}

    fill(path, {"power": power}, {"values": 8}, 6, make, every=2, overwrite=True)


def _state_of_store(folder):
    with _settled(folder, "store") as seen:
        if not (seen / "store").exists():
            return None
        power = artifacts.check_manifest(seen / "store", "knowledge")["power"]
        values = np.fromfile(seen / "store" / "values", np.int64)
        np.testing.assert_array_equal(values, np.arange(6) ** power)
        return power


def _do_steps(folder, word):
    def first():
        path = folder / "made" / "first"
        before = path.read_text() if path.exists() else ""
        if before and word[0] not in before:
            raise AssertionError(f"goes on with {before}")
        artifacts.write_json(folder / "made" / "first", word[:1])
        with artifacts.atomic_file(folder / "made" / "first", "w") as file:
            file.write(word)

    def second():
        artifacts.write_json(folder / "second", (folder / "made" / "first").read_text())

    with artifacts.locked(folder, ("made", "second", "stages")):
        steps = Steps(folder, 2)
        inputs = {"word": word}
        remove = {"begin": lambda: artifacts.remove(folder / "made")}
        steps.run("first", "", inputs, ["made/first"], first, **remove)
        steps.run("second", "", inputs, ["second"], second)


def _state_of_steps(folder):
    path = folder / "second"
    return artifacts.read_json(path) if path.exists() else None


PRIMITIVES = [
    Case(
        "file",
        lambda folder: artifacts.write_json(folder / "a.json", "new"),
        lambda folder: artifacts.read_json(folder / "a.json"),
        lambda folder: artifacts.write_json(folder / "a.json", "old"),
    ),
    Case(
        "pair",
        lambda folder: _write_pair(folder, "new"),
        _state_of_pair,
        lambda folder: _write_pair(folder, "old"),
    ),
    Case(
        "folder",
        lambda folder: _write_folder(folder, "new"),
        _state_of_folder,
        lambda folder: _write_folder(folder, "old"),
    ),
    Case("first run", lambda folder: _start_run(folder, 2, ["data"]), _state_of_run),
    Case(
        "smaller run",
        lambda folder: _start_run(folder, 2, ["data"]),
        _state_of_run,
        lambda folder: _start_run(folder, 1, ["data", "knowledge", "model"]),
    ),
    Case(
        "larger run",
        lambda folder: _start_run(folder, 2, ["data", "knowledge", "model"]),
        _state_of_run,
        lambda folder: _start_run(folder, 1, ["data", "model"]),
    ),
    Case("stages", lambda folder: _do_steps(folder, "new"), _state_of_steps),
    Case(
        "other stages",
        lambda folder: _do_steps(folder, "new"),
        _state_of_steps,
        lambda folder: _do_steps(folder, "old"),
    ),
    Case(
        "removal",
        lambda folder: artifacts.remove(folder / "model"),
        lambda folder: (folder / "model" / "weights").exists(),
        lambda folder: _write_folder(folder, "old"),
    ),
]
STORES = [
    Case("first store", _fill, _state_of_store),
    Case("another store", lambda folder: _fill(folder, 3), _state_of_store, _fill),
]


# Commands


_WORDS = "the quick brown fox jumps over a lazy dog and runs away again".split()
_TINY = (
    *("--preset", "tiny", "--vocab-size", "262", "--embedding-dim", "8"),
    *("--num-heads", "2", "--num-layers", "2", "--context-length", "8"),
    *("--batch-size", "2", "--steps", "4", "--validate-every", "2"),
    *("--validation-batches", "1", "--checkpoint-every", "1"),
    *("--keep-checkpoints", "2", "--jit-compile", "off", "--strategy", "one_device"),
)
_ANEW = ("--steps", "2", "--checkpoint-every", "1", "--strategy", "one_device")


def _gpt_tf(*words):
    """Run the command line in this process, in a folder, without compiling."""

    def run(folder):
        import tensorflow as tf

        from gpt_tf import cli

        tf.config.run_functions_eagerly(True)
        os.chdir(folder)
        sys.argv = ["gpt-tf", *words]
        try:
            cli.main()
        except SystemExit as error:
            if error.code:
                raise AssertionError(f"status {error.code}") from None

    return run


def _in_turn(*works):
    def run(folder):
        for work in works:
            work(folder)

    return run


def _write_texts(folder):
    generator = random.Random(1)
    lines = (" ".join(generator.choices(_WORDS, k=8)) for _ in range(60))
    (folder / "text.txt").write_text(".\n".join(lines))
    # The preset of an optimisation wants a larger vocabulary.
    words = ["".join(generator.choices("abcdefghij", k=5)) for _ in range(300)]
    (folder / "more.txt").write_text("\n".join(generator.choices(words, k=1500)))
    rows = ({"prompt": word[:2], "completion": word[2:4]} for word in words[:8])
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def _stop_after(steps, work):
    """Do something that trains, and end it after so many steps as a kill does."""

    def run(folder):
        import tf_keras as keras

        from gpt_tf.training import loop

        class Stop(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                if self.model.optimizer.iterations == steps:
                    raise InterruptedError

        real = loop.train
        stopping = {"callbacks": [Stop()]}
        loop.train = lambda *a, **k: real(*a, **{**k, **stopping})
        with contextlib.suppress(InterruptedError):
            work(folder)

    return run


def _weights_of(folder):
    """Return a hash of a finished model's weights."""
    import h5py

    artifacts.check_manifest(folder, "model")
    digest = hashlib.sha256()
    with zipfile.ZipFile(folder / "model.keras") as archive:
        content = archive.read("model.weights.h5")
    with h5py.File(io.BytesIO(content)) as weights:
        weights.visititems(
            lambda name, item: (
                digest.update(name.encode() + item[()].tobytes())
                if isinstance(item, h5py.Dataset)
                else None
            )
        )
    return digest.hexdigest()


def _state_of_training(folder):
    """Return what a run has come to, as the next process that writes there finds it."""
    from gpt_tf.text.dataset import TokenFile
    from gpt_tf.training.run_folder import OWN_ENTRIES, read_run

    with _next_one_of(folder / "run", OWN_ENTRIES) as run:
        if not artifacts.entries(run):
            return None
        config = read_run(run)
        for split in ("train", "validation"):
            TokenFile.open(run / "data" / f"{split}.tokens")
        newest = ""
        for newest in sorted((run / "checkpoints").glob("step-*")):
            artifacts.check_manifest(newest, "checkpoint")
        weights = _weights_of(run / "model") if (run / "model").exists() else None
        return {"course": config, "newest": Path(newest).name, "weights": weights}


def _is_on_the_way(found, old, new):
    """Return whether a run is between the old one, or nothing, and the new one."""
    if not found or found["course"] != new["course"] or found["weights"]:
        return False
    goes_on = old is not None and old["course"] == new["course"]
    return not goes_on or found["newest"] >= old["newest"]


def _state_of_knowledge(folder):
    from gpt_tf.distillation.teacher_cache import KnowledgeStore

    with _settled(folder, "store") as seen:
        if not (seen / "store").exists():
            return None
        return KnowledgeStore.open(seen / "store").manifest["sha256"]


def _extract_unless_there(teacher, *words):
    """Extract knowledge; what is complete is refused, as it should be."""

    def run(folder):
        extract = _gpt_tf("distil", "--teacher", teacher, "--extract", "store", *words)
        try:
            extract(folder)
        except AssertionError:
            if "--overwrite" in words or not (folder / "store").exists():
                raise

    return run


def _state_of_export(name):
    def state(folder):
        path = folder / name
        if not path.exists():
            return None
        manifest = artifacts.check_file_manifest(path)
        return manifest and manifest.get("tflite_sha256", manifest["sha256"])

    return state


def _state_of_report(folder):
    from gpt_tf.evaluation.report import read_report

    if not (folder / "report.json").exists():
        return None
    entries = read_report(folder / "report.json")["entries"]
    return [(entry["name"], entry["accuracy"]) for entry in entries]


def _state_of_explanation(folder):
    path = folder / "why" / "explanation.json"
    return artifacts.read_json(path) if path.exists() else None


def _state_of_page(folder):
    from gpt_tf.export import integrity

    with _settled(folder, "site") as seen:
        if not (seen / "site").exists():
            return None
        facts = artifacts.read_json(seen / "site" / "model.json")
        model = (seen / "site" / facts["model"]["file"]).read_bytes()
        integrity.read_seal(model)
        if hashlib.sha256(model).hexdigest() != facts["model"]["sha256"]:
            raise AssertionError("a model of another page")
        return facts["prompt"], facts["model"]["sha256"]


def _save_session(gpt, text):
    def work(folder):
        from gpt_tf.edge import EdgeGPT

        with EdgeGPT(gpt, num_threads=1) as edge:
            edge.prefill(text)
            edge.save_session(folder / "text.session")

    return work


def _state_of_session(folder):
    from gpt_tf.edge import session_file
    from gpt_tf.export import integrity

    path = folder / "text.session"
    if not path.exists():
        return None
    return integrity.read_seal(path.read_bytes(), prefix=session_file.PREFIX)["ids"]


def _state_of_huggingface(folder):
    import safetensors.numpy

    if not (folder / "hf").exists():
        return None
    tensors = safetensors.numpy.load_file(folder / "hf" / "model.safetensors")
    artifacts.read_json(folder / "hf" / "config.json")
    return {name: array.tobytes() for name, array in tensors.items()}


def _state_of_optimization(folder):
    from gpt_tf.evaluation.report import read_report
    from gpt_tf.workflow.optimization import _OWN_ENTRIES

    with _next_one_of(folder / "best", _OWN_ENTRIES) as out:
        if not (out / "report.json").exists():
            return None
        report = read_report(out / "report.json")
        artifacts.check_file_manifest(out / "gpt.litertlm")
        return [(entry["name"], entry["accuracy"]) for entry in report["entries"]]


def commands(base):
    """Return every command that writes, over what a folder of inputs holds."""
    text, run, gpt = (str(base / name) for name in ("text.txt", "run", "gpt.litertlm"))
    train = _gpt_tf("train", *_TINY, "--corpus", text, "--out", "run")
    again = _gpt_tf(
        *("train", *_TINY, "--corpus", text, "--out", "run", "--resume-or-start")
    )
    resume = _gpt_tf("train", "--resume", "--out", "run")
    other = ("--seed", "7", "--overwrite", "--out", "run")
    quantize = ("quantize", "--model", run, *_ANEW, "--out", "run")
    distil = (
        *("distil", "--teacher", run, "--student-layers", "1", *_ANEW),
        *("--out", "run", "--resume-or-start"),
    )
    finetune = (
        *("finetune", "--model", run, "--data", str(base / "rows.jsonl"), *_ANEW),
        *("--batch-size", "2", "--validate-every", "2"),
        *("--out", "run", "--resume-or-start"),
    )
    web = _gpt_tf("web", "--model", gpt, "--out", "site")
    other_page = _gpt_tf("web", "--model", gpt, "--out", "site", "--prompt", "the")
    training = {"state": _state_of_training, "fits": _is_on_the_way}
    cases = [
        Case("train", train, again=again, **training),
        Case("train --resume-or-start", again, **training),
        Case(
            "train --overwrite",
            _gpt_tf("train", *_TINY, "--corpus", text, *other),
            before=train,
            **training,
        ),
        Case("train --resume", resume, before=_stop_after(2, train), **training),
        Case("quantize", _gpt_tf(*quantize, "--resume-or-start"), **training),
        Case(
            "quantize --overwrite",
            _gpt_tf(*quantize, "--overwrite"),
            before=train,
            **training,
        ),
        Case("finetune", _gpt_tf(*finetune), **training),
        Case("finetune with LoRA", _gpt_tf(*finetune, "--lora-rank", "2"), **training),
        Case("distil", _gpt_tf(*distil), **training),
        Case(
            "distil of other tokens",
            _gpt_tf(*distil, "--student-vocab-size", "259"),
            **training,
        ),
        Case(
            "distil of written text",
            _gpt_tf(*distil, "--written-tokens", "40"),
            **training,
        ),
        Case(
            "distil --extract",
            _extract_unless_there(run, "--top-k", "4", "--passes", "2"),
            _state_of_knowledge,
            share=2.0,
        ),
        Case(
            "distil --extract --overwrite",
            _extract_unless_there(run, "--top-k", "4", "--overwrite"),
            _state_of_knowledge,
            _extract_unless_there(run, "--top-k", "3"),
        ),
        Case(
            "optimize",
            _gpt_tf(
                *("optimize", "--preset", "tiny", "--corpus", str(base / "more.txt")),
                *("--steps", "2", "--student-layers", "1", "--student-steps", "2"),
                *("--out", "best"),
                *("--mode", "dynamic_int8", "--evaluated-tokens", "60"),
                *("--prompt-tokens", "4", "--new-tokens", "4", "--repetitions", "1"),
                *("--explained-prompts", "0"),
            ),
            _state_of_optimization,
            share=0.5,
        ),
        Case(
            "evaluate",
            _gpt_tf(
                *("evaluate", gpt, "--corpus", run, "--max-tokens", "60"),
                *("--no-parse", "--out", "report.json"),
            ),
            _state_of_report,
        ),
        Case(
            "benchmark",
            _gpt_tf(
                *("benchmark", gpt, "--quick", "--requests", "1", "--repetitions", "1"),
                *("--prompt-tokens", "2", "--new-tokens", "2", "--out", "report.json"),
            ),
            _state_of_report,
            share=0.5,
        ),
        Case(
            "explain",
            _gpt_tf(
                *("explain", gpt, "--prompt", "the quick", "--samples", "20"),
                *("--method", "lime", "--out", "why"),
            ),
            _state_of_explanation,
        ),
        Case("to_huggingface", _to_huggingface(run), _state_of_huggingface),
        Case("web", web, _state_of_page),
        Case("web over a page", web, _state_of_page, other_page),
        Case("session", _save_session(gpt, [1, 2, 3]), _state_of_session),
        Case(
            "session over another",
            _save_session(gpt, [1, 2, 3]),
            _state_of_session,
            _save_session(gpt, [4, 5]),
        ),
    ]
    for name in ("gpt.tflite", "gpt.litertlm"):
        export = ("export", "--model", run, "--out", name, "--mode")
        cases += [
            Case(f"export {name}", _gpt_tf(*export, "float32"), _state_of_export(name)),
            Case(
                f"export over {name}",
                _gpt_tf(*export, "dynamic_int8"),
                _state_of_export(name),
                _gpt_tf(*export, "float32"),
                # A file whose manifest is on its way is known by its seal.
                fits=lambda found, old, new: found is None,
            ),
        ]
    return cases


def _to_huggingface(run):
    def work(folder):
        from gpt_tf.models.interop import to_huggingface
        from gpt_tf.training.loop import load_model

        if not (folder / "hf").exists():
            to_huggingface(load_model(run)[0], folder / "hf")
        else:
            artifacts.settle(folder / "hf")

    return work


def kill_in_turn(cases, root, every):
    """Kill at one of so many operations, now and then another one after it."""
    generator, campaigns = random.Random(1), []
    for index, case in enumerate(cases):
        campaign = Campaign(case, root / case.name)
        for number in range(1 + index % every, campaign.operations + 1, every):
            again = generator.randint(1, campaign.operations)
            is_twice = generator.random() < 0.25
            campaign.kill(number=number, again=again if is_twice else None)
        campaigns.append(campaign)
    return campaigns


def kill_at_random(cases, root, count, seed):
    """Kill commands so often altogether, nine of ten times at a file operation."""
    generator, campaigns = random.Random(seed), []
    shares = sum(case.share for case in cases)
    for case in cases:
        began = time.perf_counter()
        campaign = Campaign(case, root / case.name)
        wanted = max(1, round(count * case.share / shares))
        for _ in range(3 * wanted):
            if campaign.kills >= wanted:
                break
            at = {"number": generator.randint(1, campaign.operations)}
            if generator.random() < 0.1:
                at = {"seconds": generator.uniform(0.01, campaign.seconds)}
            campaign.kill(**at, seed=generator.randrange(2**32))
        campaigns.append(campaign)
        print(
            f"{case.name}: {campaign.kills} kills at {campaign.operations} operations, "
            f"{len(campaign.faults)} faults, {time.perf_counter() - began:.0f} s",
            *campaign.faults,
            sep="\n",
            flush=True,
        )
    return campaigns


def _primitives(is_wanted):
    yield from filter(is_wanted, PRIMITIVES)
    if stores := [*filter(is_wanted, STORES)]:
        # With TensorFlow in memory, forks take much longer.
        import gpt_tf.distillation.teacher_cache  # noqa: F401

        yield from stores


def _make_inputs(base):
    """Fill a folder with what the commands read."""
    base.mkdir()
    _write_texts(base)
    corpus = ("--corpus", str(base / "text.txt"))
    made = _in_turn(
        _gpt_tf("train", *_TINY, *corpus, "--out", "run"),
        _gpt_tf("export", "--model", "run", "--out", "gpt.litertlm"),
    )
    status, _, said = in_child(made, base)
    if status:
        raise AssertionError(said)


def main():
    """Kill as often as the command line says and report."""
    count, seed, *names = sys.argv[1:]
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

    def is_wanted(case):
        return not names or case.name in names

    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        if not int(count):
            campaigns = kill_in_turn(_primitives(is_wanted), root, int(seed))
        else:
            # Imported and not used: a process that is to be forked must not compute.
            import gpt_tf.distillation.teacher_cache  # noqa: F401

            _make_inputs(root / "base")
            cases = [*filter(is_wanted, commands(root / "base"))]
            campaigns = kill_at_random(cases, root, int(count), int(seed))
    faults = [fault for campaign in campaigns for fault in campaign.faults]
    kills = sum(campaign.kills for campaign in campaigns)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(*faults, sep="\n")
    print(f"{used.ru_utime + used.ru_stime:.0f} s of CPU")
    print(f"{kills} kills, {len(faults)} faults")
    sys.exit(bool(faults))


# Of a process of its own: one that has computed with TensorFlow cannot be forked.


def _campaign(*words, before=""):
    program = (
        f"{before}\nimport runpy\nrunpy.run_path({__file__!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_nothing_is_lost_stuck_or_left_by_a_kill_at_a_file_operation():
    done = _campaign(0, 5)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-4]) > 80


def test_a_swap_that_nobody_undoes_is_noticed():
    before = "from gpt_tf import artifacts\nartifacts._settle = lambda path: None"
    done = _campaign(0, 3, "smaller run", before=before)
    assert done.returncode == 1
    assert "left" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("words", [(0, 1), (COUNT, 1)])
def test_none_of_all_operations_and_commands_loses_anything_when_killed(words):
    done = _campaign(*words)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    main()
