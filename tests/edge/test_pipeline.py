import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from gpt_tf.edge import EdgeGPT, EdgePipeline, executor, stage
from gpt_tf.edge import pipeline as pipelines
from gpt_tf.edge.pipeline import StageError
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export.stages import export_stages
from gpt_tf.export.tflite import export_tflite
from tests.edge.conftest import CONTEXT, small_model
from tests.edge.test_runtime import OPTIONS, random_ids

PROMPTS = [[3], random_ids(11), random_ids(CONTEXT), [5, 3, 5], random_ids(19, seed=2)]


@pytest.fixture(scope="module")
def pipeline(exported):
    """The stages as processes."""
    with EdgePipeline(exported.stages) as opened:
        yield opened


@pytest.fixture(scope="module")
def turns(exported):
    """The stages in this process, whose caches grow early and often."""
    before, executor.GROWTH = executor.GROWTH, 4
    with EdgePipeline(exported.stages, processes=False) as opened:
        yield opened
    executor.GROWTH = before


@pytest.fixture
def folder(exported, tmp_path):
    """A copy of the stages, to be damaged."""
    return shutil.copytree(exported.stages, tmp_path / "copy")


def processes_of(pipeline):
    return pipeline._line._processes


# Texts


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "prompt", [PROMPTS, PROMPTS[1], "abc", ["a", "hello there", "x.\n"]], ids=str
)
@pytest.mark.parametrize("kind", ["pipeline", "turns"])
def test_texts_are_those_of_the_undivided_file(gpt, request, kind, prompt, options):
    # Long enough for the oldest half to be dropped.
    options = {"max_new_tokens": 30, **options}
    found = request.getfixturevalue(kind).generate(prompt, **options)
    assert found == gpt.generate(prompt, **options)


def test_more_texts_than_may_have_a_cache_wait_for_their_turn(exported, gpt):
    options = {"max_new_tokens": 9, "seed": 2}
    with EdgePipeline(exported.stages, max_active=2, processes=False) as few:
        assert few.generate(PROMPTS, **options) == gpt.generate(PROMPTS, **options)


def test_a_text_that_may_not_slide_ends_where_the_cache_does(exported):
    options = {"max_new_tokens": 60, "temperature": 0}
    with (
        EdgeGPT(exported.tflite, when_full="stop") as gpt,
        EdgePipeline(exported.stages, processes=False, when_full="stop") as pipeline,
    ):
        assert pipeline.generate(PROMPTS, **options) == gpt.generate(PROMPTS, **options)


def test_stop_texts_and_streams_are_those_of_the_undivided_file(gpt, pipeline):
    options = {"max_new_tokens": 30, "seed": 5}
    whole = gpt.generate("abc", **options)
    assert "".join(pipeline.stream("abc", **options)) == whole
    options["stop"] = [whole[4:6]]
    prompts = ["abc", "fox"]
    assert pipeline.generate(prompts, **options) == gpt.generate(prompts, **options)


def test_streams_may_take_turns_and_be_left(gpt, pipeline):
    options = {"max_new_tokens": 20, "temperature": 0}
    alone = [gpt.generate(prompt, **options) for prompt in PROMPTS[:3]]
    both = [pipeline.stream(prompt, **options) for prompt in PROMPTS[:3]]
    assert next(both[2]) == alone[2][0]
    both[2].close()
    together = list(zip(*both[:2], strict=True))
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone[:2]
    assert pipeline.generate(PROMPTS[2], **options) == alone[2]


@pytest.mark.parametrize("mode", ["dynamic_int8", "int8_full"])
def test_integer_modes_give_the_same_texts_too(tmp_path, mode):
    model = small_model(num_heads=4, embedding_dim=32)
    representative = np.array([random_ids(CONTEXT)])
    options = {"prefill_lengths": (1, 8), "representative": representative}
    export_tflite(model, tmp_path / "gpt.tflite", mode, **options)
    export_stages(model, tmp_path / "stages", mode, **options)
    with (
        EdgeGPT(tmp_path / "gpt.tflite") as gpt,
        EdgePipeline(tmp_path / "stages", processes=False) as pipeline,
    ):
        assert pipeline.mode == mode
        assert pipeline.generate(PROMPTS, seed=1) == gpt.generate(PROMPTS, seed=1)


# Order of events


@pytest.fixture
def events(exported, monkeypatch):
    """Run prompts; return the frames sent, (text, tokens), and None for each got."""

    def events(prompts, **options):
        found = []
        with EdgePipeline(exported.stages, processes=False) as opened:
            send, receive = opened._line.send, opened._line.receive

            def noted(frame):
                if frame.kind == stage.RUN:
                    found.append((frame.session, frame.count))
                send(frame)

            monkeypatch.setattr(opened._line, "send", noted)
            monkeypatch.setattr(
                opened._line, "receive", lambda: found.append(None) or receive()
            )
            opened.generate(prompts, temperature=0, **options)
        return found

    return events


def test_a_stage_gets_the_next_text_before_the_one_before_has_come_out(events):
    found = events([[1], [2], [3]], max_new_tokens=4)
    a, b, c = [(number, 1) for number in range(3)]
    # All three are under way before the first result is asked for, and each comes
    # back as soon as its token is known.
    assert found[:9] == [a, b, c, None, a, None, b, None, c]


def test_of_a_long_prompt_several_pieces_are_under_way(events):
    found = events([random_ids(18), [7]], max_new_tokens=1)
    # The short one does not wait for all pieces of the long one.
    assert [event and event[0] for event in found[:6]] == [0, 1, 0, 0, None, 0]
    assert sum(count for number, count in filter(None, found) if number == 0) == 18


