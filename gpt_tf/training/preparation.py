"""Before the first step: text to tokens, and the model to start from.

Where training starts from a model or with a teacher, `start` does its part.
"""

import dataclasses
import logging
import shutil
from pathlib import Path

import tensorflow as tf

from gpt_tf import artifacts
from gpt_tf.distillation.distiller import shape_of
from gpt_tf.errors import InputError
from gpt_tf.models.sizes import (
    SIZES,
    TRAINED_WEIGHT_BYTES,
    check_memory,
    checked_sizes,
)
from gpt_tf.settings import arguments
from gpt_tf.text import tokenizer as tokenizers
from gpt_tf.text.augment import AugmentationConfig
from gpt_tf.text.dataset import TokenFile, write_token_file
from gpt_tf.training.run_folder import OWN_ENTRIES, save_model, windows_of
from gpt_tf.training.start import (
    add_written_text,
    check_losses,
    cut_student,
    extract_from,
    in_tokens_of,
    load_start,
    open_text,
    prepare_knowledge,
    run_with_text,
    with_context,
    written_tokens,
)

logger = logging.getLogger(__name__)

# What a run that starts from a model takes from it, whatever its configuration says.
SHAPE = (
    "vocab_size",
    "embedding_dim",
    "num_layers",
    "num_heads",
    "feedforward_dim",
    "dropout",
    "tie_embeddings",
)


def prepare(config, out, overwrite):
    """Write tokens and configuration, whole or not at all, in place of an old run."""
    _refuse_foreign_folder(out, overwrite)
    start = load_start(config)
    config = with_context(config, start)
    if start.model is None and start.teacher is None:
        _check_memory(config)
    source = run_with_text(config, start.tokenizer)
    text = open_text(config) if source is None else None
    with artifacts.replaced(out / "run.json", *OWN_ENTRIES[1:]) as staging:
        check_losses(config, start)
        tokenizer = start.tokenizer or _new_tokenizer(config, text)
        _check_tokenizer(config, tokenizer)
        tokenizer.save(staging)
        if source is None:
            encode = _encode if config.data is None else _encode_rows
            train, validation = encode(text, tokenizer, staging / "data", config)
            if written_tokens(config):
                train = add_written_text(config, start, text, tokenizer, staging)
            corpus = text.describe()
        else:
            logger.info(f"taking the tokens of the run {source.name}")
            shutil.copytree(source / "data", staging / "data")
            train, validation = (
                TokenFile.open(staging / "data" / f"{split}.tokens")
                for split in ("train", "validation")
            )
            run = artifacts.read_json(source / "run.json", {"corpus": dict})
            corpus = run["corpus"]
        if start.teacher is not None:
            reads = start.teacher_tokenizer
            read = in_tokens_of(reads, config, staging.parent, text, train)
            if start.model is None:
                start.model = cut_student(config, start, read)
        config = _with_shape_of(start.model, config)
        windows_of(validation, config, shuffle=False)  # long enough?
        windows = windows_of(train, config, shuffle=True)
        if start.teacher is not None:
            prepare_knowledge(config, start, read, train, staging)
        if start.model is not None:
            initial = _quantized(start.model, config, windows)
            folder = staging / "initial"
            save_model(initial, tokenizer, folder, made_from=start.made_from)
        facts = {
            "kind": "run",
            "config": dataclasses.asdict(config),
            "corpus": corpus,
            "made_from": start.made_from,
            "versions": artifacts.versions(),
        }
        artifacts.write_sealed_json(staging / "run.json", facts)


def store_knowledge(config, path, **options):
    """Store what the teacher of a configuration says of its text; return the store."""
    path = Path(path)
    start = load_start(config)
    config = with_context(config, start)
    with artifacts.workspace(path.with_name(f"{path.name}.tokens")) as folder:
        read = in_tokens_of(start.teacher_tokenizer, config, folder)
        own = in_tokens_of(start.tokenizer, config, folder, token_file=read)
        return extract_from(start, config, read, own, path, seed=config.seed, **options)


def _refuse_foreign_folder(out, overwrite):
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(
            f"The run's folder is to be {out}, but that is a file. Choose another."
        )
    if artifacts.entries(out) and not overwrite:
        what = "a run" if (out / "run.json").exists() else "something else"
        raise InputError(
            f"The folder {out} already holds {what}. Choose another, or add "
            "--overwrite to replace what gpt_tf wrote there"
            + (", or --resume to go on." if what == "a run" else ".")
        )


