"""The whole way as one command: train, distil, quantise, export, measure, choose.

A folder holds it all; `steps` knows what of it is done, `plan` what is to be made. Here
is `optimize`, and a function for each step that returns what it needs, does and leaves.

optimize.json       the configuration, but for the budgets, which may change
runs/               teacher, student-2, student-2-int8, ...: each a run's folder
files/              teacher-float32.litertlm, student-2-int8.litertlm, ...
measurements/       accuracy.json, latency.json, explanations.json
stages/             what each step was made of, and hashes of what it made
report.html, report.json, *.png
gpt.litertlm        the file that was chosen
"""

import contextlib
import hashlib
import itertools
import logging
import os
import shlex
import shutil

from gpt_tf import artifacts
from gpt_tf.advisor.constraints import Budgets, objective_of, scenario_of
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
from gpt_tf.training.config import TrainingConfig
from gpt_tf.training.preparation import open_text
from gpt_tf.training.run_folder import model_file
from gpt_tf.workflow.config import OptimizationConfig
from gpt_tf.workflow.plan import REFERENCE, TEXT, Plan, silenced
from gpt_tf.workflow.steps import FOLDER as STEPS_FOLDER
from gpt_tf.workflow.steps import Step, Steps

logger = logging.getLogger(__name__)

CONFIG_NAME = "optimize.json"
CHOSEN_NAME = "gpt.litertlm"
_MODEL_FILES = ("model.keras", "tokenizer.json", artifacts.MANIFEST_NAME)
_OWN_ENTRIES = (
    *(CONFIG_NAME, "runs", "files", "measurements", STEPS_FOLDER, CHOSEN_NAME),
    *(f"{CHOSEN_NAME}.json", "report.html", "report.json"),
    *(f"{name}.png" for name in plots.PLOTS),
)
_PYTHON_PROMPT = "    def __init__(self"
_PROMPT_CHARACTERS = 40
_SAMPLE_TOKENS = 100
# Prompts to explain are this long, and spread over so many times their own text.
_EXPLAINED_TOKENS = 24
_EXPLAINED_FROM = 8


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
    objective_of(scenario, prefer)  # refuses what there is not
    budgets = Budgets.of(budgets).over(scenario_of(scenario).budgets)
    with artifacts.locked(out, _OWN_ENTRIES):
        if not (update or overwrite):
            _refuse_other_options(out, config)
        plan = Plan(config, out, budgets, describe_machine())
        # All that can be refused was: from here on the folder is written to.
        others = _OWN_ENTRIES[1:] if overwrite else ()
        with artifacts.replaced(out / CONFIG_NAME, *others) as new:
            artifacts.write_json(new / CONFIG_NAME, config.get_config())
        return _run(plan, budgets, scenario, prefer, command)


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


def _run(plan, budgets, scenario, prefer, command):
    """Do what is not done; return the report."""
    trained = [] if plan.config.model else [train_teacher(plan)]
    for count in plan.students:
        trained.append(distil_student(plan, count))
        if "int8" in plan.config.modes:
            trained.append(quantize_student(plan, count))
    measured = 3 if plan.config.explained_prompts else 2
    steps = Steps(plan.out, len(trained) + len(plan.files) + measured)
    for step in trained:
        steps.run(step)
    for file in list(plan.files):
        try:
            steps.run(export_file(plan, file))
        except InputError as error:
            if file.name == REFERENCE:
                raise
            steps.skip()
            plan.files.remove(file)
            _note(plan, f"{file.name} could not be exported: {error}")
    text = _held_out_text(plan)
    accuracies = _measured(plan, steps, measure_accuracy(plan, text))
    latencies = _measured(plan, steps, measure_latency(plan))
    report = reports.new_report(
        [_entry(plan, file, accuracies, latencies) for file in plan.files],
        command=command,
        machine=plan.machine,
        corpus=accuracies["corpus"],
        budgets={name: getattr(budgets, name) for name in reports.BUDGETS},
        reference=REFERENCE,
    )
    report["recommendation"] = recommend(
        report, budgets=budgets, scenario=scenario, prefer=prefer
    )
    chosen = report["recommendation"]["choice"]
    chosen = next((file for file in plan.files if file.name == chosen), None)
    sample = _keep_the_chosen(plan, chosen, text)
    if sample is not None:
        report["recommendation"]["sample"] = sample
    report["explanations"] = _explanations(plan, steps, chosen, text)
    report["stages"] = [done._asdict() for done in steps.done]
    report["notes"] = plan.notes
    publish(report, plan.out)
    return report


