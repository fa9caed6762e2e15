"""The whole way as one command: train, distil, quantise, export, measure, choose.

A folder holds it all; `gpt_tf.workflow.steps` knows what of it is done.

optimize.json       the configuration, but for the budgets, which may change
runs/               teacher, student-2, student-2-int8, ...: each a run's folder
files/              teacher-float32.litertlm, student-2-int8.litertlm, ...
measurements/       accuracy.json, latency.json, explanations.json
stages/             what each stage was made of, and hashes of what it made
report.html, report.json, *.png
gpt.litertlm        the file that was chosen
"""

import contextlib
import dataclasses
import hashlib
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gpt_tf import artifacts
from gpt_tf.advisor.constraints import Budgets, objective_of, scenario_of
from gpt_tf.advisor.estimate import count_parameters, refuse_impossible
from gpt_tf.advisor.ranking import recommend
from gpt_tf.edge.runtime import EdgeGPT
from gpt_tf.errors import InputError
from gpt_tf.evaluation import report as reports
from gpt_tf.evaluation.accuracy import measure_accuracies
from gpt_tf.evaluation.code_validity import find_prompts, measure_code_validity
from gpt_tf.evaluation.hardware import describe_machine
from gpt_tf.evaluation.latency import compare_latencies
from gpt_tf.evaluation.models import describe, open_model
from gpt_tf.evaluation.text import DEFAULT_CORPUS, held_out_text
from gpt_tf.explain.faithfulness import compare_explanations, deletion_test, prompts_of
from gpt_tf.export.from_run import export_trained
from gpt_tf.progress import StepProgress
from gpt_tf.reporting import plots
from gpt_tf.reporting.render import publish
from gpt_tf.settings import arguments
from gpt_tf.settings.configuration import differences
from gpt_tf.training import loop
from gpt_tf.training.config import PRESETS, TrainingConfig
from gpt_tf.training.preparation import open_text
from gpt_tf.training.run_folder import model_file, read_run
from gpt_tf.workflow.config import OptimizationConfig
from gpt_tf.workflow.steps import FOLDER as STAGES_FOLDER
from gpt_tf.workflow.steps import Stages

CONFIG_NAME = "optimize.json"
# Fields that say which text is learnt from and what of it is held out.
_TEXT = ("corpus", "validation", "separator")
_MODEL_FILES = ("model.keras", "tokenizer.json", artifacts.MANIFEST_NAME)
CHOSEN_NAME = "gpt.litertlm"
_OWN_ENTRIES = (
    *(CONFIG_NAME, "runs", "files", "measurements", STAGES_FOLDER, CHOSEN_NAME),
    *(f"{CHOSEN_NAME}.json", "report.html", "report.json"),
    *(f"{name}.png" for name in plots.PLOTS),
)
REFERENCE = "teacher-float32"
_PYTHON_PROMPT = "    def __init__(self"
_PROMPT_CHARACTERS = 40
_SAMPLE_TOKENS = 100
# Prompts to explain are this long, and spread over so many times their own text.
_EXPLAINED_TOKENS = 24
_EXPLAINED_FROM = 8


class File(NamedTuple):
    """A file to make.

    Attributes:
        name: Of the file and of its entry in the report.
        source: Name of the run that it is exported from.
        mode: How it is quantised.
        num_layers: Blocks of its model.
        made_from: A sentence about its model.
    """

    name: str
    source: str
    mode: str
    num_layers: int
    made_from: str

    @property
    def path(self) -> str:
        """Where it lies in the folder."""
        return f"files/{self.name}.litertlm"


