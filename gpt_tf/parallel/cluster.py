"""Several workers, started by Ray Train and, when one is lost, started again.

Ray gives every worker its place in `TF_CONFIG`, from which the strategy `multi_worker`
follows as it does under Slurm or Kubernetes. Without an address the workers run on this
machine, in a Ray cluster of their own that listens on the loopback address and ends
with this process.

No TensorFlow here but in the workers: what cannot work is said before it is imported.
"""

import concurrent.futures
import contextlib
import logging
import os
import re
import socket
import sys
import tempfile
import threading
from pathlib import Path

from gpt_tf.errors import InputError, WorkerFailedError
from gpt_tf.native_logs import held_back
from gpt_tf.settings import arguments as checks

_CONNECT_S = 10.0
_START_S = 45  # for all workers to find their cores
_OBJECT_STORE_BYTES = 100 << 20  # nothing large goes through it
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(_START_S),
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_worker_niceness": "0",  # as fast as a process that Ray did not start
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # a worker without GPUs sees none
}


def run(
    function, *arguments, out, workers, address=None, max_restarts=3, **options
) -> None:
    """Call a function that trains in several workers, until all have succeeded.

    Args:
        function: `gpt_tf.train`, `quantize` or `distil`, or another of a module that
            the workers can import.
        *arguments: What it takes.
        out: Folder of the run. Workers on several machines share it.
        workers: Number of workers, from 1 to 4096. The first is the chief.
        address: `host:port` of a Ray cluster that this machine is part of; workers
            run on this machine alone unless given.
        max_restarts: How often all workers start again after one was lost. They go
            on from the newest checkpoint.
        **options: More of what it takes; `strategy`, `resume_or_start` and, on the
            others than the chief, `verbose` are set here.

    Raises:
        InputError: Ray does not answer, has too few cores, or `function` refuses
            what it was given.
        WorkerFailedError: Workers failed more often than `max_restarts`.

    Example:
        >>> run(gpt_tf.train, out="runs/two", workers=2, corpus="my/texts")
    """
    out = checks.path("out", out).absolute()
    workers = checks.integer("workers", workers, 1, 4096)
    max_restarts = checks.integer("max_restarts", max_restarts)
    if options.get("strategy") not in (None, "multi_worker"):
        raise InputError(
            "Workers expect the strategy multi_worker, which is set unless given. "
            f"Received: {options['strategy']!r}. Leave `strategy` out."
        )
    options["strategy"] = "multi_worker"
    if address is None:
        _cores_each(workers, [_own_cores()])
    else:
        _check_address(address)
    os.environ.update(_SETTINGS)
    if address is None:
        # Ray then takes the loopback address, on Linux too.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    with contextlib.ExitStack() as stack:
        shared = None
        if address is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            shared = out.parent
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(
                prefix=".gpt-tf-ray-", dir=shared, ignore_cleanup_errors=True
            )
        )
        stack.callback(ray.shutdown)
        cores = _start(ray, address, folder)
        size = _cores_each(workers, cores)
        job = {
            "function": function,
            "arguments": arguments,
            "options": options,
            "out": out,
            "before": _stamp(out),
            "folder": os.getcwd(),
            "threads": size,
            "log": Path(folder) / "chief.log",
        }
        _fit(job, workers, size, max_restarts, folder)


def _start(ray, address, folder):
    """Start Ray here or join it; return the cores of each machine."""
    here = {
        "_temp_dir": folder,
        "num_cpus": _own_cores(),
        "object_store_memory": _OBJECT_STORE_BYTES,
        "include_dashboard": False,
    }
    try:
        ray.init(
            address="local" if address is None else address,
            logging_level=logging.CRITICAL,
            log_to_driver=False,
            runtime_env={"env_vars": {"TF_CPP_MIN_LOG_LEVEL": "3", **_SETTINGS}},
            **(here if address is None else {}),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"Workers expect a Ray cluster at {address or 'this machine'}. Received: "
            f"{str(error).splitlines()[0]} Start one with `ray start --head`."
        ) from None
    return [
        int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]
    ]


