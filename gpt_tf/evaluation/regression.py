"""A report beside a stored one: what changed, and whether that is more than noise.

Entries are matched by name. Beyond noise is

- a time or a throughput, of which both reports state median and quartiles: if the
  quartile ranges do not overlap, the gap between them is wider than the wider of the
  two, and the larger median is at least 5 % above the other. Of fewer than ten
  measurements, or from fewer than ten processes, the gap has to be twice as wide, and
  of fewer than five measurements nothing is concluded;
- energy, which has no spread: if it differs by at least 15 %, and by more than the
  quartile ranges of both reports' inter-token latencies together;
- memory: if it differs by at least 10 %; the file's size: by at least 1 %;
- accuracy: if its 95 % intervals do not overlap, which small changes on the same text
  do not achieve; what is relative to a reference, if that has the same name in both.

Made of equal distributions, a time is taken for a change, worse or better, in fewer
than 1 of 100 cases: of five measurements or of twenty, or of five processes that differ
by 20 %. A third more is found in 7 of 10 cases or more if the measurements, or the
processes, differ by 5 %. Two processes, as `--quick` has them, say little about how
processes differ: then it is 1 of 25 cases where they do by 20 %. Percentiles beyond
the quartiles are shown and not judged: a busy minute moves them.
"""

import functools
import math
import os

from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.evaluation.report import read_report

LEAST_TIME = 0.05
LEAST_ENERGY = 0.15
LEAST_MEMORY = 0.10
LEAST_SIZE = 0.01

_FEWEST = 5
_FEW = 10

_TIMES = (
    *("time_to_first_token_ms", "inter_token_latency_ms", "response_time_ms"),
    *("load_ms", "cold_start_ms"),
)
_RELATIVE = ("perplexity_increase", "divergence_nats", "top1_agreement")
# Of accuracy; whether more is better.
_ACCURACIES = {
    "perplexity": False,
    "bits_per_byte": False,
    "token_accuracy": True,
    "perplexity_increase": False,
    "divergence_nats": False,
    "top1_agreement": True,
}
_SETTINGS = ("engine", "threads", "prompt_tokens", "new_tokens")


def read_baseline(path: str | os.PathLike, **settings) -> dict:
    """Read a report to compare with, before minutes are spent on measuring.

    Args:
        path: As for `read_report`.
        **settings: What will be measured, `prompt_tokens=64` for example.

    Returns:
        The report.

    Raises:
        InputError: It is of another version, was measured with other settings, or
            holds no speed, if there are settings.
        DamagedFileError: It is missing, no report, incomplete, or altered.

    Example:
        >>> baseline = read_baseline("report.json", prompt_tokens=64, new_tokens=64)
    """
    baseline = read_report(path)
    try:
        compare_with_baseline(baseline, baseline)
    except (AttributeError, LookupError, TypeError, ZeroDivisionError) as error:
        raise DamagedFileError(
            f"Expected the measurements of a report in {path}, but they cannot be "
            f"compared: {error!r}. The report was altered; store a new baseline."
        ) from None
    measured = [entry for entry in baseline["entries"] if entry["latency"]]
    if settings and not measured:
        raise InputError(
            f"The baseline expects files whose speed was measured. Received: {path}, "
            "which has none. Name a report that `gpt-tf benchmark` wrote."
        )
    for entry in measured:
        _check_settings(entry["name"], entry["latency"], settings)
    return baseline


def compare_with_baseline(report: dict, baseline: dict) -> dict:
    """Compare a report with a stored one, entry by entry.

    Args:
        report: The new one.
        baseline: The stored one.

    Returns:
        `rows`, a list of dicts: `entry`, `metric`, `before`, `after`, `ratio` (after
        over before, or None) and `change`, which is `"worse"`, `"better"`, `"none"`
        where it is not beyond noise, or None where it is not judged. `notes`, a list
        of sentences. `regressed`, whether anything is worse.

    Raises:
        InputError: No entry is in both, or one was measured with other settings.

    Example:
        >>> compare_with_baseline(new, read_report("report.json"))["regressed"]
    """
    stored = {entry["name"]: entry for entry in baseline["entries"]}
    ours = {entry["name"]: entry for entry in report["entries"]}
    names = [name for name in ours if name in stored]
    if not names:
        raise InputError(
            f"The baseline has entries {', '.join(stored) or '(none)'}. Received: "
            f"{', '.join(ours) or '(none)'}. Measure files of the same names."
        )
    notes = [f"{name}: not in the baseline" for name in ours if name not in stored]
    notes += [f"{name}: only in the baseline" for name in stored if name not in ours]
    notes += _machine_notes(report["machine"], baseline["machine"])
    same_text = report["corpus"] == baseline["corpus"]
    references = [one["reference"] for one in (baseline, report)]
    left_out = _RELATIVE if references[0] != references[1] else ()
    rows = []
    for name in names:
        before, after = stored[name], ours[name]
        found = [_scalar("size_bytes", before, after, LEAST_SIZE)]
        if before["latency"] and after["latency"]:
            settings = {part: after["latency"][part] for part in _SETTINGS}
            _check_settings(name, before["latency"], settings)
            found += _latency_rows(before["latency"], after["latency"])
        if before["accuracy"] and after["accuracy"]:
            if same_text:
                parts = before["accuracy"], after["accuracy"]
                found += _accuracy_rows(*parts, left_out)
                if left_out:
                    notes.append(f"{name}: {_other_reference(*references)}")
            else:
                notes.append(f"{name}: accuracy is that of another text")
        rows += [{"entry": name} | row for row in found]
    return {
        "rows": rows,
        "notes": notes,
        "regressed": any(row["change"] == "worse" for row in rows),
    }


