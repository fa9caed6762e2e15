"""The server, spoken to by OpenAI's own client and by raw sockets, on loopback."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import openai
import prometheus_client.parser
import pytest

from gpt_tf.edge import EdgeGPT
from gpt_tf.edge.serving import server as serving
from gpt_tf.edge.serving.connection import BACKLOG
from gpt_tf.edge.serving.metrics import Metrics
from gpt_tf.edge.serving.worker import ModelWorker
from gpt_tf.settings.server import ServerConfig
from tests.edge.conftest import CONTEXT, VOCAB_SIZE
from tests.edge.test_chat import GREETING, talking  # noqa: F401

MODEL = {"model": "gpt"}
LONG = {"prompt": "abc", "max_tokens": 4000, "temperature": 0}


@contextlib.contextmanager
def running(path, **settings):
    """Serve a file as `gpt`, in a thread."""
    config, metrics = ServerConfig(port=0, **settings), Metrics()
    with EdgeGPT(path, when_full=config.when_full) as gpt:
        worker = ModelWorker("gpt", gpt, config, metrics)
        server = serving.make_server([worker], config, metrics)
        listener = serving._listen(config)
        host, port = listener.getsockname()
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        client = openai.OpenAI(
            base_url=f"http://{host}:{port}/v1",
            api_key=config.api_key or "none",
            max_retries=0,
        )
        try:
            yield SimpleNamespace(
                client=client,
                address=(host, port),
                worker=worker,
                connections=server.server_state.connections,
            )
        finally:
            client.close()
            server.should_exit = True
            thread.join()
            assert not worker.is_alive


@pytest.fixture(scope="module")
def server(exported):
    with running(exported.litertlm, max_request_kb=4, max_active=4) as started:
        yield started


@pytest.fixture(scope="module")
def complete(server):
    def ask(**options):
        return server.client.completions.create(**MODEL, **options)

    return ask


def answer(address, data, wait_s=60):
    """Send bytes; return the status and the body of what comes back, or None."""
    with socket.create_connection(address, timeout=wait_s) as connection:
        connection.sendall(data)
        received = b""
        with contextlib.suppress(ConnectionResetError, TimeoutError):
            while piece := connection.recv(1 << 16):
                received += piece
    if not received:
        return None
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def post(body, path="/v1/completions", **headers):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {
        "Host": "localhost",
        "Content-Type": "application/json",
        "Content-Length": len(body),
        "Connection": "close",
        **headers,
    }
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode() + body


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.01)


# Texts


def test_texts_are_those_of_edge_gpt_for_the_same_seed(gpt, complete):
    prompts = ["abc", "the fox"]
    options = {"max_new_tokens": 30, "seed": 7, "temperature": 0.8, "top_p": 0.9}
    expected = gpt.generate([p for p in prompts for _ in range(2)], **options)
    asked = {"max_tokens": 30, "seed": 7, "temperature": 0.8, "top_p": 0.9}
    found = complete(prompt=prompts, n=2, **asked)
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    for choice in found.choices:  # a character is a token
        reason = "length" if len(choice.text) == 30 else "stop"
        assert choice.finish_reason == reason
    usage, new = found.usage, len("".join(expected))
    assert (usage.prompt_tokens, usage.completion_tokens) == (10, new)
    assert usage.total_tokens == 10 + new
    extra = {"top_k": 3, "repetition_penalty": 1.2}
    own = gpt.generate([3, 4], max_new_tokens=9, seed=1, **extra)
    found = complete(prompt=[3, 4], max_tokens=9, seed=1, extra_body=extra)
    assert found.choices[0].text == gpt.tokenizer.decode(own)


def test_pieces_join_to_the_text_and_stop_texts_are_cut_off(gpt, complete):
    text = gpt.generate("abc", max_new_tokens=30, seed=3)
    stop = text[10:12]
    end = text.index(stop)
    usage = {"include_usage": True}
    options = {"prompt": "abc", "seed": 3, "max_tokens": 30, "logprobs": 1}
    *pieces, last = complete(
        stop=[stop], stream=True, stream_options=usage, n=1, **options
    )
    choices = [piece.choices[0] for piece in pieces]
    assert len(choices) > 2 and "".join(c.text for c in choices) == text[:end]
    assert [c.finish_reason for c in choices] == [None] * (len(choices) - 1) + ["stop"]
    tokens = [token for c in choices for token in c.logprobs.tokens]
    offsets = [offset for c in choices for offset in c.logprobs.text_offset]
    assert "".join(tokens) == text[:end] and offsets == list(range(end))
    assert last.choices == [] and last.usage.completion_tokens == end + 2
    found = complete(stop=stop, **options).choices[0]
    assert (found.text, found.finish_reason) == (text[:end], "stop")


def test_logprobs_are_those_that_the_model_scores(gpt, complete):
    found = complete(prompt="abc", max_tokens=8, seed=2, logprobs=3).choices[0]
    scores = gpt.score("abc" + found.text)[-8:]
    logprobs = found.logprobs
    np.testing.assert_allclose(logprobs.token_logprobs, scores, atol=1e-4)
    assert "".join(logprobs.tokens) == found.text
    assert all(len(top) == 3 for top in logprobs.top_logprobs)
    greedy = complete(prompt="abc", max_tokens=8, temperature=0, logprobs=1).choices[0]
    tops = [list(top) for top in greedy.logprobs.top_logprobs]
    assert tops == [[token] for token in greedy.logprobs.tokens]


def test_chat_is_that_of_edge_gpt(talking):  # noqa: F811
    options = {"seed": 3, "temperature": 0.9}
    with EdgeGPT(talking[2]) as gpt:
        expected = gpt.chat(GREETING, max_new_tokens=20, **options)
        scores = gpt.score(gpt.tokenizer.chat_template.render(GREETING) + expected)
    parts = [{"role": "user", "content": [{"type": "text", "text": "the fox"}]}]
    with running(talking[2]) as server:
        chat = server.client.chat.completions
        asked = {**MODEL, **options, "max_completion_tokens": 20}
        for messages in (GREETING, parts):
            found = chat.create(messages=messages, logprobs=True, **asked)
            assert found.choices[0].message.content == expected
        content = found.choices[0].logprobs.content
        count = found.usage.completion_tokens
        assert (
            b"".join(bytes(one.bytes) for one in content).decode("utf-8", "replace")
            == expected
        )
        found = [one.logprob for one in content]
        if len(gpt.tokenizer.encode(expected)) == count:
            np.testing.assert_allclose(found, scores[-count:], atol=1e-4)
        pieces = [
            piece.choices[0]
            for piece in chat.create(messages=GREETING, stream=True, **asked)
        ]
        assert pieces[0].delta.role == "assistant"
        assert "".join(piece.delta.content for piece in pieces[1:]) == expected
        assert pieces[-1].finish_reason in ("stop", "length")


def test_requests_at_once_get_their_own_texts_and_share_a_prefix(gpt, server):
    prompts = [f"the quick brown fox {letter}" for letter in "abcdefgh"]
    expected = [gpt.generate(p, max_new_tokens=12, seed=5) for p in prompts]

    async def ask_all():
        async with openai.AsyncOpenAI(
            base_url=server.client.base_url, api_key="none", max_retries=0
        ) as client:
            asked = [
                client.completions.create(**MODEL, prompt=p, max_tokens=12, seed=5)
                for p in prompts
            ]
            return [one.choices[0].text for one in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == expected


def test_models_health_and_metrics(server, complete):
    complete(prompt="abc", max_tokens=5, temperature=0)
    models = server.client.models
    assert [model.id for model in models.list()] == ["gpt"]
    assert models.retrieve("gpt").id == "gpt"
    assert answer(server.address, GET % b"/health")[0] == 200

    def counted():
        _, body = answer(server.address, GET % b"/metrics")
        families = prometheus_client.parser.text_string_to_metric_families(
            body.decode()
        )
        return {
            (
                sample.name,
                sample.labels.get("kind") or sample.labels.get("outcome"),
            ): sample.value
            for family in families
            for sample in family.samples
        }

    before = counted()
    complete(prompt=["abc", "fox"], max_tokens=5, temperature=0)
    after = counted()
    grown = {key: after[key] - before[key] for key in before}
    assert grown["gpt_tf_tokens_total", "prompt"] == 6
    assert grown["gpt_tf_tokens_total", "generated"] == 10
    assert grown["gpt_tf_texts_total", "length"] == 2
    assert grown["gpt_tf_time_to_first_token_seconds_count", None] == 2
    assert grown["gpt_tf_time_between_tokens_seconds_count", None] == 8
    assert (
        after["gpt_tf_texts_active", None] == after["gpt_tf_texts_waiting", None] == 0
    )


# Bad input


PROMPT = {**MODEL, "prompt": "abc"}
BAD = [
    (b"{broken", 400, None),
    (b"", 400, None),
    (b"[" * 4000, 400, None),
    (b"\xff\xfe", 400, None),
    ([], 400, None),
    ({"prompt": "abc"}, 400, "model"),
    ({**PROMPT, "model": "other"}, 404, "model"),
    ({**PROMPT, "max_tokens": -1}, 400, "max_tokens"),
    ({**PROMPT, "max_tokens": 1 << 40}, 400, "max_tokens"),
    ({**PROMPT, "max_tokens": "5"}, 400, "max_tokens"),
    ({**PROMPT, "temperature": -1}, 400, "temperature"),
    ({**PROMPT, "temperature": float("nan")}, 400, "temperature"),
    ({**PROMPT, "top_p": 0}, 400, "top_p"),
    ({**PROMPT, "n": 0}, 400, "n"),
    ({**PROMPT, "n": 1000}, 400, "n"),
    ({**PROMPT, "seed": -1}, 400, "seed"),
    ({**PROMPT, "stop": ["a"] * 17}, 400, "stop"),
    ({**PROMPT, "stop": ""}, 400, "stop"),
    ({**PROMPT, "logprobs": 21}, 400, "logprobs"),
    ({**PROMPT, "suffix": "x"}, 400, None),
    ({**PROMPT, "prompt": {"a": 1}}, 400, "prompt"),
    ({**PROMPT, "prompt": ""}, 400, None),
    ({**PROMPT, "prompt": []}, 400, None),
    ({**PROMPT, "prompt": ["abc", ""]}, 400, None),
    ({**PROMPT, "prompt": [VOCAB_SIZE]}, 400, None),
    ({**PROMPT, "prompt": [1 << 80]}, 400, None),
    ({**PROMPT, "prompt": "\u4e2d"}, 400, None),
    ({**PROMPT, "\ud800": 1}, 400, None),
    ({**PROMPT, "prompt": "a" * (CONTEXT + 1)}, 400, "prompt"),
]


@pytest.mark.parametrize(("body", "status", "param"), BAD, ids=range(len(BAD)))
def test_a_bad_request_gets_one_error_of_openais_form(server, body, status, param):
    found, text = answer(server.address, post(body))
    error = json.loads(text)["error"]
    assert (found, error["param"]) == (status, param), error
    assert error["type"] == "invalid_request_error" and error["message"]


def test_clients_see_errors_as_their_own(server, complete):
    with pytest.raises(openai.NotFoundError, match="expects one of gpt"):
        server.client.completions.create(model="other", prompt="abc")
    with pytest.raises(openai.BadRequestError, match="chat template"):
        server.client.chat.completions.create(**MODEL, messages=GREETING)
    with pytest.raises(openai.BadRequestError) as raised:
        complete(prompt="a" * 100, stream=True)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as raised:
        complete(prompt="a" * 10_000_000)
    assert raised.value.status_code == 413
    assert complete(prompt="abc", max_tokens=0).choices[0].text == ""


CHUNKED = {"Transfer_Encoding": "chunked"}
IN_CHUNKS = post(b"", **CHUNKED).replace(b"Content-Length: 0\r\n", b"")
SMALL = post(b"{}")
LENGTH = b"Content-Length: 2\r\n"
GET = b"GET %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
HTTP = [
    (post(PROMPT, **CHUNKED), 400),  # and a length
    (SMALL.replace(LENGTH, LENGTH + b"Content-Length: 3\r\n"), 400),
    (SMALL.replace(LENGTH, LENGTH + b"Transfer-Encoding: identity\r\n"), 400),
    (post(b"{}", Content_Length="-2"), 400),
    (post(b"{}", Content_Length="2 2"), 400),
    (post(b"{}", Content_Length="0x2"), 400),
    (SMALL.replace(b"Host:", b"Host :"), 400),
    (SMALL.replace(b"Host: ", b"Host: a\x00"), 400),
    (SMALL.replace(b"Host: localhost\r\n", b""), 400),
    (SMALL.replace(b"HTTP/1.1", b"HTTP/9"), 400),
    (IN_CHUNKS + b"zz\r\n{}\r\n0\r\n\r\n", 400),
    (IN_CHUNKS + b"1388\r\n" + b" " * 5000 + b"\r\n0\r\n\r\n", 413),
    (b"GET / HTTP/1.1\r\nX: " + b"y" * 1_000_000, 400),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    (GET % b"/../../etc/passwd", 404),
    (GET % b"/v1/completions", 405),
]


@pytest.mark.parametrize(("data", "status"), HTTP, ids=range(len(HTTP)))
def test_what_is_no_sound_http_is_refused_and_the_connection_closed(
    server, data, status
):
    # What stands behind would be a second request to a program that reads otherwise.
    found, text = answer(server.address, data + GET % b"/health")
    assert found == status and b"HTTP/1.1" not in text
    assert json.loads(text)["error"]["message"]


def test_a_key_is_asked_for_and_health_is_open(exported):
    with running(exported.litertlm, api_key="secret-1") as server:
        assert [model.id for model in server.client.models.list()] == ["gpt"]
        bad = server.client.with_options(api_key="secret-2")
        with pytest.raises(openai.AuthenticationError) as raised:
            bad.models.list()
        assert "secret" not in str(raised.value) + repr(ServerConfig(api_key="secret"))
        for path, status in ((b"/health", 200), (b"/metrics", 401), (b"/x", 401)):
            assert answer(server.address, GET % path)[0] == status


# Clients that go away, wait, or stand still


def test_a_client_that_goes_away_frees_its_place(exported):
    with running(exported.litertlm, max_active=1, max_waiting=1) as server:
        complete = server.client.completions.create
        with complete(**MODEL, **LONG, stream=True) as stream:
            next(stream)
            gone = socket.create_connection(server.address)
            gone.sendall(post({**MODEL, **LONG}))
            wait_until(lambda: server.worker._taken == 2)
            with pytest.raises(openai.RateLimitError) as raised:
                complete(**MODEL, prompt="abc", max_tokens=1)
            assert raised.value.response.headers["Retry-After"] == "1"
            gone.close()
            wait_until(lambda: server.worker._taken == 1)
            waiting = complete(**MODEL, prompt="abc", max_tokens=0)
            assert waiting.choices[0].text == ""
        wait_until(lambda: server.worker._taken == 0)
        assert (
            complete(
                **MODEL, prompt="abc", max_tokens=3, temperature=0
            ).usage.completion_tokens
            == 3
        )


def test_connections_are_bounded(exported):
    with running(exported.litertlm, max_connections=2) as server:
        opened = []
        most = 2 + BACKLOG
        for count in range(1, most + 5):
            opened.append(socket.create_connection(server.address, timeout=60))
            wait_until(lambda: len(server.connections) == min(count, most))  # noqa: B023
        assert opened[-1].recv(1) == b""  # closed
        for connection, status in ((opened[0], 200), (opened[2], 503)):
            connection.sendall(post(PROMPT))
            assert f"HTTP/1.1 {status}".encode() in connection.recv(1 << 16)
        for connection in opened:
            connection.close()
        wait_until(lambda: not server.connections)
        assert answer(server.address, post(PROMPT))[0] == 200


def test_no_request_takes_for_ever(exported):
    with running(exported.litertlm, timeout_s=0.4) as server:
        parts = b"", b"POST /v1/completions HTTP/1.1\r\nHost:", post(PROMPT)[:-1]
        opened = [socket.create_connection(server.address, timeout=60) for _ in parts]
        for connection, part in zip(opened, parts, strict=True):
            connection.sendall(part)
        received = [connection.recv(1 << 16) for connection in opened[:2]]
        assert received == [b"", b""] and b" 408 " in opened[2].recv(1 << 16)
        wait_until(lambda: not server.connections)
        for connection in opened:
            connection.close()


def test_a_reader_that_stands_still_is_let_go(exported):
    with running(exported.litertlm, timeout_s=0.4) as server:
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            slow.connect(server.address)
            body = {**MODEL, **LONG, "stream": True, "logprobs": 20, "n": 8}
            slow.sendall(post(body))
            wait_until(lambda: server.worker._taken == 8)
            wait_until(lambda: server.worker._taken == 0)
            wait_until(lambda: not server.connections)
        outcomes = {
            sample.labels["outcome"]: sample.value
            for metric in server.worker._metrics.texts.collect()
            for sample in metric.samples
            if sample.name.endswith("_total")
        }
        assert outcomes["cancelled"] > 0


def test_a_text_that_fails_does_not_end_the_server(exported, monkeypatch):
    with running(exported.litertlm) as server:
        complete = server.client.completions.create
        session = server.worker.gpt._session.__class__
        decode = session.decode

        def fail(self, token):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(session, "decode", fail)
        with pytest.raises(openai.InternalServerError):
            complete(**MODEL, prompt="abc")
        with pytest.raises(openai.APIError):
            list(complete(**MODEL, prompt="abc", stream=True))
        monkeypatch.setattr(session, "decode", decode)
        assert (
            complete(
                **MODEL, prompt="abc", max_tokens=2, temperature=0
            ).usage.completion_tokens
            == 2
        )


# The command


def test_the_command_serves_until_it_is_interrupted(exported):
    code = (
        "import sys; from gpt_tf import cli; sys.argv[1:] = sys.argv[1:]\n"
        "import atexit; atexit.register(lambda: print(sorted({'tensorflow', 'tf_keras'}"
        " & set(sys.modules)), flush=True)); cli.main()"
    )
    options = ["serve", "--model", str(exported.litertlm), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "GPT_TF_API_KEY": "secret"},
    )
    line = process.stdout.readline()
    base = line.partition(" ")[0]
    assert line == f"{base} serves gpt; Ctrl-C ends it\n"
    with openai.OpenAI(base_url=base, api_key="secret") as client:
        found = client.completions.create(
            **MODEL, prompt="abc", max_tokens=3, temperature=0
        )
        assert found.usage.completion_tokens == 3
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "[]\n", "gpt-tf: interrupted\n")


def test_what_cannot_be_served_is_one_line(exported, command, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, said in (
            (["--port", port], "free"),
            (["--host", "192.0.2.1"], "192.0.2.1"),
            (["--max-active", 0], "--max-active"),
            (["--model", exported.litertlm, "--port", 0], "names of their own"),
            (["--model", tmp_path / "none.litertlm", "--port", 0], "none.litertlm"),
        ):
            result = command("serve", "--model", exported.litertlm, *options)
            assert (result.status, result.err.count("\n")) == (2, 1), result.err
            assert said in result.err and not result.out
