"""bodies.py: what is refused of a body before anybody reads it, and how much of all of them is in memory."""

from __future__ import annotations

import asyncio
import logging

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4_jax.serving import bodies, guards
from minigpt4_jax.serving.bodies import BodyGuard
from tests.serving.asgi import CHAT, ask, echo, framed, run


def bounded(
    app: ASGIApp = echo, *, timeout_s: float = 60.0, max_total_bytes: int = 10**6
) -> ASGIApp:
    return framed(
        BodyGuard(app, max_bytes=100, max_total_bytes=max_total_bytes, timeout_s=timeout_s)
    )


def test_a_body_arrives_whole_whatever_its_parts() -> None:
    assert run(bounded(), parts=[b"a" * 50, b"", b"b" * 50]).body == b"a" * 50 + b"b" * 50
    assert run(bounded(), headers={"content-length": "2", "transfer-encoding": ""}).body == b"{}"


@pytest.mark.parametrize(
    ("headers", "parts"),
    [({"content-length": "101", "transfer-encoding": ""}, []), ({}, [b"a" * 60, b"b" * 41])],
)
def test_a_body_that_is_too_large_is_refused_announced_or_come(
    headers: dict[str, str], parts: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guards, "LINGER_S", 0.05)
    reached: list[bool] = []

    async def note(scope: Scope, receive: Receive, send: Send) -> None:
        reached.append(True)

    reply = run(bounded(note), headers=headers, parts=parts, hang=True)
    assert (reply.status, reply.headers["connection"]) == (413, "close")
    assert reply.error["code"] == "request_too_large"
    assert "expected at most 100" in reply.error["message"]
    assert not reached


@pytest.mark.parametrize("path", ["/tokenize", "/never/there", f"{CHAT}\n", ""])
def test_the_body_of_every_post_is_looked_at_whatever_its_path(path: str) -> None:
    assert run(bounded(), path=path, headers={"content-type": "text/plain"}).status == 415
    announced = {"content-length": "101", "transfer-encoding": ""}
    assert run(bounded(), path=path, headers=announced, parts=[b"a" * 101]).status == 413


def test_large_bodies_together_have_a_bound_until_they_are_read_and_small_ones_come_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bodies, "SMALL_BYTES", 10)

    async def scenario() -> None:
        reading, release = asyncio.Event(), asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            await reading.wait()
            scope["state"]["body_done"]()
            await release.wait()
            await echo(scope, receive, send)

        app = bounded(slow, max_total_bytes=150)
        sizes = (80, 60, 40, 10)
        tasks = [asyncio.create_task(ask(app, parts=[b"a" * size])) for size in sizes]
        for _ in range(20):
            await asyncio.sleep(0)
        assert [task.done() for task in tasks] == [False, False, True, False]
        refused = tasks.pop(2).result()
        assert (refused.status, refused.headers["retry-after"]) == (429, "2")
        # Those that are inside are answered still, but their bodies have been read.
        reading.set()
        for _ in range(20):
            await asyncio.sleep(0)
        tasks.append(asyncio.create_task(ask(app, parts=[b"a" * 90])))
        release.set()
        assert [len((await task).body) for task in tasks] == [80, 60, 10, 90]

    asyncio.run(scenario())


def test_a_body_that_was_refused_or_read_takes_no_room() -> None:
    app = bounded(max_total_bytes=100)
    for _ in range(5):
        assert run(app, parts=[b"a" * 60, b"b" * 41]).status == 413
        assert run(app, parts=[b"a" * 100]).status == 200


def test_a_body_that_does_not_end_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "LINGER_S", 0.01)
    reply = run(bounded(timeout_s=0.01), parts=[b"{"], hang=True)
    assert (reply.status, reply.error["code"]) == (408, "request_timeout")


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"}, {"content-type": ""}, {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "application/x-www-form-urlencoded"}, {"content-type": "application/jsonp"},
        {"content-encoding": "gzip"},
    ],
)  # fmt: skip
def test_a_body_that_a_page_of_another_site_could_send_is_refused(headers: dict[str, str]) -> None:
    reply = run(bounded(), headers=headers)
    assert (reply.status, reply.error["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("kind", ["application/json", "application/JSON; charset=utf-8"])
def test_json_is_taken_however_it_is_spelled(kind: str) -> None:
    assert run(bounded(), headers={"content-type": kind}).status == 200


def test_a_client_that_leaves_in_its_body_is_nobodys_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> list[Message]:
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": CHAT, "raw_path": b"", "client": None,
            "headers": [(b"content-length", b"5"), (b"content-type", b"application/json")],
        }  # fmt: skip
        await bounded()(scope, receive, send)
        return sent

    assert asyncio.run(scenario()) == []
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
