"""Text that models generate to learn from.

Before training, the teacher continues beginnings of the training text: what repeats
itself is thrown away, and the rest is mixed with real text (sequence-level
distillation). Within a training step, the student continues prompts for the teacher to
judge (on-policy distillation).

References: Kim and Rush, "Sequence-Level Knowledge Distillation", arXiv:1606.07947;
Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649.
"""

from collections.abc import Iterator

import numpy as np
import tensorflow as tf

from gpt_tf.errors import InputError
from gpt_tf.models import cached_forward
from gpt_tf.models.cached_forward import empty_cache, forward_cached
from gpt_tf.models.next_token import IGNORED, token_weights
from gpt_tf.settings import arguments
from gpt_tf.text.corpus import Document

_BATCH_SIZE = 32
_TOP_P = 0.95
# Documents of which a larger share repeats itself are left out.
_MAX_REPETITION = 0.3
# Rounds in a row of which nothing may be kept before we give up.
_FRUITLESS_ROUNDS = 5


def written_documents(
    teacher, tokenizer, tokens, num_tokens: int, *, prompt_length: int = 16, seed=0
) -> Iterator[Document]:
    """Let a teacher write documents, and leave out those that repeat themselves.

    Args:
        teacher: A trained GPT.
        tokenizer: Its tokenizer.
        tokens: Ids of real text `(N,)`; beginnings are taken from random places.
        num_tokens: Number of tokens to write at least, beginnings included.
        prompt_length: Tokens of each beginning, below the teacher's context.
        seed: The same seed writes the same documents.

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
    prompt_length = arguments.integer(
        "prompt_length",
        prompt_length,
        1,
        min(context, len(tokens)) - 1,
        repair="It is shorter than the context and the text.",
    )
    seed = arguments.integer("seed", seed, most=arguments.LARGEST_SEED)
    generator = np.random.default_rng(seed)
    count = kept = fruitless = 0
    while count < num_tokens:
        starts = generator.integers(0, len(tokens) - prompt_length, _BATCH_SIZE)
        prompts = [[int(t) for t in tokens[s : s + prompt_length]] for s in starts]
        texts = cached_forward.generate(
            teacher,
            prompts,
            tokenizer=tokenizer,
            max_new_tokens=context - prompt_length,
            temperature=1.0,
            top_p=_TOP_P,
            seed=int(generator.integers(2**31)),
        )
        before = kept
        for prompt, new in zip(prompts, texts, strict=True):
            ids = [*prompt, *new]
            if count >= num_tokens or repetition(ids) > _MAX_REPETITION:
                continue
            yield Document(f"written-{kept}", tokenizer.decode(ids))
            kept += 1
            count += len(ids)
        fruitless = 0 if kept > before else fruitless + 1
        if fruitless == _FRUITLESS_ROUNDS:
            raise InputError(
                f"Of {fruitless * _BATCH_SIZE} documents that the teacher wrote, each "
                f"repeats itself in over {_MAX_REPETITION:.0%} of its places. Train "
                "the teacher longer, or let it write nothing."
            )


def repetition(ids) -> float:
    """Return the share of runs of four tokens that occurred before, in [0, 1]."""
    runs = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


class OnPolicySteps:
    """A training step of which a share is on text that the student writes itself.

    A part of `Distiller`, before `TokenTraining` among its bases. The teacher alone
    judges what the student wrote.

    Reference: Agarwal et al. (GKD), arXiv:2306.13649, algorithm 1.
    """

    def train_step(self, data):
        if self.on_policy_fraction:
            data = self._with_own_text(*self.unpack(data))
        return super().train_step(data)

    def _with_own_text(self, x, y, sample_weight):
        """Let the student write a batch, or not, as the step's seed decides."""
        if set(x) != {"tokens"}:
            raise InputError(
                "`on_policy_fraction` expects token ids as inputs, which a live "
                f"teacher reads. Received: {sorted(x)}. Pass token ids, or 0."
            )
        tokens = x["tokens"]
        weights = token_weights(y, sample_weight)
        length = tokens.shape[1]
        prompt = self._prompt_length(length or 0)
        if length is None or not 1 <= prompt < length:
            raise InputError(
                "`on_policy_prompt_length` expects a number from 1 to below the "
                f"windows' known length. Received: {prompt} for windows of {length}."
            )
        done = tf.cast(self.optimizer.iterations, tf.int32)
        seed = tf.stack([self.on_policy_seed, done])
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        apart = tf.stack([7919 * (1 + tf.cast(replica, tf.int32)), 0])

        def own():
            written = self._compiled(self._write)(tokens, seed + apart)
            is_judged = (weights > 0.0) & (tf.range(length) >= prompt - 1)
            y = tf.where(is_judged, written[:, 1:], IGNORED)
            return written[:, :-1], y, tf.ones_like(weights), tf.zeros_like(weights)

        draw = tf.random.stateless_uniform([], seed)
        tokens, y, weights, labelled = tf.cond(
            draw < self.on_policy_fraction,
            own,
            lambda: (tokens, y, weights, tf.ones_like(weights)),
        )
        # Where the student wrote, no label tells what is right.
        return {"tokens": tokens, "labelled": labelled}, y, weights

    def _write(self, tokens, seed):
        """Continue the beginnings of windows `(B, T)` to `(B, T + 1)`."""
        length = tokens.shape[1]
        beginnings = tokens[:, : self._prompt_length(length)]
        return continued(self.student, beginnings, length + 1, seed)

    def _prompt_length(self, length):
        return self.on_policy_prompt_length or max(1, length // 4)


def continued(student, prompts, length, seed):
    """Let a GPT continue prompts `(B, P)` to `(B, length)`, inside a graph.

    It samples at temperature 1; the same seed, `(2,)` int32, gives the same text.
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
