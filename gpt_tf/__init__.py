"""Train a GPT in Keras, make it fast, and ship it to an edge device.

The public names are resolved when they are first used, so `import gpt_tf` loads
neither TensorFlow nor Keras; `gpt_tf.edge` never does. TF-MOT works on Keras 2,
so this package does too: importing it before `tf.keras` is touched makes
`tf.keras` the same thing as `tf_keras`.
"""

import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of TensorFlow's remarks, errors

__version__ = "0.1.0"

_PUBLIC = {
    "AdamW": "gpt_tf.models.optimizer",
    "AugmentationConfig": "gpt_tf.text.config",
    "BPEDropout": "gpt_tf.text.augment",
    "BPETokenizer": "gpt_tf.text.tokenizer",
    "Budgets": "gpt_tf.advisor.constraints",
    "CharacterTokenizer": "gpt_tf.text.tokenizer",
    "DistillationConfig": "gpt_tf.distillation.config",
    "Distiller": "gpt_tf.distillation.distiller",
    "EdgeGPT": "gpt_tf.edge",
    "EdgeScheduler": "gpt_tf.edge",
    "GPTModel": "gpt_tf.models.gpt",
    "InputError": "gpt_tf.errors",
    "KerasGPT": "gpt_tf.evaluation.models",
    "KnowledgeStore": "gpt_tf.distillation.teacher_cache",
    "MeshGPT": "gpt_tf.parallel.mesh_gpt",
    "Pipeline": "gpt_tf.parallel.pipeline",
    "QuantizationConfig": "gpt_tf.quantization.config",
    "TokenFile": "gpt_tf.text.dataset",
    "Windows": "gpt_tf.text.dataset",
    "activation_ranges": "gpt_tf.quantization.qat",
    "calibrate": "gpt_tf.quantization.calibration",
    "compare_explanations": "gpt_tf.explain.faithfulness",
    "deletion_test": "gpt_tf.explain.faithfulness",
    "derive_tokenizer": "gpt_tf.distillation.tokenizer_alignment",
    "describe_machine": "gpt_tf.evaluation.hardware",
    "distil": "gpt_tf.training.loop",
    "equalize": "gpt_tf.quantization.equalize",
    "evaluate_files": "gpt_tf.evaluation.accuracy",
    "explain_prompt": "gpt_tf.explain.attribution",
    "explanation_html": "gpt_tf.reporting.explanations",
    "export_litertlm": "gpt_tf.export.litertlm",
    "export_tflite": "gpt_tf.export.tflite",
    "export_trained": "gpt_tf.export.from_run",
    "extract": "gpt_tf.distillation.teacher_cache",
    "extract_knowledge": "gpt_tf.training.loop",
    "generate": "gpt_tf.models.cached_forward",
    "head_outliers": "gpt_tf.quantization.equalize",
    "held_out_text": "gpt_tf.evaluation.text",
    "join_reports": "gpt_tf.evaluation.report",
    "load_model": "gpt_tf.training.run_folder",
    "load_tokenizer": "gpt_tf.text.tokenizer",
    "make_mesh": "gpt_tf.parallel.mesh",
    "make_strategy": "gpt_tf.parallel.data",
    "make_student": "gpt_tf.distillation.student",
    "measure_files": "gpt_tf.evaluation.latency",
    "open_corpus": "gpt_tf.text.corpus",
    "open_model": "gpt_tf.training.run_folder",
    "optimize": "gpt_tf.workflow.optimization",
    "prompts_of": "gpt_tf.explain.faithfulness",
    "quantize": "gpt_tf.training.loop",
    "quantize_aware": "gpt_tf.quantization.qat",
    "quantize_gpt_model": "gpt_tf.quantization.qat",
    "quantize_weights": "gpt_tf.quantization.weights",
    "recommend": "gpt_tf.advisor.ranking",
    "shipped_model": "gpt_tf.bundled_model",
    "split_cpu": "gpt_tf.parallel.data",
    "stream": "gpt_tf.models.cached_forward",
    "tasks_of": "gpt_tf.parallel.pipeline",
    "to_float": "gpt_tf.quantization.qat",
    "to_rounded": "gpt_tf.quantization.qat",
    "train": "gpt_tf.training.loop",
    "write_token_file": "gpt_tf.text.dataset",
}

__all__ = sorted(_PUBLIC)


def _keep_freed_memory():
    """Let glibc keep what a training step frees for the next step.

    By default each step's buffers go back to the system and come again as pages to be
    filled with zeros, a quarter of a step's time on a CPU. What the environment says
    of malloc takes precedence; a process without TensorFlow stays as it is.
    """
    if sys.platform != "linux" or "tensorflow" in sys.modules:
        return  # its threads have arenas already, which are not reached
    is_chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if is_chosen or "GLIBC_TUNABLES" in os.environ or "LD_PRELOAD" in os.environ:
        return
    if importlib.util.find_spec("tensorflow") is None:
        return
    arena_max, mmap_max, trim_threshold = -8, -4, -1  # as malloc.h numbers them
    with contextlib.suppress(AttributeError, OSError):  # another C library
        library = ctypes.CDLL(None)
        library.mallopt(arena_max, 1)
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, 1 << 30)


_keep_freed_memory()


def __getattr__(name):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'gpt_tf' has no attribute {name!r}")
    try:
        module = importlib.import_module(_PUBLIC[name])
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        if package == "gpt_tf":
            raise
        extra = "edge" if package == "ai_edge_litert" else "train"
        raise ModuleNotFoundError(
            f"`gpt_tf.{name}` expects the package {package}, which is not "
            f"installed. Install it with: pip install 'gpt-tf[{extra}]'",
            name=package,
        ) from error
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__():
    return sorted(set(globals()) | set(_PUBLIC))
