"""What a run starts from: its text, and the models that it goes on from or learns from.

A student may read text that its teacher wrote, and learn from what the teacher said of
the text before. Both are made here, once, before training.
"""

import dataclasses
import itertools
import logging
import warnings
from pathlib import Path

import numpy as np
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
from gpt_tf.text import corpus as corpora
from gpt_tf.text.augment import AugmentationConfig
from gpt_tf.text.dataset import TokenFile, Windows, write_token_file
from gpt_tf.text.examples import Examples
from gpt_tf.text.tokenizer import Tokenizer, load_tokenizer
from gpt_tf.training.config import CONTEXT_LENGTH
from gpt_tf.training.lora import check_adaptable
from gpt_tf.training.run_folder import TEXT, load_model, model_files, read_run

logger = logging.getLogger(__name__)

_MEASURED_TOKENS = 4096  # of the text, to tell which parts of a teacher matter


@dataclasses.dataclass
class Start:
    """What a run starts from.

    Attributes:
        model: The model whose training goes on, or None.
        tokenizer: Its tokenizer, or the student's; None where one is to be trained.
        distillation: The `DistillationConfig`, where there is a teacher.
        teacher, teacher_tokenizer: Of a run that distils.
        writer: A model that only writes text to be read, and its tokenizer, or None.
        made_from: SHA-256 of the files of all, by role.
    """

    model: keras.Model | None = None
    tokenizer: Tokenizer | None = None
    distillation: DistillationConfig | None = None
    teacher: keras.Model | None = None
    teacher_tokenizer: Tokenizer | None = None
    writer: tuple[keras.Model, Tokenizer] | None = None
    made_from: dict = dataclasses.field(default_factory=dict)

    @property
    def reads_other_tokens(self):
        """Whether there is a teacher whose tokenizer is another than the student's."""
        if self.teacher is None:
            return False
        return self.tokenizer.fingerprint() != self.teacher_tokenizer.fingerprint()


def load_start(config):
    """Load the model, the teacher and the writer that a configuration names."""
    start = Start()

    def load(role, path):
        model, tokenizer = load_model(path)
        if tokenizer is None:
            raise InputError(
                f"Expected tokenizer.json beside the model in {path}. Put it "
                "there, or name the folder that `gpt-tf train` wrote."
            )
        if role != "model" and looks_untrained(model):
            warnings.warn(
                "the teacher looks untrained: all its biases are 0, as before the "
                "first step. The student will learn noise from it",
                DistillationWarning,
                stacklevel=3,
            )
        start.made_from[role] = artifacts.sha256_of(*model_files(path))
        return model, tokenizer

    if config.init_from is not None:
        start.model, start.tokenizer = load("model", config.init_from)
        if config.lora is not None:
            check_adaptable(start.model)
    writer = AugmentationConfig.of(config.augmentation).teacher
    if writer is not None:
        start.writer = load("writer", writer)
    if config.distillation is not None:
        wanted = start.distillation = DistillationConfig.of(config.distillation)
        start.teacher, start.teacher_tokenizer = load("teacher", wanted.teacher)
        if start.tokenizer is None:
            start.tokenizer = start.teacher_tokenizer
            if wanted.vocab_size not in (None, start.tokenizer.vocab_size):
                start.tokenizer = derive_tokenizer(start.tokenizer, wanted.vocab_size)
    return start


def with_context(config, start):
    """Return the configuration with windows for which all its models have room."""
    if config.context_length is not None:
        return config
    models = filter(None, (start.model, start.teacher))
    rooms = [shape_of(model)["context_length"] for model in models]
    return dataclasses.replace(config, context_length=min(CONTEXT_LENGTH, *rooms))


def open_text(config):
    """Open the text of a run's configuration, divided as the configuration says."""
    if config.data is not None:
        return Examples(
            config.data,
            config.validation,
            validation_fraction=config.validation_fraction,
            seed=config.seed,
        )
    return corpora.open_corpus(
        list(config.corpus) if isinstance(config.corpus, tuple) else config.corpus,
        validation_fraction=config.validation_fraction,
        validation=config.validation,
        separator=config.separator,
    )


