"""How fast a server of OpenAI's protocol answers, one client and several at once.

Each client has a connection of its own and asks `/v1/completions` for greedy streams,
each after other random words, so that no server has the prompt in a cache. What is
measured of a stream:

- time to first token: from sending the request to the first piece of text;
- time between tokens: from a piece to the next; a piece may hold several tokens;
- response time: to the end of the stream; its tokens over it are the tokens per second.

Tokens are counted by the server's `usage`, or else by pieces. A client that waits for
its answer is one request at a time: so many clients are so many requests at once.
"""

import contextlib
import functools
import http.client
import itertools
import random
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.evaluation import report
from gpt_tf.evaluation.harness import spread, take_turns, throughput
from gpt_tf.evaluation.latency import REPETITIONS, REQUESTS, ROUNDS
from gpt_tf.formatting import count as counted
from gpt_tf.settings import arguments

_TOKENS = 64  # of the prompt, and as many new ones
_TIMEOUT_S = 600
_SEED = 20_240_601
_WORDS = (
    "the of and to in a is that for it as was with be by on not he his but at are this "
    "have from or had an they which one you were all her she there would their we him "
    "been has when who will more no if out so said what up its about into than them can"
).split()
_FIRST_WORDS = 8  # by which a word's tokens are counted


class Stream(NamedTuple):
    """What one request took, in seconds, and its tokens."""

    first_s: float
    gaps_s: list[float]
    response_s: float
    tokens: int
    prompt_tokens: int | None  # where the server says it