def _check_memory(config):
    """Refuse a model whose training memory cannot hold, before the text is read."""
    sizes = checked_sizes({name: getattr(config, name) for name in SIZES})
    sizes["tie_embeddings"] = config.tie_embeddings
    if config.tokenizer != "bpe":
        sizes["vocab_size"] = 1  # its tokens are not counted yet
    gpus = len(tf.config.list_physical_devices("GPU"))
    check_memory(sizes, TRAINED_WEIGHT_BYTES, accelerators=gpus)


def _new_tokenizer(config, text):
    if config.tokenizer not in ("bpe", "character"):
        return tokenizers.load_tokenizer(config.tokenizer)
    is_bpe = config.tokenizer == "bpe"
    # Every character must be known, those of the held-out text included.
    splits = ("train",) if is_bpe else ("train", "validation")
    texts = (document.text for split in splits for document in text.documents(split))
    if not is_bpe:
        has_ends = config.separator is not None
        return tokenizers.CharacterTokenizer.train(texts, end_of_text=has_ends)
    logger.info("training a tokenizer of %d tokens on %s", config.vocab_size, text.name)
    trained = tokenizers.BPETokenizer.train(texts, config.vocab_size)
    if trained.vocab_size < config.vocab_size:
        logger.info(
            f"{text.name} supports a vocabulary of {trained.vocab_size} tokens; it "
            "is the run's"
        )
    return trained


def _check_tokenizer(config, tokenizer):
    """Refuse settings that do not go with a tokenizer."""
    AugmentationConfig.of(config.augmentation).check_fits(tokenizer)
    if config.separator is not None and tokenizer.end_of_text_id is None:
        expected = f"a tokenizer with an end-of-text token, {tokenizers.END_OF_TEXT}"
        repair = "Use another tokenizer, or leave it out."
        arguments.refuse("separator", config.separator, expected, repair)
    prompt = config.sample_prompt
    if config.sample_every and not tokenizer.encode(prompt, special=True):
        arguments.refuse("sample_prompt", prompt, "at least one token")


def _encode(text, tokenizer, folder, config):
    """Write and open the tokens of the two splits."""
    logger.info("encoding %s with a vocabulary of %d", text.name, tokenizer.vocab_size)
    for split in ("train", "validation"):
        token_file = write_token_file(
            folder / f"{split}.tokens",
            text.documents(split),
            tokenizer,
            facts={"corpus": text.name, "split": split},
        )
        logger.info(f"{split}: {token_file.count:,} tokens")
        yield token_file


def _encode_rows(examples, tokenizer, folder, config):
    """Write and open the tokens of rows, in two splits."""
    for split in ("train", "validation"):
        path = folder / f"{split}.tokens"
        token_file = examples.write(path, split, tokenizer, config.context_length)
        windows = windows_of(token_file, config, shuffle=False)
        learnt = int(windows.is_learnt.sum())
        logger.info(
            f"{split}: {windows.num_windows:,} rows of {token_file.count:,} tokens, "
            f"{learnt:,} of them answers; windows of {windows.context_length}"
        )
        yield token_file


def _with_shape_of(model, config):
    """Return the configuration with the sizes of a model that is there."""
    if model is None:
        return config
    shape = shape_of(model)
    if config.context_length > shape["context_length"]:
        source = config.init_from or config.distillation["teacher"]
        positions = f"{shape['context_length']}, the positions of the model in {source}"
        arguments.refuse(
            "context_length", config.context_length, f"at most {positions}"
        )
    return dataclasses.replace(config, **{name: shape[name] for name in SHAPE})


def _quantized(model, config, windows):
    """Return the model that training starts from, its ranges known."""
    if config.quantization is None:
        return model
    # Here and not above: only who quantises waits for TF-MOT.
    from gpt_tf.quantization.qat import quantize_aware

    model = quantize_aware(model, config.quantization)
    batches = min(model.quantization.calibration_batches, windows.steps_per_epoch)
    if batches:
        logger.info(f"calibrating ranges on {batches} batches")
        model.calibrate(windows, num_batches=batches)
    return model
