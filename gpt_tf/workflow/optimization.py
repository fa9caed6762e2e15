"""The whole way as one command: train, distil, quantise, export, measure, choose.

A folder holds it all; `steps` knows what of it is done, `plan` what is to be made. Here
is `optimize`, and a function for each step, with its inputs, its work and its outputs.

optimize.json       the configuration, but for the budgets, which may change
runs/               teacher, student-2, student-2-int8, ...: each a run's folder
files/              teacher-float32.litertlm, student-2-int8.litertlm, ...
measurements/       accuracy.json, task.json, latency.json, explanations.json
stages/             what each step was made of, and hashes of what it made
report.html, report.json, *.png
gpt.litertlm        the file that was chosen
"""

import contextlib
import functools
import hashlib
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
from gpt_tf.evaluation import tasks
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
from gpt_tf.training.preparation import open_text
from gpt_tf.training.run_folder import model_files, tokenizer_of
from gpt_tf.workflow.config import OptimizationConfig
from gpt_tf.workflow.plan import REFERENCE, TEXT, Plan, silenced
from gpt_tf.workflow.steps import FOLDER as STEPS_FOLDER
from gpt_tf.workflow.steps import Steps

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
    is_own = not out.is_dir() or (out / CONFIG_NAME).is_file()
    others = () if is_own else artifacts.entries(out) - set(_OWN_ENTRIES)
    if others:
        raise InputError(
            f"The folder {out} already holds something else, {min(others)} for "
            "example. Choose another."
        )


def _refuse_other_options(out, config):
    """Refuse a folder that has another configuration, and say in what it differs."""
    if not (out / CONFIG_NAME).is_file():
        return
    # As JSON gives it back, where tuples are lists.
    asked = artifacts.parse_json(artifacts.to_json(config.get_config()))
    if found := differences(artifacts.read_json(out / CONFIG_NAME, dict), asked):
        raise InputError(
            f"The optimisation in {out} expects the options that it was started with. "
            f"Received: others. It has {found}. Give these again, add --update to do "
            "what the change concerns, or --overwrite to begin anew."
        )


def _run(plan, budgets, scenario, prefer, command):
    """Do what is not done; return the report."""
    config = plan.config
    in_integers = "int8" in config.modes
    steps = Steps(
        plan.out,
        plan.trains_teacher
        + len(plan.students) * (1 + in_integers)
        + len(plan.files)
        + 2
        + (plan.task is not None)
        + bool(config.explained_prompts),
    )
    if plan.trains_teacher:
        train_teacher(plan, steps)
    if plan.task is not None:  # before hours are spent
        tokenizer = tokenizer_of(plan.teacher)
        tasks.prompts_of(
            plan.task, tokenizer, plan.training.context_length, "the teacher"
        )
    for count in plan.students:
        distil_student(plan, steps, count)
        if in_integers:
            quantize_student(plan, steps, count)
    for file in list(plan.files):
        try:
            export_file(plan, steps, file)
        except InputError as error:
            if file.name == REFERENCE:
                raise
            plan.files.remove(file)
            _skip(plan, steps, f"{file.name} could not be exported: {error}")
    # Text that no model of ours has learnt from.
    is_own = config.model is None or config.corpus is None
    text = held_out_text(
        plan.teacher if is_own else plan.training.corpus,
        validation_fraction=plan.training.validation_fraction,
        validation=plan.training.validation,
        separator=plan.training.separator,
    )
    accuracies = measure_accuracy(plan, steps, text)
    scores = measure_task(plan, steps) if plan.task is not None else {}
    latencies = measure_latency(plan, steps)
    report = reports.new_report(
        [_entry(plan, file, accuracies, scores, latencies) for file in plan.files],
        command=command,
        machine=plan.machine,
        corpus=accuracies["corpus"],
        task=None if plan.task is None else plan.task.describe(),
        budgets={name: getattr(budgets, name) for name in reports.BUDGETS},
        reference=REFERENCE,
    )
    recommendation = recommend(report, budgets, scenario, prefer)
    report["recommendation"] = recommendation
    chosen = [file for file in plan.files if file.name == recommendation["choice"]]
    if chosen:
        recommendation["sample"] = _keep_the_chosen(plan, *chosen, text)
    else:
        # Not the choice of another budget under the name of this one.
        artifacts.file_manifest_path(plan.out / CHOSEN_NAME).unlink(missing_ok=True)
        (plan.out / CHOSEN_NAME).unlink(missing_ok=True)
    if chosen and config.explained_prompts:
        report["explanations"] = explain_chosen(plan, steps, *chosen, text)
    elif config.explained_prompts:
        _skip(plan, steps, "No file was chosen, so that none was explained.")
    report["stages"] = steps.done
    report["notes"] = plan.notes
    publish(report, plan.out)
    return report


def _skip(plan, steps, why):
    """Leave a step out, and say so."""
    steps.skip()
    plan.notes.append(why)
    logger.info(why)


# Making


