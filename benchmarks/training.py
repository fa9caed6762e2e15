"""Time of a training step: gpt_tf beside KerasHub and PyTorch, in turn.

    python benchmarks/training.py [--shape small|large] [--rounds N]

Each contender trains a GPT-2 of the same shape with AdamW and clipping by global
norm, on batches that come from a table of token ids: ours and KerasHub's by `fit`,
PyTorch's by the usual loop. A step is what lies between the ends of two steps, so
waiting for input counts.
"""

import argparse
import dataclasses
import time

import numpy as np
from harness import (
    Contender,
    console,
    finish,
    gpt_tf_model,
    import_torch,
    keras_hub_gpt2,
    print_machine,
    product_rate,
    take_turns,
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model and its batch."""

    num_layers: int
    num_heads: int
    embedding_dim: int
    context_length: int
    batch_size: int
    vocab_size: int

    @property
    def tokens(self):
        return self.batch_size * self.context_length

    @property
    def operations(self):
        """Multiplications and additions of the matrix products of one step.

        Forward and twice that backward; attention counts the whole square, which
        every contender computes or masks.
        """
        width = self.embedding_dim
        kernels = self.num_layers * 12 * width * width + self.vocab_size * width
        square = self.num_layers * 2 * self.context_length * width
        return 3 * 2 * self.tokens * (kernels + square)

    def __str__(self):
        return (
            f"{self.num_layers} layers, {self.num_heads} heads, "
            f"{self.embedding_dim} wide, context {self.context_length}, "
            f"batch {self.batch_size}, vocabulary {self.vocab_size}"
        )


SHAPES = {
    "small": Shape(4, 4, 128, 64, 12, 65),
    "large": Shape(6, 8, 512, 128, 8, 10000),
    "long": Shape(6, 8, 512, 1024, 1, 10000),
}

LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0


def token_ids(shape):
    generator = np.random.default_rng(0)
    return generator.integers(0, shape.vocab_size, 200_000).astype("int32")


# Contenders


def gpt_tf_fit(shape, jit_compile):
    """`GPTModel.fit` on `Windows`, all as a user gets it."""
    import gpt_tf

    model = gpt_tf_model(shape)
    model.compile(
        optimizer=gpt_tf.AdamW(
            LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            beta_1=BETAS[0],
            beta_2=BETAS[1],
            global_clipnorm=CLIP,
        ),
        jit_compile=jit_compile,
    )
    windows = gpt_tf.Windows(token_ids(shape), shape.context_length, shape.batch_size)
    import tf_keras

    return fit_by_steps(model, windows.dataset(), tf_keras)


def keras_hub_fit(shape, jit_compile):
    """KerasHub's `GPT2CausalLM.fit` on TensorFlow, without its metrics."""
    model = keras_hub_gpt2(shape)  # first: it says so where KerasHub is missing
    import keras

    import gpt_tf

    model.compile(
        optimizer=keras.optimizers.AdamW(
            LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            beta_1=BETAS[0],
            beta_2=BETAS[1],
            global_clipnorm=CLIP,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
        jit_compile=jit_compile,
    )
    windows = gpt_tf.Windows(token_ids(shape), shape.context_length, shape.batch_size)
    padding = np.ones((shape.batch_size, shape.context_length), "bool")
    dataset = windows.dataset().map(
        lambda x, y, weights: ({"token_ids": x, "padding_mask": padding}, y, weights)
    )
    return fit_by_steps(model, dataset.prefetch(4), keras)


def fit_by_steps(model, dataset, keras):
    class Clock(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.ends = []

        def on_train_batch_end(self, batch, logs=None):
            self.ends.append(time.perf_counter())

    def repeat(count):
        clock = Clock()
        # The first step of a `fit` waits for its input pipeline to start.
        model.fit(
            dataset, steps_per_epoch=count + 1, epochs=1, verbose=0, callbacks=[clock]
        )
        return list(np.diff(clock.ends))

    return repeat


def torch_loop(shape, compiled):
    """A plain PyTorch GPT-2 in the usual training loop."""
    torch = import_torch()
    import torch.nn.functional as functional
    from torch import nn

    class Block(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.heads = heads
            self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = (
                nn.Linear(width, 4 * width),
                nn.Linear(4 * width, width),
            )

        def forward(self, x):
            batch, length, width = x.shape
            qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
            hidden = functional.gelu(self.up(self.norm_2(x)), approximate="tanh")
            return x + self.down(hidden)

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            width = shape.embedding_dim
            self.tokens = nn.Embedding(shape.vocab_size, width)
            self.places = nn.Embedding(shape.context_length, width)
            blocks = (Block(width, shape.num_heads) for _ in range(shape.num_layers))
            self.blocks = nn.Sequential(*blocks)
            self.norm = nn.LayerNorm(width)
            self.head = nn.Linear(width, shape.vocab_size, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, x, y):
            h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
            logits = self.head(self.norm(self.blocks(h)))
            return functional.cross_entropy(
                logits.view(-1, shape.vocab_size), y.view(-1)
            )

    torch.manual_seed(0)
    model = GPT()
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": WEIGHT_DECAY},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=LEARNING_RATE,
        betas=BETAS,
        fused=True,
    )
    forward = torch.compile(model) if compiled else model
    ids = torch.from_numpy(token_ids(shape).astype("int64"))
    steps = torch.arange(shape.context_length)

    def one():
        starts = torch.randint(len(ids) - shape.context_length, (shape.batch_size, 1))
        x, y = ids[starts + steps], ids[starts + steps + 1]
        optimizer.zero_grad(set_to_none=True)
        forward(x, y).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()

    def repeat(count):
        ends = [time.perf_counter()]
        for _ in range(count):
            one()
            ends.append(time.perf_counter())
        return list(np.diff(ends))

    return repeat


CONTENDERS = (
    ("gpt_tf, XLA", gpt_tf_fit, True),
    ("gpt_tf, graph", gpt_tf_fit, False),
    ("KerasHub, XLA", keras_hub_fit, True),
    ("KerasHub, graph", keras_hub_fit, False),
    ("PyTorch, eager", torch_loop, False),
    ("PyTorch, compile", torch_loop, True),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, help="steps in a turn")
    parser.add_argument("--only", help="contenders whose name holds this, comma-parted")
    arguments = parser.parse_args()
    print_machine()
    console.print("a matrix product of 1536 x 1536, the floor's rate")
    rate = product_rate()
    console.print(f"  {rate / 1e9:.0f} GFLOP/s")
    report = {"matrix_product_gflops": rate / 1e9, "shapes": {}}
    only = arguments.only.split(",") if arguments.only else [""]
    for name in arguments.shape or SHAPES:
        shape = SHAPES[name]
        console.print(f"\n{name}: {shape}")
        contenders = [
            Contender(label, make, (shape, flag))
            for label, make, flag in CONTENDERS
            if any(part in label for part in only)
        ]
        steps = arguments.steps or (30 if name == "small" else 4)
        results = take_turns(contenders, arguments.rounds, steps)
        floor_ms = shape.operations / rate * 1e3
        report["shapes"][name] = {
            "shape": dataclasses.asdict(shape),
            "floor_ms": floor_ms,
            "results": [_row(m, shape, floor_ms) for m in results],
        }
    finish("training", report, keep=not arguments.only and not arguments.shape)


def _row(measured, shape, floor_ms):
    row = measured.as_dict()
    if not measured.failure:
        row["tokens_per_second"] = shape.tokens / measured.median_ms * 1e3
        row["model_flop_utilisation"] = floor_ms / measured.median_ms
    return row


if __name__ == "__main__":
    main()