def optimize(
    config: OptimizationConfig | dict | None = None,
    out: str | os.PathLike = "runs/optimized",
    *,
    budgets=None,
    scenario: str = "custom",
    prefer: str | None = None,
    update: bool = False,
    overwrite: bool = False,
    command: str | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> dict:
    """Make every file that may suit, measure all of them, and choose one.

    What was done before in `out`, by a process that was killed for example, is not done
    again while its inputs are the same.

    Args:
        config: What is made, and how it is measured.
        out: Folder of it all.
        budgets: A `gpt_tf.advisor.constraints.Budgets`, or None for the scenario's.
        scenario, prefer: As for `gpt_tf.advisor.ranking.recommend`.
        update: Go on in a folder of another configuration; what that does not concern
            is kept.
        overwrite: Begin anew in a folder that holds another optimisation.
        command: The command line, for the report.
        on_notice: Takes a line per stage; they are printed unless given.

    Returns:
        The report, as `gpt_tf.evaluation.report` describes it. Its `recommendation`
        names no choice where nothing fits the budgets.

    Raises:
        InputError: A value, the corpus or the model cannot be used; the folder is in
            use, is somebody else's, or has another configuration.

    Example:
        >>> report = optimize({"corpus": "texts/"}, "runs/texts")
        >>> report["recommendation"]["choice"]
        'student-2-int8'

    Reference: article 6.1 to 6.3.
    """
    config = OptimizationConfig.of(config)
    out = arguments.path("out", out)
    update = arguments.switch("update", update)
    overwrite = arguments.switch("overwrite", overwrite)
    arguments.text("command", command, or_none=True)
    if update and overwrite:
        raise InputError(
            "`update` keeps what is there and `overwrite` does not. Received: both. "
            "Choose one."
        )
    _refuse_foreign_folder(out)
    say = on_notice or print
    with artifacts.locked(out, _OWN_ENTRIES):
        if not (update or overwrite):
            _refuse_other_options(out, config)
        wanted = {"budgets": budgets, "scenario": scenario, "prefer": prefer}
        optimization = _Optimization(config, out, wanted, say)
        # All that can be refused was: from here on the folder is written to.
        others = _OWN_ENTRIES[1:] if overwrite else ()
        with artifacts.replaced(out / CONFIG_NAME, *others) as new:
            artifacts.write_json(new / CONFIG_NAME, config.get_config())
        return optimization.run(command)


def _refuse_foreign_folder(out):
    """Refuse a folder in which something lies that is not an optimisation's."""
    if not out.is_dir() or (out / CONFIG_NAME).is_file():
        return
    others = artifacts.entries(out) - set(_OWN_ENTRIES)
    if others:
        raise InputError(
            f"The folder {out} already holds something else, {min(others)} for "
            "example. Choose another."
        )


def _refuse_other_options(out, config):
    """Refuse a folder that has another configuration, and say in what it differs."""
    path = out / CONFIG_NAME
    if not path.is_file():
        return
    there = artifacts.read_json(path, dict)
    # As JSON gives it back, tuples are lists.
    asked = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in config.get_config().items()
    }
    if differences(there, asked):  # a field that is missing there was not known then
        raise InputError(
            f"The optimisation in {out} expects the options that it was started with. "
            f"Received: others. It has {differences(there, asked)}. Give these again, "
            "add --update to do what the change concerns, or --overwrite to begin anew."
        )


