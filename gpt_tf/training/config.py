"""The settings of a training run, and the presets; read without TensorFlow."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gpt_tf.distillation.config import DistillationConfig
from gpt_tf.errors import InputError
from gpt_tf.models.sizes import MOST_LAYERS
from gpt_tf.parallel.config import Schedule, Strategy, parse_mesh
from gpt_tf.quantization.config import QuantizationConfig
from gpt_tf.settings import arguments
from gpt_tf.settings.arguments import MOST_TOKENS
from gpt_tf.settings.configuration import (
    Configuration,
    Count,
    CountOrZero,
    PathText,
    Positive,
    Rate,
    Seed,
    configuration,
)
from gpt_tf.text.config import AugmentationConfig
from gpt_tf.text.corpus import check_separator

# Tokens per window, where nothing says how many.
CONTEXT_LENGTH = 128
_Size = Annotated[int, Field(ge=1, le=2**20)]


@configuration
class LoraConfig(Configuration):
    """How a model is adapted by matrices of a low rank; see `gpt_tf.training.lora`.

    Example:
        >>> LoraConfig(rank=8).scale
        2.0
    """

    title: ClassVar[str] = "A LoRA config"

    rank: int = Field(
        8,
        ge=1,
        le=2**14,
        description="Columns of A and rows of B, in the products of all blocks.",
    )
    alpha: Positive | None = Field(
        None, description="A B counts alpha / rank times; twice the rank if not given."
    )
    base: Literal["float32", "int8"] = Field(
        "float32", description="How the kernels that stay are held in training."
    )

    @property
    def scale(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


@configuration
class TrainingConfig(Configuration):
    """Everything that decides what a training run does.

    Raises:
        InputError: A value is of another type, or out of its range, or does not go
            with another.

    Example:
        >>> TrainingConfig(num_layers=2).get_config()["num_layers"]
        2
    """

    title: ClassVar[str] = "A training config"

    corpus: PathText | tuple[PathText, ...] = Field(
        "python-stdlib",
        description="python-stdlib, shakespeare, or files and folders of text.",
    )
    data: PathText | None = Field(
        None,
        description="JSON lines to fine-tune on instead of a corpus: rows of `text`, "
        "of `prompt` and `completion`, or of `messages`; the answers are learnt.",
    )
    tokenizer: PathText = Field(
        "bpe", description="bpe, character, or the path of a tokenizer to use."
    )
    vocab_size: int = Field(
        4096, ge=1, le=MOST_TOKENS, description="Tokens that bpe learns, at least 257."
    )
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of the text to hold out."
    )
    validation: PathText | None = Field(
        None,
        description="File or folder to hold out. Else what the names of the files say, "
        "or a share of the text.",
    )
    separator: str | None = Field(
        None,
        description="Text that ends a document within a file: '<|endoftext|>' for "
        "example.",
    )
    init_from: PathText | None = Field(
        None,
        description="Trained run or model to go on from; sizes and tokenizer are then "
        "that model's.",
    )
    embedding_dim: _Size = Field(256, description="Width.")
    num_layers: int = Field(4, ge=1, le=MOST_LAYERS, description="Blocks.")
    num_heads: Count = Field(4, description="Attention heads.")
    context_length: _Size | None = Field(
        None,
        description=f"Tokens per window, and positions of a new model; {CONTEXT_LENGTH}"
        ", or those of the model of `init_from` or the teacher if they are fewer.",
    )
    feedforward_dim: Count | None = Field(
        None, description="Feed-forward width; 4 x the width if not given."
    )
    dropout: Rate = Field(0.0, description="Dropout rate.")
    tie_embeddings: bool = Field(True, description="Score with the token table.")
    batch_size: _Size = Field(16, description="Windows per step over all replicas.")
    gradient_accumulation_steps: Count = Field(
        1, description="Parts in which a batch is computed."
    )
    steps: Count = Field(1000, description="Optimiser steps.")
    learning_rate: Positive = Field(1e-3, description="Learning rate at its peak.")
    final_learning_rate: float | None = Field(
        None, ge=0, description="Learning rate at the end; a tenth of the peak."
    )
    warmup_steps: CountOrZero = Field(
        100, description="Steps over which the learning rate rises."
    )
    weight_decay: float = Field(
        0.1, ge=0, description="Decay of matrices per unit of learning rate."
    )
    beta_2: Rate = Field(0.99, description="Decay of Adam's second moment.")
    global_clipnorm: Positive = Field(1.0, description="Largest norm of the gradient.")
    seed: Seed = Field(1337, description="Of weights, data order and dropout.")
    validate_every: Count = Field(200, description="Steps between validations.")
    validation_batches: Count | None = Field(
        50, description="Batches per validation; None takes all."
    )
    patience: CountOrZero = Field(
        0,
        description="Validations without improvement after which training stops and "
        "the best weights are kept; 0 trains to the end.",
    )
    checkpoint_every: CountOrZero = Field(
        200, description="Steps between checkpoints; 0 writes one at the end."
    )
    keep_checkpoints: Count = Field(3, description="Newest checkpoints that stay.")
    sample_every: CountOrZero = Field(
        0, description="Steps between samples of text; 0 writes none."
    )
    sample_prompt: str = Field("\n", description="What the samples begin with.")
    precision: Literal["float32", "mixed_bfloat16", "mixed_float16"] = Field(
        "float32", description="Type of the computation."
    )
    jit_compile: Literal["auto", "on", "off"] = Field(
        "auto", description="Compile with XLA."
    )
    strategy: Strategy = Field("auto", description="How a batch is divided.")
    pipeline_stages: Count = Field(
        1, description="Devices among which the blocks are divided; 1 for none."
    )
    micro_batches: Count = Field(
        4, description="Parts of a batch that flow through the pipeline."
    )
    pipeline_schedule: Schedule = Field(
        "1f1b", description="Order of the pipeline's tasks."
    )
    mesh: str | None = Field(
        None,
        description="Devices to divide batch x weights (x positions) among: 2x2, "
        "1x2x2, or batch=2,sequence=2.",
    )
    quantization: dict | None = Field(
        None,
        description="Fields of a `QuantizationConfig`: the model of `init_from` "
        "becomes quantisation-aware before it is trained.",
    )
    distillation: dict | None = Field(
        None,
        description="Fields of a `DistillationConfig`: the model of `init_from`, or "
        "one cut from the teacher, learns from the teacher.",
    )
    lora: dict | None = Field(
        None,
        description="Fields of a `LoraConfig`: of the model of `init_from`, adapters "
        "alone are trained.",
    )
    augmentation: dict | None = Field(
        None,
        description="Fields of an `AugmentationConfig`: the training text is read "
        "otherwise in each epoch. None only shifts its windows.",
    )

    def __post_init__(self):
        if self.context_length is None and not (self.init_from or self.distillation):
            object.__setattr__(self, "context_length", CONTEXT_LENGTH)
        width, parts = self.embedding_dim, self.gradient_accumulation_steps
        self._check(
            "num_heads", self.num_heads <= width, f"at most `embedding_dim`, {width}"
        )
        self._check(
            "batch_size", self.batch_size % parts == 0, f"a multiple of {parts}"
        )
        check_separator(self.separator)
        for name, kind in (
            ("distillation", DistillationConfig),
            ("quantization", QuantizationConfig),
            ("augmentation", AugmentationConfig),
            ("lora", LoraConfig),
        ):
            if getattr(self, name) is not None:
                fields = kind.of(getattr(self, name)).get_config()
                object.__setattr__(self, name, fields)
        self._check_division()
        self._check_rows()
        if self.lora is not None:
            self._check("init_from", self.init_from, "that names a trained model")
            others = self.quantization or self.distillation
            self._check("lora", not others, "of None beside another method")
        if self.distillation is not None:
            named = self.distillation["teacher"]
            self._check("distillation", named, "that names a teacher")
        if self.quantization is not None:
            source = self.init_from or self.distillation
            self._check("init_from", source, "that names a trained model")
            is_whole = self.precision == "float32"
            self._check("precision", is_whole, "of float32 beside `quantization`")
        if self.augmentation is not None and self.distillation is not None:
            if self.distillation["knowledge"] is not None:
                raise InputError(
                    "Stored knowledge is of the text as it stood. Received: "
                    "`augmentation` beside it. Let the teacher run along, or leave out "
                    "one of the two."
                )
            if self.augmentation["written_tokens"]:
                raise InputError(
                    "In distillation it is the student's teacher that writes. "
                    "Received: `written_tokens` in `augmentation`. Give it in "
                    "`distillation`."
                )

    def _check_rows(self):
        """Refuse what does not go with rows to fine-tune on."""
        if self.data is None:
            return
        source = self.init_from or self.distillation
        self._check("init_from", source, "that names a trained model, beside `data`")
        said = "of None beside `data`, whose rows are read as they stand"
        self._check("augmentation", self.augmentation is None, said)
        for name in ("knowledge", "written_tokens", "on_policy_fraction"):
            if (self.distillation or {}).get(name):
                expected = "left out beside `data`, whose rows have answers"
                arguments.refuse(name, self.distillation[name], expected)

    def _check_division(self):
        """Refuse what does not go with layers, weights or positions in parts."""
        is_mesh = self.mesh is not None
        if not is_mesh and self.pipeline_stages == 1:
            return
        name = "mesh" if is_mesh else "pipeline_stages"
        good = {"strategy": ("auto", "one_device"), "gradient_accumulation_steps": (1,)}
        if is_mesh:
            parse_mesh(self.mesh)
            good |= {"pipeline_stages": (1,), "precision": ("float32",)}
        for field, values in good.items():
            expected = f"of {values[0]} beside `{name}`"
            self._check(field, getattr(self, field) in values, expected)
        others = self.quantization or self.distillation or self.lora or self.data
        said = "left out in quantisation, in distillation and in fine-tuning on rows"
        self._check(name, not others, said)


@configuration
class RunOptions(Configuration):
    """How a run is started, and where; what it computes is in `TrainingConfig`.

    Example:
        >>> RunOptions(workers=2).max_restarts
        3
    """

    title: ClassVar[str] = "Run options"

    resume: bool = Field(
        False,
        description="Go on with the interrupted run in --out; with more --steps than "
        "its own, up to these.",
    )
    resume_or_start: bool = Field(
        False, description="Go on with the run in --out, or start it."
    )
    overwrite: bool = Field(False, description="Replace the run that stands in --out.")
    virtual_devices: Count | None = Field(
        None, description="Split the CPU into so many logical devices."
    )
    workers: Count | None = Field(
        None,
        description="Train with so many workers, started by Ray and started again if "
        "one is lost.",
    )
    ray_address: str | None = Field(
        None,
        description="host:port of the Ray cluster of the workers; this machine unless "
        "given.",
    )
    max_restarts: CountOrZero = Field(
        3, description="Starts after a worker was lost, from the newest checkpoint."
    )

    def __post_init__(self):
        alone = self.ray_address is not None and self.workers is None
        self._check("ray_address", not alone, "beside `workers`, the number to start")


PRESETS = {
    "quickstart": TrainingConfig(
        vocab_size=1024,
        embedding_dim=192,
        num_layers=2,
        num_heads=6,
        context_length=128,
        batch_size=8,
        steps=400,
        learning_rate=3e-3,
        warmup_steps=80,
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
        validate_every=250,
        validation_batches=None,
        checkpoint_every=500,
    ),
    "small": TrainingConfig(
        vocab_size=10000,
        embedding_dim=512,
        num_layers=6,
        num_heads=8,
        context_length=256,
        steps=5000,
        learning_rate=6e-4,
        warmup_steps=200,
        validate_every=250,
        checkpoint_every=250,
    ),
}
