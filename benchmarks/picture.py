"""Draw the pictures of README and docs from what the benchmarks left in `results/`.

    python benchmarks/picture.py [NAME ...]

Ours is orange. A bar is a contender, a variant or a way to train; a dotted line is a
yardstick, which other code may pass.
"""

import argparse
import contextlib
import json

import numpy as np
from harness import RESULTS, ROOT, console

from gpt_tf.reporting import plots

OURS, THEIRS, AGAINST, FLOOR = "#c2410c", "#8fa8c8", "#555555", "#555555"
GROUPS = {
    "mirrored": "#2b6cb0",
    "pipeline": "#2f855a",
    "mesh": "#b7791f",
    "workers": "#805ad5",
}
METHODS = {
    "lime": "#d95f02",
    "shap": "#7570b3",
    "gradient": "#1b9e77",
    "attention": "#e7298a",
}
VERSIONS = {
    "TensorFlow": "tensorflow",
    "PyTorch": "torch",
    "LiteRT": "ai-edge-litert",
    "ONNX Runtime": "onnxruntime",
    "llama-cpp-python": "llama-cpp-python",
}


def read(name):
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise SystemExit(f"{path.name} is missing: run benchmarks/{name}.py first.")
    return json.loads(path.read_text("utf-8"))


@contextlib.contextmanager
def picture(name, width, height, title=None):
    """Yield a figure, which is then kept as `results/NAME.png`."""
    with plots.house_style():
        figure = plots.new_figure(height, width)
        yield figure
        figure.suptitle(title, fontsize=9, color=FLOOR)
        path = RESULTS / f"{name}.png"
        figure.savefig(path, dpi=110)
    console.print(f"wrote {path.relative_to(ROOT)}")


def bars(axes, labels, values, colours, form="+.1f", errors=None):
    """Draw a bar from 0 for each value, with its number, the first one above."""
    drawn = axes.barh(labels, values, xerr=errors, color=colours, height=0.65)
    texts = [format(value, form) for value in values]
    for text in axes.bar_label(drawn, texts, padding=4):  # readable over a line
        text.set(fontsize=8, bbox={"color": "white", "pad": 0.5})
    axes.axvline(0, color=FLOOR, linewidth=0.8)
    axes.margins(x=0.18)
    axes.invert_yaxis()


def contenders(axes, rows, key, floor, title, label):
    """Draw those contenders that ran, and a yardstick."""
    rows = [row for row in rows if key in row]
    names = [row["name"] for row in rows]
    colours = [OURS if name.startswith("gpt_tf") else THEIRS for name in names]
    bars(axes, names, [row[key] for row in rows], colours, ",.0f")
    axes.axvline(floor, color=FLOOR, linestyle=":", linewidth=1.5, zorder=1.5)
    axes.set(title=title, xlabel=label)


def versions(machine):
    told = [f"{k} {machine[v]}" for k, v in VERSIONS.items() if v in machine]
    return f"{machine['cores']} cores of {machine['cpu']}, {', '.join(told)}"


def overview():
    training, generation, quality = map(read, ("training", "generation", "quality"))
    with picture("overview", 11, 6.4, versions(training["machine"])) as figure:
        axes = figure.subplots(2, 2)
        for one, name in zip(axes[0], ("small", "large"), strict=True):
            study = training["shapes"][name]
            sizes = "{num_layers} layers, {embedding_dim} wide, vocabulary {vocab_size}"
            contenders(
                *(one, study["results"], "median_ms", study["floor_ms"]),
                f"Training, {sizes.format(**study['shape'])}",
                "ms a step (dotted: products alone, at a large one's rate)",
            )
        contenders(
            *(axes[1, 0], generation["results"], "tokens_per_second"),
            generation["floor_tokens_per_second"],
            "Generation, GPT-2 small, float32",
            "tokens/s (dotted: weights read once)",
        )
        losses(axes[1, 1], quality)


