"""A run's folder: what decides its course, and the model that comes out of it.

run.json            configuration, corpus, versions
tokenizer.json      Hugging Face format
data/               token files of the two splits
initial/            the model that training starts from, if it is not a new one
knowledge/          what a teacher of another vocabulary says of the text
checkpoints/        step-00000200/, ... each written whole or not at all
model/              the finished model with its tokenizer and manifest
history.json        what was measured, step by step
loss.png            the same as a picture
logs/               for TensorBoard
"""

import dataclasses
from pathlib import Path

from gpt_tf import files
from gpt_tf.configuration import Configuration
from gpt_tf.distillation.config import DistillationConfig
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.models import keras_file
from gpt_tf.models.gpt import GPTModel
from gpt_tf.parallel import strategy as strategies
from gpt_tf.parallel.mesh import parse_mesh
from gpt_tf.parallel.pipeline import SCHEDULES
from gpt_tf.parallel.sequence import MeshGPT
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.text import tokenizer as tokenizers
from gpt_tf.text.augment import AugmentationConfig
from gpt_tf.text.corpus import check_separator
from gpt_tf.text.dataset import Windows

# Fields that say which text is learnt from, and which is held out.
TEXT = ("corpus", "validation_fraction", "validation", "separator")

# Fields that say where a step is computed and not what: a run that goes on may have
# others than it began with.
PLACEMENT = (
    "strategy",
    "pipeline_stages",
    "micro_batches",
    "pipeline_schedule",
    "mesh",
    "jit_compile",
)