def train_teacher(plan: Plan, steps: Steps) -> None:
    """Train the teacher, or fine-tune a model on rows."""
    training, config = plan.training, plan.config
    inputs = {"course": training.get_config(), "corpus": plan.text_hash}
    if config.data is None:
        title = "the teacher"
        asked = {name: getattr(training, name) for name in (*TEXT, "steps", "seed")}
        command = _command("train", preset=config.preset, **asked)
        work = functools.partial(loop.train, training)
    else:
        title = "the teacher, fine-tuned"
        inputs["model"] = artifacts.sha256_of(*model_files(config.model))
        asked = {"model": config.model, "data": config.data}
        options = {"steps": config.steps, "seed": config.seed}
        command = _command("finetune", **asked, lora_rank=config.lora_rank, **options)
        work = functools.partial(
            loop.finetune, config.model, config.data, **plan.fine_tuning
        )
    work = functools.partial(work, resume_or_start=True)
    _train(plan, steps, "teacher", title, inputs, lambda run: work(out=run), command)


def distil_student(plan: Plan, steps: Steps, count: int) -> None:
    """Distil a student of so many blocks from the teacher."""
    config, teacher = plan.config, plan.teacher
    own = {"steps": plan.student_steps, "seed": config.seed}
    of_text = {}
    if config.model is not None and config.corpus is not None:
        of_text = {name: getattr(config, name) for name in TEXT}
    inputs = {"teacher": artifacts.sha256_of(*model_files(teacher)), "blocks": count}
    student = {"num_layers": count}
    asked = {"teacher": teacher, "student_layers": count, **of_text, **own}
    _train(
        plan,
        steps,
        f"student-{count}",
        f"a student of {count} of its {plan.training.num_layers} blocks",
        {**inputs, "corpus": plan.text_hash, **own},
        lambda run: loop.distil(
            teacher, run, student, resume_or_start=True, **own, **of_text
        ),
        _command("distil", **asked),
    )


def quantize_student(plan: Plan, steps: Steps, count: int) -> None:
    """Fine-tune a student with quantisation-aware training."""
    source = plan.run_of(f"student-{count}")
    _train(
        plan,
        steps,
        f"{source.name}-int8",
        f"{source.name}, fine-tuned with QAT",
        {"student": artifacts.sha256_of(*model_files(source))},
        lambda run: loop.quantize(source, run, resume_or_start=True),
        _command("quantize", model=source, method="qat"),
    )


def _train(plan, steps, name, title, inputs, work, command):
    """Train in a run's folder, from its newest checkpoint where it was begun."""
    run = plan.run_of(name)
    steps.run(
        name,
        title,
        inputs,
        [f"runs/{name}/model/{file}" for file in _MODEL_FILES],
        lambda: work(run),
        begin=lambda: artifacts.remove(run),
        command=f"{command} --out {shlex.quote(str(run))}",
    )


def export_file(plan: Plan, steps: Steps, file) -> None:
    """Export a file and verify it."""
    source, path = plan.run_of(file.source), plan.out / file.path
    inputs = {"model": artifacts.sha256_of(*model_files(source)), "mode": file.mode}
    length, text = plan.config.context_length, {}
    asked = {} if length is None else {"context_length": length}
    inputs |= asked
    is_run = (source / "data" / "train.tokens").is_file()
    if not is_run:  # ranges are measured on the text that is named
        inputs["corpus"] = plan.text_hash
        text["corpus"] = plan.training.corpus

    def work():
        with silenced():
            typical = None if is_run else open_text(plan.training)
            export_trained(source, path, file.mode, corpus=typical, **asked)

    steps.run(
        f"file-{file.name}",
        f"{file.name}, exported and verified",
        inputs,
        [file.path, f"{file.path}.json"],
        work,
        command=_command(
            "export", model=source, mode=file.mode, **asked, **text, out=path
        ),
    )


def _command(verb, **options):
    """Return a command line, which may be copied."""
    words = ["gpt-tf", verb]
    for name, value in options.items():
        for one in value if isinstance(value, tuple) else (value,):
            if one is not None:
                words += ["--" + name.replace("_", "-"), str(one)]
    return shlex.join(words)


# Measuring


def measure_accuracy(plan: Plan, steps: Steps, text) -> dict:
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
            for name, gpt in opened.items() if functions else ():
                found[name]["parsed"] = measure_code_validity(
                    gpt, functions, seed=config.seed, name=name
                )
        judged = {name: found[REFERENCE][name] for name in ("bytes", "tokens")}
        corpus = {"name": text.name, "split": text.split, **judged}
        return {"corpus": corpus, "entries": found}

    return _measure(
        plan,
        steps,
        "accuracy",
        "accuracy of every file",
        {
            "text": _hash_of(text),
            "tokens": config.evaluated_tokens,
            "seed": config.seed,
            "files": _hashes(plan),
        },
        measure,
    )


