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

from harness import console, finish, print_machine

MODEL = Path(__file__).parent.parent / "saved_models" / "python-small"
CORPUS = "python-stdlib"
PROMPTS, SEED = 60, 1
# LIME and SHAP score so many masked prompts per token and one more: SHAP then hides
# the tokens one after the other in 4 orders, there and back.
LENGTH, SAMPLES = 32, 4 * (2 * 32 + 1)
QUICK_LENGTH, QUICK_SAMPLES = 12, 2 * (2 * 12 + 1)
FRACTION = 0.2
KERAS_METHODS = ("lime", "shap", "gradient", "attention")
FILE_METHODS = ("lime", "shap")
# Enough of each file for prompts from all of them.
CHARACTERS = 8000


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
    seconds = time.perf_counter() - began
    console.print(f"{seconds:.0f} s")
    finish(
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
        keep=not arguments.quick,
    )


if __name__ == "__main__":
    from gpt_tf import InputError

    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
