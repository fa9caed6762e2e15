"""Export a GPT in stages: files of a few blocks each, to be run as a pipeline.

While one stage computes a token of one text, the stage before it already computes
that of another. Each file has the weights and caches of its own blocks only, so a
stage also is what fits where the whole does not.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from gpt_tf import files
from gpt_tf.errors import DamagedFileError, InputError
from gpt_tf.export import signatures, tflite, verify
from gpt_tf.export.constants import Constants
from gpt_tf.quiet import quiet

KIND = "staged model"


class Costs(NamedTuple):
    """Operations that a token costs: multiplications and additions.

    Attributes:
        block: Of each block, half the context in its cache.
        head: Of the head, which is part of the last stage.
    """

    block: int
    head: int


def export_stages(
    model,
    folder: str | os.PathLike,
    mode: str = "dynamic_int8",
    num_stages: int = 2,
    *,
    context_length: int | None = None,
    prefill_lengths: Sequence[int] = signatures.DEFAULT_PREFILL_LENGTHS,
    tokenizer=None,
    ranges: dict | None = None,
    representative=None,
    per_channel: bool | None = None,
    verify_on=None,
    allow_untrained: bool = False,
    on_notice: Callable[[str], None] | None = None,
) -> dict:
    """Write a GPT as a folder with a `.tflite` per stage.

    The first stage embeds the tokens, the last one has the head, and between them
    `hidden` `(1, T, C)` is handed on; see `gpt_tf.export.signatures`. The blocks are
    shared out so that the costliest stage costs a token as little as possible. A
    tied token table stands in two files, since the first stage looks tokens up in it
    and the last one scores with it.

    The undivided file is written too, verified as `export_tflite` does it, compared
    with the stages and removed again. Its SHA-256 is in the facts of every stage, by
    which stages that do not belong together are noticed.

    Args:
        model, mode, context_length, prefill_lengths, ranges, representative,
            per_channel, verify_on, allow_untrained, on_notice: As for
            `export_tflite`.
        folder: Where to write; a folder of stages that stands there is replaced.
        num_stages: Number of files, from 2 to the model's number of blocks.
        tokenizer: The model's tokenizer; `tokenizer.json` in the folder.

    Returns:
        The manifest, also written as `manifest.json`: the facts of the whole, blocks
        and cost of every stage, and under `"verification"` what was measured.

    Raises:
        InputError, InputTypeError, VerificationError: As for `export_tflite`; or the
            stages do not compute what the undivided file does.

    Example:
        >>> export_stages(model, "gpt-stages", num_stages=2)["stages"][0]["blocks"]
        [0, 9]

    Reference: article 3.1; Huang et al., "GPipe", arXiv:1811.06965.
    """
    say = on_notice or (lambda line: None)
    folder = Path(folder)
    tflite.refuse_unknown_mode(mode)
    tflite.refuse_other_models(model)
    is_whole = isinstance(num_stages, int) and not isinstance(num_stages, bool)
    if not is_whole or not 2 <= num_stages <= model.num_layers:
        raise InputError(
            f"`num_stages` expects 2 to {model.num_layers}, the model's number of "
            f"blocks. Received: {num_stages!r}. A whole model is one file: export it "
            "without stages."
        )
    source = tflite.prepare(
        model,
        mode,
        context_length=context_length,
        prefill_lengths=prefill_lengths,
        tokenizer=tokenizer,
        ranges=ranges,
        representative=representative,
        per_channel=per_channel,
        verify_on=verify_on,
        allow_untrained=allow_untrained,
        say=say,
    )
    try:
        with files.atomic_folder(folder, replace=_is_staged(folder)) as temporary:
            return _fill(temporary, source, model, num_stages, tokenizer, say)
    except OSError as error:
        raise tflite.no_space(folder, error) from None


def costs_of(constants: Constants, capacity: int) -> Costs:
    """Return what a token costs.

    Args:
        constants: The weights.
        capacity: `S`, rows of the caches.
    """
    sizes = constants.sizes
    products = sum(
        matrix.shape[0] * matrix.shape[1]
        for name, matrix in constants.matrices.items()
        if name.startswith("block_0/")
    )
    # Every row seen is multiplied with a query, and by its share.
    attention = 2 * sizes["num_heads"] * sizes["head_dim"] * (capacity // 2)
    return Costs(
        2 * (products + attention), 2 * sizes["vocab_size"] * sizes["embedding_dim"]
    )


def share_out(num_layers: int, num_stages: int, costs: Costs) -> list[range]:
    """Return the blocks of each stage, so that the costliest costs least.

    Args:
        num_layers: Number of blocks, at least `num_stages`.
        num_stages: Number of stages, at least 2.
        costs: What a block and the head cost.

    Example:
        >>> share_out(12, 2, Costs(block=1, head=5))
        [range(0, 9), range(9, 12)]
    """
    others = num_stages - 1

    def costliest(last):
        most = -(-(num_layers - last) // others)
        return max(most * costs.block, last * costs.block + costs.head)

    last = min(range(1, num_layers - others + 1), key=costliest)
    # The first stages, which embed or wait for nobody, take what does not go even.
    size, more = divmod(num_layers - last, others)
    blocks, begin = [], 0
    for index in range(others):
        end = begin + size + (index < more)
        blocks.append(range(begin, end))
        begin = end
    return [*blocks, range(begin, num_layers)]


def _fill(folder, source, model, num_stages, tokenizer, say):
    """Write stages, tokenizer and manifest into a folder and verify them."""
    whole = folder / "whole.tflite"
    manifest = tflite.write(source, model, whole, None, say)
    costs = costs_of(source.constants, source.facts["capacity"])
    blocks = share_out(source.constants.sizes["num_layers"], num_stages, costs)
    names, described = [], []
    for index, own in enumerate(blocks):
        stage = {
            "index": index,
            "count": num_stages,
            "blocks": [own.start, own.stop],
            "whole_sha256": manifest["sha256"],
        }
        _, data = tflite.build(source, stage=stage, score_lengths=[])
        names.append(signatures.stage_file(index))
        (folder / names[-1]).write_bytes(data)
        is_last = index == num_stages - 1
        cost = len(own) * costs.block + is_last * costs.head
        described.append(
            {**stage, "operations_per_token": cost, "size_bytes": len(data)}
        )
    say(f"comparing {num_stages} stages with the undivided file")
    with quiet():
        measured = verify.verify_stages(
            [folder / name for name in names], blocks, whole, source.ids
        )
    whole.unlink()
    files.file_manifest_path(whole).unlink()
    if tokenizer is not None:
        from gpt_tf.text.tokenizer import FILE_NAME

        tokenizer.save(folder / FILE_NAME)
        names.append(FILE_NAME)
    return files.write_manifest(
        folder,
        KIND,
        names,
        **source.facts,
        size_bytes=sum(stage["size_bytes"] for stage in described),
        stages=described,
        verification={**manifest["verification"], **measured},
    )


def _is_staged(folder):
    """Whether a folder of stages stands there, which a new one may replace."""
    try:
        return files.read_json(folder / files.MANIFEST_NAME)["kind"] == KIND
    except (DamagedFileError, KeyError, TypeError):
        return False