class _Optimization:
    """One optimisation: its stages in their order.

    Making one refuses whatever cannot be used, and writes nothing.
    """

    def __init__(self, config, out, wanted, say):
        self.config = config
        self.out = out
        self.say = say  # takes lines for the user
        objective_of(wanted["scenario"], wanted["prefer"])  # refuses what there is not
        own = scenario_of(wanted["scenario"]).budgets
        self.budgets = Budgets.of(wanted["budgets"]).over(own)
        self.wanted = {**wanted, "budgets": self.budgets}  # of the recommendation
        self.teacher = Path(config.model) if config.model else out / "runs" / "teacher"
        self.notes = []
        self.course = self._course()
        self.request = self._request()
        self.layers = self._students()
        self.files = self._files()
        self.machine = describe_machine()
        self.sizes = {file.name: self._sizes_of(file) for file in self.files}
        smallest = min(self.sizes.values(), key=count_parameters)
        refuse_impossible(self.budgets, smallest, self.machine)
        self.text_hash = self._hash_of_text()
        self.stages = Stages(out, self._plan(), say)

    # What is to come

    def _hash_of_text(self):
        """Return the SHA-256 of the text that is learnt from."""
        tokens = self.teacher / "data" / "train.tokens"
        is_ready = self.config.model is not None and tokens.is_file()
        if is_ready and self.config.corpus is None:
            return artifacts.sha256_of(tokens)
        # Training will say what there is to say of it.
        found = open_text(self.course, _silent).describe()["sha256"]
        return ", ".join(
            [found, *filter(None, (self.course.validation, self.course.separator))]
        )

    def _course(self):
        """Return the configuration of the run that trains, or trained, the teacher."""
        config = self.config
        given = {name: getattr(config, name) for name in _TEXT}
        given = {} if config.corpus is None else given
        if config.model is None:
            if config.steps is not None:
                given["steps"] = config.steps
            preset = PRESETS[config.preset]
            return dataclasses.replace(preset, seed=config.seed, **given)
        if config.steps is not None:
            raise InputError(
                "`steps` are those of a teacher that is trained. Received: a trained "
                f"`model` too, {self.config.model}. Leave one out."
            )
        if not model_file(self.teacher).is_file():
            raise InputError(
                f"Expected a trained model at {self.teacher}; there is none. Name a "
                "folder that `gpt-tf train` finished."
            )
        if (self.teacher / "run.json").is_file():
            return dataclasses.replace(read_run(self.teacher), **given)
        if config.corpus is None:
            raise InputError(
                f"A model without its run expects a corpus. Received: none, with "
                f"{self.teacher}. Name one, python-stdlib for example."
            )
        with open_model(self.teacher) as subject:
            sizes = subject.config
        known = {field.name for field in dataclasses.fields(TrainingConfig)}
        shape = {name: sizes[name] for name in known & sizes.keys()}
        return TrainingConfig(**{**shape, **given})

    def _request(self):
        """Return prompt and new tokens of the request that is timed."""
        asked = (self.config.prompt_tokens, self.config.new_tokens)
        context = self.course.context_length
        if sum(asked) <= context:
            return asked
        half = context // 2
        self.notes.append(
            f"The context of {context} tokens has no room for a request of {asked[0]} "
            f"prompt tokens and {asked[1]} new ones: {half} and {half} were timed."
        )
        return half, half

    def _students(self):
        blocks, wanted = self.course.num_layers, self.config.students
        if wanted is None:
            wanted = sorted({blocks // 2, blocks // 4} - {0}, reverse=True)
            if not wanted:
                self.notes.append(
                    "The teacher has one block: no smaller student was distilled."
                )
        for count in wanted:
            if count > blocks:
                raise InputError(
                    f"A student expects at most the teacher's {blocks} blocks. "
                    f"Received: {count}. Choose fewer."
                )
        return wanted

    def _files(self):
        own = self.course.num_layers
        made = [File(REFERENCE, "teacher", "float32", own, "the teacher itself")]
        for mode in self.config.modes:
            if mode != "float32":
                sentence = "the teacher, quantised after training"
                made.append(File(f"teacher-{mode}", "teacher", mode, own, sentence))
        for count in self.layers:
            student = f"student-{count}"
            blocks = "1 block" if count == 1 else f"{count} blocks"
            for mode in self.config.modes:
                source, sentence = student, f"a student of {blocks}, distilled"
                if mode == "int8":
                    source = f"{student}-int8"
                    sentence += ", then trained on with rounded numbers (QAT)"
                made.append(File(f"{student}-{mode}", source, mode, count, sentence))
        return made

    @property
    def student_steps(self):
        return self.config.student_steps or max(1, self.course.steps // 3)

    def _plan(self):
        """Return every stage with seconds as two cores need them, roughly."""
        course = self.course
        width, blocks = course.embedding_dim, course.num_layers
        parameters = 12 * blocks * width**2 + course.vocab_size * width
        tokens = course.batch_size * course.context_length
        step = 6 * parameters * tokens / 1e11
        plan = {}
        if self.config.model is None:
            plan["teacher"] = 15 + course.steps * step
        for count in self.layers:
            share = (count + 0.5) / (blocks + 0.5)
            plan[f"student-{count}"] = 20 + self.student_steps * step * (share + 0.4)
            if "int8" in self.config.modes:
                plan[f"student-{count}-int8"] = 20 + self.student_steps * step / 5
        for file in self.files:
            plan[f"file-{file.name}"] = 5 + parameters / 1e6
        plan["accuracy"] = len(self.files) * (1 + parameters / 1e6)
        plan["latency"] = len(self.files) * 12.0
        if self.config.explained_prompts:
            plan["explanations"] = self.config.explained_prompts * 1.5
        return plan

    # Doing it

    def run(self, command):
        """Do what is not done; return the report."""
        if self.config.model is None:
            self._train_teacher()
        for count in self.layers:
            self._distil(count)
        for file in list(self.files):
            self._export(file)
        text = self._held_out_text()
        accuracies = self._measure_accuracy(text)
        latencies = self._measure_latency()
        report = reports.new_report(
            [self._entry(file, accuracies, latencies) for file in self.files],
            command=command,
            machine=self.machine,
            corpus=accuracies["corpus"],
            budgets={name: getattr(self.budgets, name) for name in reports.BUDGETS},
            reference=REFERENCE,
        )
        report["recommendation"] = recommend(report, **self.wanted)
        self._keep_the_chosen(report["recommendation"], text)
        report["explanations"] = self._explain(report["recommendation"], text)
        report["stages"] = [done._asdict() for done in self.stages.done]
        report["notes"] = self.notes
        publish(report, self.out)
        return report

    def _train_teacher(self):
        run = self.out / "runs" / "teacher"
        inputs = {"course": self.course.get_config(), "corpus": self.text_hash}
        self._train(
            "teacher",
            "the teacher",
            inputs,
            lambda how: loop.train(self.course, run, **how),
            f"gpt-tf train --preset {self.config.preset} "
            f"{_words(self.course)}--steps {self.course.steps} "
            f"--seed {self.config.seed} --out {_word(run)}",
        )

    def _distil(self, count):
        name = f"student-{count}"
        run = self.out / "runs" / name
        course = {"steps": self.student_steps, "seed": self.config.seed}
        inputs = {
            "teacher": artifacts.sha256_of(model_file(self.teacher)),
            "blocks": count,
            "corpus": self.text_hash,
            **course,
        }
        text = ""
        if self.config.model is not None and self.config.corpus is not None:
            course |= {name: getattr(self.config, name) for name in _TEXT}
            text = _words(self.course)
        if not (self.teacher / "run.json").is_file():
            # There is no course to take over: windows that the model has room for.
            length = min(TrainingConfig.context_length, self.course.context_length)
            course["context_length"] = length
            text += f"--context-length {length} "
        self._train(
            name,
            f"a student of {count} of its {self.course.num_layers} blocks",
            inputs,
            lambda how: loop.distil(
                self.teacher, run, {"num_layers": count}, **course, **how
            ),
            f"gpt-tf distil --teacher {_word(self.teacher)} --student-layers {count} "
            f"{text}--steps {self.student_steps} --seed {self.config.seed} "
            f"--out {_word(run)}",
        )
        if "int8" in self.config.modes:
            self._quantize(name)

    def _quantize(self, student):
        name = f"{student}-int8"
        run, source = self.out / "runs" / name, self.out / "runs" / student
        self._train(
            name,
            f"{student}, trained on with rounded numbers",
            {"student": artifacts.sha256_of(model_file(source))},
            lambda how: loop.quantize(source, run, **how),
            f"gpt-tf quantize --model {_word(source)} --method qat --out {_word(run)}",
        )

    def _train(self, name, title, inputs, train, command):
        """Train in a run's folder, from its newest checkpoint where it was begun."""
        self.stages.run(
            name,
            inputs,
            [f"runs/{name}/model/{file}" for file in _MODEL_FILES],
            lambda: train({"on_notice": self.say, "resume_or_start": True}),
            begin=lambda: artifacts.remove(self.out / "runs" / name),
            title=title,
            command=command,
        )

    def _export(self, file):
        source = self.out / "runs" / file.source
        if file.source == "teacher":
            source = self.teacher
        stage = f"file-{file.name}"
        inputs = {"model": artifacts.sha256_of(model_file(source)), "mode": file.mode}
        is_run = (source / "data" / "train.tokens").is_file()
        if not is_run:
            # Ranges are measured on this text.
            inputs["corpus"] = self.text_hash
        text = "" if is_run else _words(self.course, ["corpus"])

        def work():
            typical = None if is_run else open_text(self.course, _silent)
            export_trained(
                source,
                self.out / file.path,
                file.mode,
                corpus=typical,
                on_notice=_silent,
            )

        try:
            self.stages.run(
                stage,
                inputs,
                [file.path, f"{file.path}.json"],
                work,
                title=f"{file.name}, exported and verified",
                command=f"gpt-tf export --model {_word(source)} --mode {file.mode} "
                f"{text}--out {_word(self.out / file.path)}",
            )
        except InputError as error:
            if file.name == REFERENCE:
                raise
            self.stages.skip(stage)
            self.files.remove(file)
            self.notes.append(f"{file.name} could not be exported: {error}")
            self.say(f"{file.name} could not be exported: {error}")

    # Measuring

    def _held_out_text(self):
        """Return text that no model of ours has learnt from."""
        own = self.out / "runs" / "teacher" if self.config.model is None else None
        if own is None and self.config.corpus is None:
            own = self.teacher
        return held_out_text(
            own or self.course.corpus,
            validation_fraction=self.course.validation_fraction,
            validation=self.course.validation,
            separator=self.course.separator,
            on_notice=self.say,
        )

    def _is_python(self, text):
        # A run's text has lost the names of its files.
        return text.is_python or self.course.corpus == DEFAULT_CORPUS

    def _measure_accuracy(self, text):
        config = self.config
        inputs = {
            "text": _hash_of(text),
            "tokens": config.evaluated_tokens,
            "seed": config.seed,
        }

        is_python = self._is_python(text)

        def measure():
            with contextlib.ExitStack() as stack:
                opened = {
                    file.name: stack.enter_context(EdgeGPT(self.out / file.path))
                    for file in self.files
                }
                progress = stack.enter_context(StepProgress("held-out blocks"))
                found = measure_accuracies(
                    opened,
                    REFERENCE,
                    text,
                    max_tokens=config.evaluated_tokens,
                    seed=config.seed,
                    on_progress=progress.update,
                    on_notice=self._note,
                )
                functions = find_prompts(text, seed=config.seed) if is_python else []
                for name, subject in opened.items() if functions else ():
                    found[name]["parsed"] = measure_code_validity(
                        subject, functions, seed=config.seed, name=name
                    )
            return {
                "corpus": {
                    "name": text.name,
                    "split": text.split,
                    "bytes": found[REFERENCE]["bytes"],
                    "tokens": found[REFERENCE]["tokens"],
                },
                "entries": found,
            }

        return self._measurement("accuracy", "accuracy of every file", inputs, measure)

    def _measure_latency(self):
        config, machine = self.config, self.machine
        prompt_tokens, new_tokens = self.request
        inputs = {
            "cpu": machine["cpu"],
            "cores": machine["cores"],
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "repetitions": config.repetitions,
        }

        def measure():
            with StepProgress("turns") as progress:
                found = compare_latencies(
                    [self.out / file.path for file in self.files],
                    prompt_tokens=prompt_tokens,
                    new_tokens=new_tokens,
                    repetitions=config.repetitions,
                    read_bytes_per_s=machine["read_bytes_per_s"],
                    on_progress=lambda done, total, _: progress.update(done, total),
                )
            names = [file.name for file in self.files]
            return dict(zip(names, found, strict=True))

        return self._measurement("latency", "speed of every file", inputs, measure)

    def _measurement(self, name, title, inputs, measure):
        """Measure files, unless these very files were measured in the same way."""
        path = f"measurements/{name}.json"
        inputs = inputs | {
            "files": {
                file.name: artifacts.sha256_of(self.out / file.path)
                for file in self.files
            }
        }

        def work():
            artifacts.write_json(self.out / path, measure())

        self.stages.run(name, inputs, [path], work, title=title)
        return artifacts.read_json(self.out / path)

    def _entry(self, file, accuracies, latencies):
        with EdgeGPT(self.out / file.path) as gpt:
            described = describe(self.out / file.path, gpt)
        return reports.new_entry(
            described,
            name=file.name,
            path=file.path,
            made_from=file.made_from,
            accuracy=accuracies["entries"][file.name],
            latency=latencies[file.name],
        )

    # Choosing

    def _sizes_of(self, file):
        """Return what the model of a file will be, before there is one."""
        sizes = dataclasses.asdict(self.course)
        sizes["feedforward_dim"] = (
            sizes["feedforward_dim"] or 4 * sizes["embedding_dim"]
        )
        if file.source != "teacher":
            sizes["num_layers"] = int(file.source.split("-")[1])
        return sizes

    def _keep_the_chosen(self, recommendation, text):
        """Copy the chosen file to its place, with a sample of what it writes."""
        place = self.out / CHOSEN_NAME
        beside = artifacts.file_manifest_path(place)
        if recommendation["choice"] is None:
            # Not the choice of another budget under the name of this one.
            beside.unlink(missing_ok=True)
            place.unlink(missing_ok=True)
            return
        chosen = self.out / self._file(recommendation["choice"]).path
        with artifacts.replaced(place, beside.name) as new:
            shutil.copyfile(chosen, new / place.name)
            shutil.copyfile(artifacts.file_manifest_path(chosen), new / beside.name)
        prompt = _PYTHON_PROMPT if self._is_python(text) else _beginning_of(text)
        with EdgeGPT(place) as gpt:
            written = gpt.generate(
                prompt,
                max_new_tokens=_SAMPLE_TOKENS,
                temperature=0.8,
                seed=self.config.seed,
            )
        recommendation["sample"] = {"prompt": prompt, "text": written}

    def _file(self, name):
        return next(file for file in self.files if file.name == name)

    def _explain(self, recommendation, text):
        """Test whether explanations of the chosen file, and its model, are any good."""
        name, count = recommendation["choice"], self.config.explained_prompts
        if not count:
            return None
        if name is None:
            self.stages.skip("explanations")
            self.notes.append("No file was chosen, so that none was explained.")
            return None
        file = self._file(name)
        source = file.source.removesuffix("-int8")
        run = self.teacher if source == "teacher" else self.out / "runs" / source
        inputs = {
            "file": artifacts.sha256_of(self.out / file.path),
            "model": artifacts.sha256_of(model_file(run)),
            "text": _hash_of(text),
            "prompts": count,
            "seed": self.config.seed,
        }
        path = "measurements/explanations.json"

        def work():
            with open_model(run) as model, EdgeGPT(self.out / file.path) as gpt:
                found = self._explanations(model, gpt, file, text)
            artifacts.write_json(self.out / path, found)

        try:
            self.stages.run(
                "explanations",
                inputs,
                [path],
                work,
                title=f"explanations of {file.name} put to the test",
            )
        except ModuleNotFoundError as error:
            if error.name not in ("lime", "shap"):
                raise
            self.stages.skip("explanations")
            self._note(
                f"Explanations were left out: they expect the package {error.name}. "
                "Install it with: pip install 'gpt-tf[explain]'"
            )
            return None
        return artifacts.read_json(self.out / path)

    def _explanations(self, model, gpt, file, text):
        count, seed = self.config.explained_prompts, self.config.seed
        length = min(_EXPLAINED_TOKENS, gpt.context_length)
        tokens = []
        for document in text.documents:
            tokens += gpt.tokenizer.encode(document.text)
            if len(tokens) >= _EXPLAINED_FROM * count * length:
                break
        prompts = prompts_of(tokens, count, length)
        with StepProgress("prompts") as progress:
            counter = _Counter(progress, 4 * len(prompts))
            found = deletion_test(
                model, prompts, ["attention", "gradient"], seed=seed, on_step=counter
            )
            of_file = deletion_test(
                gpt, prompts, ["lime", "shap"], seed=seed, on_step=counter
            )
            found["methods"] |= of_file["methods"]
            for method in ("lime", "shap"):
                found["compression"][method] = compare_explanations(
                    model,
                    gpt,
                    prompts,
                    method,
                    seed=seed,
                    names=("its model in Keras", file.name),
                    on_step=counter,
                )
        return found

    def _note(self, line):
        self.notes.append(line)
        self.say(line)


class _Counter:
    """Counts the prompts of several tests on one bar."""

    def __init__(self, progress, total):
        self.progress, self.total = progress, total
        self.done = 0

    def __call__(self, done, total):
        self.done += 1
        self.progress.update(self.done, self.total)


def _hash_of(text):
    digest = hashlib.sha256()
    for document in text.documents:
        digest.update(f"{document.name}\0{document.text}\0".encode("utf-8", "replace"))
    return digest.hexdigest()


def _beginning_of(text):
    """Return the first words of a text, to be continued."""
    words = text.documents[0].text[:_PROMPT_CHARACTERS].rsplit(" ", 1)
    return words[0] or text.documents[0].text[:1]


def _words(course, names=_TEXT):
    """Return the text of a run as the command line takes it."""
    words = ""
    for name in names:
        value = getattr(course, name)
        values = value if isinstance(value, tuple) else (value,)
        words += "".join(f"--{name} {_word(v)} " for v in values if v is not None)
    return words


def _word(path):
    """Return a path as the command line takes it: it may have spaces."""
    return shlex.quote(str(path))


def _silent(line):
    """Take a notice that this stage need not pass on."""
