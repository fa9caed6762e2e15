"""Comparison of a report with a stored one: what changed, and whether beyond noise.

Entries are matched by name. A change is

- of a time or a throughput: the medians of the processes of both reports differ by a
  two-sided Mann-Whitney U test at a level of 1 %, and the medians of all by at least
  5 %. Processes are what is independent, not the tokens of one. Of fewer than five
  processes in a report (`--quick` has two) nothing is concluded;
- of energy, which has no spread: at least 15 %, and more than the interquartile ranges
  of both reports' inter-token latencies together;
- of memory: at least 10 %; of the file's size: at least 1 %;
- of accuracy: its 95 % intervals do not overlap. What is relative to a reference is
  compared where that has the same name in both.

Percentiles in the tail are shown and not judged: a busy minute moves them.

Reference: Mann and Whitney, "On a Test of Whether one of Two Random Variables is
Stochastically Larger than the Other", Annals of Mathematical Statistics 18 (1947).
"""

import math
import os

from gpt_tf.errors import InputError
from gpt_tf.evaluation.report import check_report, read_report

LEVEL = 0.01
LEAST_TIME = 0.05
LEAST_ENERGY = 0.15
LEAST_MEMORY = 0.10
LEAST_SIZE = 0.01
# So few can differ at the level of 1 %: two in 252 orders of five and five.
FEWEST_ROUNDS = 5

_GAPS = "inter_token_latency_ms"
_TIMES = (
    *("time_to_first_token_ms", _GAPS, "response_time_ms"),
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
    entries = check_report(baseline).model_dump()["entries"]
    measured = [entry for entry in entries if entry["latency"]]
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
    # Complete, with None for what was not measured.
    report, baseline = (check_report(one).model_dump() for one in (report, baseline))
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
    machines = report["machine"], baseline["machine"]
    for part in ("cpu", "cores") if all(machines) else ():
        ours_has, theirs_had = (machine[part] for machine in machines)
        if ours_has != theirs_had:
            notes.append(
                f"the baseline's machine had {part} {theirs_had}, this one has "
                f"{ours_has}"
            )
    same_text = report["corpus"] == baseline["corpus"]
    references = [one["reference"] or "none" for one in (baseline, report)]
    left_out = _RELATIVE if references[0] != references[1] else ()
    rows = []
    for name in names:
        before, after = stored[name], ours[name]
        found = [_scalar_row("size_bytes", before, after, LEAST_SIZE)]
        if before["latency"] and after["latency"]:
            settings = {part: after["latency"][part] for part in _SETTINGS}
            _check_settings(name, before["latency"], settings)
            found += _latency_rows(before["latency"], after["latency"])
            gaps = before["latency"][_GAPS], after["latency"][_GAPS]
            if _fewest_rounds(*gaps) < FEWEST_ROUNDS:
                notes.append(
                    f"{name}: times are not judged, since a report has fewer than "
                    f"{FEWEST_ROUNDS} rounds; measure both without --quick"
                )
        if before["accuracy"] and after["accuracy"]:
            if same_text:
                parts = before["accuracy"], after["accuracy"]
                found += _accuracy_rows(*parts, left_out)
                if left_out:
                    notes.append(
                        f"the baseline's reference is {references[0]}, this one's "
                        f"{references[1]}: {name} is not compared with it"
                    )
            else:
                notes.append(f"{name}: accuracy is that of another text")
        rows += [{"entry": name} | row for row in found if row is not None]
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


def _fewest_rounds(*spreads):
    return min(len((one or {}).get("rounds") or ()) for one in spreads)


def _latency_rows(before, after):
    rows = [_spread_row(part, before[part], after[part]) for part in _TIMES]
    gaps = [one[_GAPS] or {} for one in (before, after)]
    for part in ("p95", "p99"):
        rows.append(_row(f"{_GAPS} {part}", *(one.get(part) for one in gaps), None))
    for old, new in _pairs("by_context", "context", before, after):
        for part in ("time_to_first_token_ms", _GAPS):
            name = f"{part}, prompt {new['context']}"
            rows.append(_spread_row(name, old[part], new[part]))
    for old, new in _pairs("by_threads", "threads", before, after):
        name = f"{_GAPS}, threads {new['threads']}"
        rows.append(_spread_row(name, old[_GAPS], new[_GAPS]))
    for old, new in _pairs("throughput", "requests", before, after):
        name = f"tokens_per_s, requests {new['requests']}"
        old, new = (one | {"median": one["tokens_per_s"]} for one in (old, new))
        rows.append(_spread_row(name, old, new, more_is_better=True))
    rows.append(_scalar_row("peak_memory_bytes", before, after, LEAST_MEMORY))
    ranges = [
        (one["q3"] - one["q1"]) / one["median"]
        for one in gaps
        if one and None not in (one["q1"], one["median"], one["q3"])
    ]
    least = max(LEAST_ENERGY, math.hypot(*ranges))
    rows.append(_scalar_row("energy_j_per_token", before, after, least))
    return rows


def _pairs(part, key, before, after):
    """Yield what both have of a list, matched by a key."""
    stored = {one[key]: one for one in before[part] or ()}
    for one in after[part] or ():
        if one[key] in stored:
            yield stored[one[key]], one


def _spread_row(name, before, after, more_is_better=False):
    """Compare two spreads by their rounds. None where one is missing."""
    # Here, since it takes a second, and a device needs it for baselines alone.
    from scipy.stats import mannwhitneyu

    if before is None or after is None:
        return None
    old, new = before["median"], after["median"]
    if _fewest_rounds(before, after) < FEWEST_ROUNDS:
        return _row(name, old, new, None)
    differs = (
        _is_apart(old, new, LEAST_TIME)
        and mannwhitneyu(before["rounds"], after["rounds"]).pvalue <= LEVEL
    )
    return _row(name, old, new, differs, more_is_better)


def _scalar_row(part, before, after, least):
    """Compare two numbers; less is better. None where one is missing."""
    old, new = before[part], after[part]
    return _row(part, old, new, _is_apart(old, new, least))


def _is_apart(before, after, least):
    """Tell whether the larger number is above the smaller by that share of it."""
    if before is None or after is None:
        return False
    # So a change and its return are judged alike.
    small, large = sorted((before, after))
    return large >= (1 + least) * small and large != small


def _accuracy_rows(before, after, left_out):
    pairs = {part: (before[part], after[part]) for part in _ACCURACIES}
    if before["parsed"] and after["parsed"]:
        pairs["parsed share"] = before["parsed"]["share"], after["parsed"]["share"]
    return [
        _row(
            part,
            *(old["value"], new["value"]),
            old["high"] < new["low"] or new["high"] < old["low"],
            more_is_better=_ACCURACIES.get(part, True),
        )
        for part, (old, new) in pairs.items()
        if part not in left_out and old and new
    ]


def _row(metric, before, after, differs, more_is_better=False):
    """Return a row; `differs` is whether beyond noise, or None where not judged."""
    if before is None or after is None:
        return None
    change = "none" if differs is not None else None
    if differs:
        change = "better" if (after > before) == more_is_better else "worse"
    ratio = after / before if before else None
    parts = {"before": before, "after": after, "ratio": ratio, "change": change}
    return {"metric": metric} | parts
