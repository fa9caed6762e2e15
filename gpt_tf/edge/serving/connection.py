"""What bounds a connection: how many there are, and how long one may stand still.

uvicorn bounds neither the connections that are open nor the time for a request's
headers, and waits for a reader for ever.
"""

from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from gpt_tf.edge.serving.protocol import error_of

# Connections that wait to be accepted, and as many that are told to ask again later.
# asyncio accepts all that wait before it looks at one: more than there are file
# descriptors for, with uvicorn's 2048.
BACKLOG = 64

_BUSY = JSONResponse(
    error_of("The server has too many connections. Ask again later.", 503),
    503,
    {"Retry-After": "1", "Connection": "close"},
)


def bounded_connections(max_connections: int, timeout_s: float) -> type[H11Protocol]:
    """Return the class of uvicorn's connections with bounds.

    Args:
        max_connections: Connections that are served. `BACKLOG` more are answered that
            there are too many; what comes then is closed.
        timeout_s: Seconds for a request's headers, and for a reader that stands still.
    """

    class BoundedConnection(H11Protocol):
        _timer = None

        def connection_made(self, transport):
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                self.app = _BUSY
            if len(self.connections) > max_connections + BACKLOG:
                transport.abort()
            self._start()

        def connection_lost(self, exc):
            self._stop()
            super().connection_lost(exc)

        def data_received(self, data):
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()  # the request is there
            elif self._timer is None:
                self._start()

        def pause_writing(self):
            super().pause_writing()
            self._stop()
            self._start()

        def resume_writing(self):
            super().resume_writing()
            self._stop()

        def send_400_response(self, msg):
            """Answer what is no HTTP in the form of the other errors."""
            body = JSONResponse(error_of(msg, 400)).body
            head = (
                "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            self.transport.close()

        def _start(self):
            self._timer = self.loop.call_later(timeout_s, self.transport.abort)

        def _stop(self):
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return BoundedConnection
