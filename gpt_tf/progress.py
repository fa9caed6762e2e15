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
    """A progress bar for work in steps whose number is known once it begins.

    Args:
        unit: What the steps are called.
        console: Where to write; standard output unless given.

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
        """Say how far the work is.

        Args:
            done: Number of steps that are done.
            total: Number of all.
            **shown: `description` in place of the unit; `note`, a text after the count.
        """
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
    """Print a table of what a training run reached.

    Args:
        result: A `gpt_tf.training.run.TrainingResult`.
        console: Where to write; standard output unless given.
    """
    table = Table(title="Trained", show_header=False)
    table.add_row("parameters", f"{result.model.count_params():,}")
    table.add_row("vocabulary", f"{result.tokenizer.vocab_size:,} tokens")
    if result.validation_loss is not None:
        table.add_row("validation loss", f"{result.validation_loss:.4f} nats a token")
        table.add_row("validation perplexity", f"{result.validation_perplexity:.2f}")
    # A path may hold brackets; none of it is rich's markup.
    table.add_row("model", Text(str(result.out / "model")))
    table.add_row("loss curve", Text(str(result.out / "loss.png")))
    (console or Console()).print(table)


def print_knowledge(store, console=None):
    """Print a table of what a store of knowledge holds.

    Args:
        store: A `gpt_tf.distillation.teacher_cache.KnowledgeStore`.
        console: Where to write; standard output unless given.
    """
    manifest = store.manifest
    table = Table(title="Knowledge extracted", show_header=False)
    table.add_row("store", Text(str(store.path)))
    table.add_row("tokens", f"{manifest['count']:,}, {store.passes} times")
    table.add_row("of each", f"the {store.top_k} most likely next tokens, and the rest")
    table.add_row("size", f"{store.size_bytes / 1e6:,.1f} MB")
    table.add_row("a token", f"{store.bytes_per_token} bytes")
    table.add_row("vocabularies", manifest["mapping"])
    (console or Console()).print(table)


def print_export(manifest, path, console=None):
    """Print a table of what an exported file is and how it was found to compute.

    Args:
        manifest: As `export_tflite` returns it.
        path: The file.
        console: Where to write; standard output unless given.
    """
    measured = manifest["verification"]
    table = Table(title="Exported and verified", show_header=False)
    table.add_row("file", Text(str(path)))
    table.add_row("mode", manifest["mode"])
    table.add_row("size", f"{manifest['size_bytes'] / 1e6:,.2f} MB")
    table.add_row("context", f"{manifest['capacity']:,} tokens")
    table.add_row("signatures", ", ".join(measured["signatures"]))
    table.add_row(
        "against Keras",
        f"divergence {measured['divergence_nats']:.2g} nats, same top-1 token "
        f"in {measured['top1_agreement']:.1%} of {measured['positions']} places",
    )
    (console or Console()).print(table)


def draw_history(history, path):
    """Draw training and validation loss over the steps.

    Args:
        history: As in a run's `history.json`.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps, validations = history["steps"], history["validations"]
    axes.plot(
        [row["step"] for row in steps],
        [row["loss"] for row in steps],
        color="#8fa8c8",
        label="training (mean of 10 steps)",
    )
    axes.plot(
        [row["step"] for row in validations],
        [row["loss"] for row in validations],
        color="#c2410c",
        marker="o",
        markersize=4,
        label="validation",
    )
    if validations:
        last = validations[-1]
        axes.annotate(
            f"{last['loss']:.3f} (perplexity {last['perplexity']:.1f})",
            (last["step"], last["loss"]),
            textcoords="offset points",
            xytext=(-6, 12),
            ha="right",
            color="#c2410c",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title("Training")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    with artifacts.atomic_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=110)
