"""Cached decoding in Keras at GPT-2 small's shape: gpt_tf beside KerasHub, in turn.

    python benchmarks/generation.py [--rounds N] [--new-tokens N]

Both continue the same random prompt greedily, one sequence at a time, in float32.
Every token reads every weight once; what that takes at the rate at which NumPy reads
memory is a yardstick, no bound.
"""

import argparse
import dataclasses
import os

import numpy as np
from harness import (
    Contender,
    console,
    finish,
    gpt_tf_model,
    keras_hub_gpt2,
    print_machine,
    read_rate,
    repeat,
    take_turns,
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A model and what it is to continue."""

    num_layers: int = 12
    num_heads: int = 12
    embedding_dim: int = 768
    vocab_size: int = 50257
    context_length: int = 1024
    prompt_tokens: int = 32
    new_tokens: int = 96

    @property
    def bytes_per_token(self):
        """Bytes of float32 that one token reads: blocks and head."""
        width = self.embedding_dim
        block = 12 * width * width + 13 * width
        return 4 * (self.num_layers * block + self.vocab_size * width)

    def prompt(self):
        generator = np.random.default_rng(1)
        return generator.integers(0, self.vocab_size, self.prompt_tokens)


def gpt_tf_generate(task):
    import gpt_tf

    model = gpt_tf_model(task)
    prompt = [int(token) for token in task.prompt()]

    def once():
        ids = gpt_tf.generate(
            model, prompt, max_new_tokens=task.new_tokens, temperature=0
        )
        _require(len(ids), task.new_tokens)

    return repeat(once)


def keras_hub_generate(task):
    model = keras_hub_gpt2(task)
    model.compile(sampler="greedy")
    total = task.prompt_tokens + task.new_tokens
    tokens = np.zeros((1, total), "int32")
    tokens[0, : task.prompt_tokens] = task.prompt()
    padding = np.arange(total)[None] < task.prompt_tokens

    def once():
        outputs = model.generate(
            {"token_ids": tokens, "padding_mask": padding}, stop_token_ids=None
        )
        _require(outputs["token_ids"].shape[1], total)

    return repeat(once)


def _require(found, expected):
    if found != expected:
        raise RuntimeError(f"{expected} tokens were expected. Received: {found}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=96)
    arguments = parser.parse_args()
    task = Task(new_tokens=arguments.new_tokens)
    print_machine()
    bandwidth = read_rate(task.bytes_per_token, os.cpu_count())
    floor = bandwidth / task.bytes_per_token
    console.print(
        f"all cores read {bandwidth / 1e9:.1f} GB/s; a token reads "
        f"{task.bytes_per_token / 1e6:.0f} MB: at most {floor:.1f} tokens/s"
    )
    results = take_turns(
        [
            Contender("gpt_tf", gpt_tf_generate, (task,)),
            Contender("KerasHub", keras_hub_generate, (task,)),
        ],
        arguments.rounds,
        1,
        warm_up=1,
    )
    report = []
    for measured in results:
        row = measured.as_dict()
        if not measured.failure:
            rate = task.new_tokens / measured.median_ms * 1e3
            row |= {"tokens_per_second": rate, "share_of_floor": rate / floor}
        report.append(row)
    finish(
        "generation",
        {
            "task": dataclasses.asdict(task),
            "probe": "a loop in C",
            "read_gigabytes_per_second": bandwidth / 1e9,
            "floor_tokens_per_second": floor,
            "results": report,
        },
    )


if __name__ == "__main__":
    main()
