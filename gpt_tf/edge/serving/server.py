"""Opening models and serving them until the process is told to end."""

import contextlib
import ipaddress
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import uvicorn

from gpt_tf.edge.runtime import EdgeGPT
from gpt_tf.edge.serving.app import make_app
from gpt_tf.edge.serving.connection import BACKLOG, bounded_connections
from gpt_tf.edge.serving.metrics import Metrics
from gpt_tf.edge.serving.worker import ModelWorker
from gpt_tf.errors import InputError
from gpt_tf.settings.server import ServerConfig

# Seconds that answers have to end in when the server is told to.
_FAREWELL_S = 5


def serve(
    paths: Sequence[str | os.PathLike],
    config: ServerConfig | dict | None = None,
    *,
    on_ready: Callable[[str, list[str]], None] | None = None,
) -> None:
    """Serve models until Ctrl-C, or a signal that ends the process.

    Args:
        paths: `.tflite` or `.litertlm`, with tokenizers; clients call a model by its
            file's name without the ending.
        config: A `ServerConfig`, or a dict of its fields.
        on_ready: Called with the address and the models' names once the port is open.

    Raises:
        InputError: A file or the port cannot be used.
        DamagedFileError: As for `EdgeGPT`.
    """
    config, metrics = ServerConfig.of(config), Metrics()
    names = _names_of(paths)
    with contextlib.ExitStack() as opened:
        listener = opened.enter_context(_listen(config))
        workers = []
        for name, path in zip(names, paths, strict=True):
            gpt = EdgeGPT(path, num_threads=config.threads, when_full=config.when_full)
            opened.enter_context(gpt)
            if gpt.tokenizer is None:
                raise InputError(
                    f"Expected a tokenizer with {path}. Received: none. Put "
                    "tokenizer.json beside it, or export a .litertlm."
                )
            workers.append(ModelWorker(name, gpt, config, metrics))
        server = make_server(workers, config, metrics)
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        if on_ready is not None:
            on_ready(f"http://{host}:{port}", names)
        server.run(sockets=[listener])


def make_server(
    workers: Sequence[ModelWorker], config: ServerConfig, metrics: Metrics
) -> uvicorn.Server:
    """Return uvicorn's server of some workers."""
    return uvicorn.Server(
        uvicorn.Config(
            make_app(workers, config, metrics),
            http=bounded_connections(config.max_connections, config.timeout_s),
            ws="none",
            backlog=BACKLOG,
            log_level="error",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_FAREWELL_S,
        )
    )


def is_local(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _names_of(paths):
    names = [Path(path).stem for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"Models expect names of their own. Received: {name} twice. Rename a "
                "file."
            )
    return names


def _listen(config):
    """Return a socket that listens; its port may have been chosen."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # With its protocol stated, asyncio sends each piece at once.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # elsewhere two programs could have the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((config.host, config.port))
        listener.listen(BACKLOG)
        return listener
    except OSError as error:
        listener.close()
        raise InputError(
            f"`port` expects one that is free, and `host` an address of this machine. "
            f"Received: {config.host}, {config.port}: {error.strerror}. Choose others; "
            "0 takes a free port."
        ) from None
