"""Predict the time of a GPT training step on 8 to 512 accelerators.

    python studies/scaling/run.py [--devices 8,16]

Checks the model against published measurements, predicts every kind of parallelism
and the best mix, and writes `benchmarks/results/scaling_model.json` and `.png` in
about a minute. Formulas and limits: studies/scaling/README.md.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from model import KINDS, Model, best_layout
from published import A100, A100_ETHERNET, check_published

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
MODEL = Model(32, 2560, 32, 51200, 2048)  # 2.7 billion parameters
BATCH = 512
WAYS = {**{kind: (kind,) for kind in KINDS}, "best mix": KINDS}


def study(share, all_devices):
    """Predict each kind alone and the best mix, on two networks."""
    networks = {}
    for machine in (A100, A100_ETHERNET):
        machine = dataclasses.replace(machine, matrix_share=share)
        networks[machine.name] = ways = {way: [] for way in WAYS}
        for way, kinds in WAYS.items():
            for devices in all_devices:
                best = best_layout(MODEL, machine, devices, BATCH, kinds)
                if best is not None:
                    layout, found = best
                    ways[way].append(
                        {"devices": devices, "layout": str(layout), **found}
                    )
    return {"model": dataclasses.asdict(MODEL), "batch": BATCH, "networks": networks}


def print_all(published, studied):
    for source, error in published["held_out"].items():
        print(
            f"{source}: {error['rows']} rows held out, mean error {error['mean']:.1%}, "
            f"largest {error['largest']:.1%}"
        )
    for name, ways in studied["networks"].items():
        print(f"\n{name}\n{'':9} devices  step s  of peak  GB  layout")
        for way, points in ways.items():
            for point in points:
                print(
                    f"{way:9} {point['devices']:7} {point['step_s']:7.2f} "
                    f"{point['flops_share']:8.0%} {point['memory_bytes'] / 1e9:3.0f}  "
                    f"{point['layout']}"
                )


def draw(published, studied, path):
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.8), layout="constrained")
    for one, (name, ways) in zip(axes, studied["networks"].items(), strict=False):
        for way, points in ways.items():
            one.plot(
                [point["devices"] for point in points],
                [100 * point["flops_share"] for point in points],
                marker="o",
                markersize=3.5,
                linewidth=2.4 if way == "best mix" else 1.5,
                label=way,
            )
        one.set_xscale("log", base=2)
        one.set_ylim(0, 48)
        one.set_title(name.partition(", NVLink, ")[2], fontsize=10, loc="left")
        one.set_xlabel("accelerators")
        one.legend(frameon=False, fontsize=9)
    axes[0].set_ylabel("per cent of the peak")
    rows = [row for row in published["rows"] if row["published"] > 100]
    for fitted, colour in ((True, "#8fa8c8"), (False, "#c2410c")):
        some = [row for row in rows if row["fitted"] == fitted]
        axes[2].scatter(
            [row["published"] for row in some],
            [row["predicted"] for row in some],
            color=colour,
            label="fitted, one constant" if fitted else "held out",
        )
    axes[2].plot([125, 180], [125, 180], color="#555555", linewidth=0.8)
    axes[2].set_xlabel("published TFLOP/s a device (arXiv:2104.04473)")
    axes[2].set_ylabel("predicted")
    axes[2].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", default="8,16,32,64,128,256,512")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    published = check_published()
    studied = study(
        published["shares"]["A100"], [int(n) for n in options.devices.split(",")]
    )
    print_all(published, studied)
    text = json.dumps({"published": published, "study": studied}, indent=2)
    (options.out / "scaling_model.json").write_text(text + "\n", "utf-8")
    draw(published, studied, options.out / "scaling_model.png")


if __name__ == "__main__":
    main()
