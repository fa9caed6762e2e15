"""Validation loss on tiny Shakespeare, character by character, 1.5 million tokens.

    python benchmarks/quality.py [--text PATH] [--seeds N]

Both train 4 layers, 4 heads, 128 wide, context 64, for 2000 steps of 12 windows, the
configuration for which nanoGPT's README publishes a validation loss of 1.88 ("I only
have a macbook"). `nanogpt` has its learning rate, 1e-3 falling to 1e-4; `gpt_tf` has
4e-3 falling to 0. That was chosen among 1, 2, 4 and 8e-3 on the last tenth of the
training text, so the validation text played no part in it:

    head -c 1003854 input.txt >training.txt
    python benchmarks/quality.py --text training.txt --seeds 1 --only gpt_tf \\
        --set learning_rate=0.004

The loss is over the whole held-out tenth. Without `--text` the text is downloaded.
"""

import argparse
import tempfile
import time
from pathlib import Path

from harness import console, finish, print_machine

PUBLISHED_LOSS = 1.88

# Changes to the preset `shakespeare-char`.
CONFIGURATIONS = {
    "nanogpt": {"learning_rate": 1e-3, "final_learning_rate": 1e-4},
    "gpt_tf": {},
}


def run(name, seed, text, changes):
    """Train once and return the validation losses by tokens seen."""
    import gpt_tf
    from gpt_tf.training.config import PRESETS

    config = {**CONFIGURATIONS[name], **changes}
    if text:
        config["corpus"] = text
    preset = PRESETS["shakespeare-char"]
    tokens_per_step = preset.batch_size * preset.context_length
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = gpt_tf.train(
            preset,
            Path(folder) / "run",
            seed=seed,
            strategy="one_device",
            checkpoint_every=0,
            verbose=False,
            **config,
        )
    seconds = time.perf_counter() - began
    curve = [
        {"tokens": row["step"] * tokens_per_step, "loss": row["loss"]}
        for row in result.history["validations"]
    ]
    console.print(
        f"  {name}, seed {seed}: {result.validation_loss:.4f} "
        f"after {curve[-1]['tokens']:,} tokens, {seconds:.0f} s"
    )
    return {"seed": seed, "loss": result.validation_loss, "curve": curve}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="tiny Shakespeare or another text file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=CONFIGURATIONS)
    parser.add_argument(
        "--set", action="append", default=[], help="a field to try: name=number"
    )
    arguments = parser.parse_args()
    changes = dict(item.split("=", 1) for item in arguments.set)
    changes = {key: float(v) if "." in v else int(v) for key, v in changes.items()}
    print_machine()
    names = [arguments.only] if arguments.only else list(CONFIGURATIONS)
    runs = {
        name: [
            run(name, seed, arguments.text, changes)
            for seed in range(1, arguments.seeds + 1)
        ]
        for name in names
    }
    content = {"published_loss": PUBLISHED_LOSS, "runs": runs}
    finish("quality", content, keep=not changes and not arguments.only)


if __name__ == "__main__":
    from gpt_tf import InputError

    try:
        main()
    except InputError as error:
        raise SystemExit(f"{error} Name a file with --text.") from None
