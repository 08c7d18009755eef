"""connections.py, and the time that `bodies.py` gives: requests that never end, from a socket to a real uvicorn.

The server here has so little patience that a busy machine may be late for it. So nothing here is to be answered in
time, and no engine is needed; all other hostile requests are in `test_hostile_requests.py`, with the usual patience.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from minigpt4_jax.serve_config import LimitsConfig, ServeConfig
from tests.serving.fakes import FakeModel
from tests.serving.running import Running, run_server
from tests.serving.test_hostile_requests import HEAD, KEY, assert_refused, read_response, send


@pytest.fixture(scope="module")
def impatient() -> Iterator[Running]:
    """It gives headers and bodies 0.2 s, and compiles nothing."""
    limits = LimitsConfig(body_timeout_s=0.2)
    config = ServeConfig(model="tiny", port=0, context=400, num_slots=1, limits=limits)
    with run_server(FakeModel(num_slots=1), config, keys=(KEY,)) as running:
        yield running
    assert running.codes == [0]


@pytest.mark.parametrize(
    "data",
    [b"", b"GET", b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: ", b"POST "],
)
def test_headers_that_never_end_are_a_408(impatient: Running, data: bytes) -> None:
    found = send(impatient, data)
    assert_refused(found, 408)
    assert found[1]["connection"] == "close"


def test_headers_that_drip_are_a_408_all_the_same(impatient: Running) -> None:
    with impatient.connect() as connection:
        connection.settimeout(0.02)
        found, head = b"", iter(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 4000)
        while not found:
            with contextlib.suppress(ConnectionError):  # refused and closed; the answer waits
                connection.sendall(bytes([next(head)]))
            with contextlib.suppress(TimeoutError):
                found = connection.recv(65536)
        assert found.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "rest",
    ["transfer-encoding: chunked\r\n\r\n1\r\n{\r\n", "content-length: 10\r\n\r\n{"],
)
def test_a_body_without_an_end_is_a_408(impatient: Running, rest: str) -> None:
    with impatient.connect() as connection:
        connection.sendall((HEAD + rest).encode())
        assert_refused(read_response(connection), 408)
