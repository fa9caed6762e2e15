"""What of a conversation a model sees, and what ends its answer.

Keras models and the edge runtime make the prompt of `generate` here.
"""

import bisect
import functools
import warnings
from collections.abc import Sequence

from gpt_tf.errors import InputError
from gpt_tf.generation.sequence import GenerationNotice
from gpt_tf.settings import arguments
from gpt_tf.text.chat import check_messages
from gpt_tf.text.tokenizer import Tokenizer


def begin(
    messages: Sequence[dict],
    tokenizer: Tokenizer | None,
    *,
    context_length: int,
    max_new_tokens: int,
    stop: Sequence[str],
) -> tuple[str, dict]:
    """Write a conversation as a prompt that leaves room for the answer.

    Where all of it is too long, the oldest turns are left out, with a
    `GenerationNotice`; system messages at the beginning stay.

    Args:
        messages: As for `ChatTemplate.render`.
        tokenizer: With a chat template.
        context_length: Positions that the model sees.
        max_new_tokens: Largest number of tokens of the answer. Room is left for them,
            up to half of the context.
        stop: Texts that end the answer, beside the end of its turn.

    Returns:
        The prompt, and the options of `generate` that are to be as they are here:
        `max_new_tokens` and `stop`.

    Raises:
        InputError: There is no template, it cannot render the messages, or the last
            turn alone fills the context.
    """
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        raise InputError(
            "A chat expects a model with a chat template. Received: one without. "
            "Use `generate`, or give its tokenizer a `chat_template`, a "
            "`gpt_tf.text.chat.ChatTemplate`."
        )
    arguments.integer("max_new_tokens", max_new_tokens)
    stop = arguments.texts("stop", stop)
    check_messages(messages)
    count = next((i for i, m in enumerate(messages) if m["role"] != "system"), 0)
    system, turns = list(messages[:count]), list(messages[count:])
    room = context_length - min(max_new_tokens, context_length // 2)
    # Where what is left of it may begin.
    begins = [0, *(i for i, m in enumerate(turns) if i and m["role"] == "user")]

    @functools.cache
    def written(number):
        prompt = template.render([*system, *turns[begins[number] :]])
        return prompt, len(tokenizer.encode(prompt, special=True))

    def fits(number):
        return written(number)[1] <= room

    number = 0
    if not fits(0):  # the first that does, or the last
        number = bisect.bisect_left(range(len(begins) - 1), True, key=fits)
    prompt, length = written(number)
    if length >= context_length:
        raise InputError(
            f"The last turn expects room in the context of {context_length} tokens. "
            f"Received: {length}. Make the message shorter, or the system prompt."
        )
    if number > 0:
        warnings.warn(
            f"The conversation is longer than the context of {context_length} tokens; "
            "its oldest turns are left out.",
            GenerationNotice,
            stacklevel=3,
        )
    end = _end_of_turn(tokenizer)
    return prompt, {
        "max_new_tokens": min(max_new_tokens, context_length - length),
        "stop": [*stop, *end],
    }


def ids_that_end(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that end an answer: the tokenizer's, and that of a turn's end."""
    end = _end_of_turn(tokenizer) if tokenizer.chat_template else []
    return [*tokenizer.end_ids, *map(tokenizer.backend.token_to_id, end)]


def _end_of_turn(tokenizer):
    """Return the special token that the template ends a turn with, or nothing.

    Nor is it returned if it ends what the model writes anyway.
    """
    after = tokenizer.chat_template.turn_end.lstrip()
    added = tokenizer.backend.get_added_tokens_decoder()
    tokens = [added[i].content for i in added if i not in tokenizer.end_ids]
    return sorted(filter(after.startswith, tokens), key=len)[-1:]