def measure_server(
    url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    repetitions: int = REPETITIONS,
    rounds: int = ROUNDS,
    requests: Sequence[int] = REQUESTS,
    command: str | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> dict:
    """Measure a server with several numbers of clients, in turn.

    Args:
        url: Its address, `"http://127.0.0.1:8000"` for example.
        model: Which of its models; the first that it names unless given.
        api_key: What it asks for.
        prompt_tokens: Tokens of a prompt, at least 1, approximately; 64.
        new_tokens: Tokens that are asked for, at least 2; 64. A text may end earlier.
        repetitions: Requests that are counted, of each number of clients at least.
        rounds: How often each number of clients has its turn.
        requests: Numbers of clients.
        command: The command line, for the report.
        on_progress: Called with turns done, turns in all and what comes.

    Returns:
        A report as of `gpt_tf.evaluation.report`, an entry for each number of clients.

    Raises:
        InputError: There is no such server, or it refuses a request.

    Example:
        >>> made = measure_server("http://127.0.0.1:8000", requests=(1, 4))
        >>> made["entries"][1]["latency"]["throughput"][0]["tokens_per_s"]
    """
    prompt_tokens = arguments.integer("prompt_tokens", prompt_tokens or _TOKENS, 1)
    new_tokens = arguments.integer("new_tokens", new_tokens or _TOKENS, 2)
    repetitions = arguments.integer("repetitions", repetitions, 1)
    rounds = min(arguments.integer("rounds", rounds, 1), repetitions)
    numbers = arguments.integers("requests", requests, 1)
    server = Server(url, model, api_key)
    draw, done = random.Random(_SEED), itertools.count()
    words = server.words_of(prompt_tokens, draw)

    def turn(clients):
        number = next(done)
        if on_progress is not None:
            what = f"round {number // len(numbers) + 1} of {rounds}"
            what += f": {counted(clients, 'client')}"
            on_progress(number, rounds * len(numbers), what)
        each = -(-repetitions // (rounds * clients))
        prompts = [[_text(words, draw) for _ in range(each)] for _ in range(clients)]
        return _run_clients(server, prompts, new_tokens)

    _run_clients(server, [[_text(words, draw)]], new_tokens)  # not counted
    turns = [functools.partial(turn, clients) for clients in numbers]
    entries, short = [], 0
    for clients, results in zip(numbers, take_turns(turns, rounds), strict=True):
        name = f"{server.model}, {counted(clients, 'client')}"
        latency = _latency(clients, results, prompt_tokens, new_tokens)
        entries.append(report.new_entry({}, name=name, latency=latency))
        streams = [stream for streams, _ in results for stream in streams]
        short += sum(stream.tokens < new_tokens for stream in streams)
    notes = [
        f"Measured at {url}, by clients on this machine, which take their share of it "
        "where the server runs here too. Greedy, every prompt other random words."
    ]
    if short:
        notes.append(f"{counted(short, 'text')} ended before {new_tokens} tokens.")
    return report.new_report(entries, command=command, notes=notes)


def _text(words, draw):
    return " ".join(draw.choices(_WORDS, k=words))


def _run_clients(server, prompts, new_tokens):
    """Let clients ask at once; return their streams, and the seconds in all."""

    def ask(own):
        with contextlib.closing(server.connect()) as connection:
            return [server.stream(connection, text, new_tokens) for text in own]

    began = time.perf_counter()
    with futures.ThreadPoolExecutor(len(prompts)) as pool:
        streams = [stream for found in pool.map(ask, prompts) for stream in found]
    return streams, time.perf_counter() - began


def _latency(clients, results, prompt_tokens, new_tokens):
    """Return a report's latency of what each round gave."""
    rounds = [streams for streams, _ in results]
    told = [s.prompt_tokens for streams in rounds for s in streams if s.prompt_tokens]
    rates = [sum(s.tokens for s in streams) / seconds for streams, seconds in results]
    speeds = [s.tokens / s.response_s for streams in rounds for s in streams]
    if not any(stream.gaps_s for streams in rounds for stream in streams):
        raise InputError(
            "Measuring expects texts of several pieces. Received: texts that came at "
            "once. Ask for more tokens, or another model."
        )

    def of(values):
        found = [[v * 1e3 for s in streams for v in values(s)] for streams in rounds]
        return spread([one for one in found if one])

    return dict.fromkeys(report.Latency.model_fields) | {
        "engine": "server",
        "prompt_tokens": round(np.median(told)) if told else prompt_tokens,
        "new_tokens": new_tokens,
        "repetitions": sum(map(len, rounds)),
        "time_to_first_token_ms": of(lambda stream: [stream.first_s]),
        "inter_token_latency_ms": of(lambda stream: stream.gaps_s),
        "response_time_ms": of(lambda stream: [stream.response_s]),
        "tokens_per_s": float(np.median(speeds)),
        "by_context": [],
        "by_threads": [],
        "throughput": [throughput(clients, rates)],
    }


class Server:
    """A server's address and one of its models.

    Args:
        url, model, api_key: As for `measure_server`.

    Attributes:
        model: The model's name.
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None):
        self._url = arguments.text("url", url)
        try:
            parts = urllib.parse.urlsplit(url)
            known = parts.scheme in ("http", "https") and parts.hostname
            self._place = parts.hostname, parts.port
        except ValueError:
            known = False
        if not known:
            arguments.refuse(
                "url", url, "an address, http://127.0.0.1:8000 for example"
            )
        self._is_secure = parts.scheme == "https"
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/"
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        with contextlib.closing(self.connect()) as connection:
            names = self._names(connection)
        self.model = model or names[0]
        if self.model not in names:
            arguments.refuse("model", model, f"one of {', '.join(names)}")

    def connect(self) -> http.client.HTTPConnection:
        """Return a connection; it is opened by its first request."""
        kind = http.client.HTTPConnection
        if self._is_secure:
            kind = http.client.HTTPSConnection
        return kind(*self._place, timeout=_TIMEOUT_S)

    def words_of(self, tokens: int, draw: random.Random) -> int:
        """Return of how many words a prompt has about so many tokens."""
        body = {"prompt": _text(_FIRST_WORDS, draw), "max_tokens": 1}
        with contextlib.closing(self.connect()) as connection:
            answer = self._ask(connection, "completions", body | {"model": self.model})
            usage = self._json(answer.read()).get("usage") or {}
        used = usage.get("prompt_tokens") or _FIRST_WORDS
        return max(1, round(tokens * _FIRST_WORDS / used))

    def stream(self, connection, prompt, new_tokens: int) -> Stream:
        """Ask for a text after a prompt, text or ids, and time its pieces."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began, times, usage = time.perf_counter(), [], {}
        answer = self._ask(connection, "completions", body)
        while line := answer.readline():
            if line[:6] != b"data: " or line[6:12] == b"[DONE]":
                continue
            piece = self._json(line[6:])
            if any(choice.get("text") for choice in piece.get("choices", ())):
                times.append(time.perf_counter())
            usage = piece.get("usage") or usage
        if not times:
            raise InputError(
                f"The server at {self._url} is expected to write text. Received: none, "
                f"after {prompt[:40]!r}. Ask another model."
            )
        return Stream(
            times[0] - began,
            np.diff(times).tolist(),
            time.perf_counter() - began,
            usage.get("completion_tokens") or len(times),
            usage.get("prompt_tokens"),
        )

    def _names(self, connection):
        found = self._json(self._ask(connection, "models").read())
        listed = found.get("data") or []
        names = [one.get("id") for one in listed if isinstance(one, dict)]
        if not names:
            raise InputError(
                f"The server at {self._url} is expected to name its models. Received: "
                "none. Name a server of OpenAI's protocol."
            )
        return names

    def _ask(self, connection, name, body=None):
        """Send a request; return its answer, which was taken to be good."""
        data = None if body is None else artifacts.to_json(body).encode()
        method = "GET" if data is None else "POST"
        try:
            connection.request(method, self._path + name, data, self._headers)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise InputError(
                f"A server is expected at {self._url}. Received: {error!r}. Start it, "
                "or mend the address."
            ) from None
        if answer.status != 200:
            said = " ".join(answer.read(1000).decode("utf-8", "replace").split())
            raise InputError(
                f"The server at {self._url} is expected to answer {name}. Received: "
                f"status {answer.status}, {said[:300]}. Ask for less, or mend what it "
                "names."
            )
        return answer

    def _json(self, data):
        try:
            found = artifacts.parse_json(data)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise InputError(
                f"The server at {self._url} is expected to answer in JSON. Received: "
                f"{arguments.shown(data)}. Name a server of OpenAI's protocol."
            )
        return found
