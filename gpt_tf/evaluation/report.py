"""report.json: what was measured of which files, for people, programs and later runs.

A report is a dict of plain JSON values, of the shape of `Report` below; what was not
measured is None, and may be missing. Times that a budget is about are the 95th
percentiles of `inter_token_latency_ms`; files are compared, and drawn, by its median.
"""

import datetime
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.settings import arguments

logger = logging.getLogger(__name__)

REPORT_KIND = "gpt-tf report"
REPORT_FORMAT = 1
BUDGETS = (
    *("max_perplexity_increase", "max_score_drop"),
    *("max_latency_ms", "max_size_mb"),
)

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Part(pydantic.BaseModel):
    """A dict of a report, which may hold more than is known here."""

    model_config = pydantic.ConfigDict(strict=True, allow_inf_nan=False)


class Interval(Part):
    """A value with the bounds of a 95 % block bootstrap."""

    value: float
    low: float
    high: float


class PositiveInterval(Interval):
    """Of a quantity that is above 0."""

    value: Positive


class IncreaseInterval(Interval):
    """Of an increase: 0.03 is 3 % more."""

    value: Annotated[float, Field(gt=-1)]


class Spread(Part):
    """How measurements are spread, in milliseconds."""

    median: Positive | None = None
    p95: Positive | None = None
    p99: Positive | None = None
    worst: Positive | None = None
    q1: Positive | None = None
    q3: Positive | None = None
    count: Count | None = None
    # The median of each process, by which two reports are compared.
    rounds: list[Positive] | None = None
    p95_rounds: list[Positive] | None = None  # how far p95 varies between processes


class CodeValidity(Part):
    """Syntactic validity: the share of completions that are Python."""

    share: Interval
    of_true_text: Share  # what the functions' own text reaches
    count: Count


class WrongAnswer(Part):
    """A row of a task that was not answered rightly."""

    line: Count
    expected: str
    answered: str


class TaskScore(Part):
    """As `gpt_tf.evaluation.tasks` measures it."""

    rows: Count
    score: Interval  # share of rows that are right, after Wilson
    by_sum: Share | None = None  # of choices by the unnormalised sum; decides nothing
    difference: Interval | None = None  # from the reference's score, after Newcombe
    gained: Count | None = None  # rows that are right here, and not in the reference
    lost: Count | None = None  # the other way round
    wrong: WrongAnswer | None = None  # the first


class Accuracy(Part):
    """As `gpt_tf.evaluation.accuracy` measures it, over so many blocks of text."""

    tokens: Count | None = None
    bytes: Count | None = None
    blocks: Count | None = None
    perplexity: PositiveInterval | None = None
    bits_per_byte: Interval | None = None
    token_accuracy: Interval | None = None
    perplexity_increase: IncreaseInterval | None = None  # over the reference's
    divergence_nats: Interval | None = None  # KL from the reference
    top1_agreement: Interval | None = None  # with the reference
    parsed: CodeValidity | None = None
    task: TaskScore | None = None


class AtContext(Part):
    """Latency after a prompt of another length."""

    context: Count
    time_to_first_token_ms: Spread | None = None
    inter_token_latency_ms: Spread | None = None


class AtThreads(Part):
    """Latency with another number of threads."""

    threads: Count
    inter_token_latency_ms: Spread | None = None


class Throughput(Part):
    """Tokens per second of concurrent requests together: median and quartiles."""

    requests: Count
    tokens_per_s: Positive
    q1: Positive | None = None
    q3: Positive | None = None
    count: Count | None = None
    rounds: list[Positive] | None = None


