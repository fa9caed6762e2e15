"""An explanation for people: in the terminal, as a page, as a picture.

Orange tokens push the target up and blue ones down, the stronger the deeper. The two
colours are told apart by every kind of colour vision, and the numbers stand beside.
The last token is often ten times as strong as any other; so that these are seen too,
the depth of a colour follows the square root of the score. Bars are to scale.
"""

import math
import os
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.explain.attribution import Explanation
from gpt_tf.reporting import plots
from gpt_tf.settings import arguments

_UP, _DOWN = (217, 95, 2), (49, 130, 206)
# Below this depth a token is left uncoloured.
_FAINTEST = 0.15
_BAR_WIDTH = 16

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
        explanation: What `gpt_tf.explain.attribution.explain` returned.
        console: Where to write; standard output unless given.
        top: Rows of the table.
    """
    top = arguments.integer("top", top)
    console = console or Console()
    strengths = _strengths(explanation)
    text = Text()
    for token, depth in zip(explanation.texts, _depths(explanation), strict=True):
        text.append(_visible(token), _terminal_style(depth))
    console.print(text)
    target = Text("-> ").append(_quoted(explanation.target_text), Style(bold=True))
    target.append(f"  probability {explanation.probability:.1%}")
    target.append(f", log-probability {explanation.log_probability:.2f} nats")
    if explanation.base_value is not None:
        target.append(f", {explanation.base_value:.2f} with all tokens taken away")
    console.print(target)
    legend = Text()
    if _signed(explanation):
        legend.append(" down ", _terminal_style(-1.0)).append(" ")
    up = " up " if _signed(explanation) else " looked at "
    legend.append(up, _terminal_style(1.0))
    legend.append(f"  {explanation.method}: {_SAID_OF[explanation.method]}")
    console.print(legend)
    table = Table(title="Strongest tokens", title_justify="left")
    for name, justify in (("position", "right"), ("token", "left"), ("score", "right")):
        table.add_column(name, justify=justify)
    table.add_column("", no_wrap=True, min_width=_BAR_WIDTH)
    for position in _strongest(explanation)[:top]:
        strength = strengths[position]
        bar = "\u2588" * max(1, round(abs(strength) * _BAR_WIDTH))
        table.add_row(
            str(position),
            Text(_quoted(explanation.texts[position])),
            _written(explanation, position),
            Text(bar, Style(color=_hex(_UP if strength >= 0 else _DOWN))),
        )
    console.print(table)


def write_explanation_html(explanation: Explanation, path: str | os.PathLike) -> None:
    """Write a page that needs no other file and no network.

    Args:
        explanation: What `gpt_tf.explain.attribution.explain` returned.
        path: HTML file to write.
    """
    with artifacts.atomic_file(path, "w") as file:
        file.write(explanation_html(explanation))


def explanation_html(explanation: Explanation) -> str:
    """Return that page."""
    # The terminal does without Jinja.
    from gpt_tf.reporting.render import render

    strengths, depths = _strengths(explanation), _depths(explanation)
    tokens = [
        {
            "position": position,
            "visible": _visible(text),
            "quoted": _quoted(text),
            "score": _written(explanation, position),
            "depth": f"{abs(depths[position]):.2f}",
            "side": _side(depths[position]),
            "sign": "up" if strengths[position] > 0 else "down",
            "width": f"{abs(strengths[position]):.1%}",
        }
        for position, text in enumerate(explanation.texts)
    ]
    facts = {
        "probability": f"{explanation.probability:.1%}",
        "log-probability": f"{explanation.log_probability:.3f} nats",
    }
    if explanation.base_value is not None:
        facts["all tokens taken away"] = f"{explanation.base_value:.3f} nats"
    if explanation.num_samples is not None:
        steps = "steps" if explanation.method == "gradient" else "masked prompts"
        facts[steps] = f"{explanation.num_samples:,}"
        if explanation.method != "gradient":
            facts["seed"] = str(explanation.seed)
    return render(
        "explanation.html.j2",
        target=_quoted(explanation.target_text),
        tokens=tokens,
        strongest=[tokens[position] for position in _strongest(explanation)],
        is_signed=_signed(explanation),
        method=explanation.method,
        unit=_SAID_OF[explanation.method],
        facts=facts,
    )


def draw_explanation(
    explanation: Explanation, path: str | os.PathLike, *, top: int = 15
) -> None:
    """Draw the prompt with coloured tokens, and the strongest tokens as bars.

    Args:
        explanation: What `gpt_tf.explain.attribution.explain` returned.
        path: PNG to write.
        top: Number of bars.
    """
    top = arguments.integer("top", top, 1)
    with plots.house_style():
        figure = _figure_of(explanation, top)
    plots.save(figure, path)


def _figure_of(explanation, top):
    lines = _laid_out(explanation.texts)
    shown = _strongest(explanation)[:top][::-1]
    heights = (0.2 * len(lines) + 0.2, 0.27 * len(shown) + 0.7)
    figure = plots.new_figure(sum(heights) + 0.9, width=8)
    above, below = figure.subplots(2, height_ratios=heights)
    _draw_tokens(above, lines, _depths(explanation))
    figure.suptitle(
        f"{explanation.method}: why {_quoted(explanation.target_text)}?  "
        f"probability {explanation.probability:.1%}",
        x=0.01,
        ha="left",
    )
    scores = explanation.scores[shown]
    colours = [_hex(_UP if score >= 0 else _DOWN) for score in scores]
    below.barh(range(len(shown)), scores, color=colours, height=0.7)
    below.axvline(0, color=plots.GREY, linewidth=0.8)
    labels = [f"{_quoted(explanation.texts[p])}  {p}" for p in shown]
    below.set_yticks(range(len(shown)), labels, family="monospace", fontsize=8)
    below.set_xlabel(_SAID_OF[explanation.method], fontsize=8)
    below.tick_params(axis="x", labelsize=8)
    below.spines["left"].set_visible(False)
    return figure


# Columns of a line of coloured tokens, and how wide one is in the axes.
_COLUMNS = 84


def check_place(out: str | os.PathLike) -> None:
    """Refuse a name that is neither a page's, nor a picture's, nor a folder's.

    Raises:
        InputError: It ends otherwise, a file stands where a folder is expected, or it
            cannot be written.
    """
    out = Path(out)
    if out.suffix in (".html", ".png") and not out.is_dir():
        artifacts.check_writable(out)
        return
    if out.is_file() or (out.suffix and not out.is_dir()):
        raise InputError(
            "`out` expects a name that ends in .html or .png, or a folder. Received: "
            f"{str(out)!r}."
        )
    artifacts.check_writable(out / "explanation.html")


def write_explanation(explanation: Explanation, out: str | os.PathLike) -> list[Path]:
    """Write what the name asks for.

    Args:
        explanation: What `gpt_tf.explain.attribution.explain` returned.
        out: A name that ends in `.html` or `.png`; otherwise a folder, for both and
            for `explanation.json` with the numbers.

    Returns:
        The files.

    Raises:
        InputError: As `check_place`.
    """
    check_place(out)
    out = Path(out)
    if out.suffix == ".html" and not out.is_dir():
        write_explanation_html(explanation, out)
        return [out]
    if out.suffix == ".png" and not out.is_dir():
        draw_explanation(explanation, out)
        return [out]
    names = [f"explanation.{kind}" for kind in ("html", "png", "json")]
    with artifacts.replaced(out / names[0], *names[1:]) as new:
        write_explanation_html(explanation, new / names[0])
        draw_explanation(explanation, new / names[1])
        artifacts.write_json(new / names[2], explanation.as_dict())
    return [out / name for name in names]


def _laid_out(texts):
    """Break tokens into lines of at most `_COLUMNS` characters.

    Returns:
        Lines of pieces: position of the token, first column, text.
    """
    lines, column = [[]], 0
    for position, text in enumerate(texts):
        for number, part in enumerate(_visible(text).split("\n")):
            if number:
                lines.append([])
                column = 0
            part = "".join(c if c.isprintable() else "\ufffd" for c in part)
            while part:
                if column and column + len(part) > _COLUMNS:
                    lines.append([])
                    column = 0
                piece, part = part[:_COLUMNS], part[_COLUMNS:]
                lines[-1].append((position, column, piece))
                column += len(piece)
    return lines


def _draw_tokens(axes, lines, depths):
    from matplotlib.patches import Rectangle

    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(len(lines), 0)
    axes.axis("off")
    for row, line in enumerate(lines):
        for position, column, piece in line:
            depth = depths[position]
            place, width = (column + 0.04, row + 0.05), len(piece) - 0.08
            if abs(depth) >= _FAINTEST:
                colour = _hex(_mixed(depth, (255, 255, 255)))
                axes.add_patch(Rectangle(place, width, 0.9, color=colour, linewidth=0))
            for index, character in enumerate(piece):
                axes.text(
                    column + index + 0.5,
                    row + 0.52,
                    character,
                    family="monospace",
                    fontsize=8,
                    ha="center",
                    va="center",
                )


def _strengths(explanation):
    """Return scores from -1 to 1; the strongest is one of these."""
    scores = explanation.scores
    return scores / max(np.abs(scores).max(), np.finfo(np.float64).tiny)


def _depths(explanation):
    """Return how deep the colours are, from -1 to 1."""
    strengths = _strengths(explanation)
    return np.sign(strengths) * np.sqrt(np.abs(strengths))


def _strongest(explanation):
    return np.argsort(-np.abs(explanation.scores), kind="stable")


def _written(explanation, position):
    """Return a score with its sign, if any, and digits enough for the strongest."""
    strongest = float(np.abs(explanation.scores).max()) or 1.0
    digits = min(max(2 - math.floor(math.log10(strongest)), 3), 9)
    sign = "+" if _signed(explanation) else ""
    return f"{explanation.scores[position]:{sign}.{digits}f}"


def _signed(explanation):
    return explanation.method != "attention"


def _side(depth):
    if abs(depth) < _FAINTEST:
        return "none"
    return "up" if depth > 0 else "down"


def _visible(token):
    """Mark line breaks, and leave them; other control characters have their names."""
    shown = token.replace("\r", "\\r").replace("\t", "\u2192   ")
    shown = shown.replace("\n", "\u23ce\n")
    return "".join(c if c == "\n" or c >= " " else f"\\x{ord(c):02x}" for c in shown)


def _quoted(token):
    """Put a token on one line, within marks that show its spaces."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in token
    )
    mark = '"' if "'" in shown else "'"
    return f"{mark}{shown}{mark}"


def _terminal_style(depth):
    if abs(depth) < _FAINTEST:
        return Style()
    # On light paper and dark alike: its own ink, from pale to deep.
    colour = _mixed(depth, (245, 240, 232) if depth > 0 else (232, 240, 245))
    return Style(color="#000000", bgcolor=_hex(colour))


def _mixed(depth, paper):
    share = 0.15 + 0.7 * min(1.0, abs(depth))
    ink = _UP if depth >= 0 else _DOWN
    return tuple(
        round(share * a + (1 - share) * b) for a, b in zip(ink, paper, strict=True)
    )


def _hex(colour):
    return "#{:02x}{:02x}{:02x}".format(*colour)