def test_what_is_under_way_is_bounded(events):
    found = events([[number] for number in range(8)], max_new_tokens=3)
    under_way = np.cumsum([1 if event else -1 for event in found])
    assert under_way.max() == 4


# Ends


def test_closing_ends_all_processes(exported):
    opened = EdgePipeline(exported.stages)
    processes = processes_of(opened)
    assert [process.poll() for process in processes] == [None, None]
    opened.close()
    opened.close()
    assert [process.returncode for process in processes] == [0, 0]
    with pytest.raises(InputError, match="was closed"):
        opened.generate([1])


@pytest.mark.parametrize("index", [0, 1])
def test_a_stage_that_is_killed_is_an_error_and_no_wait(exported, index):
    opened = EdgePipeline(exported.stages)
    processes = processes_of(opened)
    steps = opened.stream([1, 2], max_new_tokens=100_000)
    next(steps)
    processes[index].kill()
    with pytest.raises(StageError, match=rf"^Stage {index} of 2 ended with signal 9"):
        list(steps)
    assert all(process.returncode is not None for process in processes)
    with pytest.raises(InputError, match="was closed"):
        opened.generate([1])


def test_an_error_inside_a_stage_is_told_and_ends_all(exported):
    opened = EdgePipeline(exported.stages)
    opened._lengths = (5,)  # there is no such signature, so decode gets 5 tokens
    with pytest.raises(StageError, match="A stage failed: ValueError: "):
        opened.generate(random_ids(12))
    assert all(process.returncode is not None for process in processes_of(opened))


def test_an_interruption_ends_all_processes(exported, monkeypatch):
    opened = EdgePipeline(exported.stages)

    def interrupted(stream):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipelines.stages, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened.generate([1])
    assert [process.returncode for process in processes_of(opened)] == [0, 0]


def test_stages_end_with_the_process_that_started_them(exported, tmp_path):
    """However it ends, started from standard input too, which has no file."""
    code = (
        "import os, signal\n"
        "from gpt_tf.edge import EdgePipeline\n"
        f"pipeline = EdgePipeline({str(exported.stages)!r})\n"
        "print(pipeline.generate([1, 2], max_new_tokens=3), flush=True)\n"
        "print(*[p.pid for p in pipeline._line._processes], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run(
        [sys.executable, "-X", "dev", "-"],
        input=code,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert result.returncode == -signal.SIGKILL and result.stderr == ""
    numbers = result.stdout.splitlines()[1].split()
    assert len(numbers) == 2
    for _ in range(100):
        if not any(is_running(number) for number in numbers):
            return
        time.sleep(0.05)
    pytest.fail("a stage was left behind")


def is_running(number):
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_process_that_cannot_be_started_is_one_line(exported, monkeypatch):
    monkeypatch.setattr(pipelines.sys, "executable", "/nowhere/python")
    with pytest.raises(StageError, match="Open the pipeline with `processes=False`"):
        EdgePipeline(exported.stages)


# Bad stages


def test_a_folder_without_stages_is_refused(tmp_path):
    for place, received in (("nothing", "no folder"), (".", "no stages")):
        with pytest.raises(InputError, match=rf"stage-0\.tflite .*: {received}\."):
            EdgePipeline(tmp_path / place)


@pytest.mark.parametrize("index", [0, 1])
def test_a_missing_stage_is_named(folder, index):
    (folder / f"stage-{index}.tflite").unlink()
    with pytest.raises(DamagedFileError, match=rf"lack stage-{index}\.tflite"):
        EdgePipeline(folder)


@pytest.mark.parametrize("index", [0, 1])
def test_an_altered_stage_is_refused(folder, index):
    path = folder / f"stage-{index}.tflite"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedFileError, match=rf"stage-{index}.*SHA-256"):
        EdgePipeline(folder)
    path.write_bytes(b"")
    with pytest.raises(DamagedFileError, match="an empty file"):
        EdgePipeline(folder)


def test_a_stage_of_another_model_is_refused(folder, tmp_path):
    other = tmp_path / "other"
    export_stages(small_model(num_heads=2), other, "float32", prefill_lengths=(1, 8))
    shutil.copy(other / "stage-1.tflite", folder)
    with pytest.raises(DamagedFileError, match="that of another model, mode or"):
        EdgePipeline(folder)


def test_stages_in_each_others_place_are_refused(folder):
    shutil.copy(folder / "stage-1.tflite", folder / "stage-0.tflite")
    with pytest.raises(DamagedFileError, match=r"stage 0 of 2 .*: stage 1 of 2\."):
        EdgePipeline(folder)


def test_whole_files_and_stages_are_not_taken_for_each_other(folder, exported):
    with pytest.raises(InputError, match=r"Expected a whole model .* `EdgePipeline`"):
        EdgeGPT(exported.stages / "stage-1.tflite")
    shutil.copy(exported.tflite, folder / "stage-1.tflite")
    with pytest.raises(DamagedFileError, match="Expected a stage of a model"):
        EdgePipeline(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_threads": 0}, "num_threads"),
        ({"max_active": 0}, "max_active"),
        ({"when_full": "wrap"}, "when_full"),
    ],
)
def test_bad_arguments_are_refused(exported, arguments, message):
    with pytest.raises(InputError, match=message):
        EdgePipeline(exported.stages, **arguments)


@pytest.mark.parametrize("prompt", [[], [99], "A", ["a", ""]], ids=str)
def test_bad_prompts_are_refused_and_disturb_nothing(gpt, turns, prompt):
    with pytest.raises(InputError):
        turns.generate(prompt)
    assert turns.generate("abc", seed=1) == gpt.generate("abc", seed=1)
