"""What a person sees of work in progress: a bar, tables of results, a curve."""

from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from gpt_tf import artifacts

# Consoles on which a bar is being drawn.
_drawing: list[Console] = []


def current_console() -> Console:
    """Return the console whose bar is being drawn, where lines stay above it.

    Without one, a new console, which needs no ipywidgets, and in a notebook no
    terminal codes.
    """
    if _drawing:
        return _drawing[-1]
    is_notebook = Console().is_jupyter
    return Console(force_jupyter=False, force_terminal=False if is_notebook else None)


class StepProgress:
    """A progress bar for work in steps, called `unit`, begun by the first `update`.

    Example:
        >>> with StepProgress("windows") as progress:
        ...     progress.update(3, 10)
    """

    def __init__(self, unit, console=None):
        self.console = console or current_console()
        self.unit = unit
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            refresh_per_second=4,
        )
        self.task = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def update(self, done, total, **shown):
        """Say how many steps are done; `note` is shown after the count."""
        if self.task is None:
            self.task = self.progress.add_task(self.unit, total=total, note="")
            self.progress.start()
            _drawing.append(self.console)
        self.progress.update(self.task, completed=done, total=total, **shown)

    def close(self):
        """Stop redrawing the bar."""
        if self.progress.live.is_started:
            self.progress.stop()
            _drawing.remove(self.console)


def print_result(result, console=None):
    """Print what a training run reached, a `gpt_tf.training.run.TrainingResult`."""
    rows = {
        "parameters": f"{result.model.count_params():,}",
        "vocabulary": f"{result.tokenizer.vocab_size:,} tokens",
    }
    if result.validation_loss is not None:
        rows["validation loss"] = f"{result.validation_loss:.4f} nats a token"
        rows["validation perplexity"] = f"{result.validation_perplexity:.2f}"
    rows["model"] = result.out / "model"
    rows["loss curve"] = result.out / "loss.png"
    _print_table("Trained", rows, console)


def print_knowledge(store, console=None):
    """Print what a `KnowledgeStore` holds."""
    rows = {
        "store": store.path,
        "tokens": f"{store.manifest['count']:,}, {store.passes} times",
        "of each": f"the {store.top_k} most likely next tokens, and the rest",
        "size": f"{store.size_bytes / 1e6:,.1f} MB",
        "a token": f"{store.bytes_per_token} bytes",
        "vocabularies": store.mapping,
    }
    _print_table("Knowledge extracted", rows, console)


def print_export(manifest, path):
    """Print what an exported file is and how it was found to compute.

    Args:
        manifest: As `export_tflite` returns it.
        path: The file.
    """
    measured = manifest["verification"]
    rows = {
        "file": path,
        "mode": manifest["mode"],
        "size": f"{manifest['size_bytes'] / 1e6:,.2f} MB",
        "context": f"{manifest['capacity']:,} tokens",
        "signatures": ", ".join(measured["signatures"]),
        "against Keras": f"divergence {measured['divergence_nats']:.2g} nats, same "
        f"top-1 token in {measured['top1_agreement']:.1%} of "
        f"{measured['positions']} places",
    }
    _print_table("Exported and verified", rows)


def _print_table(title, rows, console=None):
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, Text(str(value)))  # its brackets are none of rich's markup
    (console or Console()).print(table)


def draw_history(history, path):
    """Draw training and validation loss over the steps.

    Args:
        history: As in a run's `history.json`.
        path: PNG to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(
        title="Training", xlabel="step", ylabel="loss, nats per token"
    )
    for part, style, color, label in (
        ("steps", "-", "#8fa8c8", "training (mean of 10 steps)"),
        ("validations", "o-", "#c2410c", "validation"),
    ):
        rows = history[part]
        losses = [row["loss"] for row in rows]
        axes.plot(
            [row["step"] for row in rows], losses, style, color=color, label=label
        )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    with artifacts.atomic_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=110)