# Making


def train_teacher(plan: Plan) -> Step:
    """Train the teacher."""
    run = plan.run_of("teacher")
    training = plan.training
    return _training_step(
        plan,
        "teacher",
        "the teacher",
        lambda: {"course": training.get_config(), "corpus": plan.text_hash},
        lambda: loop.train(training, run, resume_or_start=True),
        f"gpt-tf train --preset {plan.config.preset} {_words(training)}"
        f"--steps {training.steps} --seed {plan.config.seed} --out {_word(run)}",
    )


def distil_student(plan: Plan, count: int) -> Step:
    """Distil a student of so many blocks from the teacher."""
    config, teacher = plan.config, plan.teacher
    run = plan.run_of(f"student-{count}")
    own = {"steps": plan.student_steps, "seed": config.seed}
    of_text, text = {}, ""
    if config.model is not None and config.corpus is not None:
        of_text = {name: getattr(config, name) for name in TEXT}
        text = _words(plan.training)
    if config.model is not None and not (teacher / "run.json").is_file():
        # There are no settings to take over: windows that the model has room for.
        length = min(TrainingConfig.context_length, plan.training.context_length)
        of_text["context_length"] = length
        text += f"--context-length {length} "
    return _training_step(
        plan,
        f"student-{count}",
        f"a student of {count} of its {plan.training.num_layers} blocks",
        lambda: {
            "teacher": artifacts.sha256_of(model_file(teacher)),
            "blocks": count,
            "corpus": plan.text_hash,
            **own,
        },
        lambda: loop.distil(
            teacher, run, {"num_layers": count}, resume_or_start=True, **own, **of_text
        ),
        f"gpt-tf distil --teacher {_word(teacher)} --student-layers {count} "
        f"{text}--steps {plan.student_steps} --seed {config.seed} --out {_word(run)}",
    )


def quantize_student(plan: Plan, count: int) -> Step:
    """Fine-tune a student with quantisation-aware training."""
    source = plan.run_of(f"student-{count}")
    run = plan.run_of(f"student-{count}-int8")
    return _training_step(
        plan,
        run.name,
        f"{source.name}, fine-tuned with QAT",
        lambda: {"student": artifacts.sha256_of(model_file(source))},
        lambda: loop.quantize(source, run, resume_or_start=True),
        f"gpt-tf quantize --model {_word(source)} --method qat --out {_word(run)}",
    )


def _training_step(plan, name, title, inputs, work, command):
    """Train in a run's folder, from its newest checkpoint where it was begun."""
    return Step(
        name,
        title,
        inputs,
        [f"runs/{name}/model/{file}" for file in _MODEL_FILES],
        work,
        begin=lambda: artifacts.remove(plan.run_of(name)),
        command=command,
    )


def export_file(plan: Plan, file) -> Step:
    """Export a file and verify it."""
    source = plan.run_of(file.source)
    is_run = (source / "data" / "train.tokens").is_file()
    text = "" if is_run else _words(plan.training, ["corpus"])

    def inputs():
        found = {"model": artifacts.sha256_of(model_file(source)), "mode": file.mode}
        # Ranges are measured on this text.
        return found if is_run else found | {"corpus": plan.text_hash}

    def work():
        with silenced():
            typical = None if is_run else open_text(plan.training)
            export_trained(source, plan.out / file.path, file.mode, corpus=typical)

    return Step(
        f"file-{file.name}",
        f"{file.name}, exported and verified",
        inputs,
        [file.path, f"{file.path}.json"],
        work,
        command=f"gpt-tf export --model {_word(source)} --mode {file.mode} "
        f"{text}--out {_word(plan.out / file.path)}",
    )


