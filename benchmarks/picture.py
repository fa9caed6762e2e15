"""Draw the README's pictures from what the benchmarks left in `results/`.

python benchmarks/picture.py
"""

import json

from harness import RESULTS, console
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LABELS = {"nanogpt": "nanoGPT's learning rate", "gpt_tf": "gpt_tf's preset"}

OURS, THEIRS, FLOOR = "#c2410c", "#8fa8c8", "#555555"


def read(name):
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise SystemExit(f"{path.name} is missing: run benchmarks/{name}.py first.")
    return json.loads(path.read_text("utf-8"))


# What the dotted lines are: yardsticks, which other code may pass.
PRODUCTS = "products alone, at a large one's rate"
READING = "weights read once at NumPy's rate"


def draw_bars(axes, rows, floor, title, unit, line):
    """Draw a bar per contender, ours in colour, and a yardstick as a dotted line."""
    names = [name for name, _ in rows]
    values = [value for _, value in rows]
    colours = [OURS if name.startswith("gpt_tf") else THEIRS for name in names]
    bars = axes.barh(names, values, color=colours, height=0.65)
    texts = axes.bar_label(bars, [f"{value:,.0f}" for value in values], padding=4)
    for text in texts:  # readable where the line passes
        text.set(fontsize=9, bbox={"color": "white", "pad": 0.5})
    axes.axvline(floor, color=FLOOR, linestyle=":", linewidth=1.5, zorder=1.5)
    axes.set_xlim(0, 1.12 * max(*values, floor))
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(f"{unit} (dotted: {line})")


def draw_training(axes, report, name, title):
    shape = report["shapes"][name]
    rows = [
        (row["name"], row["median_ms"])
        for row in shape["results"]
        if "median_ms" in row
    ]
    draw_bars(axes, rows, shape["floor_ms"], title, "ms a step", PRODUCTS)


def speeds(report):
    """Return name and tokens per second of the contenders that ran."""
    return [
        (row["name"], row["tokens_per_second"])
        for row in report["results"]
        if "tokens_per_second" in row
    ]


def draw_generation(axes, report):
    draw_bars(
        axes,
        speeds(report),
        report["floor_tokens_per_second"],
        "Generation, GPT-2 small, float32",
        "tokens/s",
        READING,
    )


def draw_quality(axes, report):
    for name, results in report["runs"].items():
        colour = OURS if name.startswith("gpt_tf") else THEIRS
        for index, result in enumerate(results):
            axes.plot(
                [point["tokens"] / 1e6 for point in result["curve"]],
                [point["loss"] for point in result["curve"]],
                color=colour,
                linewidth=1.3,
                label=LABELS[name] if index == 0 else None,
            )
    published = report["published_loss"]
    axes.axhline(published, color=FLOOR, linestyle=":", linewidth=1.5)
    axes.text(0.19, published - 0.012, "nanoGPT's published end", va="top", fontsize=8)
    axes.set_title("Tiny Shakespeare, by character", fontsize=10, loc="left")
    axes.set_xlabel("million tokens seen")
    axes.set_ylabel("validation loss, nats")
    axes.legend(frameon=False, fontsize=8)


def draw_decode(axes, report, threads):
    measured = report["threads"][threads]
    draw_bars(
        axes,
        speeds(measured),
        measured["floor_tokens_per_second"]["dynamic_int8"],
        f"The file, GPT-2 small, {threads} thread{'s' * (threads != '1')}",
        "tokens/s",
        "int8 weights once, NumPy's rate",
    )


def draw_overview():
    training, generation, quality = map(read, ("training", "generation", "quality"))
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    small, large = (training["shapes"][name]["shape"] for name in ("small", "large"))
    draw_training(axes[0, 0], training, "small", f"Training, {describe(small)}")
    draw_training(axes[0, 1], training, "large", f"Training, {describe(large)}")
    draw_generation(axes[1, 0], generation)
    draw_quality(axes[1, 1], quality)
    finish(figure, training["machine"], "overview")


def draw_edge():
    decode = read("decode")
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for one, threads in zip(axes, decode["threads"], strict=True):
        draw_decode(one, decode, threads)
    finish(figure, decode["machine"], "edge")


def finish(figure, machine, name):
    for one in figure.axes:
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
        one.tick_params(labelsize=9)
    versions = {
        "TensorFlow": "tensorflow",
        "PyTorch": "torch",
        "LiteRT": "ai-edge-litert",
        "ONNX Runtime": "onnxruntime",
        "llama-cpp-python": "llama-cpp-python",
    }
    told = [f"{k} {machine[v]}" for k, v in versions.items() if v in machine]
    figure.suptitle(
        f"{machine['cores']} cores of {machine['cpu']}, {', '.join(told)}",
        fontsize=9,
        color=FLOOR,
    )
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=110)
    console.print(f"wrote {path.relative_to(RESULTS.parent.parent)}")


def main():
    draw_overview()
    draw_edge()


def describe(shape):
    return (
        f"{shape['num_layers']} layers, {shape['embedding_dim']} wide, "
        f"vocabulary {shape['vocab_size']:,}"
    )


if __name__ == "__main__":
    main()
