"""What all tests share: four logical CPUs, small models and a small corpus."""

import ctypes
import gc
import io
import logging
import os
import random
import sys
import zlib
from types import SimpleNamespace

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Compiling takes most of the time here, so little is optimised. `XLA_FLAGS=` in the
# environment, as `make test-slow` has it, compiles as it is done for users.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import hypothesis
import numpy as np
import psutil
import pytest

import gpt_tf  # before TensorFlow: it chooses Keras 2

_LEFT_OUT = """
    arithmetic_optimization common_subgraph_elimination constant_folding
    dependency_optimization implementation_selector layout_optimizer loop_optimization
    remapping shape_optimization
"""

# The default tests take the same examples every time, so that a red test is about the
# change. `--hypothesis-profile=search` looks for new counter-examples.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", max_examples=2000, deadline=None)
hypothesis.settings.load_profile("same")


def pytest_sessionstart(session):
    import tensorflow as tf

    from gpt_tf.models import xla

    # XLA's executables stay in memory for good. What is about XLA asks for it.
    xla.ON_BY_DEFAULT = False
    if os.environ["XLA_FLAGS"]:
        tf.config.optimizer.set_experimental_options(
            dict.fromkeys(_LEFT_OUT.split(), False)
        )
    tf.get_logger().setLevel("ERROR")
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration() for _ in range(4)],
    )
    tf.config.list_logical_devices()  # TensorFlow runs now, and no test splits it
    # A tenth of the time would go into looking for garbage among TensorFlow's objects.
    # It is collected when it has grown, by `memory_is_given_back`.
    gc.disable()


# Files that take longest, the longest first.
_LONGEST = (
    "test_notebooks.py",
    "test_optimization.py",
    "test_qat.py",
    "test_cluster.py",
    "test_start.py",
    "test_distiller.py",
    "test_checkpoint.py",
    "test_loop.py",
    "test_keras_habits.py",
)


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that no process is left with one."""
    places = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def _seed_what_has_no_seed(name):
    """Let code without a seed draw the same under a name in every run.

    What it draws twice still differs. But a test that depends on what was drawn fails
    always or never, and not sometimes.
    """
    # By this name, NumPy asks the operating system for a seed.
    np.random.bit_generator.randbits = random.Random(name).getrandbits
    if "tf_keras" in sys.modules:
        sys.modules["tf_keras"].utils.set_random_seed(zlib.crc32(name.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef, request):
    is_shared = fixturedef.scope != "function"
    where = fixturedef.baseid if is_shared else request.node.nodeid
    _seed_what_has_no_seed(f"{where}::{fixturedef.argname}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    _seed_what_has_no_seed(item.nodeid)


@pytest.fixture(scope="module")
def eagerly():
    """Run functions as they are, not as graphs: for few steps, tracing takes longer."""
    import tensorflow as tf

    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.fixture
def traced():
    """Run functions as graphs again, as users do, in a module that runs eagerly."""
    import tensorflow as tf

    was = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(False)
    yield
    tf.config.run_functions_eagerly(was)


@pytest.fixture
def make_model():
    """Make a small GPTModel with the same weights every time."""
    import tf_keras as keras

    def make(seed=3, **changes):
        keras.utils.set_random_seed(seed)
        arguments = {
            "vocab_size": 31,
            "embedding_dim": 12,
            "num_layers": 2,
            "num_heads": 3,
            "context_length": 16,
            **changes,
        }
        return gpt_tf.GPTModel(**arguments)

    return make


@pytest.fixture
def windows_of():
    """Make token windows (inputs, labels) of a given shape."""

    def make(rows, length, vocab_size=31, seed=0):
        ids = np.random.default_rng(seed).integers(0, vocab_size, (rows, length + 1))
        return ids[:, :-1].astype("int32"), ids[:, 1:].astype("int32")

    return make


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """A folder of a dozen small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "the quick brown fox jumps over a lazy dog and runs away again".split()
    generator = np.random.default_rng(5)
    for index in range(12):
        lines = [" ".join(generator.choice(words, 8)) + "." for _ in range(60 + index)]
        (folder / f"text{index}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="session")
def trained(corpus_folder, tmp_path_factory):
    """A finished tiny run, traced whatever the module that asks first does."""
    import tensorflow as tf

    from gpt_tf.training.config import PRESETS
    from gpt_tf.training.loop import train

    was = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(False)
    result = train(
        PRESETS["tiny"],
        tmp_path_factory.mktemp("runs") / "tiny",
        corpus=str(corpus_folder),
        vocab_size=300,
        strategy="one_device",
        verbose=False,
    )
    tf.config.run_functions_eagerly(was)
    return result


@pytest.fixture
def notices():
    """The lines that the package logs from now on."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("gpt_tf")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    return lines


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process; return status, output and errors."""
    from gpt_tf import cli

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["gpt-tf", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setattr("warnings.showwarning", None)  # `main` sets it
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = error.code
        written = capsys.readouterr()
        return SimpleNamespace(status=status, out=written.out, err=written.err)

    return run


@pytest.fixture(autouse=True)
def notices_stay_in_their_test():
    """Take away what a test has added to the package's logger."""
    logger = logging.getLogger("gpt_tf")
    handlers, level = [*logger.handlers], logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)


@pytest.fixture(scope="session")
def interrupt_after():
    """Make a callback that stops as a killed process does: without any goodbye."""
    import tf_keras as keras

    class Interruption(keras.callbacks.Callback):
        def __init__(self, steps):
            super().__init__()
            self.left = steps

        def on_train_batch_end(self, batch, logs=None):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt

    return Interruption


@pytest.fixture(autouse=True)
def separate_collectives():
    """Let each test's own `MirroredStrategy` stand beside those of other tests."""
    from gpt_tf.parallel import data

    data._use_fresh_collective_keys()


_memory = {"bytes": 0}


@pytest.fixture(autouse=True)
def memory_is_given_back():
    """Free the models of earlier tests, and what glibc keeps of them, in time."""
    yield
    process = psutil.Process()
    if process.memory_info().rss > _memory["bytes"] + 100e6:
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
        _memory["bytes"] = process.memory_info().rss
