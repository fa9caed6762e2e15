"""What a quantised GPT computes in integers, and how its ranges are found.

Weights are symmetric and int8, or fewer bits, with the granularity of a channel or of
a whole matrix (tensor). Activations are static: each has one range, measured
beforehand.
"""

from typing import ClassVar, Literal

from pydantic import Field

from gpt_tf.settings.configuration import (
    Configuration,
    Count,
    CountOrZero,
    Rate,
    Share,
    configuration,
)

Dtype = Literal["float32", "int16", "int8"]
Method = Literal["minmax", "percentile", "mse"]

# Which activations a field of the configuration decides about.
_FIELD_OF = {
    "embedding_activation": "residual",
    "attention_norm_activation": "inputs",
    "qkv_activation": "outputs",
    "query_activation": "scores",
    "key_activation": "scores",
    "scores_activation": "scores",
    "probabilities_activation": "softmax",
    "context_activation": "inputs",
    "attended_activation": "outputs",
    "attention_residual_activation": "residual",
    "feedforward_norm_activation": "inputs",
    "up_activation": "outputs",
    "hidden_activation": "inputs",
    "down_activation": "outputs",
    "feedforward_residual_activation": "residual",
    "norm_activation": "inputs",
    "logits_activation": "logits",
}


@configuration
class QuantizationConfig(Configuration):
    """Dtypes of weights and activations, and when their static ranges are fixed.

    What it costs, in perplexity on 32,768 tokens that `saved_models/python-small`
    was not trained on (float32: 16.73), and the share of places where the top-1
    token stays the same; quantised without training, ranges from 50 batches:

    | quantised | perplexity | same token |
    |---|---|---|
    | weights alone, 8 bits per channel | +0.18 % | 98.6 % |
    | weights alone, 8 bits per tensor | +0.17 % | 96.6 % |
    | and `inputs` | +0.42 % | 97.0 % |
    | and `outputs`: the default | +0.52 % | 95.7 % |
    | the default, per tensor | +0.57 % | 94.5 % |
    | the default, weights of 4 bits | +11.8 % | 76.8 % |
    | the default, `residual="int16"` | +0.53 % | 95.6 % |
    | the default, `residual="int8"` | +1.54 % | 91.5 % |
    | the default, `scores="int16"` | +0.53 % | 95.6 % |
    | the default, `scores="int8"` | +0.88 % | 94.4 % |
    | the default, `softmax="int16"` | +0.51 % | 95.7 % |
    | the default, `softmax="int8"` | +0.58 % | 95.5 % |
    | the default, `logits="int8"` | +0.59 % | 94.8 % |
    | `full()` | +0.94 % | 93.7 % |
    | `full(scores="int16")` | +0.69 % | 94.8 % |

    Differences below 0.1 % are within the noise of rounding. Layer normalisation is
    float32 always. Of the methods of calibration `"mse"` gave the default +0.52 %,
    `"percentile"` at 99.999 +0.55 %, at 99.9 +4.3 %, and `"minmax"` +0.61 %.

    Raises:
        InputError: A value is of another type, or out of its range.

    Example:
        >>> QuantizationConfig(residual="int16").dtype_of("embedding_activation")
        'int16'
    """

    title: ClassVar[str] = "A quantisation config"

    weight_bits: int = Field(
        8,
        ge=2,
        le=8,
        description="Bits per weight of every matrix, tables included. A file holds 8 "
        "per channel, or 4 in blocks of 32; others are for study.",
    )
    block_size: Count | None = Field(
        None,
        description="How many inputs of an output channel share a scale; the tables "
        "then have 8 bits per row. With 32 and 4 bits, the weights are those of a file "
        "of mode int4. Not given, all inputs share one.",
    )
    per_channel: bool = Field(
        True,
        description="Whether every output channel of a matrix, or row of a table, has "
        "a scale of its own; otherwise each matrix has one, as TF-MOT's default.",
    )
    inputs: Dtype = Field(
        "int8",
        description="Dtype of what the products with weights read: layer-normalised "
        "vectors, attention's context, GELU's output.",
    )
    outputs: Dtype = Field(
        "int8",
        description="Dtype of what these products write, biases included; keys and "
        "values, and so the cache, among it.",
    )
    residual: Dtype = Field(
        "float32",
        description="Dtype of the embedding and of the sum after each half of a block.",
    )
    scores: Dtype = Field(
        "float32",
        description="Dtype of attention's scores before softmax, and of queries and "
        "keys that were normalised or turned by their positions.",
    )
    softmax: Dtype = Field(
        "float32", description="Dtype of the probabilities after softmax."
    )
    logits: Dtype = Field("float32", description="Dtype of the logits.")
    ema_decay: Rate = Field(
        0.99,
        description="Share that a range keeps when a batch of training has other "
        "extremes.",
    )
    freeze_ranges_at: Share = Field(
        0.5,
        description="Share of the training steps after which ranges no longer move; 1 "
        "lets them move to the end.",
    )
    calibration_batches: CountOrZero = Field(
        50,
        description="Batches of the training data from which `fit` first measures the "
        "ranges of a model that has none, before weights move; 0 starts with the first "
        "batch of training instead.",
    )
    calibration_method: Method = Field(
        "mse", description="How they are measured, as `method` of `calibrate`."
    )

    def __post_init__(self):
        fits = self.block_size is None or self.per_channel
        self._check("block_size", fits, "of None where per_channel is False")

    @classmethod
    def full(cls, **changes):
        """Return the configuration of a model without floating point, but changes."""
        whole = {"residual": "int16", "scores": "int8", "softmax": "int8"}
        return cls(**{**whole, "logits": "int8", **changes})

    def dtype_of(self, activation):
        """Return the dtype of an activation, such as `"qkv_activation"`."""
        return getattr(self, _FIELD_OF[activation])
