"""chat_route.py: what is kept of a request, what runs where, and clients that leave early, behind a real uvicorn."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import os
import socket
import threading
import time
import tracemalloc
from typing import Any

import pytest
from PIL import Image

from minigpt4_jax.serve_config import ServeConfig
from minigpt4_jax.serving.chat_route import MOST_EVENTS, Letter, stream_bytes
from minigpt4_jax.serving.jobs import Done, Event, Job, Piece, Started
from minigpt4_jax.serving.mailbox import Mailbox, Post
from minigpt4_jax.serving.pictures import PictureReader
from minigpt4_jax.serving.replies import ChatReply
from tests.planted import encoded
from tests.serving.fakes import FakeModel
from tests.serving.running import CHAT, Running, chat_body, run_server, wait_until


def with_picture(running: Running, data: bytes, **fields: Any) -> bytes:
    """A request that shows a PNG."""
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "What is this?"},
    ]
    asked = chat_body(running.server, messages=[{"role": "user", "content": content}], **fields)
    return json.dumps(asked).encode()


def noise(side: int) -> Image.Image:
    """A picture that no format makes smaller."""
    return Image.frombytes("RGB", (side, side), os.urandom(3 * side * side))


@pytest.mark.parametrize("stream", [False, True])
def test_neither_body_nor_pictures_of_a_request_are_in_memory_while_it_is_answered(
    tiny_server: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    body = with_picture(tiny_server, encoded(noise(1000), "PNG"), stream=stream)
    submit = tiny_server.server.scheduler.submit
    held: list[int] = []

    def measured() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    def measure(job: Job) -> None:
        # The client that sent it and the thread that decoded let go of it a moment later; this thread goes nowhere.
        end = time.monotonic() + 10
        while measured() >= len(body) / 4 and time.monotonic() < end:
            time.sleep(0.01)
        held.append(measured())
        submit(job)

    monkeypatch.setattr(tiny_server.server.scheduler, "submit", measure)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        assert tiny_server.ask("POST", CHAT, body)[0] == 200
    finally:
        tracemalloc.stop()
    assert len(held) == 1
    assert held[0] < len(body) / 4


def test_the_time_of_a_request_begins_when_it_arrives(
    tiny_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, read = tiny_server.server.scheduler.submit, PictureReader.read
    jobs: list[Job] = []
    began: list[float] = []

    def note(job: Job) -> None:
        jobs.append(job)
        submit(job)

    async def timed(self: PictureReader, *args: Any, **kwargs: Any) -> Any:
        began.append(time.monotonic())
        return await read(self, *args, **kwargs)

    monkeypatch.setattr(tiny_server.server.scheduler, "submit", note)
    monkeypatch.setattr(PictureReader, "read", timed)
    assert tiny_server.chat()[0] == 200
    assert jobs[0].arrived_s <= began[0]
    limit_s = tiny_server.server.config.limits.request_timeout_s
    assert jobs[0].deadline_s == jobs[0].arrived_s + limit_s


def test_what_one_key_asked_is_reused_for_that_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    salts: list[object] = []
    config = ServeConfig(model="tiny", port=0, context=128, num_slots=1)
    with run_server(FakeModel(num_slots=1), config, keys=("one", "two")) as running:
        submit = running.server.scheduler.submit

        def note(job: Job) -> None:
            salts.append(job.salt)
            submit(job)

        monkeypatch.setattr(running.server.scheduler, "submit", note)
        for key in ("one", "two", "one"):
            assert running.chat_with_key(key)[0] == 200
    first, other, again = salts
    assert first == again != other
    assert None not in salts


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_its_pictures_are_read_ends_their_reading(
    tiny_server: Running, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    reading, ended = threading.Event(), threading.Event()

    async def read(self: PictureReader, *args: Any, **kwargs: Any) -> Any:
        reading.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    monkeypatch.setattr(PictureReader, "read", read)
    body = with_picture(tiny_server, encoded(noise(8), "PNG"), stream=stream)
    with tiny_server.connect() as connection:
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        wait_until(reading.is_set)
        assert not ended.is_set()
        connection.shutdown(socket.SHUT_RDWR)
    wait_until(ended.is_set)
    wait_until(lambda: tiny_server.idle)


def test_a_whole_answer_is_put_together_on_a_thread(
    tiny_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed, threads = ChatReply.feed, set()

    def noted(self: ChatReply, event: Event) -> Any:
        threads.add(threading.current_thread().name.partition("_")[0])
        return feed(self, event)

    monkeypatch.setattr(ChatReply, "feed", noted)
    status, _, body = tiny_server.chat(n=2, temperature=1)
    assert (status, body["usage"]["completion_tokens"]) == (200, 8)
    assert threads == {"text"}


class Counted(ChatReply):
    """A reply that only counts what it is fed with between two turns of the event loop."""

    def __init__(self) -> None:
        self.fed = 0

    def feed(self, event: Event) -> list[dict[str, Any]]:
        self.fed += 1
        return [{"event": self.fed}]


def test_what_a_slow_reader_has_left_is_written_a_few_events_at_a_time() -> None:
    async def scenario() -> None:
        box: Mailbox[Letter] = Mailbox(Post())
        for event in (Started(0), *(Piece(0, "a", i) for i in range(998)), Done()):
            box.put(event)
        reply = Counted()
        most = turns = 0

        async def others() -> None:
            nonlocal most, turns
            before = 0
            while True:
                most, before = max(most, reply.fed - before), reply.fed
                turns += 1
                await asyncio.sleep(0)

        watching = asyncio.create_task(others())
        pieces = [
            piece
            async for piece in stream_bytes(
                await box.take(), box, reply=reply, num_waiting=lambda: 0
            )
        ]
        watching.cancel()
        events = b"".join(pieces).split(b"\n\n")
        assert events[:-1] == [
            *(b'data: {"event":%d}' % (i + 1) for i in range(1000)),
            b"data: [DONE]",
        ]
        assert max(piece.count(b"data: ") for piece in pieces) == MOST_EVENTS
        assert most == MOST_EVENTS
        assert turns >= len(pieces) - 1 > 50

    asyncio.run(scenario())
