"""Text that models generate to learn from.

Before training, the teacher continues beginnings of the training text: what repeats
itself is thrown away, and the rest is mixed with real text (sequence-level
distillation). Within a training step, the student continues prompts for the teacher to
judge (on-policy distillation).

References: Kim and Rush, "Sequence-Level Knowledge Distillation", arXiv:1606.07947;
Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649.
"""

from collections.abc import Callable, Iterator

import numpy as np
import tensorflow as tf

from gpt_tf.errors import InputError
from gpt_tf.models import cached_forward
from gpt_tf.models.cached_forward import empty_cache, forward_cached
from gpt_tf.settings import arguments
from gpt_tf.text.corpus import Document

# Rounds in a row of which nothing may be kept before we give up.
_FRUITLESS_ROUNDS = 5


def written_documents(
    teacher,
    tokenizer,
    tokens,
    num_tokens: int,
    *,
    prompt_length: int = 16,
    temperature: float = 1.0,
    top_p: float | None = 0.95,
    max_repetition: float = 0.3,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[Document]:
    """Let a teacher write documents.

    Args:
        teacher: A trained GPT.
        tokenizer: Its tokenizer.
        tokens: Ids of real text `(N,)`; beginnings are taken from random places.
        num_tokens: Number of tokens to write at least, beginnings included.
        prompt_length: Tokens of each beginning, below the teacher's context.
        temperature: As for `generate`.
        top_p: As for `generate`.
        max_repetition: Documents with a larger `repetition` are left out, in [0, 1].
        batch_size: Documents written at once.
        seed: The same seed writes the same documents.
        on_progress: Called with the number of tokens written so far.

    Yields:
        Documents, each as long as the teacher's context at most.

    Raises:
        InputError: A number is out of its range, or the teacher repeats itself so
            much that nothing can be kept.

    Example:
        >>> documents = list(written_documents(teacher, tokenizer, ids, 10_000))
    """
    context = teacher.context_length
    num_tokens = arguments.integer("num_tokens", num_tokens)
    batch_size = arguments.integer("batch_size", batch_size, 1)
    prompt_length = arguments.integer(
        "prompt_length",
        prompt_length,
        1,
        min(context, len(tokens)) - 1,
        repair="It is shorter than the context and the text.",
    )
    max_repetition = arguments.number("max_repetition", max_repetition, least=0, most=1)
    seed = arguments.integer("seed", seed, most=arguments.LARGEST_SEED)
    generator = np.random.default_rng(seed)
    count = kept = fruitless = 0
    while count < num_tokens:
        starts = generator.integers(0, len(tokens) - prompt_length, batch_size)
        prompts = [[int(t) for t in tokens[s : s + prompt_length]] for s in starts]
        continued = cached_forward.generate(
            teacher,
            prompts,
            tokenizer=tokenizer,
            max_new_tokens=context - prompt_length,
            temperature=temperature,
            top_p=top_p,
            seed=int(generator.integers(2**31)),
        )
        before = kept
        for prompt, new in zip(prompts, continued, strict=True):
            ids = [*prompt, *new]
            if count >= num_tokens or repetition(ids) > max_repetition:
                continue
            yield Document(f"written-{kept}", tokenizer.decode(ids))
            kept += 1
            count += len(ids)
        fruitless = 0 if kept > before else fruitless + 1
        if fruitless == _FRUITLESS_ROUNDS:
            raise InputError(
                f"Of {fruitless * batch_size} documents that the teacher wrote, each "
                f"repeats itself in over {max_repetition:.0%} of its places. Train "
                "the teacher longer, or allow more with `max_repetition`."
            )
        if on_progress is not None:
            on_progress(count)


def repetition(ids, length: int = 4) -> float:
    """Return the share of runs of `length` tokens that occurred before, in [0, 1]."""
    runs = [tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def continued(student, prompts, length, seed):
    """Let a GPT continue prompts, sampling at temperature 1, inside a graph.

    Args:
        student: A GPT.
        prompts: `(B, P)` int32, `P` at least 1.
        length: Number of tokens with the prompt, at most its context plus one.
        seed: `(2,)` int32; the same seed gives the same text.

    Returns:
        `(B, length)` int32: the prompts and what the student generates.
    """
    batch_size = prompts.shape[0] or tf.shape(prompts)[0]
    prompt_length = prompts.shape[1]
    starts = tf.zeros([batch_size], tf.int32)
    logits, caches = forward_cached(
        student, prompts, 0, starts, empty_cache(student, batch_size, length)
    )
    rest = tf.zeros([batch_size, length - prompt_length], tf.int32)
    text = tf.concat([prompts, rest], axis=1)

    def choose(logits, place):
        noise = tf.random.stateless_uniform(
            tf.shape(logits), seed + tf.stack([0, place * 65537]), minval=1e-7
        )
        gumbel = -tf.math.log(-tf.math.log(noise))
        return tf.argmax(logits + gumbel, axis=-1, output_type=tf.int32)  # (B,)

    def put(text, tokens, place):
        here = tf.range(length)[tf.newaxis] == place
        return tf.where(here, tokens[:, tf.newaxis], text)

    def more(place, text, token, caches):
        logits, updated = forward_cached(
            student, token[:, tf.newaxis], place, starts, caches
        )
        for new, old in zip(updated, caches, strict=True):
            new.set_shape(old.shape)
        token = choose(logits[:, 0], place + 1)
        return place + 1, put(text, token, place + 1), token, updated

    token = choose(logits[:, -1], tf.constant(prompt_length))
    text = put(text, token, prompt_length)
    _, text, _, _ = tf.while_loop(
        lambda place, *_: place < length - 1,
        more,
        (tf.constant(prompt_length), text, token, caches),
        maximum_iterations=max(0, length - 1 - prompt_length),
    )
    return text
