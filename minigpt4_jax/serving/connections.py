"""One TCP connection: uvicorn's h11 protocol with clocks, a bound on connections, and refusals in shape.

For: what happens before and behind a request, where no middleware can see it. Not for: anything about a request.

A connection is always on some clock. Headers: `header_timeout_s`. The body of a POST, and its answer: those of the
guards and of the job. What a client does not take: `write_timeout_s`. A body that nobody asked for: `LINGER_S`. Nothing
at all: uvicorn's keep-alive.

Differs from uvicorn 0.54: that one waits for ever for the headers of a connection (a slow loris), for a client that
reads nothing, and for the rest of a body whose request was answered; it answers broken HTTP with plain text and headers
that are too large with 400 instead of 431 (RFC 6585), and closes a connection only when its buffer is empty, which it
never is with a client that reads nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import secrets
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from minigpt4_jax.serving.bodies import headers_too_large
from minigpt4_jax.serving.errors import ApiError, invalid, timed_out, unavailable
from minigpt4_jax.serving.guards import LINGER_S

log = logging.getLogger(__name__)

SLOWEST = 16 * 2**10
"""Bytes a second that a client has to take of what waits for it."""
FREE_CHUNKS = 256
BYTES_A_CHUNK = 128
"""A body may come in `FREE_CHUNKS` chunks of any length, and in one more for each so many bytes: h11 takes some
microseconds for a chunk, and 43,000 of one letter, which is what one read of a socket brings, take 0.2 s."""
OTHER_FILES = 128
"""Files that a process has open beside its connections: weights, the log, pictures that are fetched."""


def room_for_connections(wanted: int) -> int:
    """How many connections the system lets this process have, at most `wanted`. Raises its own limit as far as it may.

    Without it the limit (often 1024) is met by `accept`, which then fails for everybody, and by every other file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if most > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    room = max(1, min(wanted, max(soft, most) - OTHER_FILES))
    if room < wanted:
        log.warning(
            "limits.max_connections is %d, and this process may open %d files: %d connections are taken. Raise the "
            "hard limit (`ulimit -Hn`), or set limits.max_connections.",
            wanted,
            max(soft, most),
            room,
        )
    return room


class _TinyChunks(h11.RemoteProtocolError):
    """A body in more chunks than its length needs."""


class _Http(h11.Connection):
    """As h11's, for a body in chunks of a useful length."""

    _chunks = _bytes = 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._chunks = self._bytes = 0
        elif isinstance(event, h11.Data):
            self._chunks += event.chunk_start
            self._bytes += len(event.data)
            if self._chunks > FREE_CHUNKS + self._bytes // BYTES_A_CHUNK:
                raise _TinyChunks("tiny chunks")
        return event


def make_connection(
    *, max_connections: int, header_timeout_s: float, write_timeout_s: float
) -> type[asyncio.Protocol]:
    """The class that uvicorn makes one of for each connection.

    Args:
        max_connections: one more is answered 503 and closed.
        header_timeout_s: from the first byte of a request (of the first request: from the connection) to the end of
            its headers; then 408.
        write_timeout_s: a client that takes less than `SLOWEST` of what waits for it in such a time is cut off, as is
            one that has not taken all so long after its connection was to be closed.
    """

    class Connection(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.conn = _Http(h11.SERVER, self.config.h11_max_incomplete_event_size or 2**16)
            self.app_state = {**self.app_state, "abort": self._abort}
            self._header_timer: asyncio.TimerHandle | None = None
            self._write_timer: asyncio.TimerHandle | None = None
            self._lingers = False

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
            self._stop_watching_writes()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing() or self._lingers:
                return
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._stop_watching()
            elif self._header_timer is None:
                self._watch_headers()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_writes()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_watching_writes()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.is_closing():
                self._watch_writes()
            elif self.conn.their_state is h11.SEND_BODY:
                # Nobody asked for the rest. Closing at once would reset the connection, and the client might lose the
                # response: it is told that nothing more comes, and what it still sends is dropped.
                self._lingers = True
                self._unset_keepalive_if_required()
                self.conn.send(h11.ConnectionClosed())
                self.transport.write_eof()
                self.loop.call_later(LINGER_S, self._abort)

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self.loop.call_later(write_timeout_s, self._abort)

        def send_400_response(self, msg: str) -> None:
            """Called by uvicorn for what is not HTTP, while it handles the exception that says so."""
            error = sys.exception()
            hint = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
            if isinstance(error, _TinyChunks):
                said = f"The body comes in tiny chunks; expected some of {BYTES_A_CHUNK} bytes or more."
                self._refuse(invalid(said, code="tiny_chunks"))
            elif hint == 431:
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

        def _watch_writes(self) -> None:
            left = self.transport.get_write_buffer_size()
            self._stop_watching_writes()
            self._write_timer = self.loop.call_later(write_timeout_s, self._check_writes, left)

        def _stop_watching_writes(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

        def _check_writes(self, before: int) -> None:
            if before - self.transport.get_write_buffer_size() < SLOWEST * write_timeout_s:
                log.info(
                    "a client took nothing for %g s, or next to it; it is cut off", write_timeout_s
                )
                self._abort()
            else:
                self._watch_writes()

        def _headers_late(self) -> None:
            if not self.transport.is_closing():
                self._refuse(timed_out(f"The headers did not come within {header_timeout_s:g} s."))

        def _refuse(self, error: ApiError) -> None:
            """Answers and closes, or only closes where a response has begun."""
            self._stop_watching()
            if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
                self._abort()
                return
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.disconnected = True  # else it would answer as well
                self.cycle.message_event.set()
            request_id = secrets.token_hex(16)
            log.info("[%s] refused a connection: %d %s", request_id, error.status, error.code)
            body = json.dumps(error.body()).encode()
            headers = {"content-type": "application/json", "content-length": str(len(body))}
            headers |= {"connection": "close", "cache-control": "no-store"}
            headers["x-request-id"] = request_id
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
