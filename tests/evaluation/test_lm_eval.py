"""lm-eval on a file that ships comes to the scores that `evaluate --task` has."""

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt_tf.edge import EdgeGPT
from gpt_tf.errors import InputError
from gpt_tf.evaluation.tasks import answer, measure_tasks, open_task
from tests.evaluation import lm_eval_stand_in

ROOT = Path(__file__).parents[2]
FILE = ROOT / "saved_models" / "python-small.litertlm"
TASKS = Path(__file__).parent / "lm_eval_tasks"
HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None


@pytest.fixture
def lm(monkeypatch):
    """The file as lm-eval opens it."""
    models = lm_eval_stand_in.install(monkeypatch)
    name = "gpt_tf.evaluation.lm_eval"
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    kind = models["gpt_tf"]
    found = kind.create_from_arg_obj({"path": str(FILE)}, {"batch_size": 1})
    yield found
    found.gpt.close()


def scores(gpt, name):
    return measure_tasks({"gpt": gpt}, None, open_task(TASKS / name))["gpt"]


def requests(*arguments):
    return [SimpleNamespace(args=one) for one in arguments]


def test_choices_have_the_scores_of_lm_eval(lm):
    lines = (TASKS / "choices.jsonl").read_text().splitlines()
    theirs = lm_eval_stand_in.scores_of(lm, list(map(json.loads, lines)))
    ours = scores(lm.gpt, "choices.jsonl")
    assert theirs == {"acc": ours["by_sum"], "acc_bytes": ours["score"]["value"]}
    assert theirs["acc"] != theirs["acc_bytes"]
    assert lm.kept[0][:2] == ("loglikelihood", ("import", " os"))


def test_answers_are_those_of_our_tasks(lm):
    options = {"until": [",", ")"], "max_gen_toks": 4, "do_sample": False}
    pairs = [("def __init__(", options), ("x", {**options, "until": "="})]
    found = lm.generate_until(requests(*pairs))
    assert found[0] == answer(lm.gpt, "def __init__(", 4, (",", ")")) == "self"
    assert found[1] == answer(lm.gpt, "x", 4, ("=",))
    sampled = {"do_sample": True, "temperature": 9.0, "max_gen_toks": 9}
    assert len(set(lm.generate_until(requests(*[("def f(", sampled)] * 3)))) > 1


def test_a_whole_text_has_the_log_likelihood_of_score(lm):
    text = "def f(x):\n    return x\n" * 30  # longer than the context
    ids = [lm.tokenizer.end_of_text_id, *lm.tokenizer.encode(text)]
    assert len(ids) > 2 * lm.gpt.context_length
    expected = float(lm.gpt.score(ids).sum())
    assert lm.loglikelihood_rolling(requests((text,))) == [expected]


def test_of_a_context_that_is_too_long_the_end_is_used(lm):
    long = "x = \u20ac + y\n" * 200 + "import"
    ((near, _),) = lm.loglikelihood(requests((long[-60:], " os")))
    ((found, _),) = lm.loglikelihood(requests((long, " os")))
    ((other, _),) = lm.loglikelihood(requests(("zebra", " os")))
    assert abs(found - near) < abs(found - other)
    (text,) = lm.generate_until(requests((long, {"max_gen_toks": 5})))
    assert 0 < len(lm.tokenizer.encode(text)) <= 5
    with pytest.raises(InputError, match="128"):
        lm.loglikelihood(requests(("a", "x = y\n" * 100)))


def test_messages_are_rendered_where_there_is_a_template(lm):
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(InputError, match="chat template"):
        lm.apply_chat_template(messages)
    assert lm.chat_template(True) == ""
    template = SimpleNamespace(
        source="S", render=lambda m, add_generation_prompt: str(m)
    )
    lm.tokenizer.chat_template = template
    assert lm.apply_chat_template(messages) == str(messages)
    assert lm.chat_template(True) == "S"


def test_what_a_file_does_not_have_is_refused(lm, tmp_path):
    kind = type(lm)
    with pytest.raises(InputError, match="revision"):
        kind(path=FILE, revision="main")
    with pytest.raises(InputError, match="nowhere"):
        kind(path="nowhere.litertlm")


@pytest.mark.skipif(HAS_LM_EVAL, reason="lm-eval is installed")
def test_without_lm_eval_the_package_is_named():
    call = [sys.executable, "-m", "gpt_tf.evaluation.lm_eval", "--model", "gpt_tf"]
    result = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode and "gpt-tf[lm-eval]" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(not HAS_LM_EVAL, reason="pip install 'gpt-tf[lm-eval]'")
def test_lm_eval_itself_comes_to_our_scores(tmp_path):
    call = [sys.executable, "-m", "gpt_tf.evaluation.lm_eval", "--model", "gpt_tf"]
    call += ["--model_args", f"path={FILE}", "--include_path", str(TASKS)]
    call += ["--tasks", "gpt_tf_choices,gpt_tf_exact", "--output_path", str(tmp_path)]
    environment = {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "cache")}
    environment |= {"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    subprocess.run(call, check=True, capture_output=True, cwd=TASKS, env=environment)
    (report,) = tmp_path.rglob("results_*.json")
    found = json.loads(report.read_text())["results"]
    with EdgeGPT(FILE) as gpt:
        choices, exact = scores(gpt, "choices.jsonl"), scores(gpt, "exact.jsonl")
    assert found["gpt_tf_choices"]["acc,none"] == choices["by_sum"]
    assert found["gpt_tf_choices"]["acc_bytes,none"] == choices["score"]["value"]
    assert found["gpt_tf_exact"]["exact_match,none"] == exact["score"]["value"] == 2 / 3
