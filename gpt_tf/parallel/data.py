"""Data parallelism: every device computes a part of each batch (article 3.1)."""

import contextlib
import itertools
import logging
import os
import re
import socket
import time
from typing import get_args

import tensorflow as tf
from tensorflow.python.distribute import collective_all_reduce_strategy
from tensorflow.python.eager import context

from gpt_tf import artifacts
from gpt_tf.errors import InputError, PeerLostError
from gpt_tf.parallel.config import Strategy
from gpt_tf.settings import arguments

logger = logging.getLogger(__name__)

STRATEGIES = get_args(Strategy)
# More logical devices than this only take time to make.
MOST_DEVICES = 256
# How long workers wait for each other, and how often they look for each other then.
JOIN_S, LOOK_S = 600, 5


def split_cpu(num_devices):
    """Divide the CPU into logical devices, to see distribution on any laptop.

    Args:
        num_devices: Number of logical CPU devices, from 1 to 256.

    Raises:
        InputError: The number is out of its range, or TensorFlow has been used
            already in this process and can no longer be divided otherwise.
    """
    num_devices = arguments.integer("num_devices", num_devices, 1, MOST_DEVICES)
    cpus = tf.config.list_physical_devices("CPU")
    wanted = [tf.config.LogicalDeviceConfiguration() for _ in range(num_devices)]
    try:
        tf.config.set_logical_device_configuration(cpus[0], wanted)
    except RuntimeError:
        found = len(tf.config.list_logical_devices("CPU"))
        if found != num_devices:
            raise InputError(
                f"The CPU was to be split into {num_devices} logical devices, but "
                f"TensorFlow already runs with {found} in this process. "
                "Split it before anything else uses TensorFlow."
            ) from None


def devices_for(count, devices=None, what="This"):
    """Return as many devices as are wanted.

    Args:
        count: How many.
        devices: Their names, `"GPU:0"` for example. Default: the GPUs of this machine
            or, where there are fewer, logical CPUs, into which the CPU is split if
            TensorFlow has not been used yet.
        what: How messages call what they are for.

    Raises:
        InputError: There are too few, or a name is unknown.
    """
    if devices is None:
        gpus = tf.config.list_physical_devices("GPU")
        if count > max(MOST_DEVICES, len(gpus)):
            raise InputError(
                f"{what} expect {count:,} devices. Received: a machine of {len(gpus)} "
                f"GPUs, whose CPU is split into at most {MOST_DEVICES}. Use fewer."
            )
        is_running = context.context()._context_handle is not None
        if len(gpus) < count and not is_running:  # then the CPU can still be split
            cpu = tf.config.list_physical_devices("CPU")[0]
            wanted = tf.config.get_logical_device_configuration(cpu) or ()
            split_cpu(max(count, len(wanted)))
        for kind in ("GPU", "CPU"):
            names = [device.name for device in tf.config.list_logical_devices(kind)]
            if len(names) >= count:
                return names[:count]
        raise InputError(
            f"{what} expect {count} devices. Received: {len(names)} logical CPUs in "
            "this process, in which TensorFlow has been used already. Begin a new one "
            f"(in a notebook, restart the kernel) with `gpt_tf.split_cpu({count})`; on "
            "the command line, leave out --virtual-devices or give more."
        )
    names = arguments.texts("devices", devices)
    known = {
        spec.name.rpartition("device:")[2]: spec.name
        for spec in tf.config.list_logical_devices()
    }
    known |= {name: name for name in known.values()}
    unknown = [name for name in names if name not in known]
    if unknown or len(names) != count:
        received = arguments.shown(unknown[0]) if unknown else f"{len(names)} of them"
        raise InputError(
            f"{what} expect {count} devices out of "
            f"{', '.join(n for n in known if n[0] != '/')}. Received: {received}."
        )
    return [known[name] for name in names]


def make_strategy(name="auto"):
    """Make a `tf.distribute.Strategy` by name.

    Args:
        name: `"one_device"`; `"mirrored"`, all GPUs of this machine, or all logical
            CPUs where there is no GPU; `"multi_worker"`, the machines that the
            environment variable `TF_CONFIG` lists; `"tpu"`; or `"auto"`: a TPU or
            several GPUs, logical CPUs or workers where there are any, else one
            device.

    Returns:
        The strategy; build models under its `scope()`.

    Raises:
        InputError: The name is unknown, `TF_CONFIG` cannot be used, not all workers
            came in time, or there is no such device.

    Example:
        >>> with make_strategy("auto").scope():
        ...     model = GPTModel(vocab_size=100, embedding_dim=16, num_layers=1,
        ...                      num_heads=2)
    """
    arguments.one_of("strategy", name, STRATEGIES)
    if name == "auto":
        if os.environ.get("TF_CONFIG"):  # before TensorFlow is used
            name = "multi_worker"
        elif os.environ.get("TPU_NAME") or tf.config.list_physical_devices("TPU"):
            name = "tpu"
        else:
            name = "mirrored" if len(_local_devices()) > 1 else "one_device"
    if name == "multi_worker":
        return _multi_worker_strategy(read_tf_config())
    if name == "mirrored":
        _use_fresh_collective_keys()
        return tf.distribute.MirroredStrategy(_local_devices())
    if name == "tpu":
        return _tpu_strategy()
    return tf.distribute.OneDeviceStrategy(_local_devices()[0])


