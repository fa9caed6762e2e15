"""What each weight-quantisation strategy costs: weight error, perplexity, bytes.

    python benchmarks/quantization_strategies.py [--model FOLDER] [--windows N]

The model is `saved_models/python-small`; the text is the tenth of Python's standard
library that its training held out (the interpreter's own, so another version of
Python has another text). The matrices are rounded, everything else computes in
float32: the table shows what the strategy does to the weights, and nothing else.
Perplexities are compared token by token on the same text; the error after a ratio is
the standard error of that comparison, with the windows of text as the units.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from harness import console, finish, print_machine

import gpt_tf
from gpt_tf.quantization.weights import STRATEGIES, channel_axis

MODEL = Path(__file__).parent.parent / "saved_models/python-small"
BITS = (8, 6, 4)
BATCH_SIZE = 16


def held_out_windows(tokenizer, context_length, limit):
    """Return inputs and targets `(N, T)` of the held-out text, whole windows only."""
    corpus = gpt_tf.open_corpus("python-stdlib", validation_fraction=0.1)
    ids = []
    for document in corpus.documents("validation"):
        ids += tokenizer.encode(document.text)
        if document.ends and tokenizer.end_of_text_id is not None:
            ids.append(tokenizer.end_of_text_id)
    count = min((len(ids) - 1) // context_length, limit)
    windows = gpt_tf.Windows(np.array(ids), context_length, count, shuffle=False)
    x, y, _ = windows.batch(0)
    return x, y


class Meter:
    """Per-token losses of any weights in one graph."""

    def __init__(self, model, x, y):
        import tensorflow as tf

        self.model = gpt_tf.GPTModel.from_config(model.get_config())
        self.data = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH_SIZE)

        @tf.function(reduce_retracing=True)
        def losses(x, y):
            logits = self.model(x, training=False)
            return tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)

        self.losses = losses

    def losses_of(self, model):
        """Return losses in nats, `(N, T)`."""
        self.model.set_weights(model.get_weights())
        parts = [self.losses(x, y).numpy() for x, y in self.data]
        return np.concatenate(parts).astype(np.float64)


def measure(model, meter):
    """Return a row per strategy and number of bits, float32 first."""
    reference = meter.losses_of(model)
    rows = [
        {
            "strategy": "float32",
            "bits": 32,
            "perplexity": math.exp(reference.mean()),
            "ratio": 1.0,
            "ratio_standard_error": 0.0,
            "size_bytes": 4 * model.count_params(),
        }
    ]
    for bits in BITS:
        for strategy in STRATEGIES:
            quantized = gpt_tf.quantize_weights(model, strategy, bits)
            losses = meter.losses_of(quantized.model)
            change = (losses - reference).mean(axis=1)  # (N,)
            ratio = math.exp(change.mean())
            error = ratio * change.std(ddof=1) / math.sqrt(len(change))
            rows.append(
                {
                    "strategy": strategy,
                    "bits": bits,
                    "snr_db": quantized.overall_snr_db,
                    "smallest_snr_db": min(quantized.snr_db.values()),
                    "perplexity": math.exp(losses.mean()),
                    "ratio": ratio,
                    "ratio_standard_error": float(error),
                    "size_bytes": quantized.size_bytes,
                    "snr_db_by_weight": quantized.snr_db,
                }
            )
            console.print(f"  {strategy}, {bits} bits: ratio {ratio:.4f}")
    return rows


def channel_spread(model):
    """Return each matrix's largest weight over the median of its channels' largest.

    It is the factor by which a scale per channel makes the median channel's step
    smaller than a scale per tensor does.
    """
    spread = {}
    for variable in model.weights:
        if variable.shape.rank == 2:
            name = variable.name.partition(":")[0]
            largest = np.abs(variable.numpy()).max(axis=1 - channel_axis(name))
            spread[name] = float(largest.max() / np.median(largest))
    return spread


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--windows", type=int, default=100_000, help="at most")
    arguments = parser.parse_args()
    print_machine()
    model, tokenizer = gpt_tf.load_model(arguments.model)
    x, y = held_out_windows(tokenizer, model.context_length, arguments.windows)
    facts = {
        "model": arguments.model.name,
        "parameters": model.count_params(),
        "corpus": "python-stdlib, validation",
        "tokens": int(x.size),
        "windows": len(x),
        "context_length": model.context_length,
    }
    rows = measure(model, Meter(model, x, y))
    spread = channel_spread(model)
    finish(
        "quantization_strategies",
        {**facts, "channel_spread": spread, "results": rows},
    )


if __name__ == "__main__":
    try:
        main()
    except gpt_tf.InputError as error:
        raise SystemExit(str(error)) from None
