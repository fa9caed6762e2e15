"""The folder for browsers, and the server that shows it here."""

import hashlib
import json
import threading
import urllib.error
import urllib.request

import pytest

from gpt_tf.edge import EdgeGPT, web_bundle
from gpt_tf.edge.loader import open_artefact
from gpt_tf.edge.static_server import make_server
from gpt_tf.edge.web_bundle import _FILES, CDN, PACKAGES, write_web
from gpt_tf.errors import InputError
from tests.edge.test_chat import END, talking  # noqa: F401


@pytest.fixture
def packages(tmp_path):
    """A folder as npm leaves it, with files that only look like the packages'."""
    folder = tmp_path / "node_modules"
    for name, files in _FILES.items():
        for file in files:
            path = folder / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text('from "@litertjs/wasm-utils"')
        about = {"version": PACKAGES[name]}
        (folder / name / "package.json").write_text(json.dumps(about))
    return folder


def contents(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_the_folder_holds_all_that_the_page_names(exported, packages, tmp_path):
    out = tmp_path / "site"
    facts = write_web(exported.litertlm, out, runtime=packages, offline=True)
    assert json.loads((out / "model.json").read_text()) == facts
    found = contents(out)
    model = (out / facts["model"]["file"]).read_bytes()
    assert model == exported.tflite.read_bytes()
    assert hashlib.sha256(model).hexdigest() == facts["model"]["sha256"]
    runtime = facts["runtime"]
    assert {runtime[name] for name in ("litert", "tokenizers", "jinja")} <= found
    assert f"{runtime['wasm']}litert_wasm_threaded_internal.wasm" in found
    entry = (out / runtime["litert"]).read_text()
    (place,) = [part for part in entry.split('"') if part.startswith("..")]
    assert (out / runtime["litert"]).parent.joinpath(place).is_file()
    bytes_of = json.loads((out / "token_bytes.json").read_text())
    with EdgeGPT(exported.litertlm) as gpt:
        assert [b.encode("latin-1") for b in bytes_of] == [
            gpt.tokenizer.decode_bytes([token]) for token in range(len(bytes_of))
        ]
        probe = facts["tokenizer"]["probe"]
        assert gpt.tokenizer.encode(probe["text"]) == probe["ids"]
    assert facts["chat"] is None


def test_a_chat_has_its_template_and_what_ends_a_turn(talking, tmp_path):  # noqa: F811
    facts = write_web(talking[2], tmp_path / "site", runtime="https://cdn.example/")
    with EdgeGPT(talking[2]) as gpt:
        template = gpt.tokenizer.chat_template
        assert facts["chat"]["template"] == template.source
        ends = [*facts["tokenizer"]["end_ids"], *facts["chat"]["stop"]]
        assert gpt.tokenizer.backend.token_to_id(END) in ends or END in ends
    address = facts["runtime"]["litert"]
    assert address.startswith("https://cdn.example/@litertjs/core@")
    assert not facts["runtime"]["threads"]


def test_it_is_written_whole_or_not_at_all(exported, packages, tmp_path, monkeypatch):
    out = tmp_path / "site"
    write_web(exported.litertlm, out, runtime=packages)
    before = contents(out)
    (out / "index.html").write_text("old")
    wasm = packages / "@litertjs/core/wasm/litert_wasm_internal.wasm"
    wasm.unlink()
    with pytest.raises(FileNotFoundError):
        write_web(exported.litertlm, out, runtime=packages)
    assert contents(out) == before and (out / "index.html").read_text() == "old"
    wasm.touch()
    write_web(exported.litertlm, out, runtime=packages)
    assert contents(out) == before and (out / "index.html").read_text() != "old"


def test_what_cannot_be_a_page_is_refused(exported, packages, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    alone = tmp_path / "alone.tflite"
    alone.write_bytes(exported.tflite.read_bytes())
    (packages / "@huggingface/jinja/package.json").unlink()
    for model, out, given, named in [
        (exported.litertlm, "mine", {}, "mine"),
        (alone, "site", {}, "alone.tflite"),
        (exported.litertlm, "site", {"runtime": packages}, "@huggingface/jinja"),
        (exported.litertlm, "site", {"offline": True}, CDN),
    ]:
        with pytest.raises(InputError) as refused:
            write_web(model, tmp_path / out, **given)
        assert named in str(refused.value)
        assert not (tmp_path / "site").exists()
    assert (tmp_path / "mine/thesis.txt").exists()


def test_a_cache_of_int8_is_refused(exported, tmp_path, monkeypatch):
    artefact = open_artefact(exported.litertlm)
    facts = {**artefact.facts, "cache_dtype": "int8", "mode": "int8_full"}
    monkeypatch.setattr(
        web_bundle, "open_artefact", lambda _: artefact._replace(facts=facts)
    )
    with pytest.raises(InputError, match="int8_full"):
        write_web(exported.litertlm, tmp_path / "site", runtime="https://cdn.example")


def test_the_server_isolates_the_page_and_stays_in_its_folder(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "secret").touch()
    for name in ("index.html", "a.js", "b.mjs", "c.wasm"):
        (tmp_path / "site" / name).write_text(name)
    with make_server(tmp_path / "site", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/"
        kinds = {}
        for name in ("", "a.js", "b.mjs", "c.wasm"):
            with urllib.request.urlopen(base + name) as answer:
                headers = answer.headers
                kinds[name] = headers.get_content_type()
                assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
                assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        assert kinds == {
            "": "text/html",
            "a.js": "text/javascript",
            "b.mjs": "text/javascript",
            "c.wasm": "application/wasm",
        }
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(base + "%2e%2e/secret")
        with pytest.raises(InputError, match=str(server.server_port)):
            make_server(tmp_path, server.server_port)
        server.shutdown()


def test_the_command_writes_the_folder_and_says_where_litert_comes_from(
    command, exported, packages, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # where `node_modules` stands
    done = command("web", "--model", exported.litertlm, "--out", "site")
    assert done.status == 0, done.err
    assert (tmp_path / "site/model.tflite").is_file() and "copied" in done.out
    packages.rename(tmp_path / "elsewhere")
    done = command("web", "--model", exported.litertlm, "--out", "site")
    assert done.status == 0 and CDN in done.out
    done = command("web", "--model", exported.litertlm, "--out", "site", "--offline")
    assert done.status == 2 and done.err.count("\n") == 1
