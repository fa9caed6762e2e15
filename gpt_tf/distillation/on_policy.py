"""The student's own text, written inside a training step for the teacher to judge."""

import tensorflow as tf

from gpt_tf.models.cached_forward import empty_cache, forward_cached


def write(student, prompts, length, seed):
    """Let a GPT continue prompts, sampling at temperature 1, inside a graph.

    Args:
        student: A GPT.
        prompts: `(B, P)` int32, `P` at least 1.
        length: Number of tokens with the prompt, at most its context plus one.
        seed: `(2,)` int32; the same seed writes the same text.

    Returns:
        `(B, length)` int32: the prompts and what the student makes of them.
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
