"""Write a folder that runs a model in a browser: page, script, model, tokenizer.

The page and the script stand in `web/`, plain modules that need no build step. What
runs the model, LiteRT.js, and what reads its tokenizer and chat template come from
Hugging Face's and Google's packages on npm: copied from a folder in which they are
installed, or fetched by the page from a content delivery network.
"""

import hashlib
import logging
import os
import shutil
from pathlib import Path

from gpt_tf import artifacts
from gpt_tf.edge.loader import Artefact, open_artefact
from gpt_tf.errors import InputError
from gpt_tf.generation.conversation import ids_that_end
from gpt_tf.generation.sequence import ids_without_token
from gpt_tf.settings import arguments

FORMAT = "gpt_tf.web/1"
FACTS_NAME = "model.json"
CDN = "https://cdn.jsdelivr.net/npm/"
# The packages, with the versions that the tests run.
PACKAGES = {
    "@litertjs/core": "2.5.3",
    "@litertjs/wasm-utils": "2.5.3",
    "@huggingface/tokenizers": "0.2.0",
    "@huggingface/jinja": "0.5.11",
}
_CORE, _WASM_UTILS, _TOKENIZERS, _JINJA = PACKAGES
# LiteRT.js loads one of these, by what the browser can do.
_WASM = [
    f"wasm/litert_wasm_{kind}internal.{ending}"
    for kind in ("", "compat_", "threaded_")
    for ending in ("js", "wasm")
]
_FILES = {
    _CORE: ["dist/index.js", *_WASM],
    _WASM_UTILS: ["dist/index.js"],
    _TOKENIZERS: ["dist/tokenizers.min.mjs"],
    _JINJA: ["dist/index.js"],
}
# Browsers find packages by their name only through an import map, workers not at all.
_BY_NAME = f'from "{_WASM_UTILS}"'
_BY_PLACE = 'from "../../wasm-utils/dist/index.js"'

_WEB = Path(__file__).with_name("web")
# The page reads it to see that tokenizer and model fit, whatever program tokenizes.
_PROBE = "a  b\n\t<|endoftext|> \u00e9\u4e2d\U0001f600 it's 1234 C"

logger = logging.getLogger(__name__)


def write_web(
    model: str | os.PathLike,
    out: str | os.PathLike,
    *,
    runtime: str | os.PathLike | None = None,
    offline: bool = False,
    prompt: str = "",
) -> dict:
    """Write a folder that any web server shows as a page with the model in it.

    The folder is a JavaScript library, too: `gpt_tf.js`. It is written whole or not at
    all; one that this function wrote before gives way.

    Args:
        model: A `.litertlm`, or a `.tflite` with `tokenizer.json` beside it.
        out: The folder.
        runtime: A `node_modules` folder with the packages of `PACKAGES`, which are
            copied, or the address of a content delivery network for npm that the page
            fetches them from. Default: `node_modules` here if it has them, else `CDN`.
        offline: Whether the page must do without a network but for its own folder.
        prompt: What stands in the page's field at first.

    Returns:
        What the page knows of the model, as in its `model.json`.

    Raises:
        InputError: The model has no tokenizer or is one that LiteRT.js cannot run, a
            package is missing, or something else stands at `out`.
        DamagedFileError: The model is damaged.

    Example:
        >>> write_web("gpt.litertlm", "site", runtime="node_modules")["capacity"]
        1024

    Reference: LiteRT.js, ai.google.dev/edge/litert/web.
    """
    out = arguments.path("out", out)
    if out.is_dir() and os.listdir(out) and not (out / FACTS_NAME).is_file():
        raise InputError(
            f"`out` expects a new folder, or one of an earlier page. Received: {out}, "
            "which holds something else. Choose another name."
        )
    artefact = open_artefact(model)
    content = artefact.model
    content = Path(content).read_bytes() if isinstance(content, str) else content
    _check(artefact, model)
    packages, addresses = _find_runtime(runtime, offline)
    facts = {
        "format": FORMAT,
        "name": Path(model).stem,
        "prompt": arguments.text("prompt", prompt),
        "model": {
            "file": "model.tflite",
            "size": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        },
        "runtime": addresses,
        **{name: artefact.facts[name] for name in ("mode", "capacity", "config")},
        "prefill_lengths": artefact.facts["prefill_lengths"],
        **_tokenizer_facts(artefact),
    }
    tokenizer = artefact.tokenizer
    token_bytes = [
        tokenizer.decode_bytes([token]).decode("latin-1")
        for token in range(tokenizer.vocab_size)
    ]
    with artifacts.atomic_folder(out, replace=True) as folder:
        shutil.copytree(_WEB, folder, dirs_exist_ok=True)
        (folder / "model.tflite").write_bytes(content)
        tokenizer.save(folder / "tokenizer.json")
        artifacts.write_json(folder / "token_bytes.json", token_bytes)
        if packages is not None:
            _copy_runtime(packages, folder / "runtime")
        artifacts.write_json(folder / FACTS_NAME, facts)
    return facts


