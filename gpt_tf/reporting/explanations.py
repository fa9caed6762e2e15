"""An explanation for people: in the terminal, as a page, as a picture.

Orange tokens push the target up and blue ones down, the stronger the deeper. The two
colours are told apart by every kind of colour vision, and the numbers stand beside.
The last token is often ten times as strong as any other; so that these are seen too,
the depth of a colour follows the square root of the score. Bars are to scale.
"""

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.color import Color, blend_rgb
from rich.color_triplet import ColorTriplet
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.explain.attribution import Explanation
from gpt_tf.reporting import plots
from gpt_tf.settings import arguments

_UP, _DOWN = "#d95f02", "#3182ce"
# Below this depth a token is left uncoloured.
_FAINTEST = 0.15
_BAR_WIDTH = 16
_COLUMNS = 84  # of a line of the picture

_SAID_OF = {
    "lime": "nats, of a linear model fitted near the prompt",
    "shap": "nats; they and the base value add up to the log-probability",
    "attention": "share of the attention that the last token pays; it has no sign "
    "and does not depend on the target",
    "gradient": "nats, integrated gradients; they and the base value add up to the "
    "log-probability, nearly",
}


def print_explanation(
    explanation: Explanation, console: Console | None = None, *, top: int = 10
) -> None:
    """Print the prompt with a coloured background per token, and the top tokens.

    Args:
        explanation: What `gpt_tf.explain.attribution.explain_prompt` returned.
        console: Where to write; standard output unless given.
        top: Rows of the table.
    """
    top = arguments.integer("top", top)
    console = console or Console()
    tokens, strongest = _tokens(explanation)
    text = Text()
    for token in tokens:
        text.append(token.visible, _terminal_style(token.depth))
    console.print(text)
    target = Text("-> ").append(_quoted(explanation.target_text), Style(bold=True))
    target.append(f"  probability {explanation.probability:.1%}")
    target.append(f", log-probability {explanation.log_probability:.2f} nats")
    if explanation.base_value is not None:
        target.append(f", {explanation.base_value:.2f} with all tokens taken away")
    console.print(target)
    legend = Text()
    if _is_signed(explanation):
        legend.append(" down ", _terminal_style(-1.0)).append(" ")
    up = " up " if _is_signed(explanation) else " looked at "
    legend.append(up, _terminal_style(1.0))
    legend.append(f"  {explanation.method}: {_SAID_OF[explanation.method]}")
    console.print(legend)
    table = Table(title="Strongest tokens", title_justify="left")
    for name, justify in (("position", "right"), ("token", "left"), ("score", "right")):
        table.add_column(name, justify=justify)
    table.add_column("", no_wrap=True, min_width=_BAR_WIDTH)
    for token in strongest[:top]:
        bar = "\u2588" * max(1, round(abs(token.strength) * _BAR_WIDTH))
        colour = Style(color=_colour(token.strength))
        row = (str(token.position), Text(token.quoted), token.score, Text(bar, colour))
        table.add_row(*row)
    console.print(table)


def explanation_html(explanation: Explanation) -> str:
    """Return a page that needs no other file and no network.

    Args:
        explanation: What `gpt_tf.explain.attribution.explain_prompt` returned.
    """
    # The terminal does without Jinja.
    from gpt_tf.reporting.render import render

    tokens, strongest = _tokens(explanation)
    return render(
        "explanation.html.j2",
        found=explanation,
        target=_quoted(explanation.target_text),
        tokens=tokens,
        strongest=strongest,
        faintest=_FAINTEST,
        is_signed=_is_signed(explanation),
        unit=_SAID_OF[explanation.method],
    )


@plots.house_style()
def draw_explanation(
    explanation: Explanation, path: str | os.PathLike, *, top: int = 15
) -> None:
    """Draw the prompt with coloured tokens, and the strongest tokens as bars.

    Args:
        explanation: What `gpt_tf.explain.attribution.explain_prompt` returned.
        path: PNG to write.
        top: Number of bars.
    """
    top = arguments.integer("top", top, 1)
    tokens, strongest = _tokens(explanation)
    cells = _cells(tokens)
    lines = 1 + max((row for row, *_ in cells), default=0)
    shown = strongest[:top][::-1]
    heights = (0.2 * lines + 0.2, 0.27 * len(shown) + 0.7)
    figure = plots.new_figure(sum(heights) + 0.9, width=8)
    above, below = figure.subplots(2, height_ratios=heights)
    figure.suptitle(
        f"{explanation.method}: why {_quoted(explanation.target_text)}?  "
        f"probability {explanation.probability:.1%}",
        x=0.01,
        ha="left",
    )
    above.set(xlim=(0, _COLUMNS), ylim=(lines, 0))
    above.axis("off")
    font = {"family": "monospace", "fontsize": 8}
    for row, column, character, depth in cells:
        if abs(depth) >= _FAINTEST:
            colour, ends = (_colour(depth), _opacity(depth)), [column, column + 1]
            above.fill_between(ends, row + 0.05, row + 0.95, color=colour, lw=0)
        place = column + 0.5, row + 0.52
        above.text(*place, character, ha="center", va="center", **font)
    scores = [explanation.scores[token.position] for token in shown]
    below.barh(range(len(shown)), scores, color=list(map(_colour, scores)), height=0.7)
    below.axvline(0, color=plots.GREY, linewidth=0.8)
    labels = [f"{token.quoted}  {token.position}" for token in shown]
    below.set_yticks(range(len(shown)), labels, **font)
    below.set_xlabel(_SAID_OF[explanation.method], fontsize=8)
    below.tick_params(axis="x", labelsize=8)
    below.spines["left"].set_visible(False)
    plots.save(figure, path)


