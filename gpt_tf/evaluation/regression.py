"""Comparison of a report with a stored one: what changed, and whether beyond noise.

Entries are matched by name. A change is

- of a time or a throughput: the medians of the processes of both reports differ by a
  two-sided Mann-Whitney U test at a level of 1 %, and the medians of all by at least
  5 %. Processes are what is independent, not the tokens of one. Of fewer than five
  processes in a report (`--quick` has two) nothing is concluded;
- of memory: at least 10 %; of the file's size: at least 1 %;
- of accuracy: its 95 % intervals do not overlap. What is relative to a reference is
  compared where that has the same name in both.

Percentiles in the tail, which a busy minute moves, and energy, which is measured once,
are shown and not judged.

Reference: Mann and Whitney, "On a Test of Whether one of Two Random Variables is
Stochastically Larger than the Other", Annals of Mathematical Statistics 18 (1947).
"""

import os

from gpt_tf.errors import InputError
from gpt_tf.evaluation.report import check_report, read_report

LEVEL = 0.01
LEAST_TIME = 0.05
LEAST = {"size_bytes": 0.01, "peak_memory_bytes": 0.10}
# So few can differ at the level of 1 %: two in 252 orders of five and five.
FEWEST_ROUNDS = 5

_GAPS, _FIRST = "inter_token_latency_ms", "time_to_first_token_ms"
_TIMES = (_FIRST, _GAPS, "response_time_ms", "load_ms", "cold_start_ms")
_RELATIVE = ("perplexity_increase", "divergence_nats", "top1_agreement")
_ABSOLUTE = ("perplexity", "bits_per_byte", "token_accuracy", "parsed share")
_ACCURACIES = (*_ABSOLUTE, *_RELATIVE)
_MORE_IS_BETTER = ("token_accuracy", "top1_agreement", "parsed share", "tokens_per_s")
_SETTINGS = ("engine", "threads", "prompt_tokens", "new_tokens")


def read_baseline(path: str | os.PathLike, **settings) -> dict:
    """Read a report to compare with, before minutes are spent on measuring.

    Args:
        path: As for `read_report`.
        **settings: What will be measured, `prompt_tokens=64` for example; None is as
            in the report.

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


def request_of(baseline: dict) -> dict:
    """Return the `prompt_tokens` and `new_tokens` that a baseline was measured with."""
    latency = next(e["latency"] for e in baseline["entries"] if e.get("latency"))
    return {name: latency[name] for name in ("prompt_tokens", "new_tokens")}


def compare_with_baseline(report: dict, baseline: dict) -> dict:
    """Compare a report with a stored one, entry by entry.

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
    references = [one["reference"] or "none" for one in (baseline, report)]
    rows = []
    for name in names:
        before, after = stored[name], ours[name]
        left_out = ()
        if before["latency"] and after["latency"]:
            settings = {part: after["latency"][part] for part in _SETTINGS}
            _check_settings(name, before["latency"], settings)
            if not all(_has_rounds(one["latency"][_GAPS]) for one in (before, after)):
                notes.append(
                    f"{name}: times are not judged, since a report has fewer than "
                    f"{FEWEST_ROUNDS} rounds; measure both without --quick"
                )
        if before["accuracy"] and after["accuracy"]:
            if report["corpus"] != baseline["corpus"]:
                left_out = _ACCURACIES
                notes.append(f"{name}: accuracy is that of another text")
            elif references[0] != references[1]:
                left_out = _RELATIVE
                notes.append(
                    f"the baseline's reference is {references[0]}, this one's "
                    f"{references[1]}: {name} is not compared with it"
                )
        known = _metrics_of(before)
        for metric, value in _metrics_of(after).items():
            if metric in known and metric not in left_out:
                rows.append({"entry": name} | _row(metric, known[metric], value))
    return {
        "rows": rows,
        "notes": notes,
        "regressed": any(row["change"] == "worse" for row in rows),
    }


def _check_settings(name, latency, settings):
    for part, wanted in settings.items():
        if wanted not in (None, latency[part]):
            raise InputError(
                f"The baseline's {name} was measured with {part} = {latency[part]}. "
                f"Received: {wanted}. Measure with the same settings, or store a new "
                "baseline."
            )


def _has_rounds(spread):
    return len((spread or {}).get("rounds") or ()) >= FEWEST_ROUNDS


def _metrics_of(entry):
    """Return what was measured of an entry: numbers, spreads and intervals."""
    latency, accuracy = entry["latency"] or {}, entry["accuracy"] or {}
    gaps = latency.get(_GAPS) or {}
    found = {"size_bytes": entry["size_bytes"]}
    found |= {part: latency.get(part) for part in _TIMES}
    found |= {f"{_GAPS} {part}": gaps.get(part) for part in ("p95", "p99")}
    for row in latency.get("by_context") or ():
        for part in (_FIRST, _GAPS):
            found[f"{part}, prompt {row['context']}"] = row[part]
    for row in latency.get("by_threads") or ():
        found[f"{_GAPS}, threads {row['threads']}"] = row[_GAPS]
    for row in latency.get("throughput") or ():
        metric = f"tokens_per_s, requests {row['requests']}"
        found[metric] = row | {"median": row["tokens_per_s"]}
    for part in ("peak_memory_bytes", "energy_j_per_token"):
        found[part] = latency.get(part)
    found |= {part: accuracy.get(part) for part in _ACCURACIES}
    found["parsed share"] = (accuracy.get("parsed") or {}).get("share")
    return {name: one for name, one in found.items() if _number(one) is not None}


def _number(measured):
    """Return the number of an interval, or the median of a spread."""
    if isinstance(measured, dict):
        return measured.get("value", measured.get("median"))
    return measured


def _row(metric, before, after):
    """Return the row of a metric that both reports have."""
    old, new = _number(before), _number(after)
    change = None
    if (differs := _differs(metric, before, after)) is not None:
        is_better = (new > old) == metric.startswith(_MORE_IS_BETTER)
        change = "none" if not differs else "better" if is_better else "worse"
    ratio = new / old if old else None
    parts = {"before": old, "after": new, "ratio": ratio, "change": change}
    return {"metric": metric} | parts


def _differs(metric, before, after):
    """Tell whether two values differ beyond noise; None where that is not judged."""
    if metric in LEAST:
        return _is_apart(before, after, LEAST[metric])
    if metric in _ACCURACIES:
        return before["high"] < after["low"] or after["high"] < before["low"]
    if not (isinstance(before, dict) and _has_rounds(before) and _has_rounds(after)):
        return None
    # Here, since it takes a second, and a device needs it for baselines alone.
    from scipy.stats import mannwhitneyu

    return (
        _is_apart(before["median"], after["median"], LEAST_TIME)
        and mannwhitneyu(before["rounds"], after["rounds"]).pvalue <= LEVEL
    )


def _is_apart(before, after, least):
    """Tell whether the larger number is above the smaller by that share of it."""
    # So a change and its return are judged alike.
    small, large = sorted((before, after))
    return large >= (1 + least) * small and large != small
