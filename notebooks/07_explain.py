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
# # 7. Explain
#
# **At the end you will have** an answer to which tokens of a prompt made a GPT say the
# next one, found in four ways, in colours and bars and as a page; the same for the file
# that ships, of which only scores can be seen; and a test that says whether such an
# explanation is worth anything, and whether compression changed it.
#
# **The article**, on GPT real-time performance: chapter 6.5, explanation. It names LIME
# and SHAP; both are here through the libraries of their authors, beside two methods
# that look into the model.
#
#     prompt -> hide tokens, watch the target -> a score per token -> deletion test
#
# Run the cells from top to bottom; on two processor cores that takes two minutes.
# Nothing is trained: the models are those in `saved_models/`.

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

# Where gpt_tf is missing, as in Colab, it is installed: from a clone, if one is near.
if getattr(importlib.util.find_spec("gpt_tf"), "origin", None) is None:
    near = (Path(".."), *Path().iterdir())
    clones = [path for path in near if (path / "gpt_tf/__init__.py").is_file()]
    if clones:
        source = clones[0].resolve().as_uri()
    else:
        source = "git+" + input("Address of the git repository of gpt_tf: ")
    pip = [sys.executable, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"gpt-tf[train,explain] @ {source}"], check=True)

# %%
import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # TensorFlow: errors only, please

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

import gpt_tf
from gpt_tf.evaluation.accuracy import held_out_text
from gpt_tf.evaluation.models import open_model
from gpt_tf.explain.attribution import METHODS, MaskedPrompt, explain
from gpt_tf.explain.faithfulness import (
    compare_explanations,
    deletion_test,
    prompts_of,
    rank_correlation,
)
from gpt_tf.reporting.explanations import (
    draw_explanation,
    print_explanation,
    write_explanation,
)

# %% tags=["parameters"]
corpus = "python-stdlib"  # or the path of a folder of your own text
num_prompts = 50  # of the tests, the fewest that they take
prompt_tokens = 16  # T
num_samples = 128  # masked prompts, of LIME and SHAP in the tests

# %%
folder = Path("runs/notebook-07")  # everything that this notebook writes goes here

# %% [markdown]
# ## A model, and its file
#
# `saved_models/python-small` is a GPT of 0.9 million parameters that learned from the
# sources of Python's standard library, and `python-small.litertlm` the same for a
# device, with int8 weights. Where there is no clone that holds them, a smaller one is
# trained in their place.

# %%
places = (Path(gpt_tf.__file__).parents[1], Path(".."), *Path().iterdir())
models = [place / "saved_models" / "python-small" for place in places]
models = [model for model in models if model.is_dir()]
if models:
    model_path, file_path = models[0], models[0].with_suffix(".litertlm")
else:
    model_path, file_path = folder / "gpt", folder / "gpt.litertlm"
    preset = gpt_tf.training.config.PRESETS["quickstart"]
    gpt_tf.train(preset, model_path, verbose=False, overwrite=True)
    gpt_tf.export_trained(model_path, file_path, "dynamic_int8")

gpt, file = open_model(model_path), open_model(file_path)
for subject in (gpt, file):
    print(f"{type(subject).__name__:8} {subject.mode}")

# %% [markdown]
# ## A prediction
#
# Someone begins to write a method. What does the model expect next?

# %%
prompt = "    def __init__(self, name):\n        self.name ="


def likeliest(subject, count=5):
    """Return the likeliest next tokens with their probabilities."""
    ids = subject.tokenizer.encode(prompt)
    logs = MaskedPrompt(subject, ids, None).log_probabilities()  # (V,)
    return [(int(token), np.exp(logs[token])) for token in np.argsort(-logs)[:count]]


for token, probability in likeliest(gpt):
    bar = "#" * int(60 * probability)
    print(f"{gpt.tokenizer.decode([token])!r:12} {probability:6.1%} {bar}")

# %% [markdown]
# ## Why that one?
#
# Take a token away, and see what that does to the probability of the *target*, which is
# the likeliest next token unless another is named. Away means that a space stands in
# its place, so that all others keep their positions. Tokens act together, so one at a
# time is not enough: SHAP takes them away one after the other, in many random orders,
# and a token's score is what its removal cost on average, in nats of log-probability.
# Orange pushes the target up, blue down.

# %%
explanation = explain(gpt, prompt, method="shap")
print_explanation(explanation, top=6)

