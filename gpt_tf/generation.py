"""What continuing a prompt means, whoever computes the logits.

Keras models and the edge runtime share this, so that the same prompts, options and
messages hold in both. NumPy and a tokenizer are all it needs.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from gpt_tf.errors import InputError
from gpt_tf.text.tokenizer import StreamDecoder, Tokenizer


class GenerationNotice(UserWarning):
    """A prompt was changed before it was used."""


def answer(
    prompt,
    steps_of: Callable,
    *,
    vocab_size: int,
    context_length: int,
    tokenizer: Tokenizer | None,
    max_new_tokens: int,
    stop: Sequence[str],
    stream: bool,
):
    """Continue prompts with the tokens that an engine chooses.

    Args:
        prompt: A text, a list of texts, token ids, or a list of token ids. In a text
            special tokens are recognised, as `"<|endoftext|>"`. A text may be bytes,
            which are taken literally and need not be UTF-8 for a byte-level tokenizer.
        steps_of: Called with the prompts as lists of ids, the id that ends a text or
            None, and a set of rows to which no more tokens need be added, which
            grows. Returns an iterator over dicts of row to new token.
        vocab_size: The model's number of token ids.
        context_length: Positions that the model sees.
        tokenizer: Needed for texts.
        max_new_tokens: Largest number of tokens to add, at least 0.
        stop: Texts that end the generation; they are cut off.
        stream: Return an iterator over pieces instead; for one prompt only.

    Returns:
        What was added: a text for a text, a list of texts for a list of texts,
        a list of ids for ids, and so on. With `stream`, an iterator over texts, or
        over ids where the prompt was ids.

    Raises:
        InputError: A prompt or an option cannot be used.
    """
    if max_new_tokens < 0:
        raise InputError(
            f"`max_new_tokens` expects at least 0. Received: {max_new_tokens}."
        )
    stop = [stop] if isinstance(stop, str) else list(stop)
    rows, is_text, is_list = rows_of(prompt, tokenizer)
    check_rows(rows, vocab_size)
    if stop and tokenizer is None:
        raise InputError("`stop` expects a tokenizer, to compare text with.")
    if stream and is_list:
        raise InputError(
            f"`stream` follows one prompt. Received: a list of {len(rows)}. "
            "Pass the prompts one by one."
        )
    longest = max(map(len, rows))
    if longest > context_length and max_new_tokens:
        warnings.warn(
            f"The prompt of {longest} tokens is longer than the context of "
            f"{context_length}; its beginning was cut off.",
            GenerationNotice,
            stacklevel=3,
        )
    done = set()
    end = tokenizer.end_of_text_id if tokenizer is not None else None
    steps = steps_of(rows, end, done)
    if stream:
        tokens = (step[0] for step in steps)
        return _stream_text(tokens, tokenizer, stop) if is_text else tokens
    if is_text or stop:
        results = _collect_texts(steps, len(rows), tokenizer, stop, done)
        if not is_text:
            results = [tokenizer.encode(text) for text in results]
    else:
        results = [[] for _ in rows]
        for step in steps:
            for row, token in step.items():
                results[row].append(token)
    return results if is_list else results[0]


def rows_of(prompt, tokenizer) -> tuple[list[list[int]], bool, bool]:
    """Return prompts as lists of ids; whether they were text, and several.

    Raises:
        InputError: It is neither text nor ids, or text without a tokenizer.
    """
    is_list = isinstance(prompt, (list, tuple, np.ndarray)) and (
        len(prompt) > 0 and not isinstance(prompt[0], (int, np.integer))
    )
    prompts = list(prompt) if is_list else [prompt]
    if all(isinstance(item, (str, bytes)) for item in prompts):
        if tokenizer is None:
            raise InputError(
                "A prompt of text expects `tokenizer`. Received: None. Pass the "
                "tokenizer that the model was trained with, or token ids."
            )
        rows = [
            tokenizer.encode(item, special=True)
            if isinstance(item, str)
            else tokenizer.encode_bytes(item)
            for item in prompts
        ]
        return rows, True, is_list
    try:
        return [[int(token) for token in item] for item in prompts], False, is_list
    except (TypeError, ValueError):
        raise InputError(
            "A prompt is a text or token ids, or a list of one kind. "
            f"Received: {prompt!r}."
        ) from None


def check_rows(rows: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Refuse prompts that are empty or have ids that the model does not know.

    Raises:
        InputError: Such a prompt.
    """
    for index, row in enumerate(rows):
        if not row:
            raise InputError(
                f"Prompt {index} is empty. Give it at least one token, a line break "
                "for example."
            )
        if min(row) < 0 or max(row) >= vocab_size:
            raise InputError(
                f"Token ids run from 0 to {vocab_size - 1}. Received: {min(row)} to "
                f"{max(row)}. Use the tokenizer that the model was trained with."
            )


def _stream_text(tokens, tokenizer, stop) -> Iterator[str]:
    """Yield text as it is complete, holding back what may begin a stop text."""
    decoder = StreamDecoder(tokenizer)
    held = ""
    longest = max(map(len, stop), default=0)
    for token in tokens:
        held += decoder.push(token)
        cut = _first_stop(held, stop)
        if cut is not None:
            if held[:cut]:
                yield held[:cut]
            return
        ready = len(held) - max(0, longest - 1)
        if ready > 0:
            yield held[:ready]
            held = held[ready:]
    held += decoder.finish()
    cut = _first_stop(held, stop)
    held = held if cut is None else held[:cut]
    if held:
        yield held


def _collect_texts(steps, num_rows, tokenizer, stop, done):
    texts = [""] * num_rows
    decoders = [StreamDecoder(tokenizer) for _ in range(num_rows)]
    for step in steps:
        for row, token in step.items():
            if row in done:
                continue
            texts[row] += decoders[row].push(token)
            cut = _first_stop(texts[row], stop)
            if cut is not None:
                texts[row] = texts[row][:cut]
                done.add(row)
        if len(done) == num_rows:
            break
    return [
        text if row in done else text + decoders[row].finish()
        for row, text in enumerate(texts)
    ]


def _first_stop(text, stop):
    places = [place for item in stop if item and (place := text.find(item)) >= 0]
    return min(places, default=None)
