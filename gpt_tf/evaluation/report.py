"""report.json: what was measured of which files, for people, programs and later runs.

A report is a dict of plain JSON values:

    kind            "gpt-tf report"
    format          REPORT_FORMAT; another is refused
    made_at         when, ISO 8601 in UTC
    command         the command line that made it, or None
    versions        of Python and packages, as in every manifest
    machine         as `gpt_tf.evaluation.hardware.describe_machine` says, or None
    corpus          what accuracy was measured on: name, split, tokens, bytes, or None
    budgets         max_perplexity_increase (0.03 is 3 %), max_latency_ms,
                    max_size_mb; each a number or None
    reference       name of the entry that others are compared with, or None
    entries         a list of entries, below
    recommendation  as `gpt_tf.advisor.ranking.recommend` returns it, or None
    explanations    as `gpt_tf.explain.faithfulness` measures them, or None
    stages          of `gpt-tf optimize`: what was done, in seconds, or []
    notes           sentences that a reader should know

An entry is one file or model:

    name            unique in the report; a label in tables and pictures
    path            relative to the report where it lies below it
    kind            "tflite", "litertlm" or "keras"
    mode            "dynamic_int8" and so on; "keras" or "keras_qat"
    parameters      number
    size_bytes      of the file
    sha256          of the file
    context_length  positions
    config          the GPT's sizes
    made_from       a sentence, or None
    accuracy        below, or None
    latency         below, or None
    estimate        as `gpt_tf.advisor.ranking.estimate` returns it, or None

Accuracy (`gpt_tf.evaluation.accuracy`). An INTERVAL is {"value", "low", "high"}, its
bounds those of a 95 % block bootstrap:

    tokens, bytes, blocks   what was judged, in how many blocks
    perplexity              INTERVAL
    bits_per_byte           INTERVAL
    token_accuracy          INTERVAL, 0 to 1
    perplexity_increase     INTERVAL, 0.03 is 3 % above the reference's, or None
    divergence_nats         INTERVAL, KL from the reference, or None
    top1_agreement          INTERVAL, with the reference, 0 to 1, or None
    parsed                  {"share": INTERVAL, "of_true_text": share, "count"}, or None

Latency (`gpt_tf.evaluation.latency`). A SPREAD is {"median", "p95", "p99", "worst",
"q1", "q3", "count"}:

    engine                  "gpt_tf", "litert-lm" or "keras"
    threads, prompt_tokens, new_tokens, repetitions
    time_to_first_token_ms  SPREAD
    inter_token_latency_ms  SPREAD
    response_time_ms        SPREAD, of prompt_tokens and new_tokens
    tokens_per_s            of one request while it writes
    load_ms                 SPREAD, opening the file in a process that runs
    cold_start_ms           SPREAD, from a new process to its first token
    peak_memory_bytes       resident, of a process that runs it
    bandwidth_share         bytes read per token over what memory could give meanwhile
    energy_j_per_token      or None where the machine does not tell
    by_context              [{"context", "time_to_first_token_ms": SPREAD,
                              "inter_token_latency_ms": SPREAD}]
    by_threads              [{"threads", "inter_token_latency_ms": SPREAD}]
    throughput              [{"requests", "tokens_per_s" (the median), "q1", "q3",
                              "count"}]

The latency that a budget is about is the 95th percentile of `inter_token_latency_ms`;
files are compared, and drawn, by its median.
"""

import datetime
import os
from collections.abc import Sequence
from pathlib import Path

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError

REPORT_KIND = "gpt-tf report"
REPORT_FORMAT = 1
BUDGETS = ("max_perplexity_increase", "max_latency_ms", "max_size_mb")

