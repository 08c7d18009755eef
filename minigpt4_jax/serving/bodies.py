"""A request's size before anybody reads it: its headers, its body, the body's type, and how long it may take.

For: `HeaderGuard` and `BodyGuard`, ASGI middlewares; the latter is the innermost. Not for: JSON (`protocol.py`), nor
headers that do not end (`connections.py`).

A body is in memory once, and until it was read: `BodyGuard` keeps no copy, `take_body` makes none, and the route says
when it is done with the text of it (`scope["state"]["body_done"]`), long before the answer ends.
"""

from __future__ import annotations

import asyncio
import functools

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4_jax.serving.errors import ApiError, overloaded, timed_out
from minigpt4_jax.serving.guards import has_body

SMALL_BYTES = 64 * 2**10
"""A body up to here is always taken, so that large ones of one caller do not keep out the others' questions; `InFlight`
bounds their number."""
RETRY_AFTER_S = 2


class ClientGone(Exception):
    """The client closed the connection within its request. Nobody is left to be told."""


class HeaderGuard:
    """Refuses headers that are too large (431). h11 itself bounds only those that come in several pieces.

    Args:
        max_bytes: of the target and all headers together.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            target = len(scope["raw_path"]) + len(scope["query_string"])
            found = target + sum(len(name) + len(value) for name, value in scope["headers"])
            if found > self._max_bytes:
                raise headers_too_large()
        await self._app(scope, receive, send)


def headers_too_large() -> ApiError:
    """431 (RFC 6585)."""
    return ApiError(
        431, "The headers are too large; expected fewer or shorter ones.", code="headers_too_large"
    )


class BodyGuard:
    """Reads the whole body of a POST, within its limits, and gives it to the routes in one piece.

    A page of another site can make a browser send `text/plain` here without asking; it cannot send JSON unless CORS
    allows it. So a body of another type is refused (415), which also keeps such pages out of a server without keys.
    Every POST is looked at, whatever its path: what is no route for a guard may be one for the router.

    Args:
        max_bytes: of the body; more is refused (413) as soon as it is announced or has come.
        max_total_bytes: of all bodies that have come and were not read by their routes yet; one above `SMALL_BYTES`
            that does not fit is refused (429). What has come counts and not what is announced, which costs nothing.
        timeout_s: from the first to the last byte (408).
    """

    def __init__(
        self, app: ASGIApp, *, max_bytes: int, max_total_bytes: int, timeout_s: float
    ) -> None:
        self._app = app
        self._max_bytes, self._timeout_s = max_bytes, timeout_s
        self._max_total_bytes = max_total_bytes
        self._inside: dict[object, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        place = object()
        done = functools.partial(self._inside.pop, place, None)
        try:
            whole = await self._whole(scope, receive, place)
            if whole is None:
                return
            scope["state"]["body_done"] = done
            replay = _replay(whole, receive)
            del whole
            await self._app(scope, replay, send)
        finally:
            done()

    async def _whole(self, scope: Scope, receive: Receive, place: object) -> Message | None:
        """The body as one message; None where the client has gone."""
        headers = Headers(scope=scope)
        if has_body(headers):
            _check_type(headers)
        self._check_size(int(headers.get("content-length", "0")))  # digits only: h11 saw to it
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(scope, receive, place)
        except TimeoutError:
            raise timed_out(
                f"The body did not come within {self._timeout_s:g} s; expected all of it by then."
            ) from None
        except ClientGone:
            return None
        return {"type": "http.request", "body": body, "more_body": False}

    async def _read(self, scope: Scope, receive: Receive, place: object) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            # Also for what is refused here: of a body that has ended nothing is left to be read and dropped.
            scope["state"]["body_read"] = not message.get("more_body", False)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            self._check_size(size)
            self._inside[place] = size
            if size > SMALL_BYTES and sum(self._inside.values()) > self._max_total_bytes:
                raise overloaded(
                    "The server has as many bytes of requests in memory as it takes; ask again later.",
                    retry_after_s=RETRY_AFTER_S,
                )
            if scope["state"]["body_read"]:
                return b"".join(parts)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise ApiError(
                413,
                f"The body has {num_bytes} bytes or more; expected at most {self._max_bytes}. Send smaller or fewer "
                "pictures.",
                code="request_too_large",
            )


def _replay(whole: Message, receive: Receive) -> Receive:
    """Gives the body once and forgets it; then what `receive` gives."""
    left = [whole]

    async def replay() -> Message:
        return left.pop() if left else await receive()

    return replay


async def take_body(receive: Receive) -> bytes:
    """The whole body of a request behind `BodyGuard`. (Starlette's `Request.body` would keep it as long as itself.)"""
    body = (await receive())["body"]
    assert isinstance(body, bytes)
    return body


def _check_type(headers: Headers) -> None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if kind != "application/json" or encoding != "identity":
        raise ApiError(
            415,
            f"The body is {kind[:80] or 'of no type'!r} with the encoding {encoding[:40]!r}; expected "
            "`Content-Type: application/json`, not compressed.",
            code="unsupported_media_type",
        )
