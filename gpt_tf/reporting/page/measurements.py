"""What was measured, as the page tells it: all files, speed, accuracy, estimates."""

from gpt_tf.advisor.estimate import estimate_error
from gpt_tf.reporting import pictures as drawing
from gpt_tf.reporting.page import elements
from gpt_tf.reporting.pictures import format_number


def plane(report, drawn):
    points, _ = drawing.pareto_points(report)
    frontier = [point["name"] for point in drawing.frontier_of(points)]
    return elements.section(
        "pareto",
        "Accuracy against latency",
        elements.picture(
            drawn,
            "pareto",
            "Perplexity against inter-token latency of "
            f"{elements.count(len(points), 'file')}. "
            f"On the frontier, from fast to accurate: {', '.join(frontier)}.",
            "A point further left is faster, a lower one more accurate, a smaller one "
            "a smaller file. On the line are the files, within the budgets if any are, "
            f"than which none is better in both: {', '.join(frontier)}.",
        ),
    )


def all_files(report, drawn):
    worth, speed = [], []
    for entry in report["entries"]:
        name = elements.name_cell(report, entry)
        accuracy, latency = entry["accuracy"] or {}, entry["latency"] or {}
        count = entry["parameters"]
        worth.append(
            [
                name,
                entry["mode"] or elements.NOTHING,
                f"{count:,}" if count else elements.NOTHING,
                elements.megabytes(entry["size_bytes"]),
                elements.interval(accuracy.get("perplexity")),
                elements.interval(
                    accuracy.get("perplexity_increase"), "%", is_change=True
                ),
                elements.interval(accuracy.get("bits_per_byte"), "bits"),
                elements.interval(accuracy.get("token_accuracy"), "%"),
            ]
        )
        spread = latency.get("inter_token_latency_ms")
        speed.append(
            [
                name,
                *(
                    elements.spread(spread, part)
                    for part in ("median", "p95", "p99", "worst")
                ),
                elements.median(latency.get("time_to_first_token_ms")),
                elements.unit(latency.get("tokens_per_s"), "tokens/s"),
                elements.median(latency.get("response_time_ms")),
                elements.megabytes(latency.get("peak_memory_bytes")),
                elements.share(latency.get("bandwidth_share")),
            ]
        )
    has_speed = any(entry["latency"] for entry in report["entries"])
    return elements.section(
        "files",
        "All files",
        elements.table(
            [
                "File",
                "Mode",
                "Parameters",
                "Size",
                elements.term("Perplexity", "perplexity"),
                "Above the reference",
                elements.term("Bits per byte", "bits-per-byte"),
                elements.term("Token accuracy", "token-accuracy"),
            ],
            worth,
            caption=f"What they are, and how well they predict; in brackets "
            f"95{elements.SPACE}% intervals"
            if any(entry["accuracy"] for entry in report["entries"])
            else "What they are",
            texts=("Mode",),
            cards=True,
        ),
        elements.table(
            [
                "File",
                elements.term("Between tokens, median", "inter-token"),
                elements.term("p95", "percentile"),
                elements.term("p99", "percentile"),
                "Worst",
                elements.term("First token", "first-token"),
                elements.term("Tokens per second", "tokens-per-second"),
                elements.term("Response time", "response-time"),
                elements.term("Peak memory", "peak-memory"),
                elements.term("Share of the bandwidth", "bandwidth"),
            ],
            speed,
            caption=elements.join("How fast they are", _conditions(report)),
            cards=True,
        )
        if has_speed
        else None,
        elements.picture(
            drawn,
            "sizes",
            "Bars: the size of each file and the peak memory of a process that runs "
            "it, as in the tables.",
            "Size of the file and, where it was measured, memory of a process that "
            "runs it, Python included.",
        ),
    )


