"""The studies run, and their tables say what their pages say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_study_of_scaling_runs_and_agrees_with_its_committed_result(tmp_path):
    command = ["studies/scaling/run.py", "--devices", "8", "--out", str(tmp_path)]
    result = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ, capture_output=True
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "scaling_model.png").stat().st_size > 10_000
    new, committed = (
        json.loads((folder / "scaling_model.json").read_text("utf-8"))["published"]
        for folder in (tmp_path, ROOT / "benchmarks" / "results")
    )
    assert new["shares"] == pytest.approx(committed["shares"], rel=1e-3)
    for source, errors in committed["held_out"].items():
        assert new["held_out"][source] == pytest.approx(errors, rel=1e-3)
