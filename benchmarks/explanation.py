"""Are explanations worth anything, and do they survive compression?

    python benchmarks/explanation.py [--model FOLDER] [--float32 FILE] [--int8 FILE]
                                     [--quick]

Prompts come from the part of Python's standard library that the model was not trained
on. From each the fifth of its tokens that an explanation ranks highest is taken away, a
space in the place of each, and the probability of the most likely next token must fall
further than when as many random tokens are taken away: for LIME, SHAP, attention and
integrated gradients on the Keras model, for LIME and SHAP on its float32 and int8
files. "last kept" is the harder test, in which the prompt's last token may not
be taken; "nearest" takes the last tokens, without any explanation.

Then the ranks that LIME and SHAP give the tokens are compared, float32 with int8, and
beside that float32 with itself under another seed: more agreement than this cannot be
seen. Intervals are those of a 95 % bootstrap over the prompts.

Files that are not named are exported anew from the model. `--quick` takes shorter
prompts and fewer samples, and keeps no results.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from harness import RESULTS, console, print_machine, print_table, save

MODEL = Path(__file__).parent.parent / "saved_models" / "python-small"
CORPUS = "python-stdlib"
PROMPTS, SEED = 60, 1
# LIME and SHAP score so many masked prompts per token and one more: SHAP then hides
# the tokens one after the other in 4 orders, there and back.
LENGTH, SAMPLES = 32, 4 * (2 * 32 + 1)
QUICK_LENGTH, QUICK_SAMPLES = 12, 2 * (2 * 12 + 1)
FRACTION, CURVE = 0.2, (0.03, 0.06, 0.1, 0.4)
KERAS_METHODS = ("lime", "shap", "gradient", "attention")
FILE_METHODS = ("lime", "shap")
# Enough of each file for prompts from all of them.
CHARACTERS = 8000

COLOURS = {
    "lime": "#d95f02",
    "shap": "#7570b3",
    "gradient": "#1b9e77",
    "attention": "#e7298a",
}


def held_out_prompts(tokenizer, length):
    """Return prompts from all files that the model was not trained on."""
    from gpt_tf.explain.faithfulness import prompts_of
    from gpt_tf.text.corpus import open_corpus

    tokens = []
    for document in open_corpus(CORPUS).documents("validation"):
        tokens += tokenizer.encode(document.text[:CHARACTERS])
    return prompts_of(tokens, PROMPTS, length)


def export(source, out, mode):
    """Write a file of the model, unless it was named."""
    from gpt_tf.export.from_run import export_trained

    console.print(f"exporting {mode}")
    export_trained(source, out, mode, corpus=CORPUS)
    return out


def measure(paths, prompts, samples):
    """Test every subject; return results by its name, and the comparisons."""
    from gpt_tf.evaluation.models import open_model
    from gpt_tf.explain.faithfulness import compare_explanations, deletion_test

    subjects = {name: open_model(path) for name, path in paths.items()}
    tests = {}
    for name, subject in subjects.items():
        began = time.perf_counter()
        methods = KERAS_METHODS if name == "keras" else FILE_METHODS
        tests[name] = deletion_test(
            subject,
            prompts,
            methods,
            fraction=FRACTION,
            curve=CURVE,
            keep_last=True,
            seed=SEED,
            num_samples=samples,
        )
        console.print(f"  {name}: {time.perf_counter() - began:.0f} s")
    compression = {}
    for method in FILE_METHODS:
        began = time.perf_counter()
        compression[method] = compare_explanations(
            subjects["float32"],
            subjects["int8"],
            prompts,
            method,
            seed=SEED,
            num_samples=samples,
            names=("float32", "int8"),
        )
        console.print(f"  ranks, {method}: {time.perf_counter() - began:.0f} s")
    for subject in subjects.values():
        subject.close()
    return tests, compression


def shown(interval):
    return "{value:.3f} [{low:.3f}, {high:.3f}]".format(**interval)


def print_tests(tests, compression):
    for title, part in (
        (f"Probability lost with {FRACTION:.0%} of the tokens", lambda test: test),
        ("The same, last token kept", lambda test: test["last_kept"]),
    ):
        print_table(
            title,
            ("", "highest", "random", "difference", "holds", "nearest"),
            [
                (
                    f"{name} {method}",
                    shown(facts["drop"]),
                    shown(facts["random_drop"]),
                    shown(facts["difference"]),
                    "yes" if facts["holds"] else "NO",
                    f"{part(test)['nearest_drop']['value']:.3f}",
                )
                for name, test in tests.items()
                for method, facts in part(test)["methods"].items()
            ],
        )
    print_table(
        "Rank correlation of the tokens' scores",
        ("", "float32 and int8", "float32, another seed"),
        [
            (method, shown(facts["rank_correlation"]), shown(facts["ceiling"]))
            for method, facts in compression.items()
        ],
    )


def draw(tests, compression, path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    curves, bars, ranks = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 0.8))
    draw_curves(curves, tests["keras"])
    draw_differences(bars, tests)
    draw_ranks(ranks, compression)
    for axes in (curves, bars, ranks):
        axes.title.set_fontsize(10)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    console.print(f"wrote {path.relative_to(Path(__file__).parent.parent)}")


def draw_curves(axes, test):
    parts = sorted([*test["curve"], test], key=lambda part: part["fraction"])
    shares = [100 * part["fraction"] for part in parts]
    for method, colour in COLOURS.items():
        drops = [part["methods"][method]["drop"]["value"] for part in parts]
        axes.plot(shares, drops, "o-", color=colour, label=method, markersize=4)
    first = next(iter(test["methods"]))
    random = [part["methods"][first]["random_drop"]["value"] for part in parts]
    nearest = [part["nearest_drop"]["value"] for part in parts]
    axes.plot(shares, nearest, "--", color="#555555", label="nearest")
    axes.plot(shares, random, ":", color="#555555", label="random")
    axes.set_title("Keras: highest tokens taken away")
    axes.set_xlabel("taken away, % of the prompt")
    axes.set_ylabel("probability lost")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def draw_differences(axes, tests):
    rows = [
        (f"{name} {method}", method, facts["difference"])
        for name, test in tests.items()
        for method, facts in test["last_kept"]["methods"].items()
    ][::-1]
    values = np.array([[d["value"], d["low"], d["high"]] for _, _, d in rows])
    errors = np.abs(values[:, 1:] - values[:, :1]).T
    axes.barh(
        [label for label, _, _ in rows],
        values[:, 0],
        xerr=errors,
        color=[COLOURS[method] for _, method, _ in rows],
        height=0.65,
    )
    axes.axvline(0, color="#555555", linewidth=0.8)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title(f"Last token kept, {FRACTION:.0%} taken")
    axes.set_xlabel("probability lost, more than with random ones")


def draw_ranks(axes, compression):
    for place, facts in enumerate(compression.values()):
        for offset, key, colour in (
            (-0.12, "rank_correlation", "#c2410c"),
            (0.12, "ceiling", "#8fa8c8"),
        ):
            found = facts[key]
            spread = [
                [found["value"] - found["low"]],
                [found["high"] - found["value"]],
            ]
            axes.errorbar(
                place + offset,
                found["value"],
                yerr=spread,
                fmt="o",
                color=colour,
                capsize=4,
                label=None
                if place
                else {
                    "rank_correlation": "float32 and int8",
                    "ceiling": "float32, another seed",
                }[key],
            )
    axes.set_xticks(range(len(compression)), list(compression))
    axes.set_xlim(-0.5, len(compression) - 0.5)
    axes.set_ylim(0, 1)
    axes.set_title("Rank correlation of scores")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--float32", type=Path, help="its float32 file")
    parser.add_argument("--int8", type=Path, help="its int8 file")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    print_machine()
    from gpt_tf.text.tokenizer import load_tokenizer

    began = time.perf_counter()
    length = QUICK_LENGTH if arguments.quick else LENGTH
    samples = QUICK_SAMPLES if arguments.quick else SAMPLES
    prompts = held_out_prompts(load_tokenizer(arguments.model), length)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        paths = {
            "keras": arguments.model,
            "float32": arguments.float32
            or export(arguments.model, folder / "float32.litertlm", "float32"),
            "int8": arguments.int8
            or export(arguments.model, folder / "int8.litertlm", "dynamic_int8"),
        }
        tests, compression = measure(paths, prompts, samples)
    print_tests(tests, compression)
    seconds = time.perf_counter() - began
    console.print(f"{seconds:.0f} s")
    if arguments.quick:
        return
    save(
        "explanation",
        {
            "model": arguments.model.name,
            "corpus": CORPUS,
            "num_samples": samples,
            "seed": SEED,
            "seconds": seconds,
            "tests": tests,
            "compression": compression,
        },
    )
    draw(tests, compression, RESULTS / "explanation.png")


if __name__ == "__main__":
    from gpt_tf import InputError

    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