class Latency(Part):
    """As `gpt_tf.evaluation.latency` measures it."""

    engine: str | None = None  # "gpt_tf", "litert-lm" or "keras"
    threads: Count | None = None
    prompt_tokens: Count | None = None
    new_tokens: Count | None = None
    repetitions: Count | None = None
    time_to_first_token_ms: Spread | None = None
    inter_token_latency_ms: Spread | None = None
    response_time_ms: Spread | None = None  # of prompt_tokens and new_tokens
    tokens_per_s: Positive | None = None  # of one request while it decodes
    load_ms: Spread | None = None  # opening the file in a process that runs
    cold_start_ms: Spread | None = None  # from a new process to its first token
    peak_memory_bytes: Positive | None = None  # resident, of a process that runs it
    bandwidth_share: float | None = None  # bytes read a token over what memory gives
    energy_j_per_token: float | None = None
    by_context: list[AtContext] | None = None
    by_threads: list[AtThreads] | None = None
    throughput: list[Throughput] | None = None


class Entry(Part):
    """One file or model."""

    name: str  # unique in the report; a label in tables and plots
    path: str | None  # relative to the report where it lies below it
    kind: str | None  # "tflite", "litertlm" or "keras"
    mode: str | None  # "dynamic_int8" and so on; "keras" or "keras_qat"
    parameters: Count | None
    size_bytes: Annotated[int, Field(gt=0)] | None  # of the file
    sha256: str | None  # of the file
    context_length: Count | None
    config: dict | None  # the GPT's sizes
    made_from: str | None  # a sentence
    accuracy: Accuracy | None
    latency: Latency | None


class Report(Part):
    """All of report.json."""

    kind: Literal["gpt-tf report"]
    format: int  # another than `REPORT_FORMAT` is refused
    made_at: str | None  # ISO 8601 in UTC
    command: str | None  # the command line that made it
    versions: dict | None  # of Python and packages
    machine: dict | None  # as `gpt_tf.evaluation.hardware.describe_machine` returns it
    corpus: dict | None  # what accuracy was measured on: name, split, tokens, bytes
    task: dict | None = None  # what was answered: name, kind, rows, sha256
    budgets: dict[str, float | None]  # names of `gpt_tf.advisor.constraints.Budgets`
    reference: str | None  # name of the entry that others are compared with
    entries: list[Entry]
    recommendation: dict | None  # as `gpt_tf.advisor.ranking.recommend` returns it
    explanations: dict | None  # as `gpt_tf.explain.faithfulness` measures them
    stages: list[dict[str, Any]]  # steps of `gpt-tf optimize` and their seconds
    notes: list[str]  # sentences that a reader should know

    @pydantic.field_validator("entries")
    @classmethod
    def _names_are_unique(cls, entries):
        if name := _repeated([entry.name for entry in entries]):
            raise ValueError(f"two entries have the name {name!r}")
        return entries


def new_report(entries, **parts) -> dict:
    """Put a report together.

    Args:
        entries: Dicts as `new_entry` makes them, each of another name.
        **parts: Any other part of a report; those not given are None or empty.
    """
    for part in parts:
        arguments.one_of("part", part, Report.model_fields)
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        **dict.fromkeys(Report.model_fields),
        "kind": REPORT_KIND,
        "format": REPORT_FORMAT,
        "made_at": now.isoformat(timespec="seconds"),
        "versions": artifacts.versions(),
        "budgets": dict.fromkeys(BUDGETS),
        "entries": list(entries),
        "stages": [],
        "notes": [],
        **parts,
    }


def note(notes: list[str], line: str) -> None:
    """Add a sentence to a report's notes, and log it."""
    notes.append(line)
    logger.info(line)


def _repeated(names):
    return next((name for name in names if names.count(name) > 1), None)


def new_entry(described: dict, **parts) -> dict:
    """Make an entry of what `gpt_tf.evaluation.models.describe` says.

    Args:
        described: That dict.
        **parts: `made_from`, `accuracy`, `latency`, or another name; what is not given
            is None.
    """
    for part in parts:
        arguments.one_of("part", part, Entry.model_fields)
    return dict.fromkeys(Entry.model_fields) | described | parts


