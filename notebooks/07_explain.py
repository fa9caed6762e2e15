# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7. Explain, and test the explanation
#
# **Result:** removing the tokens that SHAP names takes more of a prediction's
# probability than removing the tokens nearest to it; removing those that attention
# names takes less.
#
# ![The result](attachment:result.png)
#
# **At the end you have** the tokens of a prompt that a prediction depends on, by four
# methods and as a page to hand on; a test that compares each method with two trivial
# rules; and the explanation of an int8 file beside that of its Keras model.
#
# **The article**, on GPT real-time performance: chapter 6.5, explanation. It
# names LIME and SHAP; both are here through their authors' libraries, beside attention
# and integrated gradients.
#
# **In gpt_tf:** [6.5](../docs/article.md#65-explanation).
#
# **Time:** 3 minutes on two quiet CPU cores. Nothing is trained: you explain the
# bundled model or your own.

# %%
# Install gpt_tf where it is missing, from a wheel or a clone beside this notebook.
import glob
import importlib.util

from IPython import get_ipython

if getattr(importlib.util.find_spec("gpt_tf"), "origin", None) is None:
    source = [*glob.glob("./gpt_tf*.whl"), *glob.glob("./gpt_tf*/"), ".."][0]
    get_ipython().run_line_magic("pip", f"install -q {source}[train,explain]")

# %%
import html
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, Markdown, display

import gpt_tf

# %% tags=["parameters"]
model = gpt_tf.shipped_model("python-small")  # yours: a run, a Hugging Face folder ...
corpus = "python-stdlib"  # text for the test: a folder of your own
prompt = "    def __init__(self, name):\n        self.name ="  # no space at its end
num_prompts = 50  # of the test, the fewest that it takes
prompt_tokens = 24
num_samples = 128  # masked prompts for each LIME or SHAP explanation in the test

# %%
folder = Path("runs/notebook-07")
folder.mkdir(parents=True, exist_ok=True)
opened = gpt_tf.open_model(model)
tokenizer = opened.tokenizer
gpt = gpt_tf.KerasGPT(opened.model, tokenizer)
gpt_tf.export_litertlm(opened.model, tokenizer, folder / "gpt.litertlm", "dynamic_int8")
file = gpt_tf.EdgeGPT(folder / "gpt.litertlm")

# %% [markdown]
# ## 1. The result: which explanations pass the test
#
# An explanation names the tokens that a prediction depends on. You can test that:
# remove the fifth of the tokens that it names first, and see how far the probability of
# the predicted token falls. (*Remove* means: put a space in its place, so that all
# others keep their positions.) It has to fall further than with two rules that explain
# nothing:
#
# - **random**: as many tokens at random, the mean of 16 draws;
# - **nearest**: as many tokens at the end of the prompt.
#
# The second is a strong rule, because a next token depends most on the tokens just
# before it. The test runs twice; the second time the last token always stays, since
# nearly every method names it first.

# %%
text = gpt_tf.held_out_text(corpus)
tokens = []
for document in text.documents:
    tokens += tokenizer.encode(document.text)
    if len(tokens) >= 20 * num_prompts * prompt_tokens:
        break
prompts = gpt_tf.prompts_of(tokens, num_prompts, prompt_tokens)

methods = ("shap", "lime", "gradient", "attention")
test = gpt_tf.deletion_test(
    gpt, prompts, methods, keep_last=True, num_samples=num_samples
)

# %% tags=["result"]
parts = {"any token may go": test, "the last token stays": test["last_kept"]}
figure, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for axes, (title, part) in zip(panels, parts.items(), strict=True):
    drops = {method: part["methods"][method]["drop"] for method in methods}
    drops["nearest"] = part["nearest_drop"]
    drops["random"] = part["methods"]["shap"]["random_drop"]
    for place, (name, drop) in enumerate(drops.items()):
        colour = "#9ca3af" if name in ("nearest", "random") else "#0e7490"
        value, low, high = (100 * drop[bound] for bound in ("value", "low", "high"))
        axes.plot([low, high], [place, place], color=colour, linewidth=3)
        axes.plot(value, place, "o", color=colour)
        axes.text(high, place, f"  {value:.0f}", va="center", color=colour)
    axes.axvline(100 * part["nearest_drop"]["value"], color="#9ca3af", linewidth=0.8)
    axes.set_title(title, loc="left")
    axes.set_xlabel("percentage points of probability lost")
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_yticks(range(len(drops)), list(drops))
panels[0].invert_yaxis()
plt.show()

