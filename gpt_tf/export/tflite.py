"""Export a GPT to a `.tflite`: write it, run it, and only then give it its name."""

import logging
import os
from collections.abc import Sequence

import numpy as np

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.export import graph, integrity, signatures, tflite_writer, verify, weights
from gpt_tf.generation.sequence import ids_without_token
from gpt_tf.models.cached_forward import looks_untrained
from gpt_tf.models.gpt import GPTModel
from gpt_tf.models.language_model import check_language_model
from gpt_tf.native_logs import quiet
from gpt_tf.quantization import gptq
from gpt_tf.quantization.modes import MODES
from gpt_tf.settings import arguments
from gpt_tf.text.chat import CONFIG_NAME
from gpt_tf.text.tokenizer import FILE_NAME, load_tokenizer

logger = logging.getLogger(__name__)

# The short ones verify proposals, see `generation.speculation`.
SCORE_LENGTHS = (2, 4, 8, 64)
_MANY_PARAMETERS = 10_000_000


def export_tflite(
    model,
    path: str | os.PathLike,
    mode: str = "dynamic_int8",
    *,
    context_length: int | None = None,
    prefill_lengths: Sequence[int] = signatures.DEFAULT_PREFILL_LENGTHS,
    batch_sizes: Sequence[int] | None = None,
    tokenizer=None,
    ranges: dict | None = None,
    representative=None,
    per_channel: bool | None = None,
    gptq_on=None,
    has_offsets: bool = False,
    head_outliers: Sequence[int] = (),
    verify_on=None,
    allow_untrained: bool = False,
) -> dict:
    """Write a GPT as one `.tflite` with prefill, decode and a key-value cache.

    The signatures are those of `gpt_tf.export.signatures`. The file is opened and run
    before it gets its name, and a manifest with what was measured is written beside it.

    | mode | weights | activations |
    |---|---|---|
    | `float32` | float32 | float32 |
    | `float16` | float16 | float32 |
    | `dynamic_int8` | int8 per channel | float32, each row quantised as it comes |
    | `int8` | int8 per channel | int8 in all products of the blocks, static |
    | `int8_full` | int8 per channel | integers, but for norms, mask and softmax |
    | `int16x8` | int8 per channel | int16 in all products of the blocks |
    | `int4` | int4 in blocks of 32; tables int8 | as `dynamic_int8` |

    Args:
        model: A `GPTModel`, or one that `quantize_aware` made of it, whose ranges are
            then used.
        path: Where to write; a file that stands there is replaced.
        mode: One of the above.
        context_length: `S`, capacity of the cache; the model's unless given, and at
            most that.
        prefill_lengths: Lengths of the prefill signatures. Those longer than the
            context are left out.
        batch_sizes: Numbers of texts that `EdgeScheduler` decodes in one call, among
            2, 4, 8 and 16. Default: 4 and 8 for models of 10 million parameters or
            more, whose files hardly grow by it; none for smaller ones.
        tokenizer: The model's tokenizer. Its fingerprint is put into the file, and
            `tokenizer.json` beside it. Ids to which it has no token, as in a padded
            vocabulary, get logits of about -1e9 in the file: no runtime draws them,
            and scores are those of the tokens alone.
        ranges: (minimum, maximum) by activation, as `calibrate` returns; for `int8`,
            `int8_full` and `int16x8`.
        representative: Instead of ranges: token ids `(N, T)` to measure them on.
        per_channel: Whether int8 weights have a scale per output channel. Default:
            yes, or as a quantisation-aware model was trained. One per matrix costs
            accuracy.
        gptq_on: Token ids `(N, T)` of some thousand positions of text, by which GPTQ
            rounds int8 and int4 weights. Default: each to the nearest. A model that
            was trained to be rounded so stays with that.
        has_offsets: Whether blocks of `int4` have an offset beside their step, which
            is a quarter of a bit a weight. Weights that have 4 bits already, as in a
            GGUF's Q4_0, Q4_1 and Q4_K, then stay what they are; `gptq_on` is not used.
        head_outliers: Channels of what the head reads that are much larger than the
            others, as `equalize` returns them. In `dynamic_int8` and `int4`, which
            quantise it row by row, the head multiplies them apart, so that they do not
            coarsen the rest; other modes do without.
        verify_on: Token ids `(N,)` of a text on which the file is run and compared
            with Keras. Default: the first row of `representative`, else random ids.
        allow_untrained: Whether a model whose biases are all 0 still may be written.

    Returns:
        The manifest: mode, configuration, size and SHA-256, and under
        `"verification"` the differences measured.

    Raises:
        InputError: An argument cannot be used, or no space is left.
        InputTypeError: The model is not a GPT of gpt_tf.
        VerificationError: The file does not compute what the model does. It is not
            kept; what stood at `path` before is untouched.

    Example:
        >>> manifest = export_tflite(model, "gpt.tflite", "dynamic_int8")
        >>> manifest["verification"]["top1_agreement"]
        1.0

    Reference: article 3.2; TensorFlow Lite's 8-bit quantisation specification.
    """
    path = arguments.path("path", path)
    arguments.one_of("mode", mode, MODES)
    if path.suffix != ".tflite":
        raise InputError(
            f"`path` expects a name that ends in .tflite. Received: {path.name!r}. "
            "For one file with the tokenizer use `export_litertlm`."
        )
    allow_untrained = arguments.switch("allow_untrained", allow_untrained)
    if per_channel is not None:
        per_channel = arguments.switch("per_channel", per_channel)
    plain, ranges = _source_of(model, mode, ranges, representative)
    if not allow_untrained and looks_untrained(plain):
        raise InputError(
            "Exporting expects a trained model. Received: one whose biases are all 0, "
            "as before the first step. Train it, load its weights, or pass "
            "`allow_untrained=True`."
        )
    capacity = plain.context_length
    if context_length is not None:
        capacity = arguments.integer("context_length", context_length, 2, capacity)
    lengths = sorted(arguments.integers("prefill_lengths", prefill_lengths, 1))
    if not lengths:
        arguments.refuse("prefill_lengths", lengths, "one or more integers")
    # LiteRT-LM needs a small one for what is left of a prompt.
    lengths = [1, *(length for length in lengths if 1 < length <= capacity)]
    if batch_sizes is None:
        is_large = plain.count_params() >= _MANY_PARAMETERS
        batch_sizes = signatures.DEFAULT_BATCH_SIZES if is_large else ()
    batch_sizes = sorted(arguments.integers("batch_sizes", batch_sizes, 1))
    if not set(batch_sizes) <= set(signatures.BATCH_SIZES):
        known = ", ".join(map(str, signatures.BATCH_SIZES))
        arguments.refuse("batch_sizes", batch_sizes, f"numbers among {known}")
    if per_channel is None:
        per_channel = plain is model or model.quantization.per_channel
    last = plain.get_config()["embedding_dim"] - 1
    outliers = arguments.integers("head_outliers", head_outliers, 0, last)
    outliers = sorted(outliers) if MODES[mode].quantises_rows else []
    suppressed = ids_without_token(tokenizer, plain.vocab_size)
    moments = {}
    has_offsets = arguments.switch("has_offsets", has_offsets) and mode == "int4"
    weighs = MODES[mode].weight_bits and plain is model and not has_offsets
    if gptq_on is not None and weighs:
        logger.info("GPTQ: measuring what the weights are multiplied by")
        moments = gptq.moments_of(plain, gptq_on)
    logger.info(f"storing {plain.count_params():,} parameters as {mode}")
    constants = weights.constants_of(
        plain, mode, ranges, per_channel, suppressed, moments, outliers, has_offsets
    )
    del moments
    facts = {
        "mode": mode,
        "per_channel": per_channel,
        "config": constants.sizes,
        "capacity": capacity,
        "prefill_lengths": lengths,
        "score_lengths": sorted({min(length, capacity) for length in SCORE_LENGTHS}),
        "batch_sizes": batch_sizes,
        "attends_by_row": graph.may_attend_by_row(constants.sizes, constants.mode),
        "has_offsets": has_offsets,
        "head_outliers": len(outliers),
        "cache_dtype": "int8" if constants.mode.full else "float32",
        "tokenizer_fingerprint": tokenizer.fingerprint() if tokenizer else None,
    }
    written, data = _built(constants, facts)
    ids, text = _verification_text(verify_on, representative, plain, capacity)
    more = _tokenizer_beside(path, tokenizer)
    beside = [artifacts.file_manifest_path(path).name, *more]
    with artifacts.replaced(path, *beside) as new:
        place = new / path.name
        with open(place, "wb") as file:
            file.write(data)
        del data
        logger.info("running every signature and comparing with Keras")
        with quiet():
            measured = verify.verify(place, written, constants, mode, model, ids)
        if more:
            tokenizer.save(new)
        return artifacts.write_file_manifest(
            place, "tflite", **facts, verification={**measured, "text": text}
        )


