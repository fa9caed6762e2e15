"""`gpt-tf benchmark --server`, of this package's server and of others."""

import contextlib
import http.server
import json
import threading

import pytest

from gpt_tf.evaluation.report import check_report, read_report
from gpt_tf.evaluation.server_load import measure_server
from tests.edge.test_chat import talking  # noqa: F401
from tests.edge.test_server import running


@contextlib.contextmanager
def other_server(respond):
    """A server that answers whatever path and body by status and text."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, text = respond(self.path, None)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status, text = respond(self.path, json.loads(body))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_command_measures_a_server_at_one_and_several_clients(
    talking,  # noqa: F811
    command,
    tmp_path,
    monkeypatch,
):
    monkeypatch.setenv("GPT_TF_API_KEY", "secret")
    out = tmp_path / "report.json"
    with running(talking[2], api_key="secret") as server:
        host, port = server.address
        result = command(
            *("benchmark", "--server", f"http://{host}:{port}/v1", "--out", out),
            *("--prompt-tokens", 40, "--new-tokens", 8, "--repetitions", 6),
            *("--requests", "1,3"),
        )
        assert result.status == 0, result.err
        for word in ("--threads=1", "--baseline=x.json", "gpt.litertlm"):
            refused = command("benchmark", "--server", f"http://{host}:{port}", word)
            assert refused.status == 2 and refused.err.count("\n") == 1
    report = read_report(out)
    check_report(report, out)
    one, three = report["entries"]
    assert (one["name"], three["name"]) == ("gpt, 1 client", "gpt, 3 clients")
    for entry, clients, repetitions in ((one, 1, 10), (three, 3, 15)):
        latency = entry["latency"]
        assert latency["throughput"][0]["requests"] == clients
        assert latency["repetitions"] == repetitions
        assert 20 <= latency["prompt_tokens"] <= 60
        first, gap = (
            latency[f"{name}_ms"]["median"]
            for name in ("time_to_first_token", "inter_token_latency")
        )
        assert gap > 0 and first < latency["response_time_ms"]["median"]
        assert len(latency["response_time_ms"]["rounds"]) == 5
    assert "tokens/s, 3 requests" in result.out


def test_a_server_without_usage_is_measured_by_its_pieces():
    lines = [f"data: {json.dumps({'choices': [{'text': 'a'}]})}\n\n"] * 5

    def respond(path, body):
        if path == "/base/v1/models":
            return 200, json.dumps({"data": [{"id": "a"}, {"id": "b"}]})
        if not body.get("stream"):
            return 200, json.dumps({"choices": [{"text": "x"}]})
        assert (path, body["model"]) == ("/base/v1/completions", "b")
        return 200, "".join([*lines, "data: [DONE]\n\n"])

    with other_server(respond) as url:
        report = measure_server(
            f"{url}/base", model="b", new_tokens=5, repetitions=2, requests=[1]
        )
    latency = report["entries"][0]["latency"]
    assert latency["prompt_tokens"] == 64 and len(report["notes"]) == 1
    assert latency["inter_token_latency_ms"]["count"] == 2 * 4


MODELS = json.dumps({"data": [{"id": "a"}]})
OTHERS = [
    lambda path, body: (404, "no"),
    lambda path, body: (200, "<html>"),
    lambda path, body: (200, "[]"),
    lambda path, body: (200, json.dumps({"data": []})),
    lambda path, body: (200, MODELS) if body is None else (429, "later"),
    lambda path, body: (200, MODELS) if body is None else (200, "nothing"),
    lambda path, body: (
        (200, MODELS)
        if body is None
        else (200, "{}" if not body.get("stream") else "data: [DONE]\n\n")
    ),
]


@pytest.mark.parametrize("respond", OTHERS, ids=range(len(OTHERS)))
def test_what_is_no_such_server_is_one_line(command, respond):
    with other_server(respond) as url:
        result = command("benchmark", "--server", url, "--quick")
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    assert url in result.err


@pytest.mark.parametrize(
    "url", ["nowhere", "ftp://a", "http://[", "http://127.0.0.1:1"]
)
def test_an_address_that_leads_nowhere_is_one_line(command, url):
    result = command("benchmark", "--server", url)
    assert (result.status, result.err.count("\n")) == (2, 1), result.err
    assert url in result.err