# Measuring


def _held_out_text(plan):
    """Return text that no model of ours has learnt from."""
    is_own = plan.config.model is None or plan.config.corpus is None
    return held_out_text(
        plan.teacher if is_own else plan.training.corpus,
        validation_fraction=plan.training.validation_fraction,
        validation=plan.training.validation,
        separator=plan.training.separator,
    )


def measure_accuracy(plan: Plan, text) -> Step:
    """Measure how well every file predicts held-out text."""
    config = plan.config

    def measure():
        with contextlib.ExitStack() as stack:
            opened = {
                file.name: stack.enter_context(EdgeGPT(plan.out / file.path))
                for file in plan.files
            }
            progress = stack.enter_context(StepProgress("held-out blocks"))
            found = measure_accuracies(
                opened,
                REFERENCE,
                text,
                max_tokens=config.evaluated_tokens,
                seed=config.seed,
                on_progress=progress.update,
                notes=plan.notes,
            )
            is_python = _is_python(plan, text)
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

    def inputs():
        asked = {"tokens": config.evaluated_tokens, "seed": config.seed}
        return {"text": _hash_of(text), **asked, "files": _hashes(plan)}

    return _measuring_step(plan, "accuracy", "accuracy of every file", inputs, measure)


def measure_latency(plan: Plan) -> Step:
    """Measure how fast every file answers a request."""
    machine = plan.machine
    prompt_tokens, new_tokens = plan.request
    request = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repetitions": plan.config.repetitions,
    }

    def measure():
        with StepProgress("turns") as progress:
            found = compare_latencies(
                [plan.out / file.path for file in plan.files],
                **request,
                read_bytes_per_s=machine["read_bytes_per_s"],
                on_progress=lambda done, total, _: progress.update(done, total),
            )
        names = [file.name for file in plan.files]
        return dict(zip(names, found, strict=True))

    def inputs():
        on = {"cpu": machine["cpu"], "cores": machine["cores"]}
        return {**on, **request, "files": _hashes(plan)}

    return _measuring_step(plan, "latency", "speed of every file", inputs, measure)


def explain_chosen(plan: Plan, file, text) -> Step:
    """Test whether explanations of the chosen file, and of its model, are any good."""
    config = plan.config
    run = plan.run_of(file.source.removesuffix("-int8"))

    def inputs():
        return {
            "file": artifacts.sha256_of(plan.out / file.path),
            "model": artifacts.sha256_of(model_file(run)),
            "text": _hash_of(text),
            "prompts": config.explained_prompts,
            "seed": config.seed,
        }

    def measure():
        with open_model(run) as model, EdgeGPT(plan.out / file.path) as gpt:
            return _faithfulness(
                model, gpt, file.name, text, config.explained_prompts, config.seed
            )

    title = f"explanations of {file.name} put to the test"
    return _measuring_step(plan, "explanations", title, inputs, measure)


def _measuring_step(plan, name, title, inputs, measure):
    """Measure, unless these very files were measured in the same way."""
    path = f"measurements/{name}.json"

    def work():
        artifacts.write_json(plan.out / path, measure())

    return Step(name, title, inputs, [path], work)


def _measured(plan, steps, step):
    steps.run(step)
    return artifacts.read_json(plan.out / step.outputs[0])


def _hashes(plan):
    return {file.name: artifacts.sha256_of(plan.out / file.path) for file in plan.files}