def _source_of(model, mode, ranges, representative):
    """Return the float model and the ranges to use."""
    check_language_model(model, "model")
    if not isinstance(model, GPTModel):
        from gpt_tf.quantization import qat

        found = qat.activation_ranges(model)
        # int4 chooses scales by the weights: rounded ones get those of the training.
        is_int4 = mode == "int4" and model.quantization.block_size is not None
        plain = qat.to_rounded(model) if is_int4 else qat.to_float(model)
        return plain, {**found, **(ranges or {})}
    if MODES[mode].activations is None:
        return model, {}
    if ranges is None:
        if representative is None:
            raise InputError(
                f"The mode {mode} fixes the ranges of activations beforehand. "
                "Received: neither `ranges` nor `representative`. Pass token ids "
                "(N, T) of typical text as `representative`, or use dynamic_int8."
            )
        from gpt_tf.quantization import calibration

        logger.info("calibrating: measuring the ranges of all activations")
        activations = MODES[mode].activations
        ranges = calibration.calibrate(model, representative, dtype=activations)
    return model, ranges


def _built(constants, facts):
    """Return a model of all signatures, and the bytes of its file, sealed."""
    written = tflite_writer.Model()
    graph.build_all(written, constants, facts)
    seal = integrity.blank_seal(**facts, versions=artifacts.versions())
    written.add_metadata(signatures.METADATA_NAME, seal)
    data = written.to_bytes()
    integrity.seal(data)
    return written, data


def _verification_text(verify_on, representative, model, capacity):
    if verify_on is None and isinstance(representative, np.ndarray):
        verify_on = representative[0]
    if verify_on is None:
        generator = np.random.default_rng(0)
        count = min(verify.MOST_TOKENS, capacity)
        return generator.integers(0, model.vocab_size, count), "random ids"
    ids = np.asarray(verify_on).reshape(-1)
    good = len(ids) and ids.dtype.kind in "iu"
    if not good or ids.min() < 0 or ids.max() >= model.vocab_size:
        expected = f"token ids from 0 to {model.vocab_size - 1}"
        repair = "Use the model's own tokenizer."
        arguments.refuse("verify_on", verify_on, expected, repair)
    return ids, "given text"


def _tokenizer_beside(path, tokenizer):
    """Return the names of what is to stand beside a file and does not yet."""
    if tokenizer is None:
        return []
    beside = path.parent / FILE_NAME
    if not beside.is_file():
        return [FILE_NAME] + [CONFIG_NAME] * (tokenizer.chat_template is not None)
    if load_tokenizer(beside).fingerprint() != tokenizer.fingerprint():
        raise InputError(
            f"The tokenizer is to stand beside {path}, but {beside} is another "
            "one. Choose another folder."
        )
    return []