def run_with_text(config, tokenizer):
    """Return the run whose token files are those that this run wants, or None."""
    if written_tokens(config):
        return None
    teacher = DistillationConfig.of(config.distillation).teacher
    for folder in map(Path, filter(None, (config.init_from, teacher))):
        if not (folder / "run.json").is_file() or not folder.name:
            continue
        before = read_run(folder)
        if AugmentationConfig.of(before.augmentation).written_tokens:
            continue
        if any(getattr(before, name) != getattr(config, name) for name in TEXT):
            continue
        if load_tokenizer(folder).fingerprint() == tokenizer.fingerprint():
            return folder
    return None


def in_tokens_of(tokenizer, config, folder, text=None, token_file=None):
    """Return the training text in a tokenizer's tokens.

    They are those of `token_file` or of an earlier run, or are written to the folder.
    """
    fingerprint = tokenizer.fingerprint()
    if token_file and token_file.manifest.get("tokenizer_fingerprint") == fingerprint:
        return token_file
    source = run_with_text(config, tokenizer)
    if source is not None:
        return TokenFile.open(source / "data" / "train.tokens")
    documents = (text or open_text(config)).documents("train")
    return write_token_file(folder / fingerprint / "train.tokens", documents, tokenizer)


def written_tokens(config):
    """Return how many tokens a teacher is to write before training."""
    augmentation = AugmentationConfig.of(config.augmentation)
    distillation = DistillationConfig.of(config.distillation)
    return augmentation.written_tokens or distillation.written_tokens


def add_written_text(config, start, text, tokenizer, folder):
    """Write the tokens to train on anew, with a teacher's text after the real one."""
    count = written_tokens(config)
    path = folder / "data" / "train.tokens"
    teacher, reads = start.writer or (start.teacher, start.teacher_tokenizer)
    real = in_tokens_of(reads, config, folder.parent, text, TokenFile.open(path))
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
    both = write_token_file(path, documents, tokenizer, facts=facts)
    logger.info(f"train: {both.count:,} tokens, those of the teacher among them")
    return both


def check_losses(config, start):
    """Refuse what does not go with a teacher of other tokens."""
    if not start.reads_other_tokens:
        return
    wanted = start.distillation
    for name, given in (
        ("augmentation", config.augmentation is not None),
        ("data", config.data is not None),
        ("on_policy_fraction", wanted.on_policy_fraction),
        ("written_tokens", wanted.written_tokens),
    ):
        if given:
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


def cut_student(config, start, read):
    """Cut the student; what matters of the teacher is measured on `read`, its text."""
    wanted, teacher = start.distillation, start.teacher
    if hasattr(teacher, "gpt"):
        from gpt_tf.quantization.qat import to_float

        teacher = to_float(teacher)
    options = wanted.student_sizes()
    if start.reads_other_tokens:
        options["vocab_size"] = start.tokenizer.vocab_size
        options["token_ids"] = shared_tokens(start.teacher_tokenizer, start.tokenizer)
    length = min(config.context_length, teacher.context_length)
    windows = Windows(read, length, 8, seed=config.seed)
    batches = min(4, _MEASURED_TOKENS // (8 * length) or 1, windows.steps_per_epoch)
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
    return student


def prepare_knowledge(config, start, read, token_file, folder):
    """Check the stored knowledge that was named, or extract what has to be stored.

    A teacher of another vocabulary cannot run along: what it says of the text is
    mapped to the student's tokens once, before training.
    """
    wanted = start.distillation
    is_stored = wanted.knowledge is not None or start.reads_other_tokens
    loss = losses.get(wanted.compile_arguments()["distillation_loss"])
    loss.build_for(
        None if is_stored else shape_of(start.teacher), shape_of(start.model)
    )
    if wanted.knowledge is not None:
        KnowledgeStore.open(wanted.knowledge).check_fits(
            token_file=token_file,
            tokenizer=start.tokenizer,
            teacher=start.teacher,
            context_length=config.context_length,
        )
    elif is_stored:
        logger.info("storing what the teacher predicts, in the student's tokens")
        extract_from(start, config, read, token_file, folder / "knowledge")


def extract_from(start, config, read, token_file, path, **options):
    """Store what a teacher says of `read`, in the student's tokens, `token_file`."""
    if start.reads_other_tokens:
        options["student"] = (start.tokenizer, token_file)
    return extract(
        start.teacher,
        read,
        path,
        tokenizer=start.teacher_tokenizer,
        context_length=min(config.context_length, start.teacher.context_length),
        **options,
    )
