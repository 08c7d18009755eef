"""connections.py: no connection is without a clock, and a body has chunks of a useful length."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from minigpt4_jax.serving import connections
from minigpt4_jax.serving.connections import (
    BYTES_A_CHUNK,
    FREE_CHUNKS,
    OTHER_FILES,
    SLOWEST,
    make_connection,
    room_for_connections,
)
from tests.serving.running import LIMIT_S, wait_until

LARGE = 2**24
"""More bytes than the system buffers for a connection."""


class App:
    """Answers so many bytes; reads the body of a POST alone."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.entered = self.left = 0
        self.bodies: list[int] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.entered += 1
        try:
            size, more = 0, scope["method"] == "POST"
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                size += len(message["body"])
                more = message["more_body"]
            self.bodies.append(size)
            headers = [(b"content-length", str(self.num_bytes).encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"a" * self.num_bytes})
        finally:
            self.left += 1


def uvicorn_config(app: ASGIApp, *, write_timeout_s: float = LIMIT_S) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=make_connection(
            max_connections=9, header_timeout_s=LIMIT_S, write_timeout_s=write_timeout_s
        ),
        loop="asyncio",  # as `Server`
        ws="none",
        lifespan="off",
        log_config=None,
        timeout_keep_alive=int(2 * LIMIT_S),
    )


