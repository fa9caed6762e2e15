"""Requests and answers of OpenAI's protocol: what is taken, and what comes back.

Reference: platform.openai.com/docs/api-reference, completions and chat.
"""

import time
import uuid
from collections.abc import Iterable
from typing import Annotated, Literal

import pydantic
from pydantic import Field

from gpt_tf import artifacts
from gpt_tf.edge.serving.worker import Piece
from gpt_tf.text.tokenizer import Tokenizer

_MOST_STOPS, _LONGEST_STOP = 16, 1024
_MOST_LOGPROBS = 20
# Types of errors by their status.
_KINDS = {
    401: "authentication_error",
    429: "rate_limit_error",
    **dict.fromkeys((500, 503), "server_error"),
}
# What says something about a request and nothing about its text.
_REMARKS = {"metadata", "parallel_tool_calls", "service_tier", "store", "user"}

Stop = Annotated[str, Field(min_length=1, max_length=_LONGEST_STOP)]
Logprobs = Annotated[int, Field(ge=0, le=_MOST_LOGPROBS)]
Count = Annotated[int, Field(ge=1)]


class StreamOptions(pydantic.BaseModel):
    """What a stream ends with."""

    include_usage: bool = False


class TextRequest(pydantic.BaseModel):
    """What both kinds of requests have; `top_k` and `repetition_penalty` are ours.

    A null is as good as nothing. What is not known is refused, unless it is off.
    """

    model_config = pydantic.ConfigDict(
        strict=True, extra="allow", allow_inf_nan=False, hide_input_in_errors=True
    )

    model: str
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=_MOST_STOPS)] = ()
    n: Count = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values):
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}

    @pydantic.model_validator(mode="after")
    def _knows_all(self):
        for name, value in self.model_extra.items():
            if value and name not in _REMARKS:
                raise ValueError(f"`{name}` is not known here; leave it out")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop texts."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


class CompletionRequest(TextRequest):
    """A request to `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    # Number of likely tokens to name beside each token; None: not even its own.
    num_logprobs: Logprobs | None = Field(None, alias="logprobs")


class ChatPart(pydantic.BaseModel):
    """A part of a message that is written in parts."""

    type: Literal["text"]
    text: str


class ChatMessage(pydantic.BaseModel):
    """A message of a conversation."""

    role: Annotated[str, Field(min_length=1)]
    content: str | list[ChatPart]

    def plain(self) -> dict:
        """Return it as chat templates know messages."""
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return {"role": self.role, "content": text}


class ChatRequest(TextRequest):
    """A request to `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool = False
    top_logprobs: Logprobs = 0
    max_completion_tokens: Annotated[int, Field(ge=0)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """As of `CompletionRequest`."""
        return self.top_logprobs if self.logprobs else None


class Answer:
    """The answers to one request, in the form that its kind asks for.

    Args:
        request: The request.
        tokenizer: The model's.
        prompt_tokens: Number of tokens of its prompts.
    """

    def __init__(self, request: TextRequest, tokenizer: Tokenizer, prompt_tokens: int):
        self._is_chat = isinstance(request, ChatRequest)
        self._request, self._tokenizer = request, tokenizer
        self._tokens = {"prompt_tokens": prompt_tokens, "completion_tokens": 0}
        self._offsets = {}  # of each text, where its next token begins
        kind = "chatcmpl" if self._is_chat else "cmpl"
        self._head = {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }

    def whole(self, pieces: Iterable[Piece]) -> dict:
        """Return the answer of all texts, of one piece each."""
        pieces = sorted(pieces, key=lambda piece: piece.index)
        choices = [self._choice(piece, "message") for piece in pieces]
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {
            **self._head,
            "object": kind,
            "choices": choices,
            "usage": self._usage(),
        }

    def begin(self, count: int) -> list[str]:
        """Return the events that a stream of so many texts begins with."""
        if not self._is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._event([{"index": i, "delta": delta, "finish_reason": None}])
            for i in range(count)
        ]

    def event(self, piece: Piece) -> str:
        """Return the server-sent event of a piece."""
        return self._event([self._choice(piece, "delta")])

    def end(self) -> list[str]:
        """Return the events that a stream ends with."""
        done = ["data: [DONE]\n\n"]
        if self._request.stream_options.include_usage:
            return [self._event([], usage=self._usage()), *done]
        return done

    def _event(self, choices, **parts):
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return event({**self._head, "object": kind, "choices": choices, **parts})

    def _choice(self, piece, name):
        """Return a choice; in a chat, `name` is what its text stands under."""
        if piece.finish_reason is not None:
            self._tokens["completion_tokens"] += piece.tokens
        logprobs = None
        if self._request.num_logprobs is not None:
            make = self._chat_logprobs if self._is_chat else self._logprobs
            logprobs = make(piece)
        text = {"text": piece.text}
        if self._is_chat:
            role = {"role": "assistant"} if name == "message" else {}
            text = {name: {**role, "content": piece.text}}
        return {
            "index": piece.index,
            **text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }

    def _logprobs(self, piece):
        found = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for score in piece.scores:
            text = self._text_of(score.token)
            offset = self._offsets.get(piece.index, 0)
            self._offsets[piece.index] = offset + len(text)
            top = {self._text_of(token): value for token, value in score.top}
            for name, value in zip(
                found, (text, score.logprob, top, offset), strict=True
            ):
                found[name].append(value)
        return found

    def _chat_logprobs(self, piece):
        def entry(token, value):
            data = list(self._tokenizer.decode_bytes([token]))
            return {"token": self._text_of(token), "logprob": value, "bytes": data}

        return {
            "content": [
                {
                    **entry(score.token, score.logprob),
                    "top_logprobs": [entry(*one) for one in score.top],
                }
                for score in piece.scores
            ]
        }

    def _text_of(self, token):
        return self._tokenizer.decode_bytes([token]).decode("utf-8", "replace")

    def _usage(self):
        return {**self._tokens, "total_tokens": sum(self._tokens.values())}


def event(value: dict) -> str:
    """Return a server-sent event of JSON."""
    return f"data: {artifacts.to_json(value)}\n\n"


def error_of(
    message: str, status: int, code: str | None = None, param: str | None = None
) -> dict:
    """Return an error as OpenAI's clients know it.

    Args:
        message: What is wrong, and how to mend it.
        status: The HTTP status.
        code: Its code, for programs.
        param: The field that it is about.
    """
    kind = _KINDS.get(status, "invalid_request_error")
    # It may quote what is no UTF-8.
    message = message.encode("utf-8", "backslashreplace").decode()
    parts = {"message": message, "type": kind, "param": param, "code": code}
    return {"error": parts}
