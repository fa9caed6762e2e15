"""Files that someone altered: what is of another type is one line, never a traceback.

Every value that such a file holds is replaced by values of other types, and left out.
"""

import copy
import io
import itertools
import json

import pytest
from rich.console import Console

from gpt_tf import artifacts
from gpt_tf.advisor.estimate import read_sizes
from gpt_tf.advisor.ranking import print_recommendation, recommend
from gpt_tf.distillation.teacher_cache import KnowledgeStore, extract
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.evaluation.regression import read_baseline
from gpt_tf.evaluation.report import join_reports, read_report
from gpt_tf.progress import draw_history
from gpt_tf.text.dataset import TokenFile
from gpt_tf.training.checkpoint import HISTORY
from gpt_tf.training.run_folder import read_run
from gpt_tf.workflow.steps import Steps
from tests.reporting.samples import full_report

FORGED = (None, "x", "", -1, 0, 1.5, True, [], {}, [1], {"a": 1}, 10**30)
_GONE = object()


def replaced(value, place, forged):
    """Return a copy of a JSON value in which one place is another."""
    if not place:
        return forged
    altered = copy.deepcopy(value)
    *parents, last = place
    owner = altered
    for key in parents:
        owner = owner[key]
    if forged is _GONE:
        del owner[last]
    else:
        owner[last] = forged
    return altered


def places(value, before=()):
    """Yield the keys that lead to every part of a JSON value; of a list, its first."""
    pairs = value.items() if isinstance(value, dict) else []
    if isinstance(value, list):
        pairs = enumerate(value[:1])
    for key, part in pairs:
        yield (*before, key)
        yield from places(part, (*before, key))


def wrong(value, use, every=1):
    """Return which of every so many forgeries end in a bare error; all are counted."""
    found = []
    forgeries = [*itertools.product(places(value), (*FORGED, _GONE))]
    forgeries += [((), forged) for forged in FORGED]
    for place, forged in forgeries[every - 1 :: every]:
        try:
            use(replaced(value, place, forged))
        except InputError as error:
            assert "\n" not in str(error).strip()
        except Exception as error:
            what = "left out" if forged is _GONE else repr(forged)
            found.append(f"{place} {what}: {type(error).__name__}: {error}"[:200])
    return found, len(forgeries)


@pytest.fixture
def put(tmp_path):
    """Write JSON, whatever it is, to a file."""

    def put(name, value):
        path = tmp_path / name
        path.write_text(json.dumps(value), "utf-8")
        return path

    return put


def test_forged_runs_are_one_line(trained, put, tmp_path):
    def use(run):
        put("run.json", run)
        read_run(tmp_path)
        read_sizes(tmp_path)

    found, tried = wrong(artifacts.read_json(trained.out / "run.json"), use)
    assert found == []
    assert tried > 500


def test_forged_histories_are_one_line(trained, put, tmp_path):
    def use(history):
        history = artifacts.read_json(put("history.json", history), HISTORY)
        assert all(one["step"] >= -1 for part in HISTORY for one in history[part])

    history = artifacts.read_json(trained.out / "history.json")
    found, _ = wrong(history, use)
    assert found == []
    draw_history(
        artifacts.read_json(trained.out / "history.json", HISTORY), tmp_path / "a"
    )


def test_forged_manifests_of_tokens_are_one_line(trained, put, tmp_path):
    source = trained.out / "data" / "train.tokens"
    (tmp_path / source.name).write_bytes(source.read_bytes())

    def use(manifest):
        put("train.tokens.json", manifest)
        TokenFile.open(tmp_path / source.name, verify=False).check_fits(300)

    found, _ = wrong(artifacts.read_json(f"{source}.json"), use)
    assert found == []


def test_forged_stores_of_knowledge_are_one_line(trained, tmp_path):
    tokens = TokenFile.open(trained.out / "data" / "validation.tokens")
    store = extract(
        trained.model, tokens, tmp_path / "store", tokenizer=trained.tokenizer, top_k=2
    )
    manifest = artifacts.read_json(store.path / artifacts.MANIFEST_NAME)

    def use(forged):
        if isinstance(forged, dict):  # with the hash of what it says now
            forged = {k: v for k, v in forged.items() if k != "sha256"}
            forged["sha256"] = artifacts._sha256_of_content(forged)
        artifacts.write_json(store.path / artifacts.MANIFEST_NAME, forged)
        KnowledgeStore.open(store.path, verify=False).read(0, [1, 2])

    found, _ = wrong(manifest, use, every=5)
    assert found == []


def test_forged_records_of_stages_are_done_again(put, tmp_path):
    (tmp_path / "stages").mkdir()

    def count():
        (tmp_path / "count").write_text("1")

    step = ("count", "", {"text": "a"}, ["count"], count)
    Steps(tmp_path, 1).run(*step)
    record = artifacts.read_json(tmp_path / "stages" / "count.json")

    def use(forged):
        put("stages/count.json", forged)
        again = Steps(tmp_path, 1)
        again.run(*step)
        assert isinstance(again.done[0]["seconds"], int | float)

    found, _ = wrong(record, use)
    assert found == []


# A prime, so that every kind of value is tried somewhere.
@pytest.mark.parametrize("every", [53, pytest.param(1, marks=pytest.mark.slow)])
def test_forged_reports_are_one_line(put, every):
    console = Console(file=io.StringIO())
    stored = put("stored.json", full_report())

    def use(report):
        path = put("report.json", report)
        read = read_report(path)
        print_recommendation(recommend(read), console)
        recommend(join_reports([read, read_report(stored)]))
        read_baseline(path)

    found, tried = wrong(full_report(), use, every)
    assert found == []
    assert tried > 3000


def test_a_forgery_that_nobody_checks_is_found():
    found, _ = wrong({"size": 1}, lambda value: value["size"] + 1)
    assert any("TypeError" in line for line in found)
    with pytest.raises(DamagedFileError, match=r"sizes\.0\.width"):
        shape = {"sizes": [{"width": int}]}
        artifacts.check_shape({"sizes": [{"width": "1"}]}, shape, "a.json")
