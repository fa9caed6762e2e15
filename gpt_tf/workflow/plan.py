"""What an optimisation is to make: teacher, students and files, before any of it."""

import contextlib
import dataclasses
import logging
from pathlib import Path
from typing import NamedTuple

from gpt_tf import artifacts
from gpt_tf.advisor.estimate import read_sizes, refuse_impossible
from gpt_tf.errors import InputError
from gpt_tf.evaluation.tasks import open_task
from gpt_tf.settings.configuration import fields_of
from gpt_tf.training.config import PRESETS, TrainingConfig
from gpt_tf.training.loop import finetuning_config
from gpt_tf.training.preparation import open_text
from gpt_tf.training.run_folder import model_files, read_run
from gpt_tf.workflow.config import OptimizationConfig

REFERENCE = "teacher-float32"
# Fields that say which text is learnt from and what of it is held out.
TEXT = ("corpus", "validation", "separator")


class File(NamedTuple):
    """A file to make.

    Attributes:
        name: Of the file and of its entry in the report.
        source: Name of the run that it is exported from.
        mode: How it is quantised.
        made_from: A sentence about its model.
    """

    name: str
    source: str
    mode: str
    made_from: str

    @property
    def path(self) -> str:
        """Where it lies in the folder."""
        return f"files/{self.name}.litertlm"


class Plan:
    """What is to be made. Making it refuses what cannot be used, and writes nothing.

    Args:
        config: What is asked for.
        out: The folder of it all.
        budgets: A `gpt_tf.advisor.constraints.Budgets`.
        machine: What `describe_machine` found.

    Attributes:
        trains_teacher: Whether the teacher is trained, or fine-tuned, first.
        teacher: Folder of the teacher's run or model.
        training: The configuration that trains, or trained, the teacher.
        request: Prompt and new tokens of the request that is timed.
        students: Blocks of each student.
        student_steps: Optimiser steps of each.
        task: The `gpt_tf.evaluation.tasks.Task` that files are to do, or None.
        files: The files to make; those that turn out to be impossible are removed.
        text_hash: SHA-256 of the text that is learnt from.
        notes: Lines for the report.

    Raises:
        InputError: The corpus, the model or a number cannot be used, or no file can
            keep the budgets.
    """

    def __init__(self, config: OptimizationConfig, out: Path, budgets, machine):
        self.config = config
        self.out = out
        self.machine = machine
        self.trains_teacher = config.model is None or config.data is not None
        self.teacher = out / "runs" / "teacher" if self.trains_teacher else config.model
        self.teacher = Path(self.teacher)
        self.notes = []
        self.task = open_task(config.task) if config.task else None
        if budgets.max_score_drop is not None and self.task is None:
            raise InputError(
                "`max_score_drop` expects a task to score. Received: none. Name its "
                "file with --task, or leave the budget out."
            )
        self.training = self._training()
        self.request = self._request()
        self.students = self._students()
        self.student_steps = config.student_steps or max(1, self.training.steps // 3)
        self.files = self._files()
        smallest = min([self.training.num_layers, *self.students])
        sizes = dataclasses.asdict(self.training) | {"num_layers": smallest}
        refuse_impossible(budgets, sizes, machine)
        self.text_hash = self._hash_of_text()

    @property
    def fine_tuning(self) -> dict:
        """Options of `finetune`, besides model and rows."""
        rank, steps = self.config.lora_rank, self.config.steps
        return {
            "seed": self.config.seed,
            **({} if rank is None else {"lora": {"rank": rank}}),
            **({} if steps is None else {"steps": steps}),
        }

    def run_of(self, source) -> Path:
        """Return the folder of a run: the teacher's may be anywhere."""
        return self.teacher if source == "teacher" else self.out / "runs" / source

    def _training(self):
        config = self.config
        asked = {} if config.corpus is None else {n: getattr(config, n) for n in TEXT}
        if config.model is None:
            if config.steps is not None:
                asked["steps"] = config.steps
            preset = PRESETS[config.preset]
            return dataclasses.replace(preset, seed=config.seed, **asked)
        if config.data is not None:
            return self._fine_tuning()
        if config.steps is not None:
            raise InputError(
                "`steps` are those of a teacher that is trained. Received: a trained "
                f"`model` too, {config.model}. Leave one out."
            )
        if not model_files(self.teacher)[0].is_file():
            raise InputError(
                f"Expected a trained model at {self.teacher}; there is none. Name a "
                "folder that `gpt-tf train` finished."
            )
        if (self.teacher / "run.json").is_file():
            return dataclasses.replace(read_run(self.teacher), **asked)
        if config.corpus is None:
            raise InputError(
                f"A model without its run expects a corpus. Received: none, with "
                f"{self.teacher}. Name one, python-stdlib for example."
            )
        return TrainingConfig(**{**self._shape_of(self.teacher), **asked})

    def _fine_tuning(self):
        config = self.config
        found = finetuning_config(config.model, config.data, **self.fine_tuning)
        shape = self._shape_of(config.model) | {"context_length": found.context_length}
        return dataclasses.replace(found, **shape)

    @staticmethod
    def _shape_of(model):
        sizes = read_sizes(model)
        return {name: sizes[name] for name in fields_of(TrainingConfig).keys() & sizes}

    def _request(self):
        asked = (self.config.prompt_tokens, self.config.new_tokens)
        contexts = (self.training.context_length, self.config.context_length)
        context = min(filter(None, contexts))
        if sum(asked) <= context:
            return asked
        half = context // 2
        self.notes.append(
            f"The context of {context} tokens has no room for a request of {asked[0]} "
            f"prompt tokens and {asked[1]} new ones: {half} and {half} were timed."
        )
        return half, half

    def _students(self):
        blocks, wanted = self.training.num_layers, self.config.students
        if wanted is None:
            wanted = sorted({blocks // 2, blocks // 4} - {0}, reverse=True)
            if not wanted:
                self.notes.append(
                    "The teacher has one block: no smaller student was distilled."
                )
        if max(wanted, default=0) > blocks:
            raise InputError(
                f"A student expects at most the teacher's {blocks} blocks. "
                f"Received: {max(wanted)}. Choose fewer."
            )
        return wanted

    def _files(self):
        modes = self.config.modes
        made = [File(REFERENCE, "teacher", "float32", "the teacher itself")]
        for mode in modes:
            if mode != "float32":
                sentence = "the teacher, quantised after training"
                made.append(File(f"teacher-{mode}", "teacher", mode, sentence))
        for count in self.students:
            student = f"student-{count}"
            blocks = "1 block" if count == 1 else f"{count} blocks"
            for mode in modes:
                source, sentence = student, f"a student of {blocks}, distilled"
                if mode == "int8":
                    source = f"{student}-int8"
                    sentence += ", then fine-tuned with QAT"
                made.append(File(f"{student}-{mode}", source, mode, sentence))
        return made

    def _hash_of_text(self):
        tokens = self.teacher / "data" / "train.tokens"
        is_ready = not self.trains_teacher and tokens.is_file()
        if is_ready and self.config.corpus is None:
            return artifacts.sha256_of(tokens)
        with silenced():  # training will say what there is to say of it
            found = open_text(self.training).describe()["sha256"]
        divided_by = (self.training.validation, self.training.separator)
        return ", ".join([found, *filter(None, divided_by)])


@contextlib.contextmanager
def silenced():
    """Log nothing while the block runs: another step says the same."""
    logger = logging.getLogger("gpt_tf")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
