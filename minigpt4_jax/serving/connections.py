"""One TCP connection: uvicorn's h11 protocol with a clock for headers, a bound on connections, and refusals in shape.

For: what happens before there is a request, where no middleware can see it. Not for: anything about a request.

Differs from uvicorn 0.54: that one waits for ever for the headers of a connection (a slow loris), answers broken HTTP
with plain text and headers that are too large with 400 instead of 431 (RFC 6585), and closes a connection only when
its buffer is empty, which it never is with a client that reads nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from minigpt4_jax.serving.bodies import headers_too_large
from minigpt4_jax.serving.errors import ApiError, timed_out, unavailable

log = logging.getLogger(__name__)


def make_connection(
    *, max_connections: int, header_timeout_s: float, write_timeout_s: float
) -> type[asyncio.Protocol]:
    """The class that uvicorn makes one of for each connection.

    Args:
        max_connections: one more is answered 503 and closed.
        header_timeout_s: from the first byte of a request (of the first request: from the connection) to the end of
            its headers; then 408.
        write_timeout_s: what a client has not taken so long after its connection was to be closed is dropped.
    """

    class Connection(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.app_state = {**self.app_state, "abort": self._abort}
            self._header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
            super().connection_made(transport)
            if len(self.connections) > max_connections:
                log.warning("refused a connection: there are %d", max_connections)
                self._refuse(
                    unavailable(
                        f"The server has {max_connections} connections, the most that it takes; ask again later.",
                        retry_after_s=2,
                    )
                )
                return
            self._watch_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_watching()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_watching()
            elif self._header_timer is None:
                self._watch_headers()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self.loop.call_later(write_timeout_s, self._abort)

        def send_400_response(self, msg: str) -> None:
            """Called by uvicorn for what is not HTTP, while it handles the exception that says so."""
            error = sys.exception()
            hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
            if hint == 431:
                self._refuse(headers_too_large())
            elif hint == 501:  # RFC 9112, 6.1
                said = "The transfer encoding is unknown; expected chunked."
                self._refuse(ApiError(501, said, code="unknown_transfer_encoding"))
            else:
                said = "The request is not valid HTTP/1.1 (RFC 9112)."
                self._refuse(ApiError(400, said, code="invalid_http"))

        def _watch_headers(self) -> None:
            self._header_timer = self.loop.call_later(header_timeout_s, self._headers_late)

        def _stop_watching(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _headers_late(self) -> None:
            if not self.transport.is_closing():
                self._refuse(timed_out(f"The headers did not come within {header_timeout_s:g} s."))

        def _refuse(self, error: ApiError) -> None:
            """Answers and closes, or only closes where a response has begun."""
            self._stop_watching()
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self._abort()
                return
            body = json.dumps(error.body()).encode()
            headers = {"content-type": "application/json", "content-length": str(len(body))}
            headers |= {"connection": "close", "cache-control": "no-store"}
            if error.retry_after_s is not None:
                headers["retry-after"] = str(error.retry_after_s)
            reply = h11.Response(
                status_code=error.status,
                headers=[(name.encode(), value.encode()) for name, value in headers.items()],
            )
            for event in (reply, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.close()
            self.loop.call_later(write_timeout_s, self._abort)

        def _abort(self) -> None:
            if self.transport is not None:
                self.transport.abort()

    return Connection
