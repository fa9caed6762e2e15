"""Export a GPT to a `.litertlm`: model, tokenizer and metadata in one file.

LiteRT-LM, Google's runtime, and `gpt_tf.edge` both run it. The container is written
by Google's own `litert-lm-builder`, and then sealed. The same model, options and
versions give the same bytes.
"""

import contextlib
import io
import mmap
import os
from unittest import mock

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.export import integrity, tflite
from gpt_tf.export.signatures import BUNDLE_PREFIX
from gpt_tf.models.language_model import check_language_model
from gpt_tf.settings import arguments
from gpt_tf.text.tokenizer import Tokenizer

# Whatever the conversation is, the model sees the bare text of its messages.
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for item in message.content %}{{ item.text }}{% endfor %}{% endif %}"
    "{% endfor %}"
)


def export_litertlm(
    model,
    tokenizer,
    path: str | os.PathLike,
    mode: str = "dynamic_int8",
    **options,
) -> dict:
    """Write a GPT with its tokenizer as one `.litertlm`.

    Two habits of LiteRT-LM 0.18: it keeps packed weights beside the file unless it is
    told not to, and it ends its process at a character that a `CharacterTokenizer` has
    not seen, where `EdgeGPT` raises an error. A `BPETokenizer` knows all characters.

    Args:
        model: A `GPTModel`, or one that `quantize_aware` made of it.
        tokenizer: Its tokenizer.
        path: Where to write; a file that stands there is replaced.
        mode: As for `export_tflite`; LiteRT-LM runs all of them.
        **options: As for `export_tflite`.

    Returns:
        The manifest, as written beside the file.

    Raises:
        InputError, InputTypeError, VerificationError: As for `export_tflite`.

    Example:
        >>> export_litertlm(model, tokenizer, "gpt.litertlm")["mode"]
        'dynamic_int8'
    """
    path = arguments.path("path", path)
    if path.suffix != ".litertlm":
        raise InputError(
            f"`path` expects a name that ends in .litertlm. Received: {path.name!r}."
        )
    check_language_model(model, "model")
    expected = "the tokenizer that the model was trained with"
    arguments.instance("tokenizer", tokenizer, Tokenizer, expected)
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"`tokenizer` expects {expected}, of at most {model.vocab_size} tokens. "
            f"Received: {tokenizer.vocab_size}."
        )
    with artifacts.replaced(path, artifacts.file_manifest_path(path).name) as new:
        parts = new.parent / "parts"
        inner = tflite.export_tflite(
            model, parts / "model.tflite", mode, tokenizer=tokenizer, **options
        )
        with open(new / path.name, "w+b") as file:
            _bundle(parts, inner, tokenizer, file)
            file.flush()
            with mmap.mmap(file.fileno(), 0) as data:
                integrity.seal(data, BUNDLE_PREFIX)
        inner["tflite_sha256"] = inner.pop("sha256")
        for key in ("kind", "versions", "size_bytes", "manifest_sha256"):
            del inner[key]
        return artifacts.write_file_manifest(new / path.name, "litertlm", **inner)


def _bundle(folder, manifest, tokenizer, stream):
    import litert_lm_builder as builder
    from litert_lm_builder import litertlm_builder

    # It names no start token: the model was trained without one.
    about = f"max_num_tokens: {manifest['capacity']}\n"
    about += "llm_model_type { generic_model {} }\n"
    if tokenizer.end_of_text_id is not None:
        about += f"stop_tokens {{ token_ids {{ ids: {tokenizer.end_of_text_id} }} }}\n"
    metadata, template = folder / "metadata.textproto", folder / "template.jinja"
    metadata.write_text(about, "utf-8")
    template.write_text(_TEMPLATE, "utf-8")
    seal = integrity.blank_seal(BUNDLE_PREFIX)
    with (
        # The builder prints what it adds, and adds a random id and the time.
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.object(litertlm_builder, "populate_system_metadata", list),
    ):
        bundle = builder.LitertLmFileBuilder()
        for key, value in (("Authors", "gpt_tf"), ("gpt_tf", seal)):
            entry = builder.Metadata(key, value, builder.DType.STRING)
            bundle.add_system_metadata(entry)
        bundle.add_llm_metadata(str(metadata), jinja_prompt_template_path=str(template))
        bundle.add_hf_tokenizer(str(folder / "tokenizer.json"))
        bundle.add_tflite_model(
            str(folder / "model.tflite"), builder.TfLiteModelType.PREFILL_DECODE
        )
        bundle.build(stream)