def _cells(tokens):
    """Return row, column, character and depth of all that the picture shows.

    A line has at most `_COLUMNS` characters; a token is broken only if it has more.
    """
    cells, row, column = [], 0, 0
    for token in tokens:
        if column and column + len(token.visible.partition("\n")[0]) > _COLUMNS:
            row, column = row + 1, 0
        for character in token.visible:
            if character == "\n" or column == _COLUMNS:
                row, column = row + 1, 0
            if character != "\n":
                cells.append((row, column, character, token.depth))
                column += 1
    return cells


def check_place(out: str | os.PathLike) -> list[Path]:
    """Return the files to write, or refuse the name of no page, picture or folder.

    Args:
        out: As of `write_explanation`.

    Raises:
        InputError: It ends otherwise, a file stands where a folder is expected, or it
            cannot be written.
    """
    out = Path(out)
    paths = [out / f"explanation{suffix}" for suffix in _WRITERS]
    if not out.is_dir():
        if out.suffix in (".html", ".png"):
            paths = [out]
        elif out.suffix or out.is_file():
            raise InputError(
                "`out` expects a name that ends in .html or .png, or a folder. "
                f"Received: {str(out)!r}."
            )
    artifacts.check_writable(paths[0])
    return paths


def write_explanation(explanation: Explanation, out: str | os.PathLike) -> list[Path]:
    """Write what the name asks for.

    Args:
        explanation: What `gpt_tf.explain.attribution.explain_prompt` returned.
        out: A name that ends in `.html` or `.png`; otherwise a folder, for both and
            for `explanation.json` with the numbers.

    Returns:
        The files.

    Raises:
        InputError: As `check_place`.
    """
    paths = check_place(out)
    with artifacts.replaced(*paths[:1], *(path.name for path in paths[1:])) as new:
        for path in paths:
            _WRITERS[path.suffix](explanation, new / path.name)
    return paths


_WRITERS = {
    ".html": lambda found, path: path.write_text(explanation_html(found), "utf-8"),
    ".png": draw_explanation,
    ".json": lambda found, path: artifacts.write_json(path, found.as_dict()),
}


class _Token(NamedTuple):
    position: int
    visible: str  # its text, with tabs and line breaks marked
    quoted: str  # the same on one line, within marks that show its spaces
    score: str
    strength: float  # from -1 to 1; the strongest token has one of these
    depth: float  # of its colour, from -1 to 1


def _tokens(explanation):
    """Return the prompt's tokens, in order and by strength."""
    scores = explanation.scores
    strongest = float(np.abs(scores).max()) or 1.0
    # Digits enough for the strongest.
    digits = min(max(2 - math.floor(math.log10(strongest)), 3), 9)
    sign = "+" if _is_signed(explanation) else ""
    tokens = [
        _Token(
            position,
            _visible(text),
            _quoted(text),
            f"{score:{sign}.{digits}f}",
            strength=score / strongest,
            depth=math.copysign(math.sqrt(abs(score / strongest)), score),
        )
        for position, (text, score) in enumerate(
            zip(explanation.texts, scores.tolist(), strict=True)
        )
    ]
    return tokens, sorted(tokens, key=lambda token: -abs(token.strength))


def _is_signed(explanation):
    return explanation.method != "attention"


def _visible(token):
    lines = token.replace("\t", "\u2192   ").split("\n")
    return "\u23ce\n".join(map(_printable, lines))


def _quoted(token):
    shown = _printable(token)
    mark = '"' if "'" in shown else "'"
    return f"{mark}{shown}{mark}"


def _printable(text):
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )


def _colour(score):
    return _UP if score >= 0 else _DOWN


def _opacity(depth):
    return 0.15 + 0.7 * min(1.0, abs(depth))


def _terminal_style(depth):
    """Return black on the colour over white, on light terminals and dark alike."""
    if abs(depth) < _FAINTEST:
        return Style()
    ink = Color.parse(_colour(depth)).triplet
    paper = blend_rgb(ColorTriplet(255, 255, 255), ink, _opacity(depth))
    return Style(color="#000000", bgcolor=paper.hex)