def _check_settings(name, latency, settings):
    for part, wanted in settings.items():
        if latency[part] != wanted:
            raise InputError(
                f"The baseline's {name} was measured with {part} = {latency[part]}. "
                f"Received: {wanted}. Measure with the same settings, or store a new "
                "baseline."
            )


def _machine_notes(ours, theirs):
    if not ours or not theirs:
        return []
    return [
        f"the baseline's machine had {part} {theirs[part]}, this one has {ours[part]}"
        for part in ("cpu", "cores")
        if ours[part] != theirs[part]
    ]


def _other_reference(theirs, ours):
    theirs, ours = (name or "none" for name in (theirs, ours))
    return f"the baseline's reference is {theirs}, this one's {ours}: not compared"


def _latency_rows(before, after):
    processes = min(map(_processes, (before, after)))
    compared = functools.partial(_spread, processes=processes)
    rows = [compared(part, before[part], after[part]) for part in _TIMES]
    gaps = "inter_token_latency_ms"
    for part in ("p95", "p99"):
        rows.append(_row(f"{gaps} {part}", before[gaps][part], after[gaps][part], None))
    for old, new in _pairs("by_context", "context", before, after):
        for part in ("time_to_first_token_ms", gaps):
            name = f"{part}, prompt {new['context']}"
            rows.append(compared(name, old[part], new[part]))
    for old, new in _pairs("by_threads", "threads", before, after):
        name = f"{gaps}, threads {new['threads']}"
        rows.append(compared(name, old[gaps], new[gaps]))
    for old, new in _pairs("throughput", "requests", before, after):
        name = f"tokens_per_s, requests {new['requests']}"
        old, new = ({**one, "median": one["tokens_per_s"]} for one in (old, new))
        rows.append(compared(name, old, new, more_is_better=True))
    rows.append(_scalar("peak_memory_bytes", before, after, LEAST_MEMORY))
    noise = math.hypot(_relative_range(before[gaps]), _relative_range(after[gaps]))
    least = max(LEAST_ENERGY, noise)
    rows.append(_scalar("energy_j_per_token", before, after, least))
    return [row for row in rows if row is not None]


def _pairs(part, key, before, after):
    """Yield what both have of a list, matched by a key."""
    stored = {one[key]: one for one in before[part]}
    for one in after[part]:
        if one[key] in stored:
            yield stored[one[key]], one


def _processes(latency):
    """Return from how many processes measurements are: each has one cold start."""
    return latency["cold_start_ms"]["count"] if latency["cold_start_ms"] else 1


def _spread(name, before, after, processes, more_is_better=False):
    """Compare two spreads. None where one is missing."""
    if before is None or after is None:
        return None
    fewest = min(before["count"], after["count"])
    change = None
    if fewest >= _FEWEST:
        low, high = sorted((before, after), key=lambda spread: spread["median"])
        gap = high["q1"] - low["q3"]
        fence = max(one["q3"] - one["q1"] for one in (low, high))
        fence *= 1 if min(fewest, processes) >= _FEW else 2
        change = "none"
        far = high["median"] >= (1 + LEAST_TIME) * low["median"]
        if gap > 0 and gap > fence and far:
            change = "better" if (after is high) == more_is_better else "worse"
    return _row(name, before["median"], after["median"], change)


def _scalar(part, before, after, least):
    """Compare two numbers; less is better. None where one is missing."""
    before, after = before[part], after[part]
    if before is None or after is None:
        return None
    # The smaller over the larger, so that a change and its return are judged alike.
    small, large = sorted((before, after))
    change = "none"
    if large >= (1 + least) * small and large != small:
        change = "worse" if after > before else "better"
    return _row(part, before, after, change)


def _accuracy_rows(before, after, left_out):
    rows = []
    for part, more_is_better in _ACCURACIES.items():
        if part not in left_out:
            rows.append(_interval(part, before[part], after[part], more_is_better))
    if before["parsed"] and after["parsed"]:
        shares = before["parsed"]["share"], after["parsed"]["share"]
        rows.append(_interval("parsed share", *shares, True))
    return [row for row in rows if row is not None]


def _interval(name, before, after, more_is_better):
    if before is None or after is None:
        return None
    change = "none"
    if after["low"] > before["high"]:
        change = "better" if more_is_better else "worse"
    elif after["high"] < before["low"]:
        change = "worse" if more_is_better else "better"
    return _row(name, before["value"], after["value"], change)


def _row(metric, before, after, change):
    ratio = _ratio(before, after)
    return {
        "metric": metric,
        "before": before,
        "after": after,
        "ratio": ratio if math.isfinite(ratio) else None,
        "change": change,
    }


def _ratio(before, after):
    if before:
        return after / before
    return math.inf if after else 1.0


def _relative_range(spread):
    return (spread["q3"] - spread["q1"]) / spread["median"]