def losses(axes, quality):
    labels = {"nanogpt": "nanoGPT's learning rate", "gpt_tf": "gpt_tf's preset"}
    for name, runs in quality["runs"].items():
        for index, run in enumerate(runs):
            axes.plot(
                [point["tokens"] / 1e6 for point in run["curve"]],
                [point["loss"] for point in run["curve"]],
                color=OURS if name == "gpt_tf" else THEIRS,
                label=None if index else labels[name],
            )
    label = "nanoGPT's published end"
    axes.axhline(quality["published_loss"], color=FLOOR, linestyle=":", label=label)
    axes.set_title("Tiny Shakespeare, by character")
    axes.set(xlabel="million tokens seen", ylabel="validation loss, nats")
    axes.legend()


def first_floor(found):
    """Return the floors behind the fewest tokens, by mode."""
    return next(iter(found["floors"].values()))


def edge():
    decode = read("decode")
    with picture("edge", 11, 3.6, versions(decode["machine"])) as figure:
        axes = figure.subplots(1, 2)
        for one, threads in zip(axes, decode["threads"], strict=True):
            found = decode["threads"][threads]
            contenders(
                *(one, found["results"], "tokens_per_second"),
                first_floor(found)["dynamic_int8"]["tokens_per_second"],
                f"The file, GPT-2 small, {threads} thread{'s' * (threads != '1')}",
                "tokens/s (dotted: int8 weights and cache read once)",
            )


def token():
    """What the time of one token is made of, by how much text is behind it."""
    decode = read("decode")
    with picture("token", 9, 3.4, versions(decode["machine"])) as figure:
        axes = figure.subplots(1, len(decode["threads"]), sharey=True)
        for one, (threads, found) in zip(axes, decode["threads"].items(), strict=True):
            rows = [found["results"][0], *(d[0] for d in found["depths"].values())]
            floors = [floor["dynamic_int8"] for floor in found["floors"].values()]
            taken = np.array([1e3 / row["tokens_per_second"] for row in rows])
            rates = np.array([floor["read_bytes_per_second"] for floor in floors])
            weights = (
                1e3 * np.array([floor["weight_bytes"] for floor in floors]) / rates
            )
            cache = 1e3 * np.array([floor["cache_bytes"] for floor in floors]) / rates
            parts = (
                ("reading the weights", weights, OURS),
                ("reading keys and values", cache, THEIRS),
                ("all else", taken - weights - cache, "#d8d8d8"),
            )
            below, depths = np.zeros(len(rows)), list(found["floors"])
            for label, heights, colour in parts:
                one.bar(depths, heights, 0.6, bottom=below, color=colour, label=label)
                below += heights
            for place, floor, whole in zip(depths, weights + cache, taken, strict=True):
                text = f"{whole:.1f} ms\n{floor / whole:.0%} is reading"
                one.annotate(text, (place, whole), ha="center", va="bottom", fontsize=8)
            one.set(title=f"{threads} thread{'s' * (threads != '1')}")
            one.set_xlabel("tokens behind")
            one.margins(y=0.25)
        axes[0].set_ylabel("ms a token, dynamic_int8")
        axes[0].legend()


def parallel():
    rows = [
        row
        for row in read("parallel")["rows"]
        if "failure" not in row and row["way"] != "one_device"
    ]
    labels = [row["label"] for row in rows]
    # Some ways are in two groups, by the same name.
    places = range(len(rows))
    colours = [GROUPS[row["group"]] for row in rows]
    with picture("parallel", 10, 0.3 * len(rows) + 1.2) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        shares = [row["of_one_device"] for row in rows]
        sizes = [row["memory_bytes_per_device"] / 1e6 for row in rows]
        bars(left, places, shares, colours, ".2f")
        bars(right, places, sizes, colours, ".0f")
        left.axvline(1, color=FLOOR, linewidth=0.8)
        left.set_yticks(places, labels)
        left.set_ylim(len(rows) - 0.4, -0.6)
        left.set_title("step time, of the undivided model's")
        right.set_title("weights, gradients, moments: MB")


