"""What bounds a request: its key, its size, the time that it takes to arrive."""

import hmac
import time

import anyio
from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse

from gpt_tf.edge.serving.protocol import error_of
from gpt_tf.settings.server import ServerConfig


class Guard:
    """Refuses requests without the key, too large, too slow, or of two lengths.

    Args:
        app: What answers the others.
        config: The settings.
    """

    def __init__(self, app, config: ServerConfig):
        self._app, self._config = app, config
        self._most = config.max_request_kb * 1024

    async def __call__(self, scope, receive, send):
        if scope["type"] == "http":
            refusal = self._refusal(scope["path"], Headers(scope=scope))
            if refusal is not None:
                await refusal(scope, receive, send)
                return
            receive = self._bounded(receive)
        await self._app(scope, receive, send)

    def _refusal(self, path, headers):
        """Return the answer to a request that its headers rule out, or None."""
        length = headers.get("content-length")
        if length is not None and "transfer-encoding" in headers:
            # Two programs in a row might not agree where the body ends.
            message = "A body expects one length. Received: Content-Length and chunks."
            return _answer(400, message, {"Connection": "close"})
        key = self._config.api_key
        if key is not None and path != "/health":
            given = headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {key}".encode()):
                message = "The server expects its API key, as a bearer token."
                return _answer(401, message, {"WWW-Authenticate": "Bearer"})
        if length is not None and int(length) > self._most:
            return _answer(413, self._too_large(length))
        return None

    def _bounded(self, receive):
        """Return `receive` with bounds on the body's size and on its time."""
        end, size, whole = time.monotonic() + self._config.timeout_s, 0, False

        async def bounded():
            nonlocal size, whole
            if whole:
                return await receive()
            try:
                with anyio.fail_after(max(0, end - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, "The body did not arrive in time.", {"Connection": "close"}
                ) from None
            size += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if size > self._most:
                raise HTTPException(413, self._too_large(size))
            return message

        return bounded

    def _too_large(self, size):
        return f"A request expects at most {self._most} bytes. Received: {size}."


def _answer(status, message, headers=None):
    return JSONResponse(error_of(message, status), status, headers)
