"""`gpt_tf.js` writes what `EdgeGPT` writes, in Node and in a browser."""

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest

from gpt_tf.edge import EdgeGPT, static_server
from gpt_tf.edge.web_bundle import FACTS_NAME, PACKAGES, install_command, write_web
from gpt_tf.export.litertlm import export_litertlm
from gpt_tf.generation.sampler import log_softmax
from gpt_tf.training.loop import load_model
from tests.edge.test_chat import talking  # noqa: F401

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Where npm installed the packages.
MODULES = Path(os.environ.get("GPT_TF_NODE_MODULES", ROOT / "node_modules"))

pytestmark = pytest.mark.filterwarnings("ignore:The prompt of 160 tokens")
needs_packages = pytest.mark.skipif(
    NODE is None or not all((MODULES / name).is_dir() for name in PACKAGES),
    reason=f"needs Node, and packages in {MODULES}: {install_command()}",
)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None or not (MODULES / "playwright-core").is_dir(),
    reason=f"needs Chromium, and playwright-core in {MODULES}",
)
PROMPTS = [
    "    def __init__(self",
    "import os\n\n\ndef main",
    "class Reader:\n",
    "# caf\u00e9 na\u00efve \u4e2d\u6587\n",
    "\U0001f600\U0001f469\u200d\U0001f680 = ",
    "<|endoftext|>import",
    "x",
    "for i in range(",
    "\n\n\n",
    "    return self." * 40,  # longer than the context
]
OPTIONS = [
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 0.0, "max_new_tokens": 140},  # fills the context, and slides
    {"top_k": 20, "stop": ["\n\n", "return"]},
    {"temperature": 1.3, "repetition_penalty": 1.2},
]
NAMES = {
    "max_new_tokens": "maxNewTokens",
    "top_k": "topK",
    "top_p": "topP",
    "repetition_penalty": "repetitionPenalty",
}


def requests_for(prompts, options=OPTIONS, count=20):
    """Prompts and options with a seed each, as Python has them."""
    return [
        (prompts[i % len(prompts)], options[i % len(options)] | {"seed": 2**i - 1})
        for i in range(count)
    ]


def in_javascript(requests):
    return [
        [prompt, {NAMES.get(name, name): value for name, value in options.items()}]
        for prompt, options in requests
    ]


def in_python(gpt, requests):
    return [gpt.generate(prompt, **options) for prompt, options in requests]


