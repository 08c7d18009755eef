"""A request's size before anybody reads it: its headers, its body, the body's type, and how long it may take.

For: `HeaderGuard` and `BodyGuard`, ASGI middlewares; the latter is the innermost. Not for: JSON (`protocol.py`), nor
headers that do not end (`connections.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4_jax.serving.errors import ApiError, timed_out
from minigpt4_jax.serving.guards import has_body


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

    Args:
        paths: of the routes that take a body; others refuse a POST by themselves.
        max_bytes: of the body; more is refused (413) as soon as it is announced or has come.
        timeout_s: from the first to the last byte (408).
    """

    def __init__(
        self, app: ASGIApp, *, paths: Collection[str], max_bytes: int, timeout_s: float
    ) -> None:
        self._app = app
        self._paths = frozenset(paths)
        self._max_bytes, self._timeout_s = max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._paths:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if has_body(headers):
            _check_type(headers)
        self._check_size(int(headers.get("content-length", "0")))  # digits only: h11 saw to it
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(receive)
        except TimeoutError:
            raise timed_out(
                f"The body did not come within {self._timeout_s:g} s; expected all of it by then."
            ) from None
        except ClientGone:
            return
        scope["state"]["body_read"] = True
        whole: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            message, whole = whole, None
            return message if message is not None else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes:
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            self._check_size(len(body))
            if not message.get("more_body", False):
                return bytes(body)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise ApiError(
                413,
                f"The body has {num_bytes} bytes or more; expected at most {self._max_bytes}. Send smaller or fewer "
                "pictures.",
                code="request_too_large",
            )


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