def quantization():
    studies = read("quantization")["studies"]
    with picture("quantization", 6.2 * len(studies), 4.8) as figure:
        grid = figure.subplots(1, len(studies), squeeze=False)[0]
        for axes, (name, study) in zip(grid, studies.items(), strict=True):
            rows = [r for r in study["rows"] if not r["name"].startswith("float32")]
            rows.sort(key=lambda row: row["ratio_to_own_float32"])
            bars(
                axes,
                [
                    f"{row['name'].replace(' of that', ', trained on')} "
                    f"({row['tflite_bytes'] / 1e6:.2f} MB)"
                    for row in rows
                ],
                [100 * (row["ratio_to_own_float32"] - 1) for row in rows],
                [OURS if "QAT" in row["name"] else THEIRS for row in rows],
                "+.2f",
                [100 * row["ratio_to_own_float32_standard_error"] for row in rows],
            )
            label = "perplexity above float32 trained as long, %"
            axes.set(title=name, xlabel=label)


def quantization_strategies():
    content = read("quantization_strategies")
    reference, *rows = content["results"]
    title = (
        f"{content['model']}, {content['parameters'] / 1e6:.2f} million parameters, "
        f"float32 perplexity {reference['perplexity']:.3f} over "
        f"{content['tokens']:,} held-out tokens"
    )
    with picture("quantization_strategies", 10, 4.6, title) as figure:
        left, right = figure.subplots(1, 2)
        for bits, colour in ((8, "#1e3a5f"), (6, "#6d93bd"), (4, OURS)):
            chosen = [row for row in rows if row["bits"] == bits]
            names = [row["strategy"].replace("_", "\n") for row in chosen]
            above = [100 * (row["ratio"] - 1) for row in chosen]
            style = {"color": colour, "label": f"{bits} bits"}
            left.plot(names, [row["snr_db"] for row in chosen], "o-", **style)
            right.plot(names, above, "o-", **style)
        left.set_title("Weights: signal-to-noise ratio, dB (more is better)")
        left.set_ylim(0)
        right.set_title("Perplexity above float32, per cent (less is better)")
        right.set_yscale("symlog", linthresh=0.01)
        right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        for axes in (left, right):
            axes.grid(axis="y", alpha=0.3)
        right.legend()


def distillation():
    studies = read("distillation")["studies"]
    studies.pop("article", None)  # its tokens are others than its teacher's
    with picture("distillation", 6.4 * len(studies), 4.6) as figure:
        grid = figure.subplots(1, len(studies), squeeze=False)[0]
        for axes, (name, study) in zip(grid, studies.items(), strict=True):
            ways = study["summary"]["ways"]
            above = {way: 100 * (row["of_teacher"] - 1) for way, row in ways.items()}
            names = sorted(above, key=above.get)
            colours = [THEIRS if way.startswith("alone") else OURS for way in names]
            bars(axes, names, [above[way] for way in names], colours)
            axes.set(title=name, xlabel="perplexity above the teacher's, %")


def generalisation():
    texts = read("generalisation")["texts"]
    title = (
        "Trained on 10 % of a text, stopped in time; bars: mean of the seeds and their "
        "range. Orange: better with every seed, dark: worse with every seed, light: "
        "the seeds disagree"
    )
    colours = {"helps": OURS, "harms": AGAINST, "unclear": THEIRS}
    with picture("generalisation", 13.5, 3.9 * len(texts), title) as figure:
        grid = figure.subplots(len(texts), 3, squeeze=False)
        for row, (name, text) in zip(grid, texts.items(), strict=True):
            courses(row[0], text["cells"])
            row[0].set_title(f"Trained on {name}")
            ways = [way for way in text["summary"] if way != "no augmentation"]
            for axes, where, what in (
                (row[1], "held-out", "the other nine tenths"),
                (row[2], "other", text["other"]),
            ):
                found = [text["summary"][way][f"{where}, best"] for way in ways]
                bars(
                    axes,
                    ways,
                    [one["change_percent"] for one in found],
                    [colours[one["verdict"]] for one in found],
                    errors=[one["change_spread"] for one in found],
                )
                axes.set_title(f"Tested on {what}")
                axes.set_xlabel("bits per byte, change in % (left is better)")