# Shapes, as `files.read_json` takes them; what was not measured may be missing.
_NUMBER = (float, None)
_INTERVAL = ({"value": float, "low": float, "high": float}, None)
_SPREAD = {f"{part}?": float for part in "median p95 p99 worst q1 q3 count".split()}
_ACCURACY = {
    **dict.fromkeys(("tokens?", "bytes?", "blocks?"), int),
    **dict.fromkeys(("perplexity?", "bits_per_byte?", "token_accuracy?"), _INTERVAL),
    **dict.fromkeys(("perplexity_increase?", "divergence_nats?"), _INTERVAL),
    "top1_agreement?": _INTERVAL,
    "parsed?": ({"share": _INTERVAL, "of_true_text": float, "count": int}, None),
}
_LATENCY = {
    "engine?": str,
    **dict.fromkeys(("threads?", "prompt_tokens?", "new_tokens?"), (int, None)),
    "repetitions?": (int, None),
    "time_to_first_token_ms?": (_SPREAD, None),
    "inter_token_latency_ms?": (_SPREAD, None),
    **dict.fromkeys(
        ("response_time_ms?", "load_ms?", "cold_start_ms?"), (_SPREAD, None)
    ),
    **dict.fromkeys(("tokens_per_s?", "peak_memory_bytes?"), _NUMBER),
    **dict.fromkeys(("bandwidth_share?", "energy_j_per_token?"), _NUMBER),
    "by_context?": (
        [
            {
                "context": int,
                "time_to_first_token_ms?": _SPREAD,
                "inter_token_latency_ms?": _SPREAD,
            }
        ],
        None,
    ),
    "by_threads?": ([{"threads": int, "inter_token_latency_ms?": _SPREAD}], None),
    "throughput?": (
        [{"requests": int, "tokens_per_s": float, "q1?": float, "q3?": float}],
        None,
    ),
}
_ENTRY = {
    "name": str,
    **dict.fromkeys(("path", "kind", "mode"), (str, None)),
    **dict.fromkeys(("parameters", "size_bytes", "context_length"), (int, None)),
    "sha256": (str, None),
    "config": (dict, None),
    "made_from": (str, None),
    "accuracy": (_ACCURACY, None),
    "latency": (_LATENCY, None),
    "estimate": (dict, None),
}
_REPORT = {
    "made_at": (str, None),
    "command": (str, None),
    "versions": (dict, None),
    "machine": (dict, None),
    "corpus": (dict, None),
    "budgets": {str: _NUMBER},
    "reference": (str, None),
    "entries": [_ENTRY],
    "recommendation": (dict, None),
    "explanations": (dict, None),
    "stages": [dict],
    "notes": [str],
}


def new_report(entries, **parts) -> dict:
    """Put a report together.

    Args:
        entries: Dicts as `new_entry` makes them.
        **parts: Any other part of a report; those not given are None or empty.

    Returns:
        The report.

    Raises:
        InputError: Two entries have the same name, or a part is unknown.
    """
    report = {
        "kind": REPORT_KIND,
        "format": REPORT_FORMAT,
        "made_at": datetime.datetime.now(datetime.timezone.utc).isoformat(
            timespec="seconds"
        ),
        "versions": artifacts.versions(),
        **dict.fromkeys(("command", "machine", "corpus", "reference"), None),
        "budgets": dict.fromkeys(BUDGETS),
        "entries": list(entries),
        "recommendation": None,
        "explanations": None,
        "stages": [],
        "notes": [],
    }
    _refuse_unknown(parts, report, "A report")
    report.update(parts)
    names = [entry["name"] for entry in report["entries"]]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"The entries of a report expect a name each. Received: {name!r} "
                "twice. Give one of the files another name."
            )
    return report


def new_entry(described: dict, **parts) -> dict:
    """Make an entry of what `gpt_tf.evaluation.models.describe` says.

    Args:
        described: That dict.
        **parts: `made_from`, `accuracy`, `latency`, `estimate`, or another name.

    Returns:
        The entry; what is not given is None.
    """
    entry = dict.fromkeys(_ENTRY) | described
    _refuse_unknown(parts, entry, "An entry")
    return entry | parts


def path_in_report(path: str | os.PathLike, folder: str | os.PathLike) -> str:
    """Return a path as an entry states it: relative to the report where it lies below.

    Args:
        path: Of the file or model.
        folder: That of the report.
    """
    path, folder = Path(path).resolve(), Path(folder).resolve()
    below = path.is_relative_to(folder)
    return path.relative_to(folder).as_posix() if below else str(path)


def entry_of(report: dict, name: str) -> dict:
    """Return the entry of that name.

    Raises:
        InputError: There is none.
    """
    for entry in report["entries"]:
        if entry["name"] == name:
            return entry
    names = ", ".join(entry["name"] for entry in report["entries"])
    raise InputError(f"The report has entries {names}. Received: {name!r}.")


def place_of_report(out: str | os.PathLike) -> Path:
    """Return the file of a report that is to be written, before work is done for it.

    Args:
        out: A name that ends in .json, or a folder, where it is `report.json`.

    Raises:
        InputError: It cannot be written there.

    Example:
        >>> place_of_report("runs/today")
        PosixPath('runs/today/report.json')
    """
    out = Path(out)
    if out.is_dir() or out.suffix != ".json":
        out = out / "report.json"
    artifacts.check_writable(out)
    return out


def write_report(path: str | os.PathLike, report: dict) -> None:
    """Write report.json, whole or not at all.

    Raises:
        InputError: A number in it is not finite.
    """
    artifacts.write_json(path, report)


