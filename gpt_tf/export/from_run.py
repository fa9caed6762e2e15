"""Export what `gpt-tf train` or `gpt-tf quantize` left in a folder."""

import itertools
import logging
import os
from pydoc_data.topics import topics

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.export import litertlm, tflite
from gpt_tf.models.cached_forward import parts_of
from gpt_tf.models.gpt import GPTModel
from gpt_tf.pretrained.source import is_foreign
from gpt_tf.quantization import four_bits
from gpt_tf.quantization.equalize import equalize, head_outliers
from gpt_tf.quantization.modes import MODES
from gpt_tf.settings import arguments
from gpt_tf.text.corpus import Corpus, open_corpus
from gpt_tf.text.dataset import RowWindows, TokenFile
from gpt_tf.training.run_folder import began_elsewhere, load_model

logger = logging.getLogger(__name__)

_REPRESENTATIVE_WINDOWS = 64
_LONGEST_WINDOW = 256
_VERIFIED_TOKENS = 128
# What a model trained elsewhere is verified on: on random ids, where none of its
# predictions is sure, rounding alone makes a large difference.
_ENGLISH = (
    "The river rises in the hills north of the town and runs for about forty miles "
    "before it reaches the sea. In spring, when the snow melts, it floods the meadows "
    "on both banks, and the farmers move their cattle to higher ground. A bridge of "
    "stone was built there in the eighteenth century. It has been repaired many times "
    "since, but people still walk across it every morning on their way to work, and "
    "children stop in the middle to look for fish."
)


def export_trained(
    source: str | os.PathLike,
    out: str | os.PathLike,
    mode: str = "dynamic_int8",
    *,
    corpus=None,
    prepare: bool | None = None,
    **options,
) -> dict:
    """Export a trained model with typical text to calibrate and verify on.

    Args:
        source: A run's folder, whose own text is then used, a model's folder, or a
            `.keras` file.
        out: `.litertlm` for one file with the tokenizer, `.tflite` for the model
            alone with `tokenizer.json` beside it.
        mode: As for `export_tflite`.
        corpus: A `Corpus`, or as for `open_corpus`; text to use where `source` is no
            run.
        prepare: Whether weights of a mode that rounds them are equalised
            (`gpt_tf.equalize`), and those of int4 rounded by GPTQ. Default: of a model
            trained elsewhere, and of runs that began with one, where some channels are
            much larger than the others.
            Without text, Python's documentation is what they are measured on.
        **options: As for `export_tflite`.

    Returns:
        The manifest.

    Raises:
        InputError: The model, the text or an argument cannot be used.
        VerificationError: The file does not compute what the model does.

    Example:
        >>> export_trained("runs/quickstart", "gpt.litertlm", "dynamic_int8")
    """
    source, out = arguments.path("source", source), arguments.path("out", out)
    if out.suffix not in (".tflite", ".litertlm"):
        raise InputError(
            "`out` expects a name that ends in .litertlm or .tflite. "
            f"Received: {out.name!r}."
        )
    model, tokenizer = load_model(source)
    if tokenizer is None and out.suffix == ".litertlm":
        raise InputError(
            f"A .litertlm holds the tokenizer; there is none beside the model in "
            f"{source}. Put tokenizer.json there, or export to .tflite."
        )
    text = _text_of(source, tokenizer, corpus)
    if text is not None:
        options.setdefault("verify_on", text["validation"][:_VERIFIED_TOKENS])
        # A quantisation-aware model brings its own ranges.
        if isinstance(model, GPTModel):
            windows = windows_of(text["train"], model.context_length)
            options.setdefault("representative", windows)
    elif tokenizer is not None and is_foreign(source):
        options.setdefault("verify_on", tokenizer.encode(_ENGLISH)[:_VERIFIED_TOKENS])
    if prepare is None:
        prepare = began_elsewhere(source)
    if prepare and isinstance(model, GPTModel):
        _prepare(model, tokenizer, mode, options)
    if out.suffix == ".tflite":
        return tflite.export_tflite(model, out, mode, tokenizer=tokenizer, **options)
    return litertlm.export_litertlm(model, tokenizer, out, mode, **options)


def _prepare(model, tokenizer, mode, options):
    """Equalise a model for a mode that rounds weights; 4 bits are rounded by GPTQ.

    Weights that have 4 bits already are not rounded to others.
    """
    arguments.one_of("mode", mode, MODES)
    bits = MODES[mode].weight_bits
    text = options.get("representative")
    if bits is None or (text is None and tokenizer is None):
        return
    if text is None:
        text = tokenizer.encode("\n\n".join(topics.values()))
    text = windows_of(np.ravel(text), model.context_length)[::4]
    if bits == 4 and four_bits.has_four_bits(_kernels(model)):
        logger.info("the weights have 4 bits already: they stay as they are")
        options.setdefault("has_offsets", True)
        options.setdefault("head_outliers", head_outliers(model, text))
        return
    logger.info("equalising: moving differences of channels into the weights")
    options.setdefault("head_outliers", equalize(model, text, bits=bits))
    if bits == 4:  # at 8 the nearest integers are as good
        options.setdefault("gptq_on", text)


def _kernels(model):
    """Yield the matrices of the blocks, outputs by inputs."""
    for block in parts_of(model).blocks:
        for name in block.weight_names:
            if name.endswith("_kernel"):
                yield getattr(block, name).numpy().T


def windows_of(tokens: np.ndarray, context_length: int) -> np.ndarray:
    """Return windows `(N, T)` spread evenly over a text, to calibrate on.

    Args:
        tokens: Ids `(count,)`.
        context_length: `T` is this, or 256 if that is less.

    Raises:
        InputError: There are no tokens.
    """
    if not len(tokens):
        raise InputError(
            "Calibrating expects text. Received: none. Name a corpus with more."
        )
    length = min(context_length, _LONGEST_WINDOW, len(tokens))
    count = min(_REPRESENTATIVE_WINDOWS, max(1, len(tokens) // length))
    starts = np.linspace(0, len(tokens) - length, count).astype(np.int64)
    return np.asarray(tokens)[starts[:, None] + np.arange(length)].astype(np.int32)


def _text_of(source, tokenizer, corpus):
    """Return tokens of both splits, of the run's own text or of a corpus, or None."""
    if corpus is not None:
        if tokenizer is None:
            raise InputError(
                f"`corpus` expects a tokenizer to read it with; none lies in {source}."
            )
        opened = corpus if isinstance(corpus, Corpus) else open_corpus(corpus)
        needed = _REPRESENTATIVE_WINDOWS * _LONGEST_WINDOW
        return {
            split: _encoded(opened.documents(split), tokenizer, needed)
            for split in ("train", "validation")
        }
    if not (source / "data" / "train.tokens").is_file():
        return None
    files = {
        split: TokenFile.open(source / "data" / f"{split}.tokens")
        for split in ("train", "validation")
    }
    text = {split: file.tokens for split, file in files.items()}
    if "rows" in files["validation"].manifest:
        # As a fine-tuned model is asked: a row alone, and not several in one context.
        text["validation"] = RowWindows(files["validation"], 1).longest_row
    return text


def _encoded(documents, tokenizer, count):
    """Return at least `count` tokens, where there are as many."""
    ids = (token for doc in documents for token in tokenizer.encode(doc.text))
    return np.fromiter(itertools.islice(ids, count), np.int32)