def _conditions(report):
    """How latency was measured, where that is the same for all files."""
    found = []
    for part, one, many in (
        ("prompt_tokens", "prompt token", None),
        ("new_tokens", "new token", None),
        ("threads", "thread", None),
        ("repetitions", "repetition", None),
    ):
        values = {
            entry["latency"].get(part)
            for entry in report["entries"]
            if entry["latency"]
        }
        if len(values) == 1 and None not in values:
            found.append(elements.count(values.pop(), one, many))
    return f": {', '.join(found)}" if found else ""


def estimates(report):
    """What was estimated before measuring, beside what was measured."""
    rows, within, count = [], 0, 0
    for entry in report["entries"]:
        errors = estimate_error(entry)
        if not errors:
            continue
        row = [entry["name"]]
        for name, (_, write) in _ESTIMATED.items():
            if name not in errors:
                row.append(elements.NOTHING)
                continue
            found = errors[name]
            within, count = within + found["within"], count + 1
            row.append(
                elements.join(
                    f"{write(found['estimated'])}, then {write(found['measured'])} ",
                    elements.tag("small", _off_by(found["ratio"]), class_="interval"),
                )
            )
        rows.append(row)
    if not rows:
        return None
    return elements.section(
        "estimates",
        "Estimate against measurement",
        elements.tag(
            "p",
            "Before anything was measured, this was computed from the model's sizes "
            "and the rate at which the machine reads memory. Of "
            f"{elements.count(count, 'measurement')} {within} fell within the range "
            "that was stated with the estimate.",
        ),
        elements.table(
            ["File", *(title for title, _ in _ESTIMATED.values())],
            rows,
            caption="Estimated, then measured",
            cards=True,
        ),
    )


def _off_by(ratio):
    """How far an estimate divided by its measurement is from 1."""
    if 0.995 < ratio < 1.005:
        return "right"
    factor, word = (ratio, "high") if ratio > 1 else (1 / ratio, "low")
    if factor < 1.1:
        return f"{elements.share(abs(ratio - 1))} too {word}"
    return f"{format_number(elements.rounded(factor))} times too {word}"


_ESTIMATED = {
    "size_bytes": ("Size", elements.megabytes),
    "latency_ms": ("Between tokens, median", elements.ms),
    "first_token_ms": ("First token, median", elements.ms),
    "memory_bytes": ("Peak memory", elements.megabytes),
}


def latency(report, drawn):
    measured = [entry for entry in report["entries"] if entry["latency"]]
    if not measured:
        return None
    starts, contexts, threads, requests = [], [], [], []
    for entry in measured:
        name, latency = entry["name"], entry["latency"]
        starts.append(
            [
                name,
                _ENGINES.get(
                    latency.get("engine"), latency.get("engine") or elements.NOTHING
                ),
                elements.median(latency.get("load_ms")),
                elements.median(latency.get("cold_start_ms")),
                *(
                    elements.spread(latency.get("time_to_first_token_ms"), part)
                    for part in ("median", "p95", "p99", "worst")
                ),
                *_middle_half(latency.get("inter_token_latency_ms")),
                elements.unit(latency.get("energy_j_per_token"), "J"),
            ]
        )
        contexts += [
            [
                name,
                elements.count(row["context"], "token"),
                elements.median(row.get("time_to_first_token_ms")),
                elements.median(row.get("inter_token_latency_ms")),
            ]
            for row in latency.get("by_context") or []
        ]
        threads += [
            [
                name,
                elements.count(row["threads"], "thread"),
                *(
                    elements.spread(row.get("inter_token_latency_ms"), part)
                    for part in ("median", "p95", "p99")
                ),
            ]
            for row in latency.get("by_threads") or []
        ]
        requests += [
            [
                name,
                elements.count(row["requests"], "request"),
                elements.unit(row.get("tokens_per_s"), "tokens/s"),
                elements.unit(
                    None
                    if row.get("tokens_per_s") is None
                    else row["tokens_per_s"] / row["requests"],
                    "tokens/s",
                ),
            ]
            for row in latency.get("throughput") or []
        ]
    return elements.section(
        "latency",
        "Latency in detail",
        elements.picture(
            drawn,
            "latency",
            "Time between tokens and until the first token of each file, and how it "
            "changes with context, threads and requests; the numbers are in the tables "
            "below.",
            "A dot is the median, a bar's end the 95th percentile, a cross the 99th.",
        ),
        elements.table(
            [
                "File",
                "Engine",
                elements.term("Load time", "load-time"),
                elements.term("Cold start", "cold-start"),
                elements.term("First token, median", "first-token"),
                "p95",
                "p99",
                "Worst",
                elements.term("Between tokens, middle half", "middle-half"),
                "Tokens timed",
                elements.term("Energy per token", "energy"),
            ],
            starts,
            caption="Starting, the first token, and spread",
            texts=("Engine",),
            cards=True,
        ),
        elements.folded(
            "By context length",
            elements.table(
                ["File", "Context", "First token", "Between tokens"],
                contexts,
                texts=("Context",),
            ),
        ),
        elements.folded(
            "By threads",
            elements.table(
                ["File", "Threads", "Between tokens, median", "p95", "p99"],
                threads,
                texts=("Threads",),
            ),
        ),
        elements.folded(
            "By concurrent requests",
            elements.table(
                ["File", "At once", "All together", "Each"],
                requests,
                texts=("At once",),
            ),
        ),
    )


