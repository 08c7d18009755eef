"""tools/serve_faults.py, serve_soak.py and what they stand on: the slope, the injected faults, who leaves where."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minigpt4_jax.generation.state import Chosen
from tools import faulty_server, serve_soak
from tools.rude_clients import Leave, Visit, visit


def test_the_slope_is_of_what_comes_behind_the_warm_up() -> None:
    # 60 MB in the first third, then 0.5 MB a minute.
    samples = [
        {"at_s": 10.0 * n, "rss_mb": 500 + min(n, 30) * 2 + max(n - 30, 0) / 12} for n in range(91)
    ]
    assert serve_soak.slope_mb_per_minute(samples) == pytest.approx(0.5, abs=0.01)


def test_a_server_that_ends_under_load_is_told_and_nobody_asks_it_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve_soak, "QUESTIONS", 2)
    with socket.socket() as nobody:  # bound and not listening: who connects is refused
        nobody.bind(("127.0.0.1", 0))
        process = SimpleNamespace(pid=0, wait=lambda timeout: 70)
        server = SimpleNamespace(
            url=f"http://127.0.0.1:{nobody.getsockname()[1]}", process=process, alive=True
        )
        found = serve_soak.soak(server, minutes=60.0, seed=0)
    assert found == {"wrong": "the server ended with code 70", "samples": []}


def test_a_failing_method_fails_in_its_share_of_the_calls() -> None:
    call = faulty_server.failing(lambda: 7, 0.25)
    answers = []
    for _ in range(400):
        with contextlib.suppress(RuntimeError):
            answers.append(call())
    assert set(answers) == {7}
    assert 270 < len(answers) < 330
    with pytest.raises(SystemExit, match="'disk'; expected dispatch, read or nan"):
        faulty_server.break_engine("disk", 0.5)


def test_a_row_without_numbers_is_the_only_one() -> None:
    taken: list[Any] = []
    chosen = Chosen(token=np.zeros(3, np.int32), finite=np.ones(3, bool), logprobs=None)
    take = faulty_server.without_numbers(lambda loop, g, c, row: taken.append(c.finite), 1.0)
    take(SimpleNamespace(), None, chosen, 1)
    assert taken[0].tolist() == [True, False, True]
    assert chosen.finite.all(), "what others read stays as it was"


STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    b'data: {"choices": [{"delta": {"content": "A"}}]}\n\n'
    b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n'
    b"data: [DONE]\n\n"
)


def visit_scripted(answer: bytes, leave: Leave) -> tuple[Visit, bytes]:
    """A visit to a server that says this to every whole request, and the bytes that it got."""
    got = bytearray()

    async def both() -> Visit:
        gone = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):  # it left by a reset
                while not got.endswith(b"{body}"):
                    data = await reader.read(1000)
                    if not data:
                        break
                    got.extend(data)
                else:
                    writer.write(answer)
            writer.close()
            gone.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            found = await visit(url, b"{body}", leave=leave, stream=True, rng=random.Random(1))
            await asyncio.wait_for(gone.wait(), 30)
            return found

    return asyncio.run(both()), bytes(got)


@pytest.mark.parametrize(
    ("leave", "expected"),
    [
        ("never", lambda v: v.whole and v.status == 200 and v.text == "A"),
        ("after the last token", lambda v: not v.whole and v.text == "A" and not v.error),
        ("waiting", lambda v: v.status == 0 and not v.text),
        ("in the body", lambda v: v.status == 0 and not v.text),
    ],
)
def test_a_visitor_leaves_where_it_was_told_to(
    leave: Leave, expected: Callable[[Visit], bool]
) -> None:
    found, got = visit_scripted(STREAM, leave)
    assert expected(found), found
    assert got.endswith(b"{body}") == (leave != "in the body")


def test_a_stream_without_its_end_and_an_error_in_it_are_told() -> None:
    cut, _ = visit_scripted(STREAM.removesuffix(b"data: [DONE]\n\n"), "never")
    assert (cut.whole, cut.error) == (False, "the stream has no [DONE]")
    failed, _ = visit_scripted(
        STREAM.split(b"\n\n")[0] + b'\n\ndata: {"error": {"code": "internal_error"}}\n\n', "never"
    )
    assert failed.error == "in the stream: internal_error"
