"""Serve a folder on this machine with the headers that give a page threads.

A browser gives WebAssembly several threads only in a page that is isolated from
others, by the headers Cross-Origin-Opener-Policy and Cross-Origin-Embedder-Policy.
"""

import functools
import http.server
import os

from gpt_tf.errors import InputError
from gpt_tf.settings import arguments

_HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # asked for anew, and sent if it has changed
}


class _Handler(http.server.SimpleHTTPRequestHandler):
    # The system's own table may call scripts text/plain, which browsers refuse.
    extensions_map = {  # noqa: RUF012 - the base class has it so
        **http.server.SimpleHTTPRequestHandler.extensions_map,
        ".css": "text/css",
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript",
        ".json": "application/json",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self):
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path):
        self.send_error(404)

    def log_message(self, *_):
        pass


def make_server(
    folder: str | os.PathLike, port: int = 8080
) -> http.server.ThreadingHTTPServer:
    """Return a server of a folder, on this machine's own address only.

    Args:
        folder: What it serves.
        port: 0 takes a free one; `server_port` says which.

    Returns:
        The server; `serve_forever` runs it.

    Raises:
        InputError: The port is taken, or not to be had.
    """
    arguments.integer("port", port, 0, 65535)
    handler = functools.partial(_Handler, directory=os.fspath(folder))
    try:
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise InputError(
            f"`port` expects one that is free. Received: {port}: {error.strerror}. "
            "Choose another, or 0 for any."
        ) from None