@contextmanager
def serving(app: ASGIApp, **limits: float) -> Iterator[tuple[socket.socket, Callable[[], int]]]:
    """A client's connection to a server of `app`, and how many connections the server has."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn_config(app, **limits))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_until(lambda: server.started)
            with socket.create_connection(listener.getsockname(), timeout=LIMIT_S) as client:
                yield client, lambda: len(server.server_state.connections)
        finally:
            server.should_exit = True
            thread.join(LIMIT_S)
            assert not thread.is_alive()


def read_all(client: socket.socket) -> bytes:
    found = b""
    while part := client.recv(65536):
        found += part
    return found


def test_a_client_that_reads_nothing_and_asks_again_is_cut_off_and_its_request_ends() -> None:
    app = App(LARGE)
    with serving(app, write_timeout_s=0.2) as (client, num_connections):
        client.sendall(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n" * 2)
        wait_until(lambda: app.entered == 2)
        wait_until(lambda: num_connections() == 0)
        wait_until(lambda: app.left == 2)


@pytest.mark.parametrize("sent", [b"", b"x", b"x" * 50_000])
def test_a_body_that_nobody_asked_for_is_dropped_and_the_connection_with_it(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "LINGER_S", 1.0)
    with serving(App(5)) as (client, num_connections):
        client.sendall(b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n")
        found = b""
        while not found.endswith(b"\r\n\r\naaaaa"):
            part = client.recv(65536)
            assert part
            found += part
        client.sendall(sent)  # behind the response: no clock that began with it may count
        assert read_all(client) == b""
        # The client's own end is open still.
        wait_until(lambda: num_connections() == 0)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_connection_whose_bodies_are_whole_is_kept(method: str) -> None:
    app = App(5)
    with serving(app) as (client, _):
        for _ in range(3):
            client.sendall(
                f"{method} / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{{}}".encode()
            )
            found = b""
            while not found.endswith(b"aaaaa"):
                part = client.recv(65536)
                assert part
                found += part
    assert app.entered == 3


@pytest.mark.parametrize(
    ("length", "number", "status"),
    [(1, FREE_CHUNKS, 200), (1, 2000, 400), (BYTES_A_CHUNK, 2000, 200), (BYTES_A_CHUNK // 2, 2000, 400)],
)  # fmt: skip
def test_a_body_of_tiny_chunks_is_refused(length: int, number: int, status: int) -> None:
    app = App(5)
    with serving(app) as (client, num_connections):
        chunk = b"%x\r\n" % length + b"a" * length + b"\r\n"
        client.sendall(b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n")
        client.sendall(b"transfer-encoding: chunked\r\n\r\n" + chunk * number + b"0\r\n\r\n")
        found = b""
        while b"\r\n\r\n" not in found:
            found += client.recv(65536)
        assert found.startswith(b"HTTP/1.1 %d " % status)
        assert app.bodies == ([length * number] if status == 200 else [])
        wait_until(lambda: num_connections() == 0)
        wait_until(lambda: app.left == 1)


def test_each_request_of_a_connection_has_its_own_chunks() -> None:
    app = App(5)
    with serving(app) as (client, _):
        for _ in range(3):
            client.sendall(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
            client.sendall(b"1\r\na\r\n" * FREE_CHUNKS + b"0\r\n\r\n")
            found = b""
            while not found.endswith(b"aaaaa"):
                part = client.recv(65536)
                assert part
                found += part
    assert app.bodies == [FREE_CHUNKS] * 3


def test_what_is_refused_before_it_is_a_request_has_an_id_that_the_log_has(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, connections.__name__)
    with serving(App(5)) as (client, _):
        client.sendall(b"nonsense\r\n\r\n")
        head = read_all(client).decode().partition("\r\n\r\n")[0]
    headers = dict(line.lower().split(": ") for line in head.split("\r\n")[1:])
    assert f"[{headers['x-request-id']}] refused a connection: 400 invalid_http" in caplog.text


# --- the clock of what is not taken, with time in the test's hands ---


@dataclass
class Timer:
    seconds: float
    call: Callable[..., None]
    args: tuple[Any, ...]
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True


@dataclass
class Loop:
    """An event loop that only notes what should be called later."""

    timers: list[Timer] = field(default_factory=list)

    def call_later(self, seconds: float, call: Callable[..., None], *args: Any) -> Timer:
        self.timers.append(Timer(seconds, call, args))
        return self.timers[-1]

    def ring(self) -> None:
        """The newest timer, unless it was cancelled."""
        timer = self.timers[-1]
        if not timer.cancelled:
            timer.call(*timer.args)


class Pipe(asyncio.Transport):
    """A transport with so many bytes that wait."""

    def __init__(self, waiting: int) -> None:
        super().__init__()
        self.waiting, self.aborted = waiting, False

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def abort(self) -> None:
        self.aborted = True

    def is_closing(self) -> bool:
        return self.aborted


def paused(waiting: int) -> tuple[Any, Loop, Pipe]:
    """A connection whose client has left so many bytes."""
    loop, pipe = Loop(), Pipe(waiting)
    state = SimpleNamespace(connections=set(), tasks=set(), default_headers=[])
    made: Any = make_connection(max_connections=9, header_timeout_s=1.0, write_timeout_s=10.0)
    connection = made(uvicorn_config(App(1)), state, {}, _loop=loop)
    connection.connection_made(pipe)
    connection.pause_writing()
    return connection, loop, pipe


def test_a_client_that_takes_its_bytes_slowly_is_not_cut_off_and_one_that_takes_none_is() -> None:
    share = int(SLOWEST * 10)
    _, loop, pipe = paused(5 * share)
    for _ in range(3):
        pipe.waiting -= share
        loop.ring()
        assert not pipe.aborted
    assert {timer.seconds for timer in loop.timers[1:]} == {10.0}
    pipe.waiting -= share - 1
    loop.ring()
    assert pipe.aborted


def test_who_has_taken_what_waited_is_on_no_clock() -> None:
    connection, loop, pipe = paused(1000)
    connection.resume_writing()
    loop.ring()
    assert not pipe.aborted


# --- files ---


@pytest.mark.parametrize(
    ("soft", "hard", "room", "now"),
    [
        (10_000, 20_000, 1024, None),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1024, None),
        (1024, 20_000, 1024, 1024 + OTHER_FILES),
        (256, resource.RLIM_INFINITY, 1024, 1024 + OTHER_FILES),
        (1024, 1024, 1024 - OTHER_FILES, None),
        (256, 512, 512 - OTHER_FILES, 512),
        (64, 64, 1, None),
    ],
)
def test_connections_find_room_among_the_files_or_are_fewer_and_that_is_said(
    soft: int,
    hard: int,
    room: int,
    now: int | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: made.append(limits))
    assert room_for_connections(1024) == room
    assert made == ([(now, hard)] if now else [])
    assert (f"{room} connections are taken" in caplog.text) == (room < 1024)
