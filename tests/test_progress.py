import io
import os
import struct
from types import SimpleNamespace

import pytest
from rich.console import Console

from gpt_tf.cli.common import notice
from gpt_tf.progress import (
    StepProgress,
    draw_history,
    print_knowledge,
    print_result,
)
from gpt_tf.training.run import TrainingResult


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=300)


def text_of(console):
    return console.file.getvalue()


def test_a_notice_goes_to_the_console_whose_bar_is_drawn(console, capsys):
    with StepProgress("windows", console) as progress:
        progress.update(3, 10)
        notice("[5] tokens")
    assert "windows" in text_of(console) and "3/10" in text_of(console)
    assert "[5] tokens" in text_of(console)
    notice("[6] tokens")
    assert "[6]" not in text_of(console) and "[6] tokens" in capsys.readouterr().out


def test_a_store_of_knowledge_is_a_table(console, tmp_path):
    store = SimpleNamespace(
        path=tmp_path / "knowledge",
        manifest={"count": 1234},
        mapping="derived",
        passes=2,
        top_k=32,
        size_bytes=5_000_000,
        bytes_per_token=97,
    )
    print_knowledge(store, console)
    for part in ("1,234, 2 times", "the 32 most", "5.0 MB", "97 bytes", "derived"):
        assert part in text_of(console)


def test_the_result_is_a_table(trained, console, tmp_path):
    out = tmp_path / "a [bold]name[/x]"
    result = TrainingResult(trained.model, trained.tokenizer, {}, out, None)
    print_result(result, console)
    assert "validation" not in text_of(console)
    assert str(out / "model") in text_of(console)
    print_result(trained, console)
    for part in (
        f"{trained.model.count_params():,}",
        "300 tokens",
        f"{trained.validation_loss:.4f}",
        f"{trained.validation_perplexity:.2f}",
        "loss.png",
    ):
        assert part in text_of(console), part


NAN = float("nan")
STEPS = [{"step": step, "loss": 5.0 / step} for step in (1, 10, 20)]
VALIDATIONS = [{"step": step, "loss": 2.0} for step in (10, 20)]


@pytest.mark.parametrize(
    ("steps", "validations"),
    [([{"step": 1, "loss": NAN}], VALIDATIONS), ([], [])],
)
def test_the_history_is_drawn_as_a_png(tmp_path, steps, validations):
    path = tmp_path / "loss.png"
    draw_history({"steps": steps, "validations": validations}, path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", data[16:24]) == (880, 495)
    assert os.listdir(tmp_path) == ["loss.png"]


def test_the_curves_are_of_the_history(tmp_path):
    pictures = []
    for index, loss in enumerate((2.0, 2.0, 3.0)):
        rows = [{**row, "loss": loss} for row in VALIDATIONS]
        path = tmp_path / f"{index}.png"
        draw_history({"steps": STEPS, "validations": rows}, path)
        pictures.append(path.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]