OWN_ENTRIES = (
    "run.json",
    "tokenizer.json",
    "data",
    "initial",
    "knowledge",
    "checkpoints",
    "model",
    "history.json",
    "loss.png",
    "logs",
)


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Configuration):
    """Everything that decides the course of a training run.

    Args:
        corpus: `"python-stdlib"`, `"shakespeare"`, or paths of files and folders.
        tokenizer: `"bpe"`, `"character"`, or the path of a tokenizer to use.
        vocab_size: Size of the vocabulary that `"bpe"` trains, at least 257.
        validation_fraction: Share of the text that is held out, in (0, 1).
        validation: File or folder that is held out instead, or None.
        separator: Text between the documents of one file, or None. Each document is
            followed by the end-of-text token.
        embedding_dim, num_layers, num_heads, feedforward_dim, dropout,
            tie_embeddings: As for `GPTModel`.
        context_length: Tokens per window and positions of the model.
        batch_size: Windows per step over all replicas.
        gradient_accumulation_steps: Parts in which a batch is computed.
        steps: Number of optimiser steps.
        learning_rate: Largest learning rate, above 0.
        final_learning_rate: Learning rate at the end, a tenth unless given.
        warmup_steps: Steps over which the learning rate rises.
        weight_decay: Decay of matrices per unit of learning rate.
        beta_2: Decay of Adam's second moment, in [0, 1).
        global_clipnorm: Largest norm of the gradient.
        validate_every: Steps between validations.
        validation_batches: Batches per validation; None takes all.
        patience: Validations without improvement after which training stops and
            the best weights are kept; 0 trains to the end.
        checkpoint_every: Steps between checkpoints; 0 writes one at the end.
        keep_checkpoints: Number of newest checkpoints that stay.
        sample_every: Steps between samples of text; 0 writes none.
        sample_prompt: What the samples begin with.
        precision: `"float32"`, `"mixed_bfloat16"` or `"mixed_float16"`.
        jit_compile: `"auto"`, `"on"` or `"off"`: XLA.
        strategy: One of `gpt_tf.parallel.strategy.STRATEGIES`.
        pipeline_stages: Devices among which the blocks are divided, as by
            `gpt_tf.parallel.pipeline.Pipeline`; 1 keeps them together.
        micro_batches: Parts of a batch that flow through the pipeline.
        pipeline_schedule: `"1f1b"` or `"gpipe"`.
        mesh: Devices among which batch, weights and positions are divided, as read by
            `gpt_tf.parallel.mesh.parse_mesh`: `"2x2"` for example; or None.
        seed: Seed of weights, data order and dropout.
        init_from: Trained model to start from: a run's or model's folder, or a
            `.keras` file. Architecture and tokenizer are then that model's, whatever
            the fields above say.
        quantization: Fields of a `QuantizationConfig`: the model of `init_from`
            becomes quantisation-aware before it is trained. None leaves it as it is.
        distillation: Fields of a `DistillationConfig`: the model of `init_from`, or one
            cut from the teacher, learns from the teacher. None learns from text alone.
        augmentation: Fields of an `AugmentationConfig`: the training text is read
            otherwise in each epoch. None only shifts its windows. Validation reads the
            text as it stands.
    """

    corpus: str | tuple[str, ...] = "python-stdlib"
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    validation_fraction: float = 0.1
    validation: str | None = None
    separator: str | None = None
    embedding_dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    context_length: int = 128
    feedforward_dim: int | None = None
    dropout: float = 0.0
    tie_embeddings: bool = True
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    steps: int = 1000
    learning_rate: float = 1e-3
    final_learning_rate: float | None = None
    warmup_steps: int = 100
    weight_decay: float = 0.1
    beta_2: float = 0.99
    global_clipnorm: float = 1.0
    validate_every: int = 200
    validation_batches: int | None = 50
    patience: int = 0
    checkpoint_every: int = 200
    keep_checkpoints: int = 3
    sample_every: int = 0
    sample_prompt: str = "\n"
    precision: str = "float32"
    jit_compile: str = "auto"
    strategy: str = "auto"
    pipeline_stages: int = 1
    micro_batches: int = 4
    pipeline_schedule: str = "1f1b"
    mesh: str | None = None
    seed: int = 1337
    init_from: str | None = None
    quantization: dict | None = None
    distillation: dict | None = None
    augmentation: dict | None = None

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.corpus, str):
            object.__setattr__(self, "corpus", tuple(str(p) for p in self.corpus))
        for name in (
            "vocab_size",
            "embedding_dim",
            "num_layers",
            "num_heads",
            "context_length",
            "batch_size",
            "gradient_accumulation_steps",
            "steps",
            "validate_every",
            "keep_checkpoints",
            "pipeline_stages",
            "micro_batches",
        ):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("feedforward_dim", "validation_batches"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "at least 1, or None")
        for name in (
            "warmup_steps",
            "weight_decay",
            "patience",
            "checkpoint_every",
            "sample_every",
        ):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        final = self.final_learning_rate
        self._check(
            "final_learning_rate", final is None or final >= 0, "at least 0, or None"
        )
        for name in ("learning_rate", "global_clipnorm"):
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in ("dropout", "beta_2"):
            self._check(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._check("seed", 0 <= self.seed < 2**32, "at least 0 and below 2**32")
        width = self.embedding_dim
        self._check(
            "num_heads", self.num_heads <= width, f"at most `embedding_dim`, {width}"
        )
        fraction = self.validation_fraction
        self._check("validation_fraction", 0 < fraction < 1, "between 0 and 1")
        if self.validation is not None:
            object.__setattr__(self, "validation", str(self.validation))
        check_separator(self.separator)
        precisions = ("float32", "mixed_bfloat16", "mixed_float16")
        self._check("precision", self.precision in precisions, f"one of {precisions}")
        modes = ("auto", "on", "off")
        self._check("jit_compile", self.jit_compile in modes, f"one of {modes}")
        known = strategies.STRATEGIES
        self._check("strategy", self.strategy in known, f"one of {known}")
        modes = SCHEDULES
        self._check(
            "pipeline_schedule", self.pipeline_schedule in modes, f"one of {modes}"
        )
        self._check_division()
        parts = self.gradient_accumulation_steps
        self._check(
            "batch_size", self.batch_size % parts == 0, f"a multiple of {parts}"
        )
        if self.init_from is not None:
            object.__setattr__(self, "init_from", str(self.init_from))
        if self.distillation is not None:
            fields = DistillationConfig.of(self.distillation).get_config()
            self._check("distillation", fields["teacher"], "that names a teacher")
            object.__setattr__(self, "distillation", fields)
        if self.quantization is not None:
            source = self.init_from or self.distillation
            self._check("init_from", source, "that names a trained model")
            whole = self.precision == "float32"
            self._check("precision", whole, "of float32 beside `quantization`")
            fields = QuantizationConfig.of(self.quantization).get_config()
            object.__setattr__(self, "quantization", fields)
        if self.augmentation is not None:
            self._check_augmentation()

    def _check_augmentation(self):
        """Refuse what a teacher cannot follow."""
        wanted = AugmentationConfig.of(self.augmentation)
        object.__setattr__(self, "augmentation", wanted.get_config())
        if self.distillation is None:
            return
        if self.distillation["knowledge"] is not None:
            raise InputError(
                "Stored knowledge is of the text as it stood. Received: `augmentation` "
                "beside it. Let the teacher run along, or leave out one of the two."
            )
        if wanted.written_tokens:
            raise InputError(
                "In distillation it is the student's teacher that writes. Received: "
                "`written_tokens` in `augmentation`. Give it in `distillation`."
            )

    def _check_division(self):
        """Refuse what does not go with layers, weights or positions in parts."""
        if self.mesh is not None:
            parse_mesh(self.mesh)
        name = "mesh" if self.mesh is not None else "pipeline_stages"
        if self.mesh is None and self.pipeline_stages == 1:
            return
        self._check(
            "strategy",
            self.strategy in ("auto", "one_device"),
            f"of auto beside `{name}`, which places the model itself",
        )
        self._check(
            "gradient_accumulation_steps",
            self.gradient_accumulation_steps == 1,
            f"of 1 beside `{name}`",
        )
        if self.mesh is not None:
            self._check(
                "pipeline_stages", self.pipeline_stages == 1, "of 1 beside `mesh`"
            )
            whole = self.precision == "float32"
            self._check("precision", whole, "of float32 beside `mesh`")
        others = self.quantization or self.distillation
        self._check(name, not others, "left out in quantisation and in distillation")


PRESETS = {
    "quickstart": TrainingConfig(
        vocab_size=1024,
        embedding_dim=128,
        num_layers=4,
        num_heads=4,
        context_length=128,
        batch_size=16,
        steps=600,
        learning_rate=4e-3,
        warmup_steps=60,
        validate_every=100,
        validation_batches=30,
        checkpoint_every=100,
    ),
    "tiny": TrainingConfig(
        vocab_size=512,
        embedding_dim=32,
        num_layers=2,
        num_heads=2,
        context_length=32,
        batch_size=8,
        steps=20,
        warmup_steps=2,
        validate_every=10,
        validation_batches=4,
        checkpoint_every=10,
    ),
    "shakespeare-char": TrainingConfig(
        corpus="shakespeare",
        tokenizer="character",
        embedding_dim=128,
        num_layers=4,
        num_heads=4,
        context_length=64,
        batch_size=12,
        steps=2000,
        learning_rate=4e-3,
        final_learning_rate=0.0,
        warmup_steps=100,
        validate_every=250,
        validation_batches=None,
        checkpoint_every=500,
        sample_prompt="\n",
    ),
    "small": TrainingConfig(
        vocab_size=10000,
        embedding_dim=512,
        num_layers=6,
        num_heads=8,
        context_length=256,
        batch_size=16,
        steps=5000,
        learning_rate=6e-4,
        warmup_steps=200,
        validate_every=250,
        checkpoint_every=250,
    ),
}


def read_run(out):
    if not (out / "run.json").is_file():
        raise InputError(
            f"Expected an interrupted run in {out}; there is no run.json. "
            "Start a run without --resume first."
        )
    run = files.read_json(out / "run.json")
    try:
        return TrainingConfig(**run["config"])
    except (KeyError, TypeError) as error:
        raise DamagedFileError(
            f"{out / 'run.json'} is no configuration of this version: {error}."
        ) from None


def windows_of(token_file, config, shuffle, tokenizer=None):
    """Return a run's windows; those to train on are augmented, given a tokenizer."""
    is_augmented = shuffle and tokenizer is not None
    return Windows(
        token_file,
        config.context_length,
        config.batch_size,
        seed=config.seed,
        shuffle=shuffle,
        augmentation=config.augmentation if is_augmented else None,
        tokenizer=tokenizer if is_augmented else None,
    )


def load_model(path: str | Path) -> tuple[GPTModel, "tokenizers.Tokenizer | None"]:
    """Load a trained model and its tokenizer, without running what a file holds.

    Args:
        path: A run's folder, a model's folder, or a `.keras` file.

    Returns:
        The model, a `GPTModel` or `QuantizationAwareGPT`, and its tokenizer or None
        where none lies beside it.

    Raises:
        InputError: There is no model.
        DamagedFileError: A file is not what its manifest says, or no model that
            gpt_tf saved.
    """
    file = model_file(path)
    folder = file.parent
    if not file.is_file():
        raise InputError(
            f"Expected a trained model at {path}; there is none. Point to a folder "
            "that `gpt-tf train` finished, or to a .keras file."
        )
    if (folder / files.MANIFEST_NAME).is_file():
        files.check_manifest(folder, "model")
    classes = {"GPTModel": GPTModel, "QuantizationAwareGPT": _quantization_aware}
    model = keras_file.open_model(file, classes)
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return model, tokenizers.load_tokenizer(folder) if has_tokenizer else None


def _quantization_aware(**config):
    from gpt_tf.quantization.qat import QuantizationAwareGPT  # and with it TF-MOT

    return QuantizationAwareGPT(**config)


def model_file(path):
    path = Path(path)
    if path.suffix == ".keras" or path.is_file():
        return path
    return (path / "model" if (path / "model").is_dir() else path) / "model.keras"


def save_model(model, tokenizer, folder: str | Path, **facts) -> None:
    """Write model, tokenizer and manifest to a folder, whole or not at all.

    Args:
        model: A `GPTModel` or `QuantizationAwareGPT`.
        tokenizer: Its tokenizer.
        folder: Where to write; a folder that stands there is replaced.
        **facts: More to record in the manifest, as JSON values.
    """
    folder = Path(folder)
    with files.atomic_folder(folder, replace=True) as temporary:
        model.save(temporary / "model.keras")
        tokenizer.save(temporary)
        files.write_manifest(
            temporary,
            "model",
            ["model.keras", "tokenizer.json"],
            config=model.get_config(),
            parameters=model.count_params(),
            tokenizer_fingerprint=tokenizer.fingerprint(),
            **facts,
        )


def copy_of(model):
    """Return a model with the same weights, in one place unless a scope is open."""
    if isinstance(model, MeshGPT):
        return model.to_model()
    copy = type(model).from_config(model.get_config())
    copy.set_weights(model.get_weights())
    return copy
