"""An explanation in the terminal, as a page and as a picture."""

import dataclasses
import html
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from gpt_tf.errors import InputError
from gpt_tf.explain.attribution import Explanation
from gpt_tf.reporting.explanations import (
    draw_explanation,
    explanation_html,
    print_explanation,
    write_explanation,
)
from tests.reporting.reader import Reader

TEXTS = ("<b>", " &", "\n", "x$_1$", "\u4e2d", "\\xe4", "\t", "\x1b[31m", '"')


def made(method="shap"):
    scores = np.array([2.0, -1.0, 0.001, 0.5, 0.0, 0.3, -0.2, 0.1, 0.4])
    return Explanation(
        method=method,
        ids=tuple(range(len(TEXTS))),
        texts=TEXTS,
        target_id=1,
        target_text="<i>",
        probability=0.25,
        log_probability=float(np.log(0.25)),
        scores=np.abs(scores) if method == "attention" else scores,
        base_value=-3.5 if method == "shap" else None,
        neutral_id=3,
        num_samples=100,
        seed=0,
    )


def test_the_page_is_escaped_and_needs_nothing_else():
    text = explanation_html(made())
    page = Reader(text)
    assert page.links == [] and "url(" not in text and "@import" not in text
    assert not {"script", "link", "img", "b"} & set(page.tags)
    assert page.tags.count("i") == len(TEXTS)  # the bars
    assert "&lt;i&gt;" in text and "<i>" not in text


def test_the_page_shows_every_token_on_its_own_side():
    page = explanation_html(made())
    tokens = re.findall(
        '(?s)<span class="([a-z]+)"[^>]* title=[^>]*>(.*?)</span>', page
    )
    assert [side for side, _ in tokens[:4]] == ["up", "down", "none", "up"]
    texts = [html.unescape(text) for _, text in tokens]
    assert texts[:6] == ["<b>", " &", "\u23ce\n", "x$_1$", "\u4e2d", "\\xe4"]
    assert "\x1b" not in page


def test_the_terminal_colours_tokens_and_lists_the_strongest():
    file = io.StringIO()
    console = Console(
        file=file, width=100, force_terminal=True, color_system="truecolor"
    )
    print_explanation(made(), console, top=3)
    text = file.getvalue()
    assert "48;2;" in text  # a background
    assert "\x1b[31m" not in text  # the prompt's own codes do not get through
    plain = io.StringIO()
    print_explanation(made(), Console(file=plain, width=100), top=3)
    lines = plain.getvalue().splitlines()
    rows = [line for line in lines if line.startswith("\u2502")]
    assert [row.split()[1] for row in rows] == ["0", "1", "3"]
    assert "+2.000" in rows[0] and "-1.000" in rows[1]
    assert "probability 25.0%" in plain.getvalue() and "-3.50" in plain.getvalue()


def test_attention_is_shown_without_sides_and_signs():
    assert "pushes it down" in explanation_html(made())
    assert "pushes it up" in explanation_html(made())
    assert "+2.000" in explanation_html(made())
    text = explanation_html(made("attention"))
    assert "pushes" not in text and "looked at" in text
    assert "2.000" in text and "+2.000" not in text


def test_small_scores_are_not_all_written_as_nought():
    small = dataclasses.replace(made(), scores=made().scores * 1e-4)
    plain = io.StringIO()
    print_explanation(small, Console(file=plain, width=100), top=3)
    assert "+0.000200" in plain.getvalue() and "-0.000100" in plain.getvalue()
    text = explanation_html(small)
    assert text.count("+0.000200") == 2  # in the prompt and in the table
    none = dataclasses.replace(made(), scores=made().scores * 0)
    assert "+0.000" in explanation_html(none)


def test_the_picture_is_drawn_whatever_the_tokens(tmp_path):
    from matplotlib import image

    draw_explanation(made(), tmp_path / "a.png")
    pixels = image.imread(tmp_path / "a.png")[:, :, :3]
    orange = np.abs(pixels - np.array([217, 95, 2]) / 255).max(axis=-1) < 0.02
    blue = np.abs(pixels - np.array([49, 130, 206]) / 255).max(axis=-1) < 0.02
    assert orange.sum() > blue.sum() > 100


def test_a_folder_gets_page_picture_and_numbers(tmp_path):
    paths = write_explanation(made(), tmp_path / "out")
    assert [path.name for path in paths] == [
        *("explanation.html", "explanation.png", "explanation.json")
    ]
    facts = json.loads(paths[2].read_text("utf-8"))
    assert facts["scores"][:2] == [2.0, -1.0] and facts["texts"][0] == "<b>"


def test_only_pages_pictures_and_folders_are_written(tmp_path):
    (tmp_path / "file").write_text("kept")
    for name in ("a.pdf", "file"):
        with pytest.raises(InputError, match=r"ends in .html or .png, or a folder"):
            write_explanation(made(), tmp_path / name)
    assert (tmp_path / "file").read_text() == "kept"
    assert write_explanation(made(), tmp_path / "a.html") == [tmp_path / "a.html"]