_ENGINES = {"gpt_tf": "gpt_tf", "litert-lm": "LiteRT-LM", "keras": "Keras"}


def _middle_half(spread):
    """Quartiles, and of how many measurements."""
    spread = spread or {}
    quartiles = [spread.get(part) for part in ("q1", "q3")]
    count = spread.get("count")
    return (
        elements.NOTHING
        if None in quartiles
        else f"{' to '.join(map(format_number, quartiles))}{elements.SPACE}ms",
        f"{count:,}" if count else elements.NOTHING,
    )


def accuracy(report, drawn):
    rows = []
    for entry in report["entries"]:
        accuracy = entry["accuracy"]
        if not accuracy:
            continue
        parsed = accuracy.get("parsed") or {}
        of_true = parsed.get("of_true_text")
        rows.append(
            [
                entry["name"],
                elements.interval(accuracy.get("divergence_nats"), "nats"),
                elements.interval(accuracy.get("top1_agreement"), "%"),
                elements.join(
                    elements.interval(parsed.get("share"), "%"),
                    f" of {elements.count(parsed['count'], 'completion')}"
                    if parsed.get("count")
                    else "",
                    f"; of the true text {elements.share(of_true)}"
                    if of_true is not None
                    else "",
                )
                if parsed
                else elements.NOTHING,
                elements.count(accuracy["tokens"], "token")
                if accuracy.get("tokens")
                else elements.NOTHING,
                f"{accuracy['blocks']:,}"
                if accuracy.get("blocks")
                else elements.NOTHING,
            ]
        )
    if not rows:
        return None
    reference = report["reference"]
    return elements.section(
        "accuracy",
        "Accuracy in detail",
        elements.tag(
            "p",
            *(
                [
                    "The reference is ",
                    elements.tag("b", reference),
                    ". Where the interval of an increase contains 0, the measurement "
                    "cannot tell that file from it.",
                ]
                if reference
                else ["There is no reference: each file is judged by the text alone."]
            ),
        ),
        elements.picture(
            drawn,
            "accuracy",
            "Perplexity and divergence of each file with intervals, as in the tables.",
            f"A dot is the measured value, the bar its 95{elements.SPACE}% interval.",
        ),
        elements.table(
            [
                "File",
                elements.term("KL divergence", "kl"),
                elements.term("Same likeliest token", "top1"),
                elements.term("Completions that parse", "parsed"),
                "Judged on",
                "Blocks",
            ],
            rows,
            cards=True,
        ),
    )
