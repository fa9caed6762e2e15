"""The settings of the server."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from gpt_tf.settings.arguments import MOST_THREADS
from gpt_tf.settings.configuration import (
    Configuration,
    Count,
    CountOrZero,
    Positive,
    configuration,
)


@configuration
class ServerConfig(Configuration):
    """Where the server listens, and what bounds its clients.

    Example:
        >>> ServerConfig(port=0).max_active
        8
    """

    title: ClassVar[str] = "A server"

    host: str = Field(
        "127.0.0.1",
        description="Address to listen on; 0.0.0.0 lets other machines in.",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = Field(
        8000, description="Port to listen on; 0 takes a free one."
    )
    api_key: str | None = Field(
        None,
        repr=False,
        description="Key that clients must send; by default that of the environment's "
        "GPT_TF_API_KEY, if any.",
    )
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] | None = Field(
        None, description="Threads that compute; the physical cores, at most 4."
    )
    max_active: Count = Field(
        8, description="Texts of a model that are generated at once."
    )
    max_waiting: CountOrZero = Field(
        64, description="Texts of a model that may wait; one more is answered with 429."
    )
    max_chunk: Count = Field(
        64,
        description="Tokens of a prompt that are read before other texts get their "
        "next one.",
    )
    max_choices: Count = Field(
        16, description="Texts that one request may ask for: prompts times n."
    )
    max_prompt_tokens: Count | None = Field(
        None, description="Longest prompt; the model's context."
    )
    max_new_tokens: Count = Field(4096, description="Largest max_tokens of a request.")
    max_request_kb: Count = Field(
        1024, description="Largest body of a request, in units of 1024 bytes."
    )
    max_connections: Count = Field(
        256, description="Connections that are served; 64 more are told to wait."
    )
    timeout_s: Positive = Field(
        30.0,
        description="Seconds for a request to arrive, and for a reader that stands "
        "still to go on.",
    )
    prefixes: CountOrZero = Field(
        2,
        description="Prompts whose cache is kept for others that begin alike; 0 shares "
        "nothing.",
    )
    when_full: Literal["slide", "stop"] = Field(
        "slide", description="What happens to a text that fills the context."
    )