def path_in_report(path: str | os.PathLike, folder: str | os.PathLike) -> str:
    """Return a path as an entry states it: relative to the report's folder below it."""
    path, folder = Path(path).resolve(), Path(folder).resolve()
    below = path.is_relative_to(folder)
    return path.relative_to(folder).as_posix() if below else str(path)


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
    """Write report.json, whole or not at all, unless a number is not finite."""
    artifacts.write_json(path, report)


def read_report(path: str | os.PathLike) -> dict:
    """Read report.json.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        DamagedFileError: It is missing, or as for `check_report`.
        InputError: Another version of gpt_tf wrote it in another format.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "report.json"
    report = artifacts.read_json(path)
    is_report = isinstance(report, dict) and report.get("kind") == REPORT_KIND
    if is_report and report.get("format") != REPORT_FORMAT:
        versions = report.get("versions")
        known = versions if isinstance(versions, dict) else {}
        raise InputError(
            f"Expected a report of format {REPORT_FORMAT} in {path}. Received: format "
            f"{report.get('format')!r}, of gpt_tf {known.get('gpt-tf', 'unknown')}. "
            "Measure again with this version."
        )
    check_report(report, path)
    return report


def check_report(report: dict, path: str | os.PathLike = "the report") -> Report:
    """Refuse a report of another shape than `Report`.

    Args:
        report: The dict.
        path: Where it is from.

    Returns:
        The report as a `Report`, in which what may be missing and is, is None.

    Raises:
        DamagedFileError: It has another shape, or two entries of one name.
    """
    try:
        return Report.model_validate(report)
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False)[0]
        place = ".".join(map(str, found["loc"])) or "its beginning"
        raise DamagedFileError(
            f"Expected in {path} a report that `gpt-tf optimize`, `evaluate` or "
            f"`benchmark` wrote. Received: {arguments.shown(found['input'])} at "
            f"{place}; {found['msg']}. Name another file, or measure again."
        ) from None


def join_reports(reports: Sequence[dict]) -> dict:
    """Put the accuracy of one report and the speed of another together.

    Files are the same if their bytes are. Accuracy is that of one report and speed that
    of one, the last of those given that have any: numbers of two machines, or of two
    texts, do not stand side by side. So a report that was made on a device, given last,
    replaces the speed of the first; a file that it does not have then has none.

    Args:
        reports: As `read_report` returns them, at least one.

    Returns:
        A report without a recommendation. Of names and budgets that differ between
        reports, the name beside the speed and the last budget count.

    Raises:
        InputError: Different files have the same name, or there is no report.

    Example:
        >>> join_reports([read_report("accuracy.json"), read_report("device.json")])
    """
    if not reports:
        raise InputError("Joining expects at least one report. Received: none.")
    accuracy, speed = (_last_with(part, reports) for part in ("accuracy", "latency"))
    entries = []
    for report in filter(None, (speed, accuracy, *reports)):
        # Of the same file a report has an entry for each engine that it was timed with.
        known = {entry["sha256"] for entry in entries}
        new = [entry for entry in report["entries"] if entry["sha256"] not in known]
        parts = {} if report is speed else {"latency": None}
        entries += [entry | parts for entry in new]
    if name := _repeated([entry["name"] for entry in entries]):
        raise InputError(
            f"Reports that are joined expect a name for each file. Received: {name!r} "
            "for two that differ. Measure one of them under another name."
        )
    judged = accuracy["entries"] if accuracy else []
    accuracies = {entry["sha256"]: entry["accuracy"] for entry in reversed(judged)}
    references = {e["sha256"] for e in judged if e["name"] == accuracy["reference"]}
    same = (entry["name"] for entry in entries if entry["sha256"] in references)
    budgets = dict.fromkeys(BUDGETS)
    for report in reports:
        given = report["budgets"].items()
        budgets.update({name: value for name, value in given if value is not None})
    return new_report(
        [entry | {"accuracy": accuracies.get(entry["sha256"])} for entry in entries],
        machine=(speed or reports[-1])["machine"],
        corpus=accuracy and accuracy["corpus"],
        task=accuracy and accuracy.get("task"),
        budgets=budgets,
        reference=next(same, None),
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
