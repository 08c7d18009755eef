"""What stands between the socket and the routes: who asks, for which host, how many at once; and how a refusal looks.

For: pure ASGI middlewares, outermost first: `Frame` (a request id, headers, one line of the log), starlette's CORS,
`Refusals` (every error in OpenAI's shape), `HeaderGuard` of `bodies.py`, `HostGuard`, `KeyGuard`, `PathGuard`,
`InFlight`, and `BodyGuard` of `bodies.py`. Not for: what a request says (`protocol.py`), nor headers that do not end
(`connections.py`).

Everything is closed unless it is listed: a path is open only if it is exactly one of the open ones, and no guard of
keys, hosts or bodies asks whether a path is one of those that it guards. (Elsewhere the key guarded a prefix, and other
routes stayed open: CVE-2025-59425.) The router is not that exact: its patterns end in `$`, which also matches before a
last line feed, so that `/v1/chat/completions%0A` is that route. `PathGuard` answers 404 to all such paths.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4_jax.serving.errors import ApiError, internal, overloaded

log = logging.getLogger(__name__)
access_log = logging.getLogger("minigpt4_jax.serving.access")

SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""A client's `x-request-id` that is taken over; it enters the log, so it holds no spaces and no control characters."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
LINGER_S = 2.0
"""How long the rest of a refused body is read and dropped. Closing at once would make the system reset the connection,
and the client would lose the refusal that it has not read yet."""
SUCCESSOR_S = 10
"""Retry-After of a server that ends: by then its supervisor has started another, or routes to one."""
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
"""On every response, where its route says nothing else (OWASP's REST security cheat sheet)."""


class Frame:
    """Gives a request its id, every response its headers, and the log a line with neither query nor key.

    `scope["state"]` gets `request_id` and `arrived_s` (on the clock of `time.monotonic`).

    Args:
        responded: told the path that was asked for and the status of its response.
    """

    def __init__(self, app: ASGIApp, *, responded: Callable[[str, int], None]) -> None:
        self._app = app
        self._responded = responded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if SANE_ID.fullmatch(given) else secrets.token_hex(16)
        arrived_s = time.monotonic()
        scope.setdefault("state", {}).update(request_id=request_id, arrived_s=arrived_s)
        status = 0

        async def framed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                self._responded(scope["path"], status)
            await send(message)

        try:
            await self._app(scope, receive, framed)
        except asyncio.CancelledError:
            # Only the end of the server cancels a request's task; what was not answered by then is cut off. Raised on,
            # it would be a traceback in the log for every such request.
            log.warning("[%s] cut off by the end of the server", request_id)
        finally:
            path = scope.get("raw_path", b"").decode("ascii", "replace")
            access_log.info(
                "[%s] %s %s %s %.0f ms", request_id, scope["method"], path,
                status or "cut off", (time.monotonic() - arrived_s) * 1e3,
            )  # fmt: skip


class Refusals:
    """Turns an `ApiError` into its response, and any other exception into `internal()` with a traceback in the log.

    Args:
        rejected: told the code of each.
    """

    def __init__(self, app: ASGIApp, *, rejected: Callable[[str], None]) -> None:
        self._app = app
        self._rejected = rejected

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False
        refusal: Refusal | None = None

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
            return
        except (
            Exception
        ) as error:  # the last place that can: behind it a client would see a library's text
            request_id = scope["state"]["request_id"]
            if not isinstance(error, ApiError):
                log.exception("[%s] a request failed", request_id)
            if started:  # the half response must not look like a whole one
                log.error("[%s] failed after its response had begun; cut off", request_id)
            else:
                refusal = self._refusal(error if isinstance(error, ApiError) else internal())
        # Not before here: the traceback of the error, and of those that led to it, keeps the body in memory.
        if refusal is None:
            await abort(scope)
        else:
            await refusal(scope, receive, send)

    def _refusal(self, error: ApiError) -> Refusal:
        self._rejected(error.code or error.kind)
        return Refusal(error)


async def abort(scope: Scope) -> None:
    """Cuts the connection where `connections.py` offers it: what is buffered for a client that reads nothing goes."""
    cut = scope.get("state", {}).get("abort")
    if cut is not None:
        cut()
        await asyncio.sleep(
            0
        )  # one turn of the loop, in which uvicorn hears that the connection is lost


class Refusal(Response):
    """The whole response of an `ApiError`. An unread body is read and dropped for `LINGER_S`, then cut off.

    Args:
        headers: besides those that the error has by its status.
    """

    def __init__(self, error: ApiError, *, headers: Mapping[str, str] | None = None) -> None:
        own = {}
        if error.retry_after_s is not None:
            own["retry-after"] = str(error.retry_after_s)
        elif error.status == 503:
            own["retry-after"] = str(SUCCESSOR_S)
        if error.status == 401:
            own["www-authenticate"] = "Bearer"
        if error.status == 408:
            # The openai client asks twice more after a 408 unless it is told not to (`_should_retry` in its
            # _base_client.py); what took all of its time once would take it three times.
            own["x-should-retry"] = "false"
        super().__init__(
            json.dumps(error.body()),
            error.status,
            headers={**own, **(headers or {})},
            media_type="application/json",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers; as an ASGI application."""
        if not has_body(Headers(scope=scope)) or scope["state"].get("body_read", False):
            await super().__call__(scope, receive, send)
            return
        self.headers["connection"] = "close"
        start = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **start})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        try:
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body", False):
                    pass
        except TimeoutError:
            log.info("[%s] went on sending a refused body", scope["state"]["request_id"])
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def has_body(headers: Headers) -> bool:
    """Whether a request announces a body (RFC 9112, 6.3)."""
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"


class HostGuard:
    """Answers only to the names that the server goes by: against DNS rebinding.

    Args:
        names: allowed names without ports; empty allows every name.
        open_paths: paths that any name may ask for: a probe of an orchestrator calls by the address.
    """

    def __init__(
        self, app: ASGIApp, *, names: Collection[str], open_paths: Collection[str]
    ) -> None:
        self._app = app
        self._names = frozenset(name.lower().strip("[]") for name in names)
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._names and scope["path"] not in self._open_paths:
            found = Headers(scope=scope).getlist("host")
            if len(found) != 1 or host_name(found[0]) not in self._names:
                raise ApiError(
                    421,
                    "The request is for a host that this server does not answer for. Call it by its own name or "
                    "address, or add the name to access.allowed_hosts of its configuration.",
                    code="host_not_allowed",
                )
        await self._app(scope, receive, send)


def host_name(host: str) -> str:
    """The name of a Host header, without its port and without the brackets of IPv6; empty if it is no such thing."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/@\\\s]+))(?::[0-9]*)?", host)
    return (found[1] or found[2]).lower() if found else ""


def allowed_names(host: str, *, loopback: bool, allowed_hosts: Sequence[str]) -> tuple[str, ...]:
    """The names that a server at `host` answers for; empty stands for all."""
    if allowed_hosts:
        return tuple(allowed_hosts)
    return (*LOOPBACK_NAMES, host) if loopback else ()


class KeyGuard:
    """Asks for a key on every path but the open ones, and says who the caller is in `scope["state"]["caller"]`.

    All keys are compared, as digests of one length and in constant time: neither a key's length nor its beginning nor
    its place in the list can be learnt from the clock. Without keys everybody may ask and is told apart by address.
    """

    def __init__(self, app: ASGIApp, *, keys: Collection[str], open_paths: Collection[str]) -> None:
        self._app = app
        self._digests = tuple(_digest(key) for key in keys)
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["state"]["caller"] = _network(scope)
            if self._digests and scope["path"] not in self._open_paths:
                digest = _digest(_given_key(Headers(scope=scope)))
                matches = [hmac.compare_digest(digest, known) for known in self._digests]
                if not any(matches):
                    raise ApiError(
                        401,
                        "The API key is missing or wrong; expected the header `Authorization: Bearer KEY` (or "
                        "`x-api-key: KEY`) with a key of this server.",
                        kind="authentication_error",
                        code="invalid_api_key",
                    )
                scope["state"]["caller"] = digest.hex()
        await self._app(scope, receive, send)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _given_key(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return headers.get("x-api-key", "")


def _network(scope: Scope) -> str:
    """The caller's address; of IPv6 the /64, of which one machine usually has all."""
    client = scope.get("client")
    if client is None:
        return ""
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return str(client[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


class PathGuard:
    """404 to paths with control characters: no route has any, and the router takes some of them for routes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and CONTROL.search(scope["path"]):
            raise no_route()
        await self._app(scope, receive, send)


def no_route() -> ApiError:
    """404."""
    said = (
        "There is no such route; expected one of /openapi.json, such as POST /v1/chat/completions."
    )
    return ApiError(404, said, code="not_found")


class InFlight:
    """Bounds the POST requests that are inside: of one caller, and of all. (Their bytes: `BodyGuard`.)

    Args:
        max_per_caller: a key's, or without keys an address's.
        max_total: what the queues (for slots, for beams) and the slots can take; more would only be refused later.
    """

    def __init__(self, app: ASGIApp, *, max_per_caller: int, max_total: int) -> None:
        self._app = app
        self._max_per_caller, self._max_total = max_per_caller, max_total
        self._inside: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        caller = scope["state"]["caller"]
        if self._inside[caller] >= self._max_per_caller:
            raise overloaded(
                f"This key or address has {self._max_per_caller} requests under way, the most at a time; expected to "
                "wait for one of them first.",
                retry_after_s=1,
            )
        if self._inside.total() >= self._max_total:
            raise overloaded(
                f"The server has {self._max_total} requests under way, the most that it takes; ask again later.",
                retry_after_s=2,
            )
        self._inside[caller] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._inside[caller] -= 1
            if not self._inside[caller]:
                del self._inside[caller]