def measure_task(plan: Plan, steps: Steps) -> dict:
    """Measure how much of the task every file does."""

    def measure():
        with contextlib.ExitStack() as stack:
            opened = {
                file.name: stack.enter_context(EdgeGPT(plan.out / file.path))
                for file in plan.files
            }
            return tasks.measure_tasks(opened, REFERENCE, plan.task, notes=plan.notes)

    inputs = {"task": plan.task.sha256, "files": _hashes(plan)}
    title = f"{plan.task.name}, answered by every file"
    return _measure(plan, steps, "task", title, inputs, measure)


def measure_latency(plan: Plan, steps: Steps) -> dict:
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

    on = {"cpu": machine["cpu"], "cores": machine["cores"]}
    inputs = {**on, **request, "files": _hashes(plan)}
    return _measure(plan, steps, "latency", "speed of every file", inputs, measure)


def explain_chosen(plan: Plan, steps: Steps, file, text) -> dict | None:
    """Test whether explanations of the chosen file, and of its model, are any good.

    None where their libraries are not installed.
    """
    config = plan.config
    run, path = plan.run_of(file.source.removesuffix("-int8")), plan.out / file.path

    def measure():
        with open_model(run) as model, EdgeGPT(path) as gpt:
            return _faithfulness(model, gpt, file.name, text, config)

    inputs = {
        "file": artifacts.sha256_of(path),
        "model": artifacts.sha256_of(*model_files(run)),
        "text": _hash_of(text),
        "prompts": config.explained_prompts,
        "seed": config.seed,
    }
    title = f"explanations of {file.name} put to the test"
    try:
        return _measure(plan, steps, "explanations", title, inputs, measure)
    except ModuleNotFoundError as error:
        if error.name not in ("lime", "shap"):
            raise
        _skip(
            plan,
            steps,
            f"Explanations were left out: they expect the package {error.name}. "
            "Install it with: pip install 'gpt-tf[explain]'",
        )
        return None


def _faithfulness(model, gpt, name, text, config):
    length = min(_EXPLAINED_TOKENS, gpt.context_length)
    tokens, wanted = [], _EXPLAINED_FROM * config.explained_prompts * length
    for document in text.documents:
        tokens += gpt.tokenizer.encode(document.text)
        if len(tokens) >= wanted:
            break
    prompts = prompts_of(tokens, config.explained_prompts, length)
    with StepProgress("prompts") as progress:
        options = {"seed": config.seed, "on_step": progress.update}
        found = deletion_test(model, prompts, ["attention", "gradient"], **options)
        of_file = deletion_test(gpt, prompts, ["lime", "shap"], **options)
        found["methods"] |= of_file["methods"]
        names = ("its model in Keras", name)
        for method in ("lime", "shap"):
            found["compression"][method] = compare_explanations(
                model, gpt, prompts, method, names=names, **options
            )
    return found


def _measure(plan, steps, name, title, inputs, measure):
    """Measure, unless these very files were measured in the same way."""
    place = f"measurements/{name}.json"
    path = plan.out / place
    steps.run(
        name, title, inputs, [place], lambda: artifacts.write_json(path, measure())
    )
    return artifacts.read_json(path)


def _hashes(plan):
    return {file.name: artifacts.sha256_of(plan.out / file.path) for file in plan.files}


def _hash_of(text):
    digest = hashlib.sha256()
    for document in text.documents:
        digest.update(f"{document.name}\0{document.text}\0".encode("utf-8", "replace"))
    return digest.hexdigest()


def _is_python(plan, text):
    # A run's text has lost the names of its files.
    return text.is_python or plan.training.corpus == DEFAULT_CORPUS


# Choosing


def _entry(plan, file, accuracies, scores, latencies):
    with EdgeGPT(plan.out / file.path) as gpt:
        described = describe(plan.out / file.path, gpt)
    return reports.new_entry(
        described,
        name=file.name,
        path=file.path,
        made_from=file.made_from,
        accuracy=accuracies["entries"][file.name] | {"task": scores.get(file.name)},
        latency=latencies[file.name],
    )


def _keep_the_chosen(plan, file, text):
    """Copy the chosen file to its place; return a sample of what it generates."""
    place, chosen = plan.out / CHOSEN_NAME, plan.out / file.path
    beside = artifacts.file_manifest_path(place)
    with artifacts.replaced(place, beside.name) as new:
        shutil.copyfile(chosen, new / place.name)
        shutil.copyfile(artifacts.file_manifest_path(chosen), new / beside.name)
    prompt = _PYTHON_PROMPT
    if not _is_python(plan, text):  # the first words of the text
        beginning = text.documents[0].text[:_PROMPT_CHARACTERS]
        prompt = beginning.rsplit(" ", 1)[0] or beginning[:1]
    with EdgeGPT(place) as gpt:
        written = gpt.generate(
            prompt,
            max_new_tokens=_SAMPLE_TOKENS,
            temperature=0.8,
            seed=plan.config.seed,
        )
    return {"prompt": prompt, "text": written}
