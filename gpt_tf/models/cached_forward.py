"""Generation: prefill a cache with the prompt, then decode token by token.

The cached graph calls the very layers of the training graph, wrapped by TF-MOT or
not. Prompts of unequal length are left-padded, so that all rows write the same
cache row; the padding is masked. Lengths are rounded up, so that XLA
compiles few shapes.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from gpt_tf.errors import InputError
from gpt_tf.generation import conversation, sequence
from gpt_tf.generation.sampler import Sampler
from gpt_tf.models import layers, ops, placement, xla
from gpt_tf.settings import arguments
from gpt_tf.text.tokenizer import Tokenizer

_SMALLEST_BUCKET = 16


class Parts(NamedTuple):
    """The layers of a GPT in the order of the data, wrapped or not."""

    embedding: tf.Module
    blocks: tuple
    norm: tf.Module
    head: tf.Module

    def embed(self, inputs, training=False):
        """Return vectors `(B, T, C)`, and the token table or None for `score`."""
        outputs = self.embedding(inputs, training=training)
        return outputs if isinstance(outputs, (list, tuple)) else (outputs, None)

    def run_blocks(self, tokens, training=False):
        """Return what the last block gives, `(B, T, C)`, and the table for `score`."""
        x, table = self.embed(tokens, training)
        for block in self.blocks:
            x = block(x, training=training)
        return x, table

    def before_head(self, tokens):
        """Return what the head reads, `(B, T, C)`: cheap where nobody wants logits."""
        return self._call(self.norm, self.run_blocks(tokens)[0], training=False)

    def score(self, x, table, training=False):
        """Return logits `(B, T, V)` of what the last block gives."""
        x = self._call(self.norm, x, training)
        return self._call(self.head, x if table is None else [x, table], training)

    @staticmethod
    def _call(layer, x, training):
        # Only TF-MOT's wrappers of these layers ask whether they are trained.
        return layer(x, training=training) if hasattr(layer, "layer") else layer(x)


def parts_of(model) -> Parts:
    """Find a GPT's layers by their kind, through TF-MOT's wrappers.

    Raises:
        InputError: The model is not made of gpt_tf's layers.
    """
    if not hasattr(model, "layers"):
        arguments.instance("model", model, tf.keras.Model, "a GPT of gpt_tf's layers")
    found = {}
    for layer in model.layers:
        kind = type(getattr(layer, "layer", layer))
        found.setdefault(kind, []).append(layer)
    try:
        return Parts(
            found[layers.TokenAndPositionEmbedding][0],
            tuple(found[layers.TransformerBlock]),
            found[layers.LayerNormalization][0],
            found[layers.LanguageModelHead][0],
        )
    except KeyError as error:
        raise InputError(
            f"Decoding expects a GPT of gpt_tf's layers; {error.args[0].__name__} is "
            f"missing in {type(model).__name__} {model.name!r}."
        ) from None


def logits_at(model, tokens, places, training=False):
    """Score the next tokens at some places only, without a cache.

    Args:
        model: A GPT.
        tokens: `(B, T)` int32.
        places: `(B, K)` int32, positions of each row.
        training: As for every layer.

    Returns:
        Logits `(B, K, V)`: those of the model at the places.
    """
    parts = parts_of(model)
    x, table = parts.run_blocks(tokens, training)
    x = tf.gather(x, places, batch_dims=1)  # (B, K, C)
    return parts.score(x, table, training)


def looks_untrained(model) -> bool:
    """Whether the vectors of a GPT's blocks are as before the first step.

    Not of one that was read from a file of somebody else's, which is taken as it is.
    """
    if getattr(model, "is_pretrained", False):
        return False
    for block in parts_of(model).blocks:
        block = getattr(block, "layer", block)
        for name in block.weight_names:
            if not name.endswith("_kernel"):
                start = 1.0 if name.endswith("_gamma") else 0.0
                if np.any(getattr(block, name).numpy() != start):
                    return False
    return True


def empty_cache(model, batch_size: int, capacity: int) -> list[tf.Tensor]:
    """Return keys and values of every block, `2 * L` tensors `(B, G, S, D)` of 0."""
    parts = parts_of(model)
    caches = []
    for block in parts.blocks:
        block = getattr(block, "layer", block)
        shape = [batch_size, block.num_kv_heads, capacity, block.head_dim]
        caches += [tf.zeros(shape, block.compute_dtype) for _ in range(2)]
    return caches


def forward_cached(model, tokens, position, starts, caches):
    """Run tokens that follow what is in the cache.

    Args:
        model: A GPT.
        tokens: `(B, T)` int32.
        position: `()` int32, cache row of the first of them.
        starts: `(B,)` int32, cache row at which each row's text begins.
        caches: `2 * L` tensors `(B, G, S, D)`.

    Returns:
        Logits `(B, T, V)` and the caches with `T` more rows.
    """
    parts = parts_of(model)
    mask, positions = cached_mask(position, starts, tokens.shape[1], caches[0].shape[2])
    # Right padding may lie after the last position.
    positions = tf.minimum(positions, _config(model, "context_length") - 1)
    x, table = parts.embed([tokens, positions])
    x, caches = blocks_cached(parts.blocks, x, caches, position, mask, positions)
    return parts.score(x, table), caches


def cached_mask(position, starts, length, capacity):
    """Return which rows of a cache `T` new tokens see, and the tokens' positions.

    Returns:
        `(B, 1, T, S)` bool and `(B, T)` int32, for arguments as of `forward_cached`.
    """
    rows = position + tf.range(length)  # (T,)
    positions = tf.maximum(rows[tf.newaxis] - starts[:, tf.newaxis], 0)  # (B, T)
    columns = tf.range(capacity)[tf.newaxis, tf.newaxis, tf.newaxis]
    mask = tf.logical_and(
        columns <= rows[tf.newaxis, tf.newaxis, :, tf.newaxis],
        columns >= starts[:, tf.newaxis, tf.newaxis, tf.newaxis],
    )
    return mask, positions


def blocks_cached(blocks, x, caches, position, mask, positions):
    """Run blocks on `(B, T, C)`, each with two of the caches; return both, updated."""
    updated = []
    for index, block in enumerate(blocks):
        x, keys, values = block(
            [x, caches[2 * index], caches[2 * index + 1], position, mask, positions],
            training=False,
        )
        updated += [keys, values]
    return x, updated


def append(model, tokens, position, caches, starts=None):
    """Run tokens that follow what is in the cache, as `forward_cached`, compiled.

    Args:
        model: A GPT.
        tokens: `(B, T)` int32.
        position: Cache row of the first of them.
        caches: `2 * L` tensors `(B, G, S, D)`, with room for `T` more rows.
        starts: `(B,)` int32, cache row at which each row's text begins; 0 unless given.

    Returns:
        Logits `(B, T, V)`, and the caches with `T` more rows.
    """
    tokens = tf.cast(tokens, tf.int32)
    starts = np.zeros(tokens.shape[0]) if starts is None else starts
    compiled, device = _compiled(model, caches, tokens.shape[1])
    with tf.device(device):
        return compiled(
            tokens, tf.constant(position, tf.int32), tf.cast(starts, tf.int32), caches
        )


def _compiled(model, caches, num_tokens):
    """Return the cached forward pass for these shapes, compiled by XLA, and its device.

    A trace per shape is meant; a `tf.function` would warn of many.
    """
    functions = model.__dict__.setdefault("_decoding_functions", {})
    batch_size, _, capacity, _ = caches[0].shape
    key = (batch_size, num_tokens, capacity)
    if key not in functions:
        plan = getattr(model, "plan", placement.OnePlace())

        def run(tokens, position, starts, caches):
            if plan.is_divided:  # each of its stages is compiled by itself
                return plan.forward_cached(model, tokens, position, starts, caches)
            return forward_cached(model, tokens, position, starts, caches)

        uses_xla = False if plan.is_divided else None
        compiled = xla.compiled(run, uses_xla).get_concrete_function(
            tf.TensorSpec([batch_size, num_tokens], tf.int32),
            tf.TensorSpec([], tf.int32),
            tf.TensorSpec([batch_size], tf.int32),
            [tf.TensorSpec(cache.shape, cache.dtype) for cache in caches],
        )
        functions[key] = compiled, placement.device_of(model)
    return functions[key]


def generate(
    model,
    prompt,
    *,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    stream: bool = False,
):
    """Continue prompts.

    Args:
        model: A GPTModel, or one that TF-MOT made of it.
        prompt: A text, a list of texts, token ids, or a list of token ids. In a text
            special tokens are recognised, as `"<|endoftext|>"`; bytes are literal. Ids
            may stand in an array or tensor. Each text is continued as if it were
            alone: where it fills the context, its newest half is kept.
        tokenizer: Needed for texts, and for `stop`. Ids to which it has no token, as
            in a padded vocabulary, are never chosen.
        max_new_tokens: Largest number of tokens to add, at least 0.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Choose among this many tokens.
        top_p: Choose among the most likely tokens that have this probability
            together.
        repetition_penalty: Above 1 makes tokens that occurred less likely.
        seed: The same seed gives the same text.
        stop: Texts that end the generation; they are cut off. The end-of-text
            token always ends it.
        stream: Return an iterator over pieces instead; for one prompt only.

    Returns:
        What was added: a text for a text, a list of texts for a list of texts,
        a list of ids for ids, and so on. Of ids, those that were drawn, up to the
        last that lies wholly before a stop text. With `stream`, an iterator over
        texts, or over ids where the prompt was ids.

    Raises:
        InputError: A prompt or an option cannot be used.

    Example:
        >>> generate(model, "def", tokenizer=tokenizer, max_new_tokens=20, seed=1)
    """
    context, vocab_size = (
        _config(model, name) for name in ("context_length", "vocab_size")
    )
    suppressed = sequence.ids_without_token(tokenizer, vocab_size)
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty, seed, suppressed)
    sequences, is_list = sequence.begin(
        prompt,
        sampler,
        vocab_size=vocab_size,
        context_length=context,
        tokenizer=tokenizer,
        max_new_tokens=max_new_tokens,
        stop=stop,
        stream=stream,
    )
    return sequence.results(sequences, is_list, _continue(model, sequences), stream)


def stream(model, prompt, **options) -> Iterator[str]:
    """Continue one prompt piece by piece: `generate` with `stream=True`."""
    return generate(model, prompt, stream=True, **options)


def chat(
    model,
    messages: Sequence[dict],
    *,
    tokenizer: Tokenizer,
    max_new_tokens: int = 512,
    stop: Sequence[str] = (),
    **options,
):
    """Answer a conversation, by the chat template of a tokenizer.

    Args:
        model: As for `generate`.
        messages: As for `EdgeGPT.chat`.
        tokenizer: The model's, with a chat template.
        max_new_tokens: As for `EdgeGPT.chat`.
        stop: Further texts that end the answer.
        **options: As for `generate`.

    Returns:
        The answer, a text, or with `stream` an iterator over its pieces.

    Raises:
        InputError: There is no chat template, it refuses the messages, or an option
            cannot be used.

    Example:
        >>> messages = [{"role": "user", "content": "What is the sea?"}]
        >>> chat(model, messages, tokenizer=tokenizer, max_new_tokens=50)
    """
    prompt, limits = conversation.begin(
        messages,
        tokenizer,
        context_length=_config(model, "context_length"),
        max_new_tokens=max_new_tokens,
        stop=stop,
    )
    return generate(model, prompt, tokenizer=tokenizer, **limits, **options)


def _config(model, name):
    embedding = parts_of(model).embedding
    return getattr(getattr(embedding, "layer", embedding), name)


def _continue(model, sequences):
    """Yield what can be shown, a token per sequence at a time, until all finished.

    Each row sees its own window, whatever the others do: one that slides while they
    go on is prefilled alone, and its keys and values are written into its row.
    """
    context = _config(model, "context_length")
    while active := [row for row, s in enumerate(sequences) if not s.finished]:
        sliding = [row for row in active if sequences[row].needs_prefill]
        if sliding == active:
            windows = [s.pending[-1:] if s.finished else s.pending for s in sequences]
            position = min(_bucket(max(map(len, windows))), context)
            remaining = sequences[active[0]].remaining
            capacity = position + min(_bucket(remaining), context)
            tokens, starts = _left_padded(windows, position)
            caches = empty_cache(model, len(sequences), capacity)
            logits, caches = append(model, tokens, 0, caches, starts)
        else:
            for row in sliding:
                *ids, _ = sequences[row].pending
                starts[row] = position - len(ids)
                caches = _refill(model, caches, ids, row, starts[row])
            for row in set(range(len(sequences))).difference(active):
                starts[row] = position  # it sees no more than the token of this step
            if position == capacity:
                unused = min(starts)
                caches = [tf.roll(cache, -unused, axis=2) for cache in caches]
                starts, position = starts - unused, position - unused
            tokens = np.array([s.pending[-1:] for s in sequences], np.int32)
            logits, caches = append(model, tokens, position, caches, starts)
            position += 1
        values = logits[:, -1].numpy()
        for row in active:
            yield from sequences[row].push(values[row])


def _left_padded(windows, width):
    """Return windows as `(B, width)` int32, and the column where each begins."""
    tokens = np.zeros((len(windows), width), np.int32)
    starts = np.array([width - len(window) for window in windows], np.int32)
    for row, window in enumerate(windows):
        tokens[row, starts[row] :] = window
    return tokens, starts


def _refill(model, caches, ids, row, begin):
    """Put the keys and values of ids into one row of the caches, from `begin` on."""
    if not ids:
        return caches
    own = empty_cache(model, 1, len(ids))
    _, own = append(model, np.array([ids], np.int32), 0, own)
    return [
        tf.concat(
            [
                cache[:row],
                ops.write_rows(cache[row : row + 1], rows, begin),
                cache[row + 1 :],
            ],
            axis=0,
        )
        for cache, rows in zip(caches, own, strict=True)
    ]


def _bucket(length):
    """Round up, so that few lengths are compiled."""
    size = _SMALLEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size