def _fit(job, workers, size, max_restarts, folder):
    """Train with Ray; an error that the user can mend is raised as it is."""
    import ray

    with held_back(lambda line, failed: failed):  # it imports TensorFlow
        from ray.train.tensorflow import TensorflowTrainer
    from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
    from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

    class NoRestartOfWrongInput(UserCallback):
        def after_exception(self, run_context, worker_exceptions):
            for error in worker_exceptions.values():
                error = getattr(error, "_base_exc", error)
                if isinstance(error, InputError):
                    raise error

    trainer = TensorflowTrainer(
        _work,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=ray.cluster_resources().get("GPU", 0) >= workers,
            resources_per_worker={"CPU": size},
        ),
        run_config=RunConfig(
            storage_path=folder,
            failure_config=FailureConfig(
                max_failures=max_restarts, controller_failure_limit=0
            ),
            callbacks=[NoRestartOfWrongInput()],
        ),
    )
    # Ray answers Ctrl-C in its own way where it trains in the main thread; a daemon
    # does not keep this process from ending.
    fitting = concurrent.futures.Future()

    def fit():
        try:
            fitting.set_result(trainer.fit())
        except BaseException as error:
            fitting.set_exception(error)

    job["log"].touch()
    try:
        with job["log"].open(encoding="utf-8") as log:
            threading.Thread(target=fit, daemon=True).start()
            while not concurrent.futures.wait([fitting], 0.2).done:
                _pass_on(log)
            _pass_on(log)
        fitting.result()
    except ControllerError as error:
        cause = error.controller_failure
        raise cause if isinstance(cause, InputError) else error from None
    except TrainingFailedError as error:
        last = str(error).strip().splitlines()[-1]
        raise WorkerFailedError(
            f"Workers failed more than {max_restarts} times. The last one said: {last}",
            1,
        ) from error


def _work(job):
    """Be one worker: call the function, in the folder that it was asked for in."""
    import ray.train

    options, out = dict(job["options"]), job["out"]
    with contextlib.suppress(OSError):
        os.chdir(job["folder"])
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", str(job["threads"]))
    if options.get("overwrite") and _stamp(out) != job["before"]:
        options["overwrite"] = False  # it has been replaced by an earlier start
    if not (options.get("overwrite") or options.get("resume")):
        options["resume_or_start"] = True
    is_chief = ray.train.get_context().get_world_rank() == 0
    if not is_chief:
        options["verbose"] = False
    with (
        open(job["log"] if is_chief else os.devnull, "a", 1, encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
    ):
        job["function"](*job["arguments"], out=out, **options)


def _pass_on(log):
    """Write what the chief has printed meanwhile."""
    sys.stdout.write(log.read())
    sys.stdout.flush()


def _stamp(out):
    """Tell the run that stands in a folder from another one."""
    try:
        facts = (out / "run.json").stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns


def _check_address(address):
    """Refuse an address at which nobody answers, which Ray would wait for."""
    place = re.fullmatch(r"([^/]+):(\d{1,5})", address)
    try:
        if place is None:
            raise ValueError("no host:port")
        socket.create_connection((place[1], int(place[2])), _CONNECT_S).close()
    except (OSError, OverflowError, ValueError) as error:
        raise InputError(
            "`ray_address` expects host:port of a Ray cluster that answers. "
            f"Received: {address} ({error}). Start one with `ray start --head`, or "
            "leave it out to train on this machine."
        ) from None


def _own_cores():
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cores_each(workers, machines):
    """Return the most cores that each worker can have, within one machine."""
    for size in range(max(machines, default=0), 0, -1):
        if sum(cores // size for cores in machines) >= workers:
            return size
    raise InputError(
        f"{workers} workers expect a core each. Received: {sum(machines)} cores. Take "
        "fewer workers, or more machines with `ray_address`."
    )