def read_report(path: str | os.PathLike) -> dict:
    """Read report.json.

    Args:
        path: The file, or the folder that holds it.

    Returns:
        The report.

    Raises:
        DamagedFileError: It is missing, no report, incomplete, or two entries have the
            same name.
        InputError: Another version of gpt_tf wrote it in another format.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "report.json"
    if not path.exists():
        raise DamagedFileError(
            f"Expected a report at {path}; there is none. Name the report.json that "
            "`gpt-tf optimize`, `evaluate` or `benchmark` wrote."
        )
    report = artifacts.read_json(path)
    if not isinstance(report, dict) or report.get("kind") != REPORT_KIND:
        raise DamagedFileError(
            f"Expected a report in {path}. Received: other JSON. Name the report.json "
            "that `gpt-tf optimize`, `evaluate` or `benchmark` wrote."
        )
    if report.get("format") != REPORT_FORMAT:
        versions = report.get("versions")
        known = versions if isinstance(versions, dict) else {}
        version = known.get("gpt-tf", "unknown")
        raise InputError(
            f"Expected a report of format {REPORT_FORMAT} in {path}. Received: format "
            f"{report.get('format')!r}, of gpt_tf {version}. Measure again with this "
            f"version, {artifacts.versions().get('gpt-tf', 'unknown')}."
        )
    artifacts.check_shape(report, _REPORT, path)
    names = [entry["name"] for entry in report["entries"]]
    for name in names:
        if names.count(name) > 1:
            raise DamagedFileError(
                f"Every entry of the report in {path} expects a name of its own. "
                f"Received: {name!r}. The report was altered; measure again."
            )
    return report


def join_reports(reports: Sequence[dict]) -> dict:
    """Put the accuracy of one report and the speed of another together.

    Files are the same if their bytes are. Accuracy is that of one report and speed that
    of one, the last of those given that have any: numbers of two machines, or of two
    texts, do not stand side by side. So a report that was made on a device, given last,
    replaces the speed of the first; a file that it does not have then has none.

    Args:
        reports: As `read_report` returns them, at least one.

    Returns:
        A report without a recommendation. An entry has its name in the report that its
        speed is from, or else its accuracy. Of a budget that several reports have, the
        last one counts.

    Raises:
        InputError: Different files have the same name, or there is no report.

    Example:
        >>> join_reports([read_report("accuracy.json"), read_report("device.json")])
    """
    if not reports:
        raise InputError("Joining expects at least one report. Received: none.")
    accuracy, speed = (_last_with(part, reports) for part in ("accuracy", "latency"))
    estimates = speed or _last_with("estimate", reports)
    entries = [
        entry
        | {
            "accuracy": _of_same_file(entry, "accuracy", accuracy),
            "estimate": _of_same_file(entry, "estimate", estimates),
        }
        for entry in _every_file(reports, accuracy, speed)
    ]
    about_machine = speed or reports[-1]
    return new_report(
        entries,
        machine=about_machine["machine"],
        corpus=accuracy and accuracy["corpus"],
        budgets=_budgets_of(reports),
        reference=accuracy and _reference_in(entries, accuracy),
        notes=list(dict.fromkeys(note for one in reports for note in one["notes"])),
    )


def _last_with(part, reports):
    """Return the last report of which an entry has that part, or None."""
    having = (
        report
        for report in reversed(reports)
        if any(entry[part] for entry in report["entries"])
    )
    return next(having, None)


def _every_file(reports, accuracy, speed):
    """Return an entry for each file, or for each engine that it was timed with."""
    found = []
    for report in filter(None, (speed, accuracy, *reports)):
        known = {entry["sha256"] for entry in found}
        names = {entry["name"] for entry in found}
        for entry in report["entries"]:
            if entry["sha256"] in known:
                continue
            if entry["name"] in names:
                raise InputError(
                    "Reports that are joined expect a name for each file. Received: "
                    f"{entry['name']!r} for two that differ. Measure one of them "
                    "under another name."
                )
            found.append(entry if report is speed else entry | {"latency": None})
    return found


def _of_same_file(entry, part, report):
    """Return a part of a file's entry in another report, or None."""
    for other in report["entries"] if report else ():
        if other["sha256"] == entry["sha256"]:
            return other[part]
    return None


def _reference_in(entries, report):
    """Return the name that a report's reference has among other entries."""
    for one in report["entries"]:
        if one["name"] == report["reference"]:
            same = (e["name"] for e in entries if e["sha256"] == one["sha256"])
            return next(same, None)
    return None


def _budgets_of(reports):
    budgets = dict.fromkeys(BUDGETS)
    for report in reports:
        given = report["budgets"].items()
        budgets.update({name: value for name, value in given if value is not None})
    return budgets


def _refuse_unknown(parts, known, what):
    for name in parts:
        if name not in known:
            raise InputError(
                f"{what} has the parts {', '.join(known)}. Received: {name!r}."
            )
