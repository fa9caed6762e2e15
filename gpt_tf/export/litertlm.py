"""Export a GPT to a `.litertlm`: model, tokenizer and metadata in one file.

LiteRT-LM, Google's runtime, and `gpt_tf.edge` both run it. The container is written
by Google's own `litert-lm-builder`, and then sealed. The same model, options and
versions give the same bytes.
"""

import contextlib
import io
import logging
import mmap
import os
import re
from unittest import mock

from gpt_tf import artifacts
from gpt_tf.errors import InputError
from gpt_tf.export import integrity, tflite
from gpt_tf.export.signatures import BARE_TEMPLATE, BUNDLE_PREFIX
from gpt_tf.generation.conversation import ids_that_end
from gpt_tf.models.language_model import check_language_model
from gpt_tf.settings import arguments
from gpt_tf.text.tokenizer import Tokenizer

# LiteRT-LM hands templates a list of parts as `content`, where most expect a text.
_TEXTS_OF_PARTS = (
    "{% set texts = namespace(messages=[]) %}{% for message in messages %}"
    "{% if message.content is string or message.content is not iterable %}"
    "{% set texts.messages = texts.messages + [message] %}{% else %}"
    "{% set content = message.content | map(attribute='text') | join %}"
    "{% set texts.messages = texts.messages + [dict(message, content=content)] %}"
    "{% endif %}{% endfor %}{% set messages = texts.messages %}\n"
)

logger = logging.getLogger(__name__)


def export_litertlm(
    model,
    tokenizer,
    path: str | os.PathLike,
    mode: str = "dynamic_int8",
    **options,
) -> dict:
    """Write a GPT with its tokenizer as one `.litertlm`.

    The tokenizer's chat template goes with it, for `EdgeGPT.chat` and LiteRT-LM.

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

    source, ends = _template_of(tokenizer)
    # It names no start token: a chat template has it, or there is none.
    about = f"max_num_tokens: {manifest['capacity']}\n"
    about += "llm_model_type { generic_model {} }\n"
    for token in ends:
        about += f"stop_tokens {{ token_ids {{ ids: {token} }} }}\n"
    metadata, template = folder / "metadata.textproto", folder / "template.jinja"
    metadata.write_text(about, "utf-8")
    template.write_text(source, "utf-8")
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


def _template_of(tokenizer):
    """Return the source of a chat template that stands alone, and the ids that end."""
    template = tokenizer.chat_template
    if template is None:
        return BARE_TEMPLATE, tokenizer.end_ids
    try:
        template.render([{"role": "user", "content": "Good morning."}])
    except InputError as error:
        logger.info("the chat template is left out of the file: %s", error)
        return BARE_TEMPLATE, tokenizer.end_ids
    # LiteRT-LM does not know special tokens by name. It trims lines as Jinja2 does
    # here, but keeps a line break at the end.
    names = "".join(
        f"{{% set {name} = {artifacts.to_json(text)} %}}\n"
        for name, text in template.special_tokens.items()
        if name in template.source
    )
    # Nor does it know the marks of what an assistant says.
    source = re.sub(r"({%[-+]?\s*)generation\b", r"\1if true", template.source)
    source = re.sub(r"({%[-+]?\s*)endgeneration\b", r"\1endif", source)
    source = names + _TEXTS_OF_PARTS + source.removesuffix("\n")
    return source, ids_that_end(tokenizer)
