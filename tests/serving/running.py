"""A real server in a thread of the tests: uvicorn on a free port of the loopback, around a real engine.

Not for: a process of its own (`test_process.py`).
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from minigpt4_jax import MiniGPT4
from minigpt4_jax.serve_config import ServeConfig
from minigpt4_jax.serving.server import Server, bind

LIMIT_S = 120.0
"""How long a test waits for what should come at once: the machine may be busy."""
CHAT = "/v1/chat/completions"
LONG = {"max_tokens": 90, "stream": True}
"""Fields of a stream that goes on: the tiny model never ends by itself."""


@dataclass
class Running:
    """A server that is ready."""

    server: Server
    said: list[str]
    codes: list[int] = field(default_factory=list)
    stopping: bool = False

    @property
    def port(self) -> int:
        return int(self.server.address.rpartition(":")[2])

    @property
    def base_url(self) -> str:
        return f"{self.server.address}/v1"

    def stop(self) -> None:
        """As a signal."""
        self.stopping = True
        self.server.stop()

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], Any]:
        """One request on a connection of its own; a body that is not bytes goes as JSON. JSON comes back parsed."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        try:
            sent = {"content-type": "application/json"} if body is not None else {}
            data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, data, {**sent, **(headers or {})})
            response = connection.getresponse()
            found = response.read()
            named = {name.lower(): value for name, value in response.getheaders()}
            is_json = named.get("content-type", "").startswith("application/json")
            return response.status, named, json.loads(found) if is_json else found
        finally:
            connection.close()

    def chat(self, **fields: Any) -> tuple[int, dict[str, str], Any]:
        """Asks for a chat completion."""
        return self.ask("POST", CHAT, chat_body(self.server, **fields))

    def chat_with_key(self, key: str, **fields: Any) -> tuple[int, dict[str, str], Any]:
        """As `chat`, with a key."""
        return self.ask("POST", CHAT, chat_body(self.server, **fields), {"x-api-key": key})

    def connect(self) -> socket.socket:
        """A connection for bytes of any kind."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S)

    def wait(self, holds: Callable[[], bool]) -> None:
        """Until it holds."""
        wait_until(holds)

    @property
    def idle(self) -> bool:
        load = self.server.scheduler.load()
        return load.waiting == load.running == load.busy_slots == 0


def wait_until(holds: Callable[[], bool]) -> None:
    """Looks again and again until something holds; fails after `LIMIT_S`."""
    pause = threading.Event()
    for _ in range(int(LIMIT_S / 0.01)):
        if holds():
            return
        pause.wait(0.01)
    raise AssertionError(f"did not come to hold within {LIMIT_S} s")


def chat_body(server: Server, **fields: Any) -> dict[str, Any]:
    """A request that can be answered, with other fields."""
    question = {"role": "user", "content": "What is this?"}
    return {"model": server.config.name, "messages": [question], "max_tokens": 4, **fields}


@contextmanager
def run_server(
    model: MiniGPT4, config: ServeConfig, *, keys: tuple[str, ...] = ()
) -> Iterator[Running]:
    """Serves `model` until the block ends. Only the core is compiled: the tests need the time more."""
    config = dataclasses.replace(config, compile_beside="none")
    said: list[str] = []
    ready = threading.Event()

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("Ready"):
            ready.set()

    with bind(config.host, config.port) as listener:
        server = Server(config, model=model, listener=listener, keys=keys, say=say)
        running = Running(server, said)
        thread = threading.Thread(target=lambda: running.codes.append(server.run()))
        thread.start()
        try:
            assert ready.wait(LIMIT_S), said
            yield running
        finally:
            if not running.stopping:
                server.stop()
            thread.join(LIMIT_S)
            assert not thread.is_alive()


# --- what is under way ---


class Held:
    """The engine makes no step but those that are let through."""

    def __init__(self, model: MiniGPT4) -> None:
        self._engine, self._step = model.engine, model.engine.step
        self._steps = threading.Semaphore(0)
        self._open = False
        self._engine.step = self._held  # type: ignore[method-assign]

    def _held(self) -> Any:
        if not self._open:
            self._steps.acquire(timeout=LIMIT_S)
        return self._step()

    def let(self, count: int) -> None:
        """So many steps more."""
        self._steps.release(count)

    def go_on(self) -> None:
        """All steps."""
        self._open = True
        self._steps.release(1)
        self._engine.step = self._step  # type: ignore[method-assign]


def open_stream(running: Running, **fields: Any) -> socket.socket:
    """Begins a request and does not read the answer."""
    connection = running.connect()
    body = json.dumps(chat_body(running.server, **fields)).encode()
    connection.sendall(
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n".encode()
        + body
    )
    return connection


@contextmanager
def held_stream(running: Running, model: MiniGPT4) -> Iterator[tuple[socket.socket, Held]]:
    """A stream that has begun and cannot end before its engine is let go on."""
    held = Held(model)
    with open_stream(running, **LONG) as connection:
        held.let(4)
        read_until(connection, b"data: ")
        yield connection, held


def read_all(connection: socket.socket) -> bytes:
    found = b""
    while part := connection.recv(65536):
        found += part
    return found


def read_until(connection: socket.socket, text: bytes) -> bytes:
    found = b""
    while text not in found:
        part = connection.recv(65536)
        assert part, found
        found += part
    return found
