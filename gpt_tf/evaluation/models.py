"""What is measured: a file for a device or a Keras model, behind the same methods.

`EdgeGPT` is the model of a file; `KerasGPT` gives a Keras model the same methods, so
that measuring and explaining treat both alike.
"""

import os
from pathlib import Path

import numpy as np

from gpt_tf import artifacts
from gpt_tf.edge.runtime import EdgeGPT
from gpt_tf.errors import InputError
from gpt_tf.export import signatures
from gpt_tf.generation import sequence
from gpt_tf.models.sizes import count_parameters
from gpt_tf.pretrained.source import is_keras
from gpt_tf.settings import arguments

# Powers of two between these: so few lengths of a chunk are compiled.
_SMALLEST_CHUNK = 8
_LARGEST_CHUNK = 64


def open_model(path: str | os.PathLike, *, num_threads: int | None = None):
    """Open whatever can be measured.

    Args:
        path: A `.tflite`, a `.litertlm`, a run's or model's folder, or a `.keras` file.
        num_threads: Threads that compute, of a file alone.

    Returns:
        An `EdgeGPT` or a `KerasGPT`.

    Raises:
        InputError: There is nothing of that kind.
        DamagedFileError: It is no model, or its bytes were altered.

    Example:
        >>> with open_model("gpt.litertlm") as gpt:
        ...     logits = gpt.logits(gpt.tokenizer.encode("def main():"))
    """
    path = arguments.path("path", path)
    if is_keras(path):
        from gpt_tf.training.loop import load_model

        model, tokenizer = load_model(path)
        return KerasGPT(model, tokenizer)
    return EdgeGPT(path, num_threads=num_threads)


def check_open(model) -> None:
    """Refuse what is not open yet: a path, or a Keras model by itself."""
    if hasattr(model, "config") or hasattr(model, "tokenizer"):
        return
    repair = "`KerasGPT(model, tokenizer)`, or `open_model(path)`"
    if isinstance(model, str | os.PathLike):
        repair = f"`open_model({str(model)!r})`"
    raise InputError(
        "What is measured or explained is expected to be open. Received: "
        f"{type(model).__name__}. Pass {repair}, of gpt_tf.evaluation.models."
    )


def check_tokenizer(tokenizer, name: str) -> None:
    """Refuse a model, which errors call `name`, that has no tokenizer."""
    if tokenizer is None:
        raise InputError(
            f"Judging {name} expects its tokenizer. Received: none. Put "
            "tokenizer.json beside it, or name the .litertlm or the run's folder."
        )


def unique_names(paths) -> list[str]:
    """Name each of several paths by as much of its end as tells it from the others.

    Raises:
        InputError: One is named twice.

    Example:
        >>> unique_names(["a/gpt.litertlm", "b/gpt.litertlm"])
        ['a/gpt.litertlm', 'b/gpt.litertlm']
    """
    parts = [Path(path).absolute().parts for path in paths]
    for index, one in enumerate(parts):
        if one in parts[:index]:
            raise InputError(
                f"Each file is measured once. Received: {paths[index]} twice."
            )
    names = []
    for one in parts:
        length = 1
        while sum(other[-length:] == one[-length:] for other in parts) > 1:
            length += 1
        names.append("/".join(one[-length:]))
    return names


def describe(path: str | os.PathLike, model) -> dict:
    """Say what the model of a path is: the beginning of a report's `Entry`."""
    path = Path(path)
    if isinstance(model, EdgeGPT):
        files, kind = (path,), path.suffix.lstrip(".") or "tflite"
    else:
        from gpt_tf.training.run_folder import model_files

        files, kind = model_files(path), "keras"
    return {
        "name": path.name,
        "path": str(path),
        "kind": kind,
        "mode": model.mode,
        "parameters": count_parameters(model.config),
        "size_bytes": sum(file.stat().st_size for file in files),
        "sha256": artifacts.sha256_of(*files),
        "context_length": model.context_length,
        "config": dict(model.config),
    }


class KerasGPT:
    """A Keras model with the methods of `EdgeGPT`, one text at a time in its cache.

    Its `mode` is `"keras"`, or `"keras_qat"` of a quantisation-aware model.

    Args:
        model: A `GPTModel`, or a quantisation-aware one.
        tokenizer: Its `Tokenizer`, or None; ids work without.

    Example:
        >>> gpt = KerasGPT(model, tokenizer)
        >>> gpt.prefill(ids[:-1])
        >>> logits = gpt.decode(ids[-1])
    """

    num_threads = None  # TensorFlow's own

    def __init__(self, model, tokenizer=None):
        from gpt_tf.models.gpt import GPTModel

        self.model = model
        self.tokenizer = tokenizer
        is_float = isinstance(model, GPTModel)
        self.mode = "keras" if is_float else "keras_qat"
        config = model.get_config()
        config = config.get("gpt", config)
        self.config = {key: value for key, value in config.items() if key != "name"}
        self._suppressed = sequence.ids_without_token(
            tokenizer, self.config["vocab_size"]
        )
        self.context_length = self.config["context_length"]
        self.reset()

    @property
    def position(self) -> int:
        """Number of tokens in the cache."""
        return self._position

    def reset(self) -> None:
        """Empty the cache: the next token is the first of a text."""
        self._position = 0
        self._caches = None

    def prefill(self, ids) -> int:
        """Append tokens to the text in the cache; return the position."""
        self.logits(ids)
        return self._position

    def rewind(self, position: int) -> None:
        """Forget the tokens in the cache from a position on; there may be none."""
        position = arguments.integer("position", position)
        self._position = min(self._position, position)

    def decode(self, token: int) -> np.ndarray:
        """Append a token; return the logits `(V,)` of what may follow it."""
        return self.logits([token])[0]

    def logits(self, ids) -> np.ndarray:
        """Append `N` tokens; return the logits `(N, V)` of what may follow each.

        Raises:
            InputError: An id is unknown, or there is no room for so many.
        """
        ids = sequence.appendable(ids, self)
        if not ids:
            return np.zeros((0, self.config["vocab_size"]), np.float32)
        pieces = [
            self._append(ids[start : start + _LARGEST_CHUNK])
            for start in range(0, len(ids), _LARGEST_CHUNK)
        ]
        return np.concatenate(pieces)

    def _append(self, ids):
        from gpt_tf.models import cached_forward

        if self._caches is None:
            # What a chunk holds beyond its tokens has room behind the context.
            capacity = self.context_length + _LARGEST_CHUNK
            self._caches = cached_forward.empty_cache(self.model, 1, capacity)
        length = 1 if len(ids) == 1 else _SMALLEST_CHUNK
        while length < len(ids):
            length *= 2
        chunk = np.zeros((1, length), np.int32)
        chunk[0, : len(ids)] = ids
        logits, self._caches = cached_forward.append(
            self.model, chunk, self._position, self._caches
        )
        self._position += len(ids)
        logits = logits.numpy()[0, : len(ids)]
        logits[:, self._suppressed] = signatures.MASKED  # as in an exported file
        return logits

    def generate(self, prompt, **options):
        """Continue prompts, as `gpt_tf.generate` does."""
        from gpt_tf.models import cached_forward

        return cached_forward.generate(
            self.model, prompt, tokenizer=self.tokenizer, **options
        )

    def stream(self, prompt, **options):
        """Continue one prompt piece by piece."""
        return self.generate(prompt, stream=True, **options)

    def close(self) -> None:
        """Forget the cache."""
        self.reset()

    def __enter__(self) -> "KerasGPT":
        return self

    def __exit__(self, *exception):
        self.close()
