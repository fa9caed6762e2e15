"""One command makes the files, measures and chooses; a second does what is left."""

import dataclasses
import json
import os
import shlex
import shutil

import pytest

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.evaluation.hardware import describe_machine
from gpt_tf.evaluation.report import read_report
from gpt_tf.reporting import plots
from gpt_tf.training import loop
from gpt_tf.training.config import PRESETS
from gpt_tf.training.run_folder import read_run
from gpt_tf.workflow import optimization
from gpt_tf.workflow.config import OptimizationConfig
from gpt_tf.workflow.optimization import optimize

NAMES = ["teacher-float32", "teacher-int8", "student-1-int8"]
STEPS = 8  # three models, three files, their accuracy and their speed

pytestmark = pytest.mark.usefixtures("eagerly")


@pytest.fixture(scope="module")
def options(corpus_folder):
    return {
        "corpus": str(corpus_folder),
        "preset": "tiny",
        "steps": 3,
        "student_steps": 2,
        "students": (1,),
        "modes": ("int8",),
        "evaluated_tokens": 200,
        "prompt_tokens": 4,
        "new_tokens": 4,
        "repetitions": 1,
        "explained_prompts": 0,
    }


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Brief training and samples, and a machine that is looked at briefly."""
    with pytest.MonkeyPatch.context() as patch:
        tiny = dataclasses.replace(
            PRESETS["tiny"],
            vocab_size=300,
            batch_size=64,
            validation_batches=1,
            checkpoint_every=2,
            jit_compile="off",
            strategy="one_device",
        )
        patch.setitem(PRESETS, "tiny", tiny)
        machine = describe_machine(seconds=0.1)
        patch.setattr(optimization, "describe_machine", lambda: machine)
        patch.setattr(optimization, "_SAMPLE_TOKENS", 4)
        yield


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """The folder of a finished optimisation."""
    out = tmp_path_factory.mktemp("optimized") / "with a space"
    optimize(options, out)
    return out


@pytest.fixture
def out(finished, tmp_path):
    """A copy of it, to be changed."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def made(monkeypatch):
    """What is trained, exported and measured from now on, by name; nothing is drawn."""
    monkeypatch.setattr(plots, "PLOTS", {})
    found = []

    def watch(module, name):
        real = getattr(module, name)

        def note(*arguments, **named):
            found.append(name)
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, note)

    for name in ("train", "distil", "quantize"):
        watch(loop, name)
    for name in ("export_trained", "measure_accuracies", "compare_latencies"):
        watch(optimization, name)
    return found


def test_it_leaves_the_report_the_pictures_and_the_chosen_file(finished):
    report = read_report(finished)
    assert [entry["name"] for entry in report["entries"]] == NAMES
    for entry in report["entries"]:
        path = finished / entry["path"]
        assert entry["sha256"] == artifacts.sha256_of(path)
        assert entry["size_bytes"] == path.stat().st_size
        assert entry["accuracy"]["perplexity"]["value"] > 1
        assert entry["latency"]["inter_token_latency_ms"]["count"] >= 1
    # Smaller each, and the reference is compared with itself.
    sizes = {entry["name"]: entry["size_bytes"] for entry in report["entries"]}
    assert sizes["student-1-int8"] < sizes["teacher-int8"] < sizes["teacher-float32"]
    assert report["reference"] == "teacher-float32"
    first, *_, last = (entry["accuracy"] for entry in report["entries"])
    assert first["perplexity_increase"]["value"] == 0
    assert first["top1_agreement"]["value"] == 1
    assert last["divergence_nats"]["value"] > 0
    chosen = report["recommendation"]["choice"]
    path = next(e["path"] for e in report["entries"] if e["name"] == chosen)
    copy = finished / "gpt.litertlm"
    assert copy.read_bytes() == (finished / path).read_bytes()
    assert artifacts.check_file_manifest(copy) is not None
    sample = report["recommendation"]["sample"]
    assert sample["prompt"] and isinstance(sample["text"], str)
    page = (finished / "report.html").read_text("utf-8")
    assert all(name in page for name in NAMES)
    assert list(finished.glob("*.png"))
    assert [stage["reused"] for stage in report["stages"]] == [False] * STEPS


