"""Asks an ASGI application without a socket: for the tests of guards."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4_jax.serving.guards import Frame, Refusals

CHAT = "/v1/chat/completions"


@dataclass
class Reply:
    """What an application answered."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        assert set(found) == {"error"}
        assert set(found["error"]) == {"message", "type", "param", "code"}
        return found["error"]


async def ask(
    app: ASGIApp,
    *,
    method: str = "POST",
    path: str = CHAT,
    headers: dict[str, str] | None = None,
    parts: Sequence[bytes] = (b"{}",),
    client: str = "127.0.0.1",
    hang: bool = False,
) -> Reply:
    """Asks an ASGI application; with `hang` the last part of the body never comes."""
    sent: dict[str, str] = {"host": "localhost:8000"}
    if method == "POST":
        sent |= {"content-type": "application/json", "transfer-encoding": "chunked"}
    scope: Scope = {
        "type": "http", "method": method, "path": path, "raw_path": path.encode(), "client": (client, 5),
        "headers": [(n.lower().encode(), v.encode()) for n, v in {**sent, **(headers or {})}.items() if v],
    }  # fmt: skip
    left = list(parts)
    reply = Reply()

    async def receive() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left) or hang}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            assert reply.status == 0
            reply.status = message["status"]
            reply.headers = {n.decode(): v.decode() for n, v in message["headers"]}
        else:
            reply.body += message.get("body", b"")

    await app(scope, receive, send)
    return reply


def run(app: ASGIApp, **kwargs: Any) -> Reply:
    return asyncio.run(asyncio.wait_for(ask(app, **kwargs), 30))


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the body that reached it."""
    body, more = b"", scope["method"] == "POST"
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def framed(app: ASGIApp, rejected: Callable[[str], None] = lambda code: None) -> ASGIApp:
    return Frame(Refusals(app, rejected=rejected), responded=lambda path, status: None)
