"""Make the models in this folder anew, with gpt_tf's own commands.

    python saved_models/make.py

A teacher, a student distilled from it, and both as files for a device. What stands
here is replaced when everything is made and measured, not before. It takes a quarter
of an hour on two cores; a second start goes on where the first was interrupted.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = Path("runs")
sys.path.insert(0, str(HERE.parent))

from gpt_tf import artifacts
from gpt_tf.evaluation.report import read_report
from gpt_tf.models.sizes import count_parameters

MODEL_FILES = ["model.keras", "tokenizer.json"]
TEACHER, STUDENT = RUNS / "python-small", RUNS / "python-student"
QUANTIZED = RUNS / "python-student-int8"
STAGED = RUNS / "saved-models"

# What makes the model of each folder. `--resume-or-start`, which is added, only lets a
# second start go on.
TRAINING = {
    TEACHER: "train --corpus python-stdlib --vocab-size 1024 --embedding-dim 128 "
    "--num-layers 4 --num-heads 4 --context-length 128 --steps 3000 "
    "--learning-rate 4e-3 --validate-every 500",
    STUDENT: f"distil --teacher {TEACHER} --student-layers 2 --steps 3000 "
    "--validate-every 500",
    QUANTIZED: f"quantize --model {STUDENT} --method qat --steps 300",
}
# What is exported, how, and as what.
FILES = {
    "python-small.litertlm": (TEACHER, "dynamic_int8"),
    "python-student.litertlm": (QUANTIZED, "int8"),
}
# Which run's folder of this place holds the model.
FOLDERS = {"python-small": TEACHER, "python-student": STUDENT}


def gpt_tf(command):
    """Run a command as a user would, in the repository's root."""
    print(f"$ gpt-tf {command}", flush=True)
    words = [sys.executable, "-m", "gpt_tf.cli", *shlex.split(command)]
    subprocess.run(words, cwd=HERE.parent, check=True)


def measured(name, reports):
    """Return what a report's manifest states: numbers with their units."""
    accuracy, latency = (
        next(entry for entry in report["entries"] if entry["name"] == name)
        for report in reports
    )
    found = {
        "perplexity": accuracy["accuracy"]["perplexity"]["value"],
        "bits_per_byte": accuracy["accuracy"]["bits_per_byte"]["value"],
        "perplexity_increase": accuracy["accuracy"]["perplexity_increase"],
        "inter_token_latency_ms": latency["latency"]["inter_token_latency_ms"],
        "time_to_first_token_ms": latency["latency"]["time_to_first_token_ms"],
        "threads": latency["latency"]["threads"],
        "cpu": reports[1]["machine"]["cpu"],
        "made_at": reports[1]["made_at"],
    }
    if found["perplexity_increase"] is not None:
        found["perplexity_increase"] = found["perplexity_increase"]["value"]
    for metric in ("inter_token_latency_ms", "time_to_first_token_ms"):
        found[metric] = {key: found[metric][key] for key in ("median", "p95")}
    return found


def main():
    for out, command in TRAINING.items():
        gpt_tf(f"{command} --out {out} --resume-or-start")
    shutil.rmtree(HERE.parent / STAGED, ignore_errors=True)
    (HERE.parent / STAGED).mkdir(parents=True)
    for name, run in FOLDERS.items():
        shutil.copytree(HERE.parent / run / "model", HERE.parent / STAGED / name)
    commands = {name: [f"{TRAINING[run]} --out {run}"] for name, run in FOLDERS.items()}
    for name, (run, mode) in FILES.items():
        export = f"export --model {run} --mode {mode} --out {STAGED / name}"
        gpt_tf(export)
        commands[name] = [f"{TRAINING[run]} --out {run}", export]
    commands["python-student"].insert(0, commands["python-small"][0])
    commands["python-student.litertlm"][:0] = commands["python-student"]
    everything = " ".join(str(STAGED / name) for name in commands)
    gpt_tf(
        f"evaluate {everything} --corpus {TEACHER} --reference "
        f"{STAGED / 'python-small'} --out {STAGED / 'accuracy.json'}"
    )
    gpt_tf(f"benchmark {everything} --out {STAGED / 'latency.json'}")
    reports = [
        read_report(HERE.parent / STAGED / name)
        for name in ("accuracy.json", "latency.json")
    ]
    for name, made_by in commands.items():
        describe(HERE.parent / STAGED / name, name, made_by, reports)
    for name in commands:
        place = HERE / name
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        shutil.move(HERE.parent / STAGED / name, place)
        if place.is_file():
            shutil.move(HERE.parent / STAGED / f"{name}.json", HERE / f"{name}.json")
    write_table()


def table(manifests):
    """Return the README's table of what was measured.

    Args:
        manifests: What each model's manifest states, by name.
    """
    lines = [
        "| name | parameters | MB | perplexity | above the teacher | ms a token |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, manifest in manifests.items():
        facts = manifest["measured"]
        described = manifest.get("files", {}).get("model.keras", manifest)
        lines.append(
            f"| `{name}` | {count_parameters(manifest['config']):,} "
            f"| {described['size_bytes'] / 1e6:.2f} | {facts['perplexity']:.2f} "
            f"| {facts['perplexity_increase']:+.1%} "
            f"| {facts['inter_token_latency_ms']['median']:.3f} |"
        )
    return "\n".join(lines)


def write_table():
    """Put the table of what stands here into the README."""
    manifests = {}
    for name in sorted({*FOLDERS, *FILES}):
        path = HERE / name
        manifests[name] = (
            artifacts.check_manifest(path, "model")
            if path.is_dir()
            else artifacts.check_file_manifest(path)
        )
    readme = HERE / "README.md"
    text = readme.read_text("utf-8")
    begin = text.index("| name |")
    end = text.index("\n\n", begin)
    with artifacts.atomic_file(readme, "w") as file:
        file.write(text[:begin] + table(manifests) + text[end:])


def describe(path, name, made_by, reports):
    """Say in a manifest how a model was made and what was measured of it."""
    own = {"kind", "versions", "files", "sha256", "size_bytes", "manifest_sha256"}
    facts = {
        "commands": [f"gpt-tf {command}" for command in made_by],
        "measured": measured(name, reports),
    }
    if path.is_dir():
        old = artifacts.check_manifest(path, "model")
        kept = {key: value for key, value in old.items() if key not in own}
        artifacts.write_manifest(path, "model", MODEL_FILES, **{**kept, **facts})
    else:
        old = artifacts.check_file_manifest(path)
        kept = {key: value for key, value in old.items() if key not in own}
        artifacts.write_file_manifest(path, old["kind"], **{**kept, **facts})


if __name__ == "__main__":
    main()
