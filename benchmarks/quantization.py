"""What each quantisation costs, measured on the files that ship.

    python benchmarks/quantization.py [--wide] [--tokens N] [--qat-steps N]

A trained model is exported in every mode, trained further with quantisation in mind
and exported again. Each file is run by `EdgeGPT` over the same held-out text: its
perplexity, how far its predictions are from the float32 file's (KL divergence), and
top-1 agreement. The model is `saved_models/python-small`, and
with `--wide` one of 6 layers, 512 wide, which is trained first if it is not there.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
from harness import (
    console,
    cut_windows,
    file_log_probs,
    finish,
    print_machine,
)

ROOT = Path(__file__).parent.parent
WIDE = {
    "corpus": "python-stdlib",
    "vocab_size": 1024,
    "embedding_dim": 512,
    "num_layers": 6,
    "num_heads": 8,
    "context_length": 128,
    "batch_size": 8,
    "steps": 600,
    "learning_rate": 5e-4,
    "warmup_steps": 100,
    "validate_every": 100,
    "validation_batches": 20,
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A file to measure.

    Args:
        name: As it stands in the table.
        model: What it is made of: `"float"`, or a further training, see `further`.
        mode: Mode of the file.
        per_channel: Whether weights have a scale per output channel.
    """

    name: str
    model: str
    mode: str
    per_channel: bool = True

    @property
    def file_name(self):
        channel = "" if self.per_channel else "-per-tensor"
        return f"{self.model}-{self.mode}{channel}.litertlm"


AS_LONG = "float32, trained as long"
VARIANTS = (
    Variant("float32", "float", "float32"),
    Variant("float16", "float", "float16"),
    Variant("dynamic_int8", "float", "dynamic_int8"),
    Variant("dynamic_int8, per tensor", "float", "dynamic_int8", False),
    Variant("int16x8", "float", "int16x8"),
    Variant("int8, post-training", "float", "int8"),
    Variant("int8, post-training, per tensor", "float", "int8", False),
    Variant("int8, QAT", "qat", "int8"),
    Variant("int8, QAT, per tensor", "qat-per-tensor", "int8", False),
    Variant("int8_full, post-training", "float", "int8_full"),
    Variant("int8_full, QAT", "qat-full", "int8_full"),
    Variant("int4", "float", "int4"),
    # What QAT's further training alone is worth.
    Variant(AS_LONG, "longer", "float32"),
    Variant("int8 of that, post-training", "longer", "int8"),
    Variant("int4 of that, post-training", "longer", "int4"),
)


def further(source, kind, folder, course):
    """Train a model further, as `kind` says; return the run's folder.

    The same text, order, rate and number of steps, whatever the kind.
    """
    from gpt_tf.quantization.config import QuantizationConfig
    from gpt_tf.training import loop

    out = folder / kind
    if (out / "model").is_dir():
        return out
    quantization = {
        "qat": QuantizationConfig(),
        "qat-per-tensor": QuantizationConfig(per_channel=False),
        "qat-full": QuantizationConfig.full(),
        "longer": None,
    }[kind]
    console.print(f"training further: {kind}")
    options = {"overwrite": True, **course}
    if quantization is not None:
        loop.quantize(source, out, quantization, **options)
        return out
    options |= {"init_from": str(source), "final_learning_rate": 0.0}
    loop.train(None, out, **options)
    return out


def compare(found, wanted, targets):
    """Return perplexity, divergence and agreement of log-probabilities."""
    losses = -np.take_along_axis(found, targets[..., None], -1)[..., 0]
    divergence = (np.exp(wanted) * (wanted - found)).sum(-1)
    agreement = found.argmax(-1) == wanted.argmax(-1)
    return {
        "perplexity": float(np.exp(losses.mean(dtype=np.float64))),
        "divergence_nats": float(divergence.mean(dtype=np.float64)),
        "top1_agreement": float(agreement.mean()),
        "losses": losses.mean(axis=1),
    }


