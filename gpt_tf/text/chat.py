"""Chat templates: how a model was taught to see a conversation as one text.

A template is a program in Jinja2's language that somebody else wrote. It is rendered
in a process of its own (`template_process`), which has a limit on time and memory.
"""

import atexit
import contextlib
import dataclasses
import functools
import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from gpt_tf import artifacts
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.settings import arguments
from gpt_tf.text import template_process

CONFIG_NAME = "tokenizer_config.json"
_TEMPLATE_NAME = "chat_template.jinja"
_GENERATION_NAME = "generation_config.json"
# What templates know by these names, as in Hugging Face's configuration.
_SPECIAL_TOKENS = tuple(
    f"{name}_token" for name in "bos eos unk sep pad cls mask".split()
)
_ANSWER = "An answer of gpt_tf."  # where it stands in the text is looked for


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A chat template, rendered as Hugging Face's `apply_chat_template` does.

    Args:
        source: The template, in Jinja2's language.
        special_tokens: Texts of special tokens by the names that a template has for
            them: `bos_token`, `eos_token` and so on.
        end_tokens: Texts of tokens that end whatever the model writes. An `eos_token`
            is one always.

    Example:
        >>> source = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
        >>> ChatTemplate(source).render([{"role": "user", "content": "Good morning."}])
        'user: Good morning. '
    """

    source: str
    special_tokens: dict[str, str] = dataclasses.field(default_factory=dict)
    end_tokens: tuple[str, ...] = ()

    def __post_init__(self):
        arguments.text("source", self.source)
        ends = (*self.end_tokens, self.special_tokens.get("eos_token"))
        unique = dict.fromkeys(token for token in ends if token)
        object.__setattr__(self, "end_tokens", tuple(unique))

    def render(
        self,
        messages: Sequence[dict],
        add_generation_prompt: bool = True,
        **variables,
    ) -> str:
        """Return a conversation as the text that the model continues.

        Its ids are those of `tokenizer.encode(text, special=True)`.

        Args:
            messages: At least one; each with a `role`, `"system"`, `"user"` or
                `"assistant"` as a rule, and `content`, a text. Which roles there are,
                and in which order, is the template's affair.
            add_generation_prompt: Whether an assistant's answer is to follow.
            **variables: What the template knows beside that, `enable_thinking` for
                example.

        Raises:
            InputError: A message has no role, the template refuses the messages, is
                none, or needs too much time or memory; or Jinja2 is not installed.
        """
        check_messages(messages)
        # Templates ask whether these are none, and not whether they are defined.
        values = {"tools": None, "documents": None, **self.special_tokens}
        values |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return _rendered(self.source, values | variables)

    @functools.cached_property
    def turn_end(self) -> str:
        """What the template writes after an assistant's answer, if that is known."""
        messages = [
            {"role": "user", "content": "Good morning."},
            {"role": "assistant", "content": _ANSWER},
        ]
        with contextlib.suppress(InputError):
            text = self.render(messages, add_generation_prompt=False)
            return text.partition(_ANSWER)[2]
        return ""

    def to_config(self) -> dict:
        """Return it as it stands in Hugging Face's `tokenizer_config.json`."""
        config = {"chat_template": self.source, **self.special_tokens}
        return config | ({"end_tokens": [*self.end_tokens]} if self.end_tokens else {})


def check_messages(messages: Sequence[dict]) -> None:
    """Refuse what is no conversation.

    Raises:
        InputError: There are none, or one is no object, or has no role or no content.
    """
    expected = (
        'a list of messages, [{"role": "user", "content": "Good morning."}] for example'
    )
    if not isinstance(messages, list | tuple) or not messages:
        arguments.refuse("messages", messages, expected)
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not message.keys() >= {"role", "content"}:
            received = arguments.shown(message)
            missing = ""
        elif not isinstance(message["role"], str) or not message["role"]:
            received, missing = arguments.shown(message["role"]), " as its role"
        elif not isinstance(message["content"], str | list | None):
            received, missing = arguments.shown(message["content"]), " as its content"
        else:
            continue
        raise InputError(
            f"Message {number} expects a `role` and `content`, as in {expected}. "
            f"Received: {received}{missing}. Add what is missing."
        )