def test_the_commands_of_the_report_can_be_copied(finished):
    stages = {one["name"]: one["command"] for one in read_report(finished)["stages"]}
    runs, teacher = finished / "runs", str(finished / "runs" / "teacher")
    for name, words in {
        "teacher": ["--out", teacher],
        "student-1": ["--teacher", teacher, "--out", str(runs / "student-1")],
        "student-1-int8": ["--model", str(runs / "student-1")],
        "file-teacher-int8": [str(finished / "files" / "teacher-int8.litertlm")],
    }.items():
        assert set(words) <= set(shlex.split(stages[name]))


def test_a_model_is_the_same_from_every_folder(monkeypatch, tmp_path):
    config = OptimizationConfig(model=tmp_path / "model")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert OptimizationConfig(model="../model") == config


def test_a_second_start_makes_what_was_lost_and_chooses_by_its_own_budgets(
    options, out, made
):
    before = read_report(out)
    (out / "files" / "student-1-int8.litertlm").unlink()
    report = optimize(options, out, budgets={"max_size_mb": "0.05"})
    assert made == ["export_trained"]
    assert report["recommendation"]["choice"] is None
    assert report["recommendation"]["nearest_miss"]
    assert not (out / "gpt.litertlm").exists()
    assert not (out / "gpt.litertlm.json").exists()
    assert read_report(out)["budgets"]["max_size_mb"] == 0.05
    made.clear()
    report = optimize(options, out, budgets={"max_size_mb": 5})
    assert made == []
    assert [stage["reused"] for stage in report["stages"]] == [True] * STEPS
    assert report["entries"] == before["entries"]
    assert (out / "gpt.litertlm").is_file()


def test_the_smallest_file_that_does_the_task_is_chosen(options, out, made, tmp_path):
    task = tmp_path / "tasks.jsonl"
    rows = [
        {"prompt": "the quick", "choices": [" brown", "zq"], "answer": 0},
        {"prompt": "over a", "choices": ["qz", " lazy"], "answer": 1},
    ]
    task.write_text("\n".join(map(json.dumps, rows)))
    changed = {**options, "task": str(task)}
    limits = {"max_score_drop": "99%"}
    report = optimize(changed, out, update=True, budgets=limits)
    assert made == []  # nothing but the task was new
    assert report["task"]["rows"] == 2 and len(report["stages"]) == STEPS + 1
    for entry in report["entries"]:
        score = entry["accuracy"]["task"]
        assert score["rows"] == 2 and score["difference"]["low"] <= 0
        assert entry["accuracy"]["perplexity"]
    said = report["recommendation"]
    sizes = {entry["name"]: entry["size_bytes"] for entry in report["entries"]}
    kept = min(said["ranking"], key=sizes.get)
    assert said["choice"] == kept and "smallest size" in said["why"][0]
    assert any("score drop" in sentence for sentence in said["why"])
    page = (out / "report.html").read_text("utf-8")
    assert "tasks.jsonl" in page and "Right answers" in page
    # Another start answers again only if the questions are others.
    report = optimize(changed, out, budgets=limits)
    assert all(stage["reused"] for stage in report["stages"])
    task.write_text(json.dumps(rows[0]))
    report = optimize(changed, out, budgets=limits)
    redone = [one["name"] for one in report["stages"] if not one["reused"]]
    assert redone == ["task"]