def ratio(losses, base, name):
    """Return the ratio of two perplexities and its standard error, over windows."""
    difference = losses - base
    value = float(np.exp(difference.mean()))
    error = value * float(difference.std()) / len(difference) ** 0.5
    return {name: value, f"{name}_standard_error": error}


def study(name, source, folder, course, num_tokens):
    """Measure all variants of one model."""
    from gpt_tf import artifacts
    from gpt_tf.edge import EdgeGPT
    from gpt_tf.export.from_run import export_trained
    from gpt_tf.text.dataset import TokenFile
    from gpt_tf.training import loop, run_folder

    folder.mkdir(parents=True, exist_ok=True)
    model, _ = loop.load_model(source)
    context = model.context_length
    qat = further(source, "qat", folder, course)
    tokens = TokenFile.open(qat / "data" / "validation.tokens").tokens
    count = -(-num_tokens // context)
    windows = cut_windows(tokens, context, count)
    console.print(f"{name}: {count * context:,} held-out tokens in {count} windows")
    rows, wanted, losses = [], None, {}
    for variant in VARIANTS:
        if variant.model == "float":
            made_of, corpus = source, course["corpus"]
        else:
            made_of, corpus = further(source, variant.model, folder, course), None
        path = folder / variant.file_name
        manifest = export_trained(
            made_of,
            path,
            variant.mode,
            corpus=corpus,
            per_channel=variant.per_channel,
        )
        with EdgeGPT(path) as gpt:
            found = file_log_probs(gpt, windows)
        wanted = found if wanted is None else wanted
        row = compare(found, wanted, windows[:, 1:])
        losses[variant.name] = row.pop("losses")
        rows.append(
            {
                "name": variant.name,
                "mode": variant.mode,
                **row,
                **ratio(losses[variant.name], losses["float32"], "perplexity_ratio"),
                "tflite_bytes": manifest["verification"]["size_bytes"],
                "parameter_bytes": manifest["verification"]["parameter_bytes"],
            }
        )
        console.print(
            f"  {variant.name}: perplexity {rows[-1]['perplexity']:.3f}, "
            f"{rows[-1]['perplexity_ratio']:.4f} of float32"
        )
    for row, variant in zip(rows, VARIANTS, strict=True):
        # What was trained further is compared with float32 trained as long.
        own = "float32" if variant.model == "float" else AS_LONG
        row |= ratio(losses[variant.name], losses[own], "ratio_to_own_float32")
    return {
        "sizes": model.get_config(),
        "tokens": count * context,
        "further_training": course,
        "made_from": artifacts.sha256_of(run_folder.model_file(source)),
        "rows": rows,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wide", action="store_true", help="the larger model too")
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--qat-steps", type=int, default=300)
    parser.add_argument("--wide-qat-steps", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="keeps the models")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.gettempdir()) / "gpt-tf-quantization"
    print_machine()
    # A twentieth of the float training's learning rate, as `gpt-tf quantize` has it.
    course = {
        "corpus": "python-stdlib",
        "steps": arguments.qat_steps,
        "warmup_steps": arguments.qat_steps // 20,
        "context_length": 128,
        "batch_size": 16,
        "learning_rate": 2e-4,
        "validate_every": arguments.qat_steps,
        "validation_batches": 20,
        "checkpoint_every": 0,
    }
    studies = {
        "4 layers, 128 wide": study(
            "python-small",
            ROOT / "saved_models" / "python-small",
            folder / "small",
            course,
            arguments.tokens,
        )
    }
    if arguments.wide:
        source = folder / "wide-float"
        if not (source / "model").is_dir():
            from gpt_tf.training import loop

            loop.train(None, source, overwrite=True, **WIDE)
        course |= {
            "steps": arguments.wide_qat_steps,
            "warmup_steps": arguments.wide_qat_steps // 20,
            "validate_every": arguments.wide_qat_steps,
            "batch_size": 8,
            "learning_rate": 2.5e-5,
        }
        name = "6 layers, 512 wide"
        studies[name] = study(name, source, folder / "wide", course, arguments.tokens)
    finish("quantization", {"studies": studies})


if __name__ == "__main__":
    main()