def read_tf_config():
    """Read and check the cluster that `TF_CONFIG` describes.

    Returns:
        A dict with `cluster`, lists of addresses by task type, and `task`, this
        process's `type` and `index`.

    Raises:
        InputError: `TF_CONFIG` is missing, is not JSON, names no such task, or
            gives two tasks one address.
    """
    text = os.environ.get("TF_CONFIG", "")
    example = (
        '{"cluster": {"worker": ["host1:12345", "host2:12345"]}, '
        '"task": {"type": "worker", "index": 0}}'
    )
    if not text:
        raise InputError(
            "The strategy multi_worker expects the cluster in the environment "
            f"variable TF_CONFIG. Received: nothing. Set it to, for example, {example}"
        )
    try:
        config = artifacts.parse_json(text)
        cluster = {kind: list(found) for kind, found in config["cluster"].items()}
        kind, index = str(config["task"]["type"]), int(config["task"]["index"])
        addresses = list(itertools.chain(*cluster.values()))
        for address in addresses:
            place = re.fullmatch(r".+:(\d{1,5})", address)
            if not (place and 0 < int(place[1]) < 1 << 16):
                raise ValueError(
                    f"{address!r} is no host:port, with a port from 1 to 65535"
                )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            "TF_CONFIG expects JSON with a cluster and a task. "
            f"Received: {text[:200]!r} ({type(error).__name__}: {error}). "
            f"Write it like {example}"
        ) from None
    if not 0 <= index < len(cluster.get(kind, [])):
        raise InputError(
            f"TF_CONFIG says that this is task {kind} {index}, but its cluster has "
            f"{ {k: len(v) for k, v in cluster.items()} }. Give every process an "
            "index of its own, from 0."
        )
    twice = sorted({a for a in addresses if addresses.count(a) > 1})
    if twice:
        raise InputError(
            "TF_CONFIG expects an address of its own for every task. "
            f"Received: {', '.join(twice)} more than once. Give each process on one "
            "machine another port."
        )
    return {"cluster": cluster, "task": {"type": kind, "index": index}}


def is_chief(strategy):
    """Whether this process is the one that writes files."""
    resolver = strategy.cluster_resolver
    if resolver is None or resolver.task_type in (None, "", "chief"):
        return True
    has_chief = "chief" in resolver.cluster_spec().as_dict()
    return resolver.task_type == "worker" and resolver.task_id == 0 and not has_chief


def on_chief(strategy, prepare):
    """Let the chief do something while the other workers wait until it is done.

    Args:
        strategy: The strategy of this process; alone, a process is the chief.
        prepare: Called without arguments, on the chief only.

    Raises:
        InputError: This is another worker, and `prepare` failed on the chief.
    """
    failed = 1.0
    try:
        if is_chief(strategy):
            prepare()
        failed = 0.0
    finally:
        if is_multi_worker(strategy):
            # No worker has this sum before all have given their part.
            failed = strategy.reduce(
                tf.distribute.ReduceOp.SUM,
                strategy.run(tf.function(lambda: tf.constant(failed))),
                axis=None,
            )
    if failed:
        raise InputError(
            "This worker expects the chief to prepare the run, but the chief failed. "
            "Mend what its own message says, then start all workers again."
        )


def of_chief(strategy, number):
    """Return the chief's number, on all workers.

    Args:
        strategy: The strategy of this process.
        number: An integer from 0 to 2**31; that of other workers is not looked at.
    """
    if not is_multi_worker(strategy):
        return number
    own = number if is_chief(strategy) else 0
    # Each replica gives the whole number, so that the mean over a machine's is it.
    total = strategy.reduce(
        tf.distribute.ReduceOp.SUM,
        strategy.run(tf.function(lambda: tf.constant(own, tf.int64))),
        axis=None,
    )
    return int(total) // strategy.extended._num_devices_per_worker