def test_a_model_is_fine_tuned_first_where_rows_are_given(options, finished, tmp_path):
    rows, task, out = (tmp_path / name for name in ("rows.jsonl", "task.jsonl", "out"))
    learnt = [{"prompt": f"the quick {n}", "completion": " fox"} for n in range(12)]
    rows.write_text("\n".join(map(json.dumps, learnt)))
    task.write_text(json.dumps({"prompt": "the quick 3", "answer": "fox"}))
    model = finished / "runs" / "teacher"
    asked = {**options, "corpus": None, "model": str(model), "data": str(rows)}
    asked |= {"task": str(task), "lora_rank": 2, "students": ()}
    asked |= {"modes": ("dynamic_int8",)}
    report = optimize(asked, out, budgets={"max_score_drop": "99%"})
    teacher = read_run(out / "runs" / "teacher")
    assert teacher.data == str(rows) and teacher.lora["rank"] == 2
    assert teacher.steps == 3 and teacher.init_from == str(model)
    names = [entry["name"] for entry in report["entries"]]
    assert names == ["teacher-float32", "teacher-dynamic_int8"]
    assert report["recommendation"]["choice"] and report["task"]["rows"] == 1
    assert shlex.split(report["stages"][0]["command"])[:4] == [
        *("gpt-tf", "finetune", "--model", str(model))
    ]
    report = optimize(asked, out, budgets={"max_score_drop": "99%"})
    assert all(stage["reused"] for stage in report["stages"])
    for wrong in ({"model": None}, {"corpus": "python-stdlib"}, {"data": None}):
        with pytest.raises(InputError, match=r"expects .*data"):
            OptimizationConfig(**{**asked, **wrong})


def test_a_task_that_cannot_be_done_is_refused_before_anything_is_made(
    options, tmp_path, made
):
    task, out = tmp_path / "tasks.jsonl", tmp_path / "out"
    task.write_text('{"prompt": "a"}')
    with pytest.raises(InputError, match="line 1"):
        optimize({**options, "task": str(task)}, out)
    with pytest.raises(InputError, match="max_score_drop"):
        optimize(options, out, budgets={"max_score_drop": 0.01})
    assert made == [] and not (out / optimization.CONFIG_NAME).exists()


def test_a_prompt_that_does_not_fit_is_refused_before_students_are_made(
    options, out, tmp_path, made
):
    task = tmp_path / "tasks.jsonl"
    task.write_text(json.dumps({"prompt": "the quick " * 99, "answer": "brown"}))
    with pytest.raises(InputError, match=r"the teacher, at line 1 .* 32 tokens"):
        optimize({**options, "task": str(task)}, out, update=True)
    assert made == []


def test_other_options_are_refused_with_the_difference(options, out, made):
    before = sorted(path.name for path in out.iterdir())
    with pytest.raises(InputError, match="student_steps=2 instead of 7") as refused:
        optimize({**options, "student_steps": 7}, out)
    assert "--update" in str(refused.value) and "corpus" not in str(refused.value)
    assert made == []
    assert sorted(path.name for path in out.iterdir()) == before


def test_an_update_does_what_the_change_concerns_and_tells_what_cannot_be_had(
    options, out, made, monkeypatch
):
    real, asked = optimization.export_trained, []
    (latency, *_) = artifacts.read_json(out / "measurements/latency.json").values()

    def export(source, path, mode, **more):
        if mode == "int4":
            raise InputError("no such thing")
        return real(source, path, mode, **more)

    def compare(paths, *, prompt_tokens, new_tokens, **how):
        asked.append((prompt_tokens, new_tokens))
        return [latency] * len(paths)

    monkeypatch.setattr(optimization, "export_trained", export)
    monkeypatch.setattr(optimization, "compare_latencies", compare)
    # Of a context of 32 tokens.
    changed = {**options, "prompt_tokens": 32, "new_tokens": 32}
    changed["modes"] = ("int8", "float16", "int4")
    report = optimize(changed, out, update=True)
    assert made == [*["export_trained"] * 2, "measure_accuracies"]
    names = [entry["name"] for entry in report["entries"]]
    assert sorted(names) == sorted([*NAMES, "teacher-float16", "student-1-float16"])
    assert asked == [(16, 16)]
    room, *told = report["notes"]
    assert "has no room for" in room
    assert len(told) == 2 and "teacher-int4" in told[0]
    assert all("no such thing" in note for note in told)
    assert "no such thing" in (out / "report.html").read_text("utf-8")