# %% [markdown]
# The scores are complete: with what the model says when every token is taken away they
# add up to what it says of the whole prompt. As a picture:

# %%
together = explanation.base_value + explanation.scores.sum()
print(f"{together:.4f} and {explanation.log_probability:.4f} nats")
draw_explanation(explanation, folder / "shap.png", top=8)
Image(folder / "shap.png", width=760)

# %% [markdown]
# The last token often has the highest score: without it the model cannot know that
# something is to follow. What is more of an answer comes after it.
#
# ## And why not another?
#
# Any token of the vocabulary can be the target. What speaks for the second likeliest?

# %%
second, _ = likeliest(gpt)[1]
other = explain(gpt, prompt, target=second, method="shap")
agreement = rank_correlation(explanation.scores, other.scores)
print(f"rank correlation with the scores of the likeliest: {agreement:.2f}\n")
print_explanation(other, top=6)

# %% [markdown]
# ## Four methods
#
# | method | how | needs |
# |---|---|---|
# | `lime` | hides random tokens, fits a linear model to what that did | scores |
# | `shap` | Shapley values, from random orders of removal | scores |
# | `attention` | what the last position pays, mean of layers: where it looked | Keras |
# | `gradient` | integrated gradients, from a space's embedding to each own | Keras |
#
# They answer different questions, and need not agree. Attention has no sign and does
# not depend on the target: it cannot say what spoke against it.

# %%
explained = {method: explain(gpt, prompt, method=method) for method in METHODS}