@contextlib.contextmanager
def watched(strategy):
    """Say that another worker was lost where TensorFlow says what it could not do.

    Args:
        strategy: The strategy of this process, made by `make_strategy`. Once the block
            has ended, no more is computed together.

    Raises:
        PeerLostError: Another worker ended before it was done, or does not answer.
    """
    try:
        yield
    except (
        tf.errors.AbortedError,
        tf.errors.CancelledError,
        tf.errors.DeadlineExceededError,
        tf.errors.FailedPreconditionError,
        tf.errors.UnavailableError,
    ) as error:
        if not is_multi_worker(strategy):
            raise
        raise PeerLostError(
            "This worker expects all others until the run is done, but one ended or "
            f"does not answer ({error.message.splitlines()[0]}). Start all workers "
            "again with --resume-or-start; they go on from the newest checkpoint."
        ) from error
    if is_multi_worker(strategy) and strategy.extended._num_workers > 1:
        strategy.extended._check_health_thread_should_stop.set()
        time.sleep(1)  # the last answer to another worker may be on its way


def distribute(strategy, make):
    """Give each worker its part of every batch, and each of its replicas a part of it.

    Args:
        strategy: The strategy of this process; not that of a TPU.
        make: Function of a number of parts and of the part's index that returns a
            dataset of parts of batches `(B / parts, T)`.

    Returns:
        A distributed dataset for `fit`, which has to be told the number of steps.
    """

    def part(context):
        dataset = make(context.num_input_pipelines, context.input_pipeline_id)
        replicas = context.num_replicas_in_sync // context.num_input_pipelines
        if replicas == 1:
            return dataset
        rows = tf.nest.flatten(dataset.element_spec)[0].shape[0]
        cut = dataset.unbatch().batch(rows // replicas, drop_remainder=True)
        return cut.with_options(dataset.options())

    return strategy.distribute_datasets_from_function(part)


def is_multi_worker(strategy):
    """Whether other processes, each with its own `TF_CONFIG`, take part."""
    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)


def _use_fresh_collective_keys():
    """Keep a new MirroredStrategy apart from earlier ones of this process.

    TensorFlow numbers the reductions of each strategy from the same start, and
    refuses ("Shape mismatch in the collective instance") when a second strategy over
    the same devices trains a model of other shapes. The start is a class attribute,
    which TensorFlow's own tests move on in the same way.
    """
    tf.distribute.MirroredStrategy._collective_key_base += 100


def _local_devices():
    gpus = tf.config.list_logical_devices("GPU")
    return [d.name for d in gpus or tf.config.list_logical_devices("CPU")]


def _multi_worker_strategy(config):
    kind = config["task"]["type"]
    if kind not in ("chief", "worker"):
        raise InputError(
            "The strategy multi_worker expects a cluster that TensorFlow can join: "
            "tasks are of the type worker, or one of them chief. "
            f"Received: {kind!r}. Name it so in TF_CONFIG."
        )
    eager = context.context()
    if eager._context_handle is not None:
        raise InputError(
            "The strategy multi_worker expects to come before anything else uses "
            "TensorFlow in this process. Received: TensorFlow that already runs. "
            "Make the strategy first, once in a process."
        )
    # TensorFlow's coordination service has no limit for joining that its leader keeps
    # to, and takes SIGTERM away. Its older health check is begun below, once no
    # stranger can connect.
    eager.configure_coordination_service(service_type="")
    collective_all_reduce_strategy.CollectiveAllReduceExtended._enable_check_health = (
        False
    )
    try:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        addresses = itertools.chain(*config["cluster"].values())
        hosts = {address.rpartition(":")[0] for address in addresses}
        if hosts <= {"127.0.0.1", "localhost", "[::1]"}:
            own = config["cluster"][kind][config["task"]["index"]]
            _listen_on_loopback(int(own.rpartition(":")[2]))
        if strategy.extended._num_workers > 1:
            strategy.extended._check_health_initial_timeout = JOIN_S
            strategy.extended._check_health_interval = LOOK_S
            strategy.extended._start_check_health_thread()
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        raise InputError(
            "The strategy multi_worker expects a cluster that TensorFlow can join, "
            "before anything else uses TensorFlow in this process. "
            f"Received: {str(error).splitlines()[0]}. Check TF_CONFIG and that every "
            "worker runs."
        ) from None
    return strategy


def _listen_on_loopback(port):
    """Keep other machines out of a port of this process that listens everywhere.

    TensorFlow listens on every interface, whatever address it is given. Linux lets a
    socket be bound to one interface afterwards.
    """
    if not hasattr(socket, "SO_BINDTODEVICE"):  # not Linux
        return
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            copy = os.dup(int(name))
            stack.callback(os.close, copy)
            listening = socket.socket(fileno=copy)
            stack.callback(listening.detach)
            if (
                listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                and listening.getsockname()[1] == port
            ):
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")


def _tpu_strategy():
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect()
    except (ValueError, RuntimeError, tf.errors.OpError) as error:
        raise InputError(
            "The strategy tpu expects a TPU that TensorFlow can reach. "
            f"Received: {str(error).splitlines()[0]} Set TPU_NAME, or use "
            "another strategy."
        ) from None
    return tf.distribute.TPUStrategy(resolver)