# %% [markdown]
# The bars are 95 % intervals over the prompts. The same prompts are used for all, so
# the difference from *nearest* is known better than the bars suggest:

# %%
print(f"{'':22} {'method':10} {'lost':>6}   more than nearest (95 % interval)")
for title, part in parts.items():
    for method in methods:
        judged = part["methods"][method]
        value, low, high = judged["over_nearest"].values()
        verdict = "more" if low > 0 else "less" if high < 0 else "no clear difference"
        lost = judged["drop"]["value"]
        print(
            f"{title:22} {method:10} {lost:6.1%}   "
            f"{value:+6.1%} ({low:+.1%} to {high:+.1%})  {verdict}"
        )

# %% [markdown]
# Read the second half. With the last token kept, an explanation has to find what
# matters further back, and a method whose interval lies above zero does. In the first
# half the rule *nearest* is nearly as good as any method, so "better than random" alone
# says little. Attention shows where a model looks, which is not the same as what it
# uses (Jain and Wallace, "Attention is not Explanation", arXiv:1902.10186).
#
# ## 2. One prediction, explained
#
# What does the model expect after this prompt, and which tokens made it expect that?

# %%
ids = tokenizer.encode(prompt)
gpt.reset()
logits = gpt.logits(ids)[-1].astype(np.float64)  # (V,)
probabilities = np.exp(logits - logits.max())
probabilities /= probabilities.sum()
for token in np.argsort(-probabilities)[:5]:
    said = repr(tokenizer.decode([int(token)]))
    print(
        f"{said:12} {probabilities[token]:6.1%} {'#' * int(60 * probabilities[token])}"
    )

# %% [markdown]
# SHAP removes tokens one after the other in many random orders. A token's score is the
# mean change of the log-probability (in nats) when it is removed. This is the page that
# `gpt-tf explain --out` writes: orange raises the probability of the predicted token,
# blue lowers it.

# %%
explanation = gpt_tf.explain_prompt(gpt, prompt, method="shap")
page = gpt_tf.explanation_html(explanation)
(folder / "explanation.html").write_text(page, encoding="utf-8")
frame = '<div><iframe srcdoc="{}" width="100%" height="420"></iframe></div>'
HTML(frame.format(html.escape(page)))

# %% [markdown]
# The scores add up: together with the log-probability when every token is removed they
# give the log-probability after the whole prompt.

# %%
together = explanation.base_value + explanation.scores.sum()
print(f"{together:.4f} and {explanation.log_probability:.4f} nats")

# %% [markdown]
# ## 3. Four methods, one prompt
#
# | method | what it does | needs |
# |---|---|---|
# | `shap` | Shapley values, from random orders of removal | scores |
# | `lime` | removes random tokens and fits a linear model to the effect | scores |
# | `gradient` | integrated gradients, from a space to each token (embeddings) | Keras |
# | `attention` | attention of the last position, mean over layers and heads | Keras |
#
# `shap`, `lime` and `gradient` are in nats. `attention` is a share: it has no sign and
# does not depend on the predicted token.

# %%
explained = {
    method: gpt_tf.explain_prompt(gpt, prompt, method=method) for method in methods
}
labels = [repr(text) for text in explanation.texts]
figure, panels = plt.subplots(
    1, len(methods), figsize=(10, 0.24 * len(labels) + 1), sharey=True
)
for axes, (method, found) in zip(panels, explained.items(), strict=True):
    colours = ["#d95f02" if score >= 0 else "#3182ce" for score in found.scores]
    axes.barh(range(len(labels)), found.scores, color=colours)
    axes.axvline(0, color="#555555", linewidth=0.8)
    axes.set_title(method)
    axes.set_xlabel("share" if method == "attention" else "nats")
    axes.spines[["top", "right", "left"]].set_visible(False)