def _entry(plan, file, accuracies, latencies):
    with EdgeGPT(plan.out / file.path) as gpt:
        described = describe(plan.out / file.path, gpt)
    return reports.new_entry(
        described,
        name=file.name,
        path=file.path,
        made_from=file.made_from,
        accuracy=accuracies["entries"][file.name],
        latency=latencies[file.name],
    )


# Choosing


def _keep_the_chosen(plan, file, text):
    """Copy the chosen file to its place; return a sample of what it generates."""
    place = plan.out / CHOSEN_NAME
    beside = artifacts.file_manifest_path(place)
    if file is None:
        # Not the choice of another budget under the name of this one.
        beside.unlink(missing_ok=True)
        place.unlink(missing_ok=True)
        return None
    chosen = plan.out / file.path
    with artifacts.replaced(place, beside.name) as new:
        shutil.copyfile(chosen, new / place.name)
        shutil.copyfile(artifacts.file_manifest_path(chosen), new / beside.name)
    prompt = _PYTHON_PROMPT if _is_python(plan, text) else _beginning_of(text)
    with EdgeGPT(place) as gpt:
        written = gpt.generate(
            prompt,
            max_new_tokens=_SAMPLE_TOKENS,
            temperature=0.8,
            seed=plan.config.seed,
        )
    return {"prompt": prompt, "text": written}


def _explanations(plan, steps, file, text):
    """Return what the test of explanations found, or None where there was none."""
    if not plan.config.explained_prompts:
        return None
    if file is None:
        steps.skip()
        plan.notes.append("No file was chosen, so that none was explained.")
        return None
    try:
        return _measured(plan, steps, explain_chosen(plan, file, text))
    except ModuleNotFoundError as error:
        if error.name not in ("lime", "shap"):
            raise
        steps.skip()
        _note(
            plan,
            f"Explanations were left out: they expect the package {error.name}. "
            "Install it with: pip install 'gpt-tf[explain]'",
        )
        return None


def _faithfulness(model, gpt, name, text, count, seed):
    length = min(_EXPLAINED_TOKENS, gpt.context_length)
    tokens = []
    for document in text.documents:
        tokens += gpt.tokenizer.encode(document.text)
        if len(tokens) >= _EXPLAINED_FROM * count * length:
            break
    prompts = prompts_of(tokens, count, length)
    with StepProgress("prompts") as progress:
        steps = itertools.count(1)  # of several tests, on one bar

        def on_step(done, total):
            progress.update(next(steps), 4 * len(prompts))

        options = {"seed": seed, "on_step": on_step}
        found = deletion_test(model, prompts, ["attention", "gradient"], **options)
        of_file = deletion_test(gpt, prompts, ["lime", "shap"], **options)
        found["methods"] |= of_file["methods"]
        names = ("its model in Keras", name)
        for method in ("lime", "shap"):
            found["compression"][method] = compare_explanations(
                model, gpt, prompts, method, names=names, **options
            )
    return found


def _note(plan, line):
    plan.notes.append(line)
    logger.info(line)


def _is_python(plan, text):
    # A run's text has lost the names of its files.
    return text.is_python or plan.training.corpus == DEFAULT_CORPUS


def _hash_of(text):
    digest = hashlib.sha256()
    for document in text.documents:
        digest.update(f"{document.name}\0{document.text}\0".encode("utf-8", "replace"))
    return digest.hexdigest()


def _beginning_of(text):
    """Return the first words of a text, to be continued."""
    words = text.documents[0].text[:_PROMPT_CHARACTERS].rsplit(" ", 1)
    return words[0] or text.documents[0].text[:1]


def _words(training, names=TEXT):
    """Return the text of a run as the command line takes it."""
    words = ""
    for name in names:
        value = getattr(training, name)
        values = value if isinstance(value, tuple) else (value,)
        words += "".join(f"--{name} {_word(v)} " for v in values if v is not None)
    return words


def _word(path):
    """Return a path as the command line takes it: it may have spaces."""
    return shlex.quote(str(path))
