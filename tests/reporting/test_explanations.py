"""An explanation in the terminal, as a page and as a picture."""

import dataclasses
import io
import json
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console

from gpt_tf.errors import InputError
from gpt_tf.explain.attribution import Explanation
from gpt_tf.reporting.explanations import (
    draw_explanation,
    explanation_html,
    print_explanation,
    write_explanation,
)

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


def printed(explanation, **options):
    console = Console(file=io.StringIO(), width=100, **options)
    print_explanation(explanation, console, top=3)
    return console.file.getvalue()


def test_the_page_is_escaped_and_shows_every_token_on_its_own_side():
    text = explanation_html(made())
    assert "url(" not in text and "@import" not in text and "href" not in text
    page = ElementTree.fromstring(text)  # well-formed
    tags = [element.tag for element in page.iter()]
    assert not {"script", "link", "img", "b"} & set(tags)
    assert tags.count("i") == len(TEXTS)  # the bars
    tokens = page.findall(".//pre/span")
    assert [token.get("class") for token in tokens[:4]] == ["up", "down", "none", "up"]
    texts = [token.text for token in tokens]
    assert texts[:6] == ["<b>", " &", "\u23ce\n", "x$_1$", "\u4e2d", "\\xe4"]
    assert "\x1b" not in text


def test_the_terminal_colours_tokens_and_lists_the_strongest():
    text = printed(made(), force_terminal=True, color_system="truecolor")
    assert "48;2;" in text  # a background
    assert "\x1b[31m" not in text  # the prompt's own codes do not get through
    plain = printed(made())
    rows = [line for line in plain.splitlines() if line.startswith("\u2502")]
    assert [row.split()[1] for row in rows] == ["0", "1", "3"]
    assert "+2.000" in rows[0] and "-1.000" in rows[1]
    assert "probability 25.0%" in plain and "-3.50" in plain


def test_attention_is_shown_without_sides_and_signs():
    assert "pushes it down" in explanation_html(made())
    text = explanation_html(made("attention"))
    assert "pushes" not in text and "2.000" in text and "+2.000" not in text


def test_small_scores_are_not_all_written_as_nought():
    small = dataclasses.replace(made(), scores=made().scores * 1e-4)
    text = printed(small)
    assert "+0.000200" in text and "-0.000100" in text
    none = dataclasses.replace(made(), scores=made().scores * 0)
    assert "+0.000" in explanation_html(none)


def test_the_picture_is_drawn_whatever_the_tokens(tmp_path):
    draw_explanation(made(), tmp_path / "a.png")
    pixels = image.imread(tmp_path / "a.png")[:, :, :3]
    orange = np.abs(pixels - np.array([217, 95, 2]) / 255).max(axis=-1) < 0.02
    blue = np.abs(pixels - np.array([49, 130, 206]) / 255).max(axis=-1) < 0.02
    assert orange.sum() > blue.sum() > 100


def test_what_is_written_is_what_the_name_asks_for(tmp_path):
    paths = write_explanation(made(), tmp_path / "out")
    assert [path.suffix for path in paths] == [".html", ".png", ".json"]
    facts = json.loads(paths[2].read_text("utf-8"))
    assert facts["scores"][:2] == [2.0, -1.0] and facts["texts"][0] == "<b>"
    assert write_explanation(made(), tmp_path / "a.html") == [tmp_path / "a.html"]
    (tmp_path / "file").write_text("kept")
    for name in ("a.pdf", "file"):
        with pytest.raises(InputError, match="folder"):
            write_explanation(made(), tmp_path / name)
    assert (tmp_path / "file").read_text() == "kept"