panels[0].set_yticks(range(len(labels)), labels, family="monospace", fontsize=8)
panels[0].invert_yaxis()
figure.tight_layout()
plt.show()

# %% [markdown]
# On this prompt `shap` and `lime` give ' =' the highest score, and `gradient` gives it
# almost none: it follows a path on which all tokens fade in at once. One prompt cannot
# say which method is right. The test over all prompts above can.
#
# ## 4. Explain another token
#
# `target` names the token to explain. Which tokens support the second most likely one?

# %%
second = int(np.argsort(-probabilities)[1])
other = gpt_tf.explain_prompt(gpt, prompt, target=second, method="shap")
print(f"for {other.target_text!r}, at {other.probability:.1%}:")
for position in other.order()[:4]:
    print(f"  {other.texts[position]!r:12} {other.scores[position]:+.2f} nats")

# %% [markdown]
# ## 5. Does the int8 file have the same reasons?
#
# `shap` and `lime` need scores only, so they explain the exported file as well, on a
# device without TensorFlow too. Here the same prompts are explained for the Keras model
# and for the file, and the order of their tokens is compared. SHAP is random: two runs
# on one model differ as well. Their correlation, the *ceiling*, is the highest that a
# comparison can reach.

# %%
compared = gpt_tf.compare_explanations(
    gpt,
    file,
    prompts,
    "shap",
    num_samples=num_samples,
    names=("Keras, float32", "file, int8"),
)
for name, part in (
    ("Keras and the int8 file", "rank_correlation"),
    ("Keras twice (ceiling)", "ceiling"),
):
    value, low, high = compared[part].values()
    print(f"{name:26} rank correlation {value:.2f} ({low:.2f} to {high:.2f})")
overlap = compared["rank_correlation"]["high"] >= compared["ceiling"]["low"]
print(f"\nThe intervals overlap: {overlap}")
gpt.close()
file.close()

# %% [markdown]
# Where the intervals overlap, a change by int8 cannot be told from SHAP's own sampling.
#
# ## All in one table

# %%
kept = test["last_kept"]
lines = ["| the last token stays | lost | over random | over nearest |"]
lines.append("|---|---:|---:|---:|")
for method in methods:
    judged = kept["methods"][method]
    over = {
        part: judged[part]["value"] for part in ("drop", "difference", "over_nearest")
    }
    lines.append(
        f"| {method} | {over['drop']:.1%} | {over['difference']:+.1%} "
        f"| {over['over_nearest']:+.1%} |"
    )
lines.append(f"| nearest | {kept['nearest_drop']['value']:.1%} | | |")
random_drop = kept["methods"]["shap"]["random_drop"]["value"]
lines.append(f"| random | {random_drop:.1%} | | |")
display(Markdown("\n".join(lines)))

# %%
print(
    "results:",
    json.dumps(
        {
            "shap_over_nearest": kept["methods"]["shap"]["over_nearest"],
            "attention_over_nearest": test["methods"]["attention"]["over_nearest"],
            "rank_correlation": compared["rank_correlation"],
            "ceiling": compared["ceiling"],
            "cpu_minutes": round(sum(os.times()[:4]) / 60, 2),
        }
    ),
)

# %% [markdown]
# ## Where next
#
# - From a terminal:
#
#       gpt-tf explain mine.litertlm --prompt "for i in range(" --method shap --out why
#
# - An explanation says what this model reacts to, not whether the prediction is right.
#   Prompts with removed tokens are unlike any text, and a model may react to that too.
# - The functions: [explain_prompt, deletion_test and
#   compare_explanations](../gpt_tf/explain/). How to [explain a
#   prediction](../docs/how_to/explain.md).
# - Next: [8. Train in parallel](08_train_in_parallel.ipynb).