def courses(axes, cells):
    """Draw how the text is learnt by heart."""
    for way, colour in (("no augmentation", THEIRS), ("all but the teacher's", OURS)):
        found = [cell["points"] for cell in cells if cell["name"] == way]
        steps = [point["step"] for point in found[0]]
        for where, style in (("train", "--"), ("held-out", "-")):
            means = np.mean([[point[where] for point in one] for one in found], axis=0)
            label = f"{way}, {'training text' if where == 'train' else where}"
            axes.plot(steps, means, style, color=colour, label=label)
    axes.set(xlabel="steps", ylabel="bits per byte")
    axes.legend()


def serving():
    content = read("serving")
    rows = content["response"]
    with picture("serving", 11, 4.2) as figure:
        left, right = figure.subplots(1, 2)
        for place, row in enumerate(rows):
            colour = OURS if place else THEIRS
            short, median = row["short_ms"], row["short_median_ms"]
            left.scatter(short, [place] * len(short), s=14, color=colour, alpha=0.35)
            left.plot([median], [place], "|", ms=20, mew=2.5, color=colour)
            left.plot([row["long_ms"]], [place], "x", color=FLOOR)
            above = {"xytext": (0, 13), "textcoords": "offset points", "ha": "center"}
            left.annotate(f"{median:.0f}", (median, place), **above)
        left.set_yticks(range(len(rows)), [row["name"] for row in rows])
        left.set_ylim(len(rows) - 0.4, -0.6)
        left.set_xlim(0)
        left.set_xlabel("ms to the first token (bar: median; x: the long prompt's own)")
        long = content["long_tokens"]
        left.set_title(f"Short requests beside a prompt of {long} tokens")
        styles = (
            (FLOOR, ":"),
            (FLOOR, "-"),
            (OURS, "-"),
            ("#7a8b5a", "-"),
            (THEIRS, "-"),
        )
        for (colour, line), row in zip(styles, content["throughput"], strict=True):
            rates = row["tokens_per_second"]
            style = {"color": colour, "linestyle": line, "label": row["name"]}
            right.plot(rates.keys(), rates.values(), marker="o", **style)
        right.axhline(content["floor_tokens_per_second"], color=FLOOR, linestyle=":")
        right.set_ylim(0)
        right.set_xlabel(
            "requests at once (dotted: one text at a time, if reading were all)"
        )
        right.set_title("New tokens per second")
        right.legend(loc="upper left")


def explanation():
    content = read("explanation")
    rows = [
        (f"{name} {method}", METHODS[method], found["difference"])
        for name, test in content["tests"].items()
        for method, found in test["last_kept"]["methods"].items()
    ]
    share = content["tests"]["keras"]["fraction"]
    with picture("explanation", 9, 3.6) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        labels, colours, found = zip(*rows, strict=True)
        values = [one["value"] for one in found]
        bars(left, labels, values, colours, "+.2f", distances(found))
        left.set_title(f"Last token kept, {share:.0%} taken away")
        left.set_xlabel("probability lost, more than with random ones")
        compared = content["compression"]
        places = np.arange(len(compared))
        for part, shift, colour, label in (
            ("rank_correlation", -0.1, OURS, "float32 and int8"),
            ("ceiling", 0.1, THEIRS, "float32, another seed"),
        ):
            found = [one[part] for one in compared.values()]
            style = {"fmt": "o", "color": colour, "capsize": 4, "label": label}
            values = [one["value"] for one in found]
            right.errorbar(places + shift, values, yerr=distances(found), **style)
        right.set_xticks(places, compared)
        right.set_xlim(-0.5, len(compared) - 0.5)
        right.set_ylim(0, 1)
        right.set_title("Rank correlation of scores")
        right.grid(axis="y", alpha=0.3)
        right.legend(loc="lower right")


def distances(found):
    """Return how far intervals reach below and above their values, `(2, N)`."""
    ends = ([one["value"] - one[end] for one in found] for end in ("low", "high"))
    return np.abs(list(ends))


PICTURES = (
    *(overview, edge, token, parallel, quantization, quantization_strategies),
    *(distillation, generalisation, serving, explanation),
)


def main():
    names = {draw.__name__: draw for draw in PICTURES}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", help=f"of {', '.join(names)}; default: all")
    arguments = parser.parse_args()
    for name in arguments.name or names:
        names[name]()


if __name__ == "__main__":
    main()
