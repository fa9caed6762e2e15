"""The command that puts a model into a page for browsers: web."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from gpt_tf.bundled_model import shipped_model
from gpt_tf.cli.common import notice
from gpt_tf.formatting import megabytes


def web(
    model: Annotated[
        Path | None,
        typer.Option(help="A .litertlm; without it, the small model of Python."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("site"),
    runtime: Annotated[
        str | None,
        typer.Option(
            help="A node_modules folder with LiteRT.js, which is copied, or the "
            "address of a CDN that the page fetches it from. Default: node_modules "
            "here, or else jsDelivr."
        ),
    ] = None,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="Refuse a page that would need a network."),
    ] = False,
    prompt: Annotated[
        str, typer.Option(help="What stands in the page's field at first.")
    ] = "",
    serve: Annotated[
        bool, typer.Option("--serve", help="Show the page here afterwards.")
    ] = False,
    port: Annotated[int, typer.Option(help="Of --serve; 0 takes a free one.")] = 8080,
):
    """Write a folder with a page that runs a model in the browser."""
    from gpt_tf.edge.static_server import make_server
    from gpt_tf.edge.web_bundle import write_web

    facts = write_web(
        model or shipped_model(), out, runtime=runtime, offline=offline, prompt=prompt
    )
    source = facts["runtime"]["litert"]
    where = "copied" if source.startswith("runtime/") else f"from {source}"
    notice(f"wrote {out}: {facts['name']}, {megabytes(facts['model']['size'])}")
    notice(f"LiteRT.js: {where}")
    if not serve:
        return
    with make_server(out, port) as server:
        notice(f"http://127.0.0.1:{server.server_port}/ until Ctrl-C")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
