"""Before the first step: text to tokens, the model to start from, a teacher's part."""

import dataclasses
import itertools
import logging
import shutil
import warnings
from pathlib import Path

import numpy as np
import tensorflow as tf
import tf_keras as keras

from gpt_tf import artifacts
from gpt_tf.distillation import losses
from gpt_tf.distillation.config import DistillationConfig
from gpt_tf.distillation.distiller import DistillationWarning, shape_of
from gpt_tf.distillation.generated_text import written_documents
from gpt_tf.distillation.student import make_student
from gpt_tf.distillation.teacher_cache import KnowledgeStore, extract
from gpt_tf.distillation.tokenizer_alignment import (
    derive_tokenizer,
    is_derived,
    shared_tokens,
)
from gpt_tf.errors import InputError
from gpt_tf.models.cached_forward import looks_untrained
from gpt_tf.models.sizes import TRAINED_WEIGHT_BYTES, check_memory
from gpt_tf.text import corpus as corpora
from gpt_tf.text import tokenizer as tokenizers
from gpt_tf.text.augment import AugmentationConfig
from gpt_tf.text.dataset import TokenFile, Windows, write_token_file
from gpt_tf.training.run_folder import (
    OWN_ENTRIES,
    TEXT,
    load_model,
    model_file,
    read_run,
    save_model,
    windows_of,
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
    start = _load_start(config)
    if start.model is None and start.teacher is None:
        _check_memory(config)
    source = _source_with_this_text(config, start.tokenizer)
    text = open_text(config) if source is None else None
    with artifacts.replaced(out / "run.json", *OWN_ENTRIES[1:]) as staging:
        _check_losses(config, start)
        tokenizer = start.tokenizer or _prepare_tokenizer(config, text)
        AugmentationConfig.of(config.augmentation).check_fits(tokenizer)
        if config.separator is not None and tokenizer.end_of_text_id is None:
            raise InputError(
                "`separator` expects a tokenizer with an end-of-text token, "
                f"{tokenizers.END_OF_TEXT}, which is to follow each document. "
                "Received: one without. Use another, or leave the separator out."
            )
        _check_writer(start, tokenizer)
        if config.sample_every and not tokenizer.encode(
            config.sample_prompt, special=True
        ):
            raise InputError(
                "`sample_prompt` expects at least one token. "
                f"Received: {config.sample_prompt!r}."
            )
        tokenizer.save(staging)
        if source is None:
            _encode(text, tokenizer, staging / "data")
            _add_written_text(config, start, text, tokenizer, staging)
            corpus = text.describe()
        else:
            logger.info(f"taking the tokens of the run {source.name}")
            shutil.copytree(source / "data", staging / "data")
            run = artifacts.read_json(source / "run.json", {"corpus": dict})
            corpus = run["corpus"]
        token_files = {
            split: TokenFile.open(staging / "data" / f"{split}.tokens")
            for split in corpora.SPLITS
        }
        token_file = token_files["train"]
        read = _read_by_teacher(config, start, text, token_file, staging)
        start = _cut_student(start, config, read)
        config = _with_shape_of(start.model, config)
        windows_of(token_files["validation"], config, shuffle=False)  # long enough?
        windows = windows_of(token_file, config, shuffle=True)
        _check_pair(config, start)
        _prepare_knowledge(config, start, read, token_file, staging)
        if start.model is not None:
            initial = _quantized(start.model, config, windows)
            save_model(
                initial, tokenizer, staging / "initial", made_from=start.made_from
            )
        artifacts.write_sealed_json(
            staging / "run.json",
            {
                "kind": "run",
                "config": dataclasses.asdict(config),
                "corpus": corpus,
                "made_from": start.made_from,
                "versions": artifacts.versions(),
            },
        )


def _check_memory(config):
    """Refuse a model whose training memory cannot hold, before the text is read."""
    sizes = {name: getattr(config, name) for name in (*SHAPE, "context_length")}
    if config.tokenizer != "bpe":
        sizes["vocab_size"] = 1  # its tokens are not counted yet
    gpus = len(tf.config.list_physical_devices("GPU"))
    sizes["feedforward_dim"] = config.feedforward_dim or 4 * config.embedding_dim
    check_memory(sizes, TRAINED_WEIGHT_BYTES, accelerators=gpus)


def open_text(config):
    """Open the text of a run's configuration, divided as the configuration says."""
    return corpora.open_corpus(
        list(config.corpus) if isinstance(config.corpus, tuple) else config.corpus,
        validation_fraction=config.validation_fraction,
        validation=config.validation,
        separator=config.separator,
    )


def _encode(text, tokenizer, folder):
    logger.info("encoding %s with a vocabulary of %d", text.name, tokenizer.vocab_size)
    for split in ("train", "validation"):
        token_file = write_token_file(
            folder / f"{split}.tokens",
            text.documents(split),
            tokenizer,
            facts={"corpus": text.name, "split": split},
        )
        logger.info(f"{split}: {token_file.count:,} tokens")


@dataclasses.dataclass(frozen=True)
class _Start:
    """What a run starts from, as far as it does not start from nothing.

    Attributes:
        model: The model whose training goes on, or None.
        tokenizer: Its tokenizer, or None.
        teacher: The teacher that a student learns from, or None.
        teacher_tokenizer: The teacher's tokenizer, or None.
        writer: A teacher that only writes text to be read, and its tokenizer, or None.
        made_from: SHA-256 of the files of all, by role.
    """

    model: keras.Model | None = None
    tokenizer: tokenizers.Tokenizer | None = None
    teacher: keras.Model | None = None
    teacher_tokenizer: tokenizers.Tokenizer | None = None
    writer: tuple[keras.Model, tokenizers.Tokenizer] | None = None
    made_from: dict = dataclasses.field(default_factory=dict)

    @property
    def reads_other_tokens(self):
        """Whether the teacher's tokenizer is another than the student's."""
        return self.tokenizer.fingerprint() != self.teacher_tokenizer.fingerprint()


def _load_start(config):
    start = _Start()
    if config.init_from is not None:
        model, tokenizer = _load_with_tokenizer(config.init_from)
        made_from = {"model": artifacts.sha256_of(model_file(config.init_from))}
        start = _Start(model, tokenizer, made_from=made_from)
    writer = AugmentationConfig.of(config.augmentation).teacher
    if writer is not None:
        pair = _load_with_tokenizer(writer)
        _warn_of_untrained(pair[0])
        sha256 = artifacts.sha256_of(model_file(writer))
        made_from = {**start.made_from, "writer": sha256}
        start = dataclasses.replace(start, writer=pair, made_from=made_from)
    if config.distillation is None:
        return start
    wanted = DistillationConfig.of(config.distillation)
    teacher, teacher_tokenizer = _load_with_tokenizer(wanted.teacher)
    _warn_of_untrained(teacher)
    tokenizer = start.tokenizer
    if tokenizer is None:
        tokenizer = teacher_tokenizer
        if wanted.vocab_size not in (None, teacher_tokenizer.vocab_size):
            tokenizer = derive_tokenizer(teacher_tokenizer, wanted.vocab_size)
    sha256 = artifacts.sha256_of(model_file(wanted.teacher))
    return dataclasses.replace(
        start,
        tokenizer=tokenizer,
        teacher=teacher,
        teacher_tokenizer=teacher_tokenizer,
        made_from={**start.made_from, "teacher": sha256},
    )


def _load_with_tokenizer(path):
    model, tokenizer = load_model(path)
    if tokenizer is None:
        raise InputError(
            f"Expected tokenizer.json beside the model in {path}. Put it "
            "there, or name the folder that `gpt-tf train` wrote."
        )
    return model, tokenizer


def _warn_of_untrained(teacher):
    if looks_untrained(teacher):
        warnings.warn(
            "the teacher looks untrained: all its biases are 0, as before the first "
            "step. The student will learn noise from it",
            DistillationWarning,
            stacklevel=2,
        )


def _cut_student(start, config, read):
    """Make the student, where a teacher is given and no student yet.

    What of the teacher matters is measured on `read`, text in its own tokens.
    """
    if start.teacher is None or start.model is not None:
        return start
    wanted = DistillationConfig.of(config.distillation)
    teacher = start.teacher
    if hasattr(teacher, "gpt"):
        from gpt_tf.quantization.qat import to_float

        teacher = to_float(teacher)
    options = wanted.student_sizes()
    if start.reads_other_tokens:
        options["vocab_size"] = start.tokenizer.vocab_size
        options["token_ids"] = shared_tokens(start.teacher_tokenizer, start.tokenizer)
    length = min(config.context_length, teacher.context_length)
    windows = Windows(read, length, 8, seed=config.seed)
    batches = min(4, windows.steps_per_epoch)
    inputs = np.concatenate([windows.batch(step)[0] for step in range(batches)])
    student = make_student(
        teacher,
        **options,
        layers=wanted.layers if isinstance(wanted.layers, str) else list(wanted.layers),
        init=wanted.init,
        inputs=inputs,
        dropout=config.dropout,
        seed=config.seed,
    )
    logger.info(
        f"a student of {student.count_params():,} parameters, "
        f"{student.count_params() / teacher.count_params():.0%} of the teacher's"
    )
    return dataclasses.replace(start, model=student)


def _with_shape_of(model, config):
    """Return the configuration with the sizes of a model that is there."""
    if model is None:
        return config
    shape = shape_of(model)
    if config.context_length > shape["context_length"]:
        raise InputError(
            f"`context_length` expects at most {shape['context_length']}, the "
            f"positions of the model in {config.init_from or _teacher_of(config)}. "
            f"Received: {config.context_length}. Give no more."
        )
    return dataclasses.replace(config, **{name: shape[name] for name in SHAPE})


def _teacher_of(config):
    return DistillationConfig.of(config.distillation).teacher


def _source_with_this_text(config, tokenizer):
    """Return the run whose token files are those that this run wants, or None."""
    wanted = DistillationConfig.of(config.distillation)
    if _written_tokens(config):
        return None
    for folder in (config.init_from, wanted.teacher):
        folder = Path(folder or "")
        if not (folder / "run.json").is_file() or not str(folder.name):
            continue
        before = read_run(folder)
        if AugmentationConfig.of(before.augmentation).written_tokens:
            continue
        if any(getattr(before, name) != getattr(config, name) for name in TEXT):
            continue
        found = tokenizers.load_tokenizer(folder)
        if found.fingerprint() == tokenizer.fingerprint():
            return folder
    return None


def _check_writer(start, tokenizer):
    """Refuse a teacher that may write what the tokenizer cannot read."""
    if start.writer is None or tokenizer.kind == "bpe":
        return
    if start.writer[1].fingerprint() != tokenizer.fingerprint():
        raise InputError(
            "`written_tokens` expects a bpe tokenizer, or the teacher's own: a teacher "
            "may write characters that others lack. Received: another "
            f"{tokenizer.kind} tokenizer than the teacher's. Use its tokenizer.json."
        )


def _written_tokens(config):
    """Return how many tokens a teacher is to write before training."""
    augmentation = AugmentationConfig.of(config.augmentation)
    distillation = DistillationConfig.of(config.distillation)
    return augmentation.written_tokens or distillation.written_tokens


def _add_written_text(config, start, text, tokenizer, staging):
    """Write the training tokens anew, with text of the teacher after the real one."""
    count = _written_tokens(config)
    if not count:
        return
    folder = staging / "data"
    real = TokenFile.open(folder / "train.tokens")
    teacher, reads = start.writer or (start.teacher, start.teacher_tokenizer)
    if reads.fingerprint() != tokenizer.fingerprint():
        path = staging.parent / reads.fingerprint() / "train.tokens"
        real = write_token_file(path, text.documents("train"), reads)
    logger.info(f"the teacher writes {count:,} tokens")
    written = list(
        written_documents(
            teacher,
            reads,
            real.tokens,
            count,
            prompt_length=min(16, teacher.context_length // 2),
            seed=config.seed,
        )
    )
    facts = {"corpus": text.name, "split": "train", "written_documents": len(written)}
    documents = itertools.chain(text.documents("train"), written)
    both = write_token_file(folder / "train.tokens", documents, tokenizer, facts=facts)
    logger.info(f"train: {both.count:,} tokens, those of the teacher among them")


def _check_losses(config, start):
    """Refuse what does not go with a teacher of other tokens."""
    if start.teacher is None or not start.reads_other_tokens:
        return
    wanted = DistillationConfig.of(config.distillation)
    if config.augmentation is not None:
        raise InputError(
            "`augmentation` expects a teacher that reads the student's tokens. "
            "Received: two tokenizers, for which the teacher's knowledge is stored. "
            "Leave it out, or keep the vocabulary."
        )
    for name in ("on_policy_fraction", "written_tokens"):
        if getattr(wanted, name):
            raise InputError(
                f"`{name}` expects a teacher that reads the student's tokens. "
                "Received: two tokenizers. Leave it out, or keep the vocabulary."
            )
    loss = losses.get(wanted.compile_arguments()["distillation_loss"])
    if not loss.across_vocabularies and not is_derived(
        start.teacher_tokenizer, start.tokenizer
    ):
        raise InputError(
            f"{type(loss).__name__} expects tokens that the teacher's are made of. "
            "Received: a student's tokenizer that is not derived from the teacher's. "
            "Use the loss universal_logit, or give the student a `vocab_size` instead "
            "of a tokenizer of its own."
        )


def _check_pair(config, start):
    """Refuse a loss that does not fit the models, before anything is stored."""
    if start.teacher is None:
        return
    wanted = DistillationConfig.of(config.distillation)
    loss = losses.get(wanted.compile_arguments()["distillation_loss"])
    is_stored = wanted.knowledge is not None or start.reads_other_tokens
    loss.build_for(
        None if is_stored else shape_of(start.teacher), shape_of(start.model)
    )


def _prepare_knowledge(config, start, read, token_file, staging):
    """Check the stored knowledge that was named, or extract what has to be stored.

    A teacher of another vocabulary cannot run along: what it says of the text is
    mapped to the student's tokens once, before training.
    """
    if start.teacher is None:
        return
    wanted = DistillationConfig.of(config.distillation)
    if wanted.knowledge is not None:
        KnowledgeStore.open(wanted.knowledge).check_fits(
            token_file=token_file,
            tokenizer=start.tokenizer,
            teacher=start.teacher,
            context_length=config.context_length,
        )
    elif start.reads_other_tokens:
        logger.info("storing what the teacher predicts, in the student's tokens")
        extract(
            start.teacher,
            read,
            staging / "knowledge",
            tokenizer=start.teacher_tokenizer,
            context_length=min(config.context_length, start.teacher.context_length),
            student=(start.tokenizer, token_file),
        )


def _read_by_teacher(config, start, text, token_file, staging):
    """Return the training text in the teacher's tokens, or None where nobody asks."""
    if start.teacher is None or not start.reads_other_tokens:
        return token_file
    wanted = DistillationConfig.of(config.distillation)
    if start.model is not None and wanted.knowledge is not None:
        return None
    # Beside what is to stay.
    where = (config, text, staging.parent)
    return _in_tokens_of(start.teacher_tokenizer, *where)


def _in_tokens_of(tokenizer, config, text, folder):
    """Return the training text in a tokenizer's tokens, of the run that has them."""
    source = _source_with_this_text(config, tokenizer)
    if source is not None:
        return TokenFile.open(source / "data" / "train.tokens")
    text = text or open_text(config)
    path = folder / tokenizer.fingerprint() / "train.tokens"
    return write_token_file(path, text.documents("train"), tokenizer)


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


def _prepare_tokenizer(config, text):
    texts = (document.text for document in text.documents("train"))
    if config.tokenizer == "character":
        # Every character must be known, those of the held-out text included.
        texts = (
            document.text
            for split in ("train", "validation")
            for document in text.documents(split)
        )
        has_ends = config.separator is not None
        return tokenizers.CharacterTokenizer.train(texts, end_of_text=has_ends)
    if config.tokenizer == "bpe":
        size = config.vocab_size
        logger.info("training a tokenizer of %d tokens on %s", size, text.name)
        trained = tokenizers.BPETokenizer.train(texts, config.vocab_size)
        if trained.vocab_size < config.vocab_size:
            logger.info(
                f"{text.name} supports a vocabulary of {trained.vocab_size} tokens; it "
                "is the run's"
            )
        return trained
    return tokenizers.load_tokenizer(config.tokenizer)


def store_knowledge(config, path, **options):
    """Store what the teacher of a configuration says of its text.

    Args:
        config: A `TrainingConfig` with `distillation`.
        path: Folder of the store.
        **options: As for `gpt_tf.distillation.teacher_cache.extract`.

    Returns:
        The store, opened.
    """
    path = Path(path)
    start = _load_start(config)
    with artifacts.workspace(path.with_name(f"{path.name}.tokens")) as folder:
        where = (config, None, folder)
        read = _in_tokens_of(start.teacher_tokenizer, *where)
        if start.reads_other_tokens:
            own = _in_tokens_of(start.tokenizer, *where)
            options["student"] = (start.tokenizer, own)
        return extract(
            start.teacher,
            read,
            path,
            tokenizer=start.teacher_tokenizer,
            context_length=min(config.context_length, start.teacher.context_length),
            seed=config.seed,
            **options,
        )
