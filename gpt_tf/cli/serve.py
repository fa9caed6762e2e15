"""The command that serves models to other programs: serve."""

import os
import signal
from pathlib import Path
from typing import Annotated

import typer

from gpt_tf.bundled_model import shipped_model
from gpt_tf.cli.common import notice
from gpt_tf.cli.options import options_of
from gpt_tf.settings.server import ServerConfig


@options_of(ServerConfig, "settings")
def serve(
    model: Annotated[
        list[Path] | None,
        typer.Option(
            help="A .litertlm, or a .tflite with tokenizer.json beside it; may be "
            "repeated. Without it, the small model of Python that comes along."
        ),
    ] = None,
    *,
    settings: dict,
):
    """Serve models by OpenAI's protocol, until Ctrl-C."""
    from gpt_tf.edge.serving.server import is_local
    from gpt_tf.edge.serving.server import serve as run

    given = {"api_key": os.environ.get("GPT_TF_API_KEY") or None}
    config = ServerConfig(**given | settings)

    def on_ready(address, names):
        notice(f"{address}/v1 serves {', '.join(names)}; Ctrl-C ends it")
        if config.api_key is None and not is_local(config.host):
            notice("Everybody who reaches this address may use it: set GPT_TF_API_KEY.")

    # What a shell starts in the background ignores it from the beginning.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(model or [shipped_model()], config, on_ready=on_ready)
