"""Chat clients on bare sockets that leave when they like: what `serve_faults.py` and `serve_soak.py` send at a server.

For: leaving at a chosen point of a request (no HTTP library lets one do that), and saying what came before it. Not for:
speed (`benchmarks/serve_client.py`), nor what the requests ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
from collections.abc import AsyncIterator, Sequence
from typing import Literal
from urllib.parse import urlsplit

Leave = Literal["never", "in the body", "waiting", "in the answer", "after the last token"]
LEAVES: tuple[Leave, ...] = ("in the body", "waiting", "in the answer", "after the last token")
LIMIT_S = 300.0
"""Longest visit: what takes longer hangs."""
_CHUNK = 2**20


@dataclasses.dataclass
class Visit:
    """One request and what came of it."""

    leave: Leave
    stream: bool
    status: int = 0
    """0 where the client left before there was one."""
    text: str = ""
    whole: bool = False
    """Whether the answer was read to its end."""
    error: str = ""
    """An error inside a stream, a connection that the server closed, or a hanging."""


def chat_request(body: bytes, *, host: str, port: int) -> bytes:
    """The bytes of a request; the server closes behind its answer."""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def visit(url: str, body: bytes, *, leave: Leave, stream: bool, rng: random.Random) -> Visit:
    """Asks, reads until the point where it leaves, and closes: by a reset or politely, as `rng` has it."""
    found = Visit(leave=leave, stream=stream)
    address = urlsplit(url)
    host, port = str(address.hostname), int(address.port or 80)
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(LIMIT_S):
            reader, writer = await asyncio.open_connection(host, port, limit=_CHUNK)
            request = chat_request(body, host=host, port=port)
            if leave == "in the body":
                request = request[: rng.randrange(1, len(request))]
            writer.write(request)
            await writer.drain()
            if leave == "waiting":
                await asyncio.sleep(rng.choice((0.0, 0.01, 0.1, 0.5)))
            elif leave != "in the body":
                await _read(reader, found, rng)
    except TimeoutError:
        found.error = "hangs"
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        found.error = type(error).__name__
    finally:
        if writer is not None:
            await _leave(writer, rng)
    return found


async def _leave(writer: asyncio.StreamWriter, rng: random.Random) -> None:
    if rng.random() < 0.5:
        writer.transport.abort()
        return
    writer.close()
    with contextlib.suppress(ConnectionError):  # the server was faster; nothing is left to close
        await writer.wait_closed()


async def _read(reader: asyncio.StreamReader, found: Visit, rng: random.Random) -> None:
    """Reads the answer, or as much of it as `found.leave` says."""
    if found.leave == "in the answer" and not found.stream:
        # Nothing comes before the end: leave somewhere between.
        await asyncio.sleep(rng.uniform(0.0, 2.0))
        return
    found.status = int((await reader.readuntil(b"\r\n")).split()[1])
    await reader.readuntil(b"\r\n\r\n")
    if found.status != 200 or not found.stream:
        answer = await reader.read()
        if found.status == 200:
            found.text = json.loads(answer)["choices"][0]["message"]["content"]
            found.whole = True
        return
    events = rng.randrange(1, 6) if found.leave == "in the answer" else 0
    async for data in _events(reader):
        if data == "[DONE]":
            found.whole = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            found.error = f"in the stream: {chunk['error']['code']}"
            return
        ended = False
        for choice in chunk["choices"]:
            found.text += choice["delta"].get("content") or ""
            ended = choice.get("finish_reason") is not None
        events -= 1
        if events == 0 or (ended and found.leave == "after the last token"):
            return
    found.error = "the stream has no [DONE]"


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[str]:
    """The data of server-sent events; the sizes of HTTP's chunks stand on lines of their own and begin otherwise."""
    while line := await reader.readline():
        if line.startswith(b"data: "):
            yield line.removeprefix(b"data: ").strip().decode()


async def crowd(
    url: str,
    bodies: Sequence[tuple[bytes, bool]],
    leaves: Sequence[Leave],
    *,
    at_once: int,
    rng: random.Random,
) -> list[Visit]:
    """Visits with these (body, whether it streams), so many at once, each leaving as `leaves` has it."""
    numbers = iter(range(len(bodies)))
    found: dict[int, Visit] = {}

    async def worker() -> None:
        for number in numbers:
            body, stream = bodies[number]
            found[number] = await visit(url, body, leave=leaves[number], stream=stream, rng=rng)

    await asyncio.gather(*(worker() for _ in range(at_once)))
    return [found[number] for number in range(len(bodies))]