def test_a_trained_run_is_taken_as_the_teacher(options, trained, tmp_path, made):
    options = {**options, "steps": None, "students": (), "modes": ("float32",)}
    options |= {"corpus": None, "model": trained.out}
    report = optimize(options, tmp_path / "out")
    assert made == ["export_trained", "measure_accuracies", "compare_latencies"]
    (entry,) = report["entries"]
    perplexity = entry["accuracy"]["perplexity"]["value"]
    assert perplexity < 0.8 * trained.tokenizer.vocab_size
    assert entry["parameters"] == trained.model.count_params()


def test_a_model_without_its_run_has_students_and_follows_its_text(
    options, trained, corpus_folder, tmp_path, made, monkeypatch
):
    shutil.copytree(trained.out / "model", tmp_path / "alone")
    corpus = shutil.copytree(corpus_folder, tmp_path / "texts")
    wanted = {**options, "steps": None, "corpus": None, "modes": ("float16",)}
    wanted["model"] = tmp_path / "alone" / "model.keras"
    with pytest.raises(InputError, match="expects a corpus"):
        optimize(wanted, tmp_path / "out")
    calls = []

    def stop(*arguments, **named):
        calls.append((arguments, named))
        raise KeyboardInterrupt

    def exported():
        """Return how many files are made before the text to judge by is read."""
        made.clear()
        with pytest.raises(KeyboardInterrupt):
            optimize(wanted, tmp_path / "out", update=True)
        return made.count("export_trained")

    wanted["corpus"] = str(corpus)
    monkeypatch.setattr(loop, "distil", stop)
    assert exported() == 0
    ((teacher, *_), named), *_ = calls
    assert teacher == wanted["model"]
    assert "context_length" not in named  # that it follows from the teacher
    monkeypatch.setattr(optimization, "held_out_text", stop)
    wanted["students"] = ()
    assert exported() == 2
    assert calls[-1][0] == (str(corpus),)
    assert exported() == 0
    # The integers' ranges were measured on the text as it was.
    path = corpus / "text0.txt"
    path.write_text(path.read_text("utf-8") + "and again\n", "utf-8")
    assert exported() == 2


def test_an_interrupted_training_goes_on(
    options, tmp_path, interrupt_after, notices, monkeypatch
):
    real = loop.train

    class Enough(Exception):
        """What follows the teacher is another test's."""

    def stop(*arguments, **named):
        return real(*arguments, callbacks=[interrupt_after(3)], **named)

    def enough(*arguments, **named):
        raise Enough

    monkeypatch.setattr(loop, "distil", enough)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train", stop)
        optimize(options, tmp_path / "out")
    with pytest.raises(Enough):
        optimize(options, tmp_path / "out")
    assert any("step 2" in line for line in notices)


def test_a_folder_in_use_is_refused(options, out):
    with (
        artifacts.locked(out),
        pytest.raises(InputError, match=f"in use by another process, {os.getpid()}"),
    ):
        optimize(options, out)


def test_a_folder_of_something_else_is_refused(options, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        optimize(options, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modes": ("int8", "int8")}, "`modes`"),
        ({"students": (3,)}, "at most the teacher's 2 blocks"),
        ({"model": "nowhere"}, "`steps` are those"),
        ({"model": "nowhere", "steps": None}, "there is none"),
        ({"explained_prompts": 49}, "`explained_prompts`"),
    ],
)
def test_what_cannot_be_made_is_refused(options, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        optimize({**options, **changes}, tmp_path / "out")
    assert not list(tmp_path.rglob("*.litertlm"))


def test_budgets_that_nothing_can_keep_are_refused_before_any_training(
    options, tmp_path, made
):
    with pytest.raises(InputError, match="max_size_mb"):
        optimize(options, tmp_path, budgets={"max_size_mb": 0.001})
    assert made == []