def run_node(script, *arguments, given):
    done = subprocess.run(
        [NODE, HERE / script, *map(str, arguments)],
        input=json.dumps(given),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def ask_node(folder, requests):
    """Return what the library says of the model, and its answers."""
    about, *answers = run_node("web_library.mjs", folder, given={"requests": requests})
    return about, answers


def browse(scenario, url, **given):
    """Do what `web_page.mjs` has under a name."""
    given["chromium"] = CHROMIUM
    return run_node("web_page.mjs", MODULES, scenario, url, given=given)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A trained model in float32.

    Where activations are rounded as they come, the last digit of a sum decides on which
    side one falls, and other kernels have other last digits.
    """
    path = tmp_path_factory.mktemp("model") / "python-small.litertlm"
    export_litertlm(*load_model(ROOT / "saved_models/python-small"), path, "float32")
    return path


@pytest.fixture(scope="module")
def site(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("web") / "site"
    write_web(model, folder, runtime=MODULES, offline=True)
    return folder


@pytest.fixture
def changed(site, tmp_path):
    """A copy of the folder, to be changed."""
    return shutil.copytree(site, tmp_path / "changed")


@pytest.fixture(scope="module")
def gpt(model):
    with EdgeGPT(model) as opened:
        yield opened


@pytest.fixture
def served():
    """Serve folders; by another handler where one is given."""
    servers = []

    def serve(folder, handler=None):
        if handler is None:
            server = static_server.make_server(folder, 0)
        else:
            handler = functools.partial(handler, directory=str(folder))
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


# In Node


@needs_packages
def test_the_same_seed_gives_the_same_text(site, gpt):
    requests = requests_for(PROMPTS)
    about, answers = ask_node(site, in_javascript(requests))
    assert [answer["text"] for answer in answers] == in_python(gpt, requests)
    assert about["contextLength"] == gpt.context_length
    token = answers[0]["first"]["token"]
    gpt.reset()
    likely = log_softmax(gpt.logits(gpt.tokenizer.encode(PROMPTS[0]))[-1])
    assert token["probability"] == pytest.approx(np.exp(likely[token["id"]]), rel=1e-3)
    others = [one["id"] for one in answers[0]["first"]["others"]]
    best = [i for i in np.argsort(-likely, kind="stable") if i != token["id"]]
    assert len(others) == 5 and others == best[:5]


@needs_packages
def test_characters_and_chats_are_those_of_python(exported, talking, tmp_path):  # noqa: F811
    write_web(exported.litertlm, tmp_path / "letters", runtime=MODULES)
    write_web(talking[2], tmp_path / "talking", runtime=MODULES)
    requests = requests_for(["abc", "\u00e9 x\n"], count=4)
    _, answers = ask_node(
        tmp_path / "letters", [*in_javascript(requests), ["\u4e2d", {}], ["", {}]]
    )
    with EdgeGPT(exported.litertlm) as gpt:
        assert [one.get("text") for one in answers[:4]] == in_python(gpt, requests)
    assert all("error" in answer for answer in answers[4:])
    turns = [{"role": "user", "content": "the fox"}]
    answer = {"role": "assistant", "content": "runs"}
    turns = [turns, [*turns, answer, *turns], turns * 9]
    options = {"max_new_tokens": 30, "temperature": 0.7, "seed": 5}
    requests = [(messages, options) for messages in turns]
    _, answers = ask_node(tmp_path / "talking", in_javascript(requests))
    with EdgeGPT(talking[2]) as gpt:
        expected = [gpt.chat(messages, **options) for messages in turns]
    assert [answer.get("text") for answer in answers] == expected


@needs_packages
def test_what_cannot_be_used_is_refused_with_one_line(site, changed):
    wrong = [
        ["x", {"temperature": -1}],
        ["x", {"topP": 0}],
        ["x", {"seed": -1}],
        ["x", {"maxNewTokens": 1.5}],
        [[1024], {}],
        [[{"role": "user", "content": "x"}], {}],
    ]
    _, answers = ask_node(site, [*wrong, ["x", {"maxNewTokens": 1}]])
    assert all("Received" in answer["error"] for answer in answers[:-1])
    assert "text" in answers[-1]
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].reverse()
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused, _ = ask_node(changed, [])
    assert "tokenizer" in refused["error"]
    model = bytearray((changed / "model.tflite").read_bytes())
    model[-100] ^= 1
    (changed / "model.tflite").write_bytes(model)
    assert "SHA-256" in ask_node(changed, [])[0]["error"]


# In a browser


@pytest.mark.slow
@needs_packages
@needs_browser
def test_a_browser_writes_the_same_text(site, gpt, served):
    requests = requests_for(PROMPTS)
    found = browse("library", served(site), requests=in_javascript(requests))
    assert found["texts"] == in_python(gpt, requests)
    assert found["about"]["threads"] > 1 or os.cpu_count() == 1


@pytest.mark.slow
@needs_packages
@needs_browser
def test_the_page_does_what_people_ask(site, gpt, served):
    settings = {"seed": 7, "maxNewTokens": 60, "stopText": "\\n\\n", "temperature": 0.8}
    found = browse("people", served(site), prompt=PROMPTS[0], settings=settings)
    options = {"seed": 7, "max_new_tokens": 60, "stop": ["\n\n"], "temperature": 0.8}
    text = gpt.generate(PROMPTS[0], top_p=0.95, **options)
    assert found["text"] == PROMPTS[0] + text
    assert found["chosen"] in text and len(found["candidates"]) in (5, 6)
    assert found["taken"] == 1 and found["speed"][-1] == "7"
    assert "".join(found["spoken"].split()) == "".join(text.split())
    assert 20 < found["stopped"] < 5000
    assert found["wide"] == 390 and found["unnamed"] == 0 and found["errors"] == []


@pytest.mark.slow
@needs_packages
@needs_browser
def test_a_chat_goes_on(talking, served, tmp_path):  # noqa: F811
    write_web(talking[2], tmp_path / "talking", runtime=MODULES)
    settings = {"seed": 5, "maxNewTokens": 20, "temperature": 0, "system": "be kind"}
    asked = ["the fox", "and then"]
    url = served(tmp_path / "talking")
    shown = browse("chat", url, messages=asked, settings=settings)
    messages = [{"role": "system", "content": "be kind"}]
    expected = []
    with EdgeGPT(talking[2]) as gpt:
        for message in asked:
            messages.append({"role": "user", "content": message})
            answer = gpt.chat(messages, max_new_tokens=20, temperature=0)
            messages.append({"role": "assistant", "content": answer})
            expected += [message, answer]
    assert shown == expected


@pytest.mark.slow
@needs_packages
@needs_browser
def test_the_model_is_kept_until_it_changes(changed, served):
    url = served(changed)
    found = browse("kept", url)
    facts = json.loads((changed / FACTS_NAME).read_text())
    assert (found["first"], found["second"]) == (1, 0)
    (kept,) = found["kept"]
    assert kept.endswith(facts["model"]["sha256"])
    model = bytearray((changed / "model.tflite").read_bytes())
    model[-100] ^= 1
    (changed / "model.tflite").write_bytes(model)
    found = browse("status", url)
    assert found["failed"] and "SHA-256" in found["status"]


class CutOnce(static_server._Handler):
    """Sends half of the model, the first time."""

    was_cut = False

    def copyfile(self, source, outputfile):
        if self.path == "/model.tflite" and not CutOnce.was_cut:
            CutOnce.was_cut = True
            outputfile.write(source.read(1_000_000))
            self.close_connection = True
        else:
            super().copyfile(source, outputfile)


@pytest.mark.slow
@needs_packages
@needs_browser
def test_an_interrupted_download_is_told_and_can_be_repeated(site, served):
    CutOnce.was_cut = False
    found = browse("again", served(site, CutOnce))
    assert "ended after" in found["first"] and "Ready" in found["second"]


@pytest.mark.slow
@needs_packages
@needs_browser
def test_what_a_server_or_browser_lacks_is_told(site, served):
    plain = browse("status", served(site, http.server.SimpleHTTPRequestHandler))
    assert not plain["failed"] and "one thread" in plain["status"]
    assert "Cross-Origin-Opener-Policy" in plain["status"]
    flags = ["--js-flags=--no-enable-sse4-1 --no-enable-ssse3 --no-enable-sse3"]
    without = browse("status", served(site), flags=flags)
    assert without["failed"] and "SIMD" in without["status"]


@pytest.mark.slow
@needs_packages
@needs_browser
def test_webgpu_is_used_only_where_it_agrees(site, gpt, served):
    options = {"max_new_tokens": 4, "temperature": 0.0}
    request = in_javascript([(PROMPTS[0], options)])[0]
    found = browse("webgpu", served(site), prompt=request[0], options=request[1])
    if "error" in found:
        assert "WebGPU" in found["error"]
    else:
        assert found["about"]["accelerator"] == "webgpu"
        assert found["text"] == gpt.generate(PROMPTS[0], **options)