labels = [repr(text) for text in explanation.texts]
figure, panels = plt.subplots(
    1, len(METHODS), figsize=(10, 0.24 * len(labels) + 1), sharey=True
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
# ## Of the file that ships
#
# LIME and SHAP ask for scores and nothing else. So they explain the `.litertlm` as they
# explain the Keras model, on a device without TensorFlow, too. The others cannot:

# %%
of_file = explain(file, prompt, method="shap")
draw_explanation(of_file, folder / "file.png", top=8)
try:
    explain(file, prompt, method="gradient")
except gpt_tf.InputError as error:
    print(error)
Image(folder / "file.png", width=760)

# %% [markdown]
# ## Is it worth anything?
#
# An explanation always looks plausible. Whether it is true can be tested: without the
# tokens that it names first, the target must become less likely, and more so than
# without as many random ones. For our prompt, a fifth of the tokens:

# %%
count = round(len(explanation.ids) / 5)
random = np.random.default_rng(0)
scorer = MaskedPrompt(gpt, explanation.ids, explanation.neutral_id)


def without(positions):
    """Return the target's probability after the prompt without these tokens."""
    kept = np.ones((1, len(explanation.ids)), bool)
    kept[0, positions] = False
    (value,) = scorer.values(kept, explanation.target_id)
    return np.exp(value)


draws = [random.permutation(len(explanation.ids))[:count] for _ in range(16)]
print(f"whole prompt           {explanation.probability:6.1%}")
print(f"without {count} random ones  {np.mean([without(d) for d in draws]):6.1%}")
for method, found in explained.items():
    print(f"without {method + chr(39) + 's':12} {without(found.order()[:count]):9.1%}")

# %% [markdown]
# One prompt proves little. `deletion_test` does it for at least 50, from held-out text,
# and states the mean with the interval that holds it in 95 of 100 cases. A second time
# the last token stays in any case: nearly every method names that one, and without it
# hardly any prediction stands, so this is the harder test.

# %%
text = held_out_text(corpus)
tokens = []
for document in text.documents:
    tokens += gpt.tokenizer.encode(document.text)
    if len(tokens) >= 20 * num_prompts * prompt_tokens:
        break
prompts = prompts_of(tokens, num_prompts, prompt_tokens)

tests = {
    "Keras": deletion_test(
        gpt, prompts, METHODS, keep_last=True, num_samples=num_samples
    ),
    "the file": deletion_test(
        file, prompts, ["lime", "shap"], keep_last=True, num_samples=num_samples
    ),
}
rows = []
for name, test in tests.items():
    for kind, part in (("any token", test), ("last kept", test["last_kept"])):
        rows += [(name, kind, m, judged) for m, judged in part["methods"].items()]

print(f"{'':20} {'method':10} {'its tokens':>10} {'random':>8}   more, with interval")
for name, kind, method, judged in rows:
    drops = f"{judged['drop']['value']:10.1%} {judged['random_drop']['value']:8.1%}"
    value, low, high = judged["difference"].values()
    verdict = "holds" if judged["holds"] else "does not hold"
    more = f"{value:6.1%} ({low:6.1%} to {high:6.1%})  {verdict}"
    print(f"{name:9} {kind:10} {method:10} {drops}   {more}")

# %% [markdown]
# How far the target's probability fell more than without random tokens. What lies right
# of the line with all of its interval is worth something:

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for axes, kind in zip(panels, ("any token", "last kept"), strict=True):
    shown = [row for row in rows if row[1] == kind]
    for place, (name, _, _, judged) in enumerate(shown):
        value, low, high = (100 * bound for bound in judged["difference"].values())
        colour = "#0e7490" if name == "Keras" else "#c2410c"
        axes.plot([low, high], [place, place], color=colour, linewidth=3)
        axes.plot(value, place, "o", color=colour)
    axes.axvline(0, color="#555555", linewidth=0.8)
    axes.set_title(f"{kind}", loc="left")
    axes.set_xlabel("percentage points more than random")
    axes.spines[["top", "right"]].set_visible(False)
panels[0].set_yticks(range(len(shown)), [f"{m}, {name}" for name, _, m, _ in shown])
panels[0].invert_yaxis()
plt.show()

# %% [markdown]
# What does not hold is decoration, however plausible its colours. Attention is the one
# to distrust: it says where a model looks, and looking is not using (Jain and Wallace,
# "Attention is not Explanation", arXiv:1902.10186). Followed back through all layers,
# as is usual, it does much worse than this mean of the layers:
# `gpt_tf.explain.attribution` has the numbers.
#
# ## Does compression change the explanation?
#
# The file's weights are int8. Its answers are nearly those of the Keras model; are its
# reasons? The same prompts are explained for both, and the order of their tokens
# compared. LIME and SHAP sample, so that the same model explained twice does not agree
# with itself entirely: that is the *ceiling*, beyond which no comparison can come.

# %%
compared = {
    method: compare_explanations(
        gpt,
        file,
        prompts,
        method,
        num_samples=num_samples,
        names=("Keras, float32", "the file, int8"),
    )
    for method in ("lime", "shap")
}
for method, facts in compared.items():
    for name, part in (
        (f"{facts['a']} and {facts['b']}", "rank_correlation"),
        (f"{facts['a']} with itself", "ceiling"),
    ):
        value, low, high = facts[part].values()
        print(f"{method:5} {name:34} {value:.2f} ({low:.2f} to {high:.2f})")

# %%
figure, axes = plt.subplots(figsize=(7, 2.2), layout="constrained")
for place, facts in enumerate(compared.values()):
    for shift, part, colour in (
        (-0.12, "rank_correlation", "#c2410c"),
        (0.12, "ceiling", "#0e7490"),
    ):
        value, low, high = facts[part].values()
        label = {"rank_correlation": "Keras and the file", "ceiling": "ceiling"}[part]
        axes.plot([low, high], [place + shift] * 2, color=colour, linewidth=3)
        axes.plot(
            value, place + shift, "o", color=colour, label=None if place else label
        )
axes.set_yticks(range(len(compared)), compared)
axes.set_ylim(1.5, -0.5)
axes.set_xlim(right=1)
axes.set_xlabel("rank correlation of the tokens' scores")
axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# Where both intervals overlap, compression changed less than sampling does.
#
# ## To hand on
#
# A folder takes a page that needs no network, the picture, and the numbers as JSON.

# %%
for path in write_explanation(of_file, folder / "explained"):
    print(f"{path.name:20} {path.stat().st_size:>8,} bytes")
file.close()
gpt.close()

# %% [markdown]
# ## Where next
#
# - From a terminal, in colours:
#
#       gpt-tf explain mine.litertlm --prompt "for i in range(" --method shap
#       gpt-tf explain runs/mine --prompt "for i in range(" --target "len" \
#           --method gradient --out explained
#
# - `gpt-tf optimize` puts the deletion test of the file that it chose, and the
#   comparison with its Keras model, into its report.
# - An explanation tells what this model reacts to, and not why the text is so. Prompts
#   with tokens taken away are such as nobody writes; a model may react to that, too.