def read_template(folder: Path, backend) -> ChatTemplate | None:
    """Read the template beside a `tokenizer.json`, or return None if there is none.

    Args:
        folder: With `tokenizer_config.json`; in newer models with
            `chat_template.jinja`, and with `generation_config.json`.
        backend: The `tokenizers.Tokenizer`, which knows ids' tokens.

    Raises:
        DamagedFileError: A file is not what it should be.
    """
    config = _object(folder / CONFIG_NAME)
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by names
        named = [one for one in source if isinstance(one, dict)]
        source = {one.get("name"): one.get("template") for one in named}.get("default")
    if (folder / _TEMPLATE_NAME).is_file():
        source = read_source(folder / _TEMPLATE_NAME)
    if source is None:
        return None
    if not isinstance(source, str):
        raise DamagedFileError(
            f"{folder / CONFIG_NAME} expects a text as `chat_template`. Received: "
            f"{arguments.shown(source)}."
        )
    special = {}
    for name in _SPECIAL_TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            special[name] = token
    ends = config.get("end_tokens")
    ends = ends if isinstance(ends, list) else []
    ids = _object(folder / _GENERATION_NAME).get("eos_token_id")
    ends = [one for one in ends if isinstance(one, str)]
    ends += tokens_of(ids if isinstance(ids, list) else [ids], backend)
    return ChatTemplate(source, special, tuple(ends))


def read_source(path: Path) -> str:
    """Read a file that is a template.

    Raises:
        InputError: There is none, or it is no text.
    """
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(
            f"A chat template is expected in {path}, as text in UTF-8. "
            f"Received: {error}. Name the file of a template."
        ) from None


def tokens_of(ids, backend) -> list[str]:
    """Return the tokens of those ids that have one; anything may be among them."""
    numbers = [one for one in ids if type(one) is int and 0 <= one < 1 << 32]
    return [token for one in numbers if (token := backend.id_to_token(one))]


def _object(path):
    return artifacts.read_json(path, {}) if path.is_file() else {}


# The process that renders


class _Renderer:
    """Has templates rendered by one process, which is started when it is needed."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process = self._owner = None

    def ask(self, source, values):
        """Return what the process answers, or how it came to its end."""
        request = artifacts.to_json([source, values])
        with self._lock:
            if self._process is None or self._owner != os.getpid():  # in a fork
                self._start()
            answer = ""
            try:
                with contextlib.suppress(OSError):  # it has ended
                    self._process.stdin.write(request + "\n")
                    self._process.stdin.flush()
                    answer = self._process.stdout.readline()
                if answer:
                    return artifacts.parse_json(answer)
            except BaseException:  # what is on its way belongs to nobody
                self.stop()
                raise
            if self.stop() == -getattr(signal, "SIGPROF", 0):
                return {"error": f"more than {template_process.SECONDS} seconds"}
            return {"error": "an end of its process, for too much memory perhaps"}

    def _start(self):
        if importlib.util.find_spec("jinja2") is None:
            raise InputError(
                "A chat template expects the package Jinja2, which is not installed. "
                "Install it with `pip install jinja2`."
            )
        self._process = subprocess.Popen(
            # Nothing of the folder that one stands in is imported.
            [sys.executable, "-I", template_process.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is not for it
        )
        self._owner = os.getpid()
        first = artifacts.to_json([template_process.SECONDS, sys.path])
        self._process.stdin.write(first + "\n")

    def stop(self):
        """End the process; return its status."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return None
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.kill()
        process.stdout.close()
        return process.wait()


_renderer = _Renderer()
atexit.register(_renderer.stop)


def _rendered(source, values):
    try:
        answer = _renderer.ask(source, values)
    except InputError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"Messages expect texts, numbers and lists. Received: {error}."
        ) from None
    if "text" in answer:
        # Of what is no UTF-8, no tokenizer knows.
        return answer["text"].encode("utf-8", "replace").decode("utf-8")
    raise InputError(
        "The chat template expects messages that it can render. Received from it: "
        f"{answer['error']}. Mend the messages, or take another template."
    )