def _check(artefact: Artefact, model):
    if artefact.tokenizer is None:
        raise InputError(
            f"A page expects a model with its tokenizer. Received: {model} alone. Name "
            "a .litertlm, or put tokenizer.json beside the .tflite."
        )
    if artefact.facts["cache_dtype"] != "float32":
        raise InputError(
            "A page expects a model whose cache is float32: LiteRT.js has no int8 "
            f"tensors. Received: mode {artefact.facts['mode']}. Export it in another "
            "mode, int8 or dynamic_int8 for example."
        )


def _tokenizer_facts(artefact):
    """Return what ends a text, which ids are never drawn, and the chat template."""
    tokenizer = artefact.tokenizer
    is_limited = tokenizer.kind == "character"  # it has no other characters
    probe = tokenizer.decode(range(min(64, tokenizer.vocab_size)))
    probe = probe if is_limited else _PROBE
    suppressed = ids_without_token(tokenizer, artefact.facts["config"]["vocab_size"])
    facts = {
        "end_ids": list(tokenizer.end_ids),
        "suppressed": suppressed.tolist(),
        "probe": {"text": probe, "ids": tokenizer.encode(probe, special=True)},
    }
    template = tokenizer.chat_template
    if template is None:
        return {"tokenizer": facts, "chat": None}
    ends = set(ids_that_end(tokenizer)) - set(tokenizer.end_ids)
    chat = {
        "template": template.source,
        "special_tokens": template.special_tokens,
        "stop": [tokenizer.backend.id_to_token(token) for token in ends],
    }
    return {"tokenizer": facts, "chat": chat}


def _find_runtime(runtime, offline):
    """Return the folder to copy packages from, or None; and what the page imports."""
    arguments.switch("offline", offline)
    here = Path("node_modules")
    if runtime is None:
        runtime = here if (here / _CORE).is_dir() else CDN
    is_address = str(runtime).startswith(("https://", "http://"))
    if is_address and offline:
        raise InputError(
            "A page that is to work offline expects `runtime`, a folder to copy "
            f"LiteRT.js from. Received: {runtime}. Run `{install_command()}` and name "
            "the folder node_modules."
        )
    if is_address:
        base = str(runtime).rstrip("/") + "/"
        at = {name: f"{base}{name}@{version}/" for name, version in PACKAGES.items()}
    else:
        base = arguments.path("runtime", runtime)
        at = {name: f"runtime/{name}/" for name in PACKAGES}
    return None if is_address else base, {
        # The network makes modules of packages that name others.
        "litert": at[_CORE] + ("+esm" if is_address else _FILES[_CORE][0]),
        "wasm": at[_CORE] + "wasm/",
        "tokenizers": at[_TOKENIZERS] + _FILES[_TOKENIZERS][0],
        "jinja": at[_JINJA] + _FILES[_JINJA][0],
        # A browser starts workers from the page's own server only.
        "threads": not is_address,
    }


def install_command() -> str:
    """Return the command that installs the packages."""
    names = [f"{name}@{version}" for name, version in PACKAGES.items()]
    return " ".join(["npm install", *names])


def _copy_runtime(source, target):
    for name, files in _FILES.items():
        about = source / name / "package.json"
        if not about.is_file():
            raise InputError(
                f"`runtime` expects a folder with the package {name}. Received: "
                f"{source}, which lacks it. Run `{install_command()}` and name the "
                "folder node_modules."
            )
        version = artifacts.read_json(about, {"version": str})["version"]
        if version != PACKAGES[name]:
            logger.info("%s is %s; tested is %s", name, version, PACKAGES[name])
        licenses = [path.name for path in (source / name).glob("LICENSE*")]
        for file in ["package.json", *files, *licenses]:
            (target / name / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name / file, target / name / file)
    entry = target / _CORE / _FILES[_CORE][0]
    code = entry.read_text("utf-8")
    if code.count(_BY_NAME) != 1:
        raise InputError(
            f"{_CORE} expects to import {_WASM_UTILS} once, as its version "
            f"{PACKAGES[_CORE]} does. Run `{install_command()}`."
        )
    entry.write_text(code.replace(_BY_NAME, _BY_PLACE), "utf-8")
