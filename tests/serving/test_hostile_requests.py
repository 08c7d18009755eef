"""Requests that nobody means well with: each gets its 4xx in OpenAI's shape, and nothing else suffers.

Pictures of that kind are in `test_hostile_pictures.py`; generated requests in `test_schemathesis.py`.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from minigpt4_jax import MiniGPT4
from minigpt4_jax.serve_config import LimitsConfig, ServeConfig
from tests.serving.running import CHAT, Running, chat_body, run_server

KEY = "a-key-0123456789ab"
HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {KEY}\r\ncontent-type: application/json\r\n"


@pytest.fixture(scope="module")
def strict(make_model: Callable[..., MiniGPT4]) -> Iterator[Running]:
    """A server with a key and small limits, but for time: `test_connections.py` has one without patience."""
    limits = LimitsConfig(max_body_bytes=100_000, max_header_bytes=4096, max_connections=8)
    config = ServeConfig(model="tiny", port=0, context=128, num_slots=1, limits=limits)
    with run_server(make_model(num_slots=1), config, keys=(KEY,)) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_else_suffers(strict: Running) -> Iterator[None]:
    """Behind each of these requests the server is as it was."""
    yield
    strict.wait(lambda: strict.idle)
    status, _, answer = strict.chat_with_key(KEY)
    assert (status, answer["usage"]["completion_tokens"]) == (200, 4)


def send(running: Running, data: bytes, *, close: bool = False) -> tuple[int, dict[str, str], Any]:
    """Sends bytes as they are and reads one response; the status is 0 where there is none."""
    with running.connect() as connection:
        connection.sendall(data)
        if close:
            connection.shutdown(socket.SHUT_WR)
        return read_response(connection)


def read_response(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    found = b""
    while b"\r\n\r\n" not in found:
        part = connection.recv(65536)
        if not part:
            return 0, {}, found
        found += part
    head, _, body = found.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += connection.recv(65536)
    whole = json.loads(body[: int(headers["content-length"])])
    return int(first.split()[1]), headers, whole


def assert_refused(found: tuple[int, dict[str, str], Any], status: int) -> None:
    assert found[0] == status, found
    assert set(found[2]) == {"error"}
    assert set(found[2]["error"]) == {"message", "type", "param", "code"}
    assert len(found[2]["error"]["message"]) < 1000


def body_of(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], **fields}


# --- bodies ---

BODIES: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"model=tiny",
    "cut off": b'{"model": "tiny", "messages": [',
    "a list": b"[]",
    "a number": b"7",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": json.dumps(body_of()).encode("utf-16"),
    "invalid UTF-8": b'{"model": "tiny", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "half a surrogate pair": b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "deep lists": b'{"messages": ' + b"[" * 40_000 + b"]" * 40_000 + b"}",
    "deep objects": b'{"a":' * 15_000 + b"1" + b"}" * 15_000,
    "many values": b'{"messages": [' + b"0," * 49_000 + b"0]}",
    "NaN": b'{"model": "tiny", "temperature": NaN}',
    "infinity": b'{"model": "tiny", "temperature": 1e999}',
    "a number of ten thousand digits": b'{"model": "tiny", "seed": ' + b"9" * 10_000 + b"}",
    "a doubled key": b'{"model": "tiny", "model": "tiny", "messages": []}',
    "a zero byte": b'{"model": "tiny\x00"}',
    "nothing but spaces": b" " * 90_000,
}
FIELDS: dict[str, dict[str, Any]] = {
    "huge n": {"n": 10**9},
    "negative n": {"n": -1},
    "no answer": {"n": 0},
    "n as text": {"n": "2"},
    "huge max_tokens": {"max_tokens": 2**63},
    "negative max_tokens": {"max_tokens": -5},
    "no token": {"max_tokens": 0},
    "negative temperature": {"temperature": -0.1},
    "hot": {"temperature": 1e300},
    "top_p of 0": {"top_p": 0},
    "negative top_k": {"top_k": -7},
    "negative seed": {"seed": -1},
    "large seed": {"seed": 2**64},
    "huge logprobs": {"logprobs": True, "top_logprobs": 10**6},
    "huge beams": {"num_beams": 10**6, "temperature": 0},
    "a bias of a token that is none": {"logit_bias": {"999999999": 1}},
    "a bias of text": {"logit_bias": {"__proto__": 1}},
    "infinite bias": {"logit_bias": {"1": 1e308}},
    "many stops": {"stop": ["a"] * 1000},
    "a long stop": {"stop": "a" * 10_000},
    "an empty stop": {"stop": ""},
    "a list as model": {"model": ["tiny"]},
    "true as a number": {"temperature": True},
    "no messages": {"messages": []},
    "null messages": {"messages": None},
    "a text as messages": {"messages": "hello"},
    "many messages": {"messages": [{"role": "user", "content": "a"}] * 300},
    "an unknown role": {"messages": [{"role": "root", "content": "a"}]},
    "content of a number": {"messages": [{"role": "user", "content": 5}]},
    "a part of no kind": {"messages": [{"role": "user", "content": [{"type": "exec"}]}]},
    "a file": {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "file://localhost/etc/passwd"}}]}]},
    "the metadata service": {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}]}]},
    "an unknown field": {"chat_template": "{{ 7 * 7 }}"},
    "template arguments": {"chat_template_kwargs": {"tokenize": True}},
    "a pattern": {"guided_regex": "(a+)+$"},
    "tools": {"tools": [{"type": "function", "function": {"parameters": {"pattern": "(a+)+$"}}}]},
    "a prompt that is too long": {"messages": [{"role": "user", "content": "a" * 50_000}]},
}  # fmt: skip


@pytest.mark.parametrize("body", [*BODIES.values()], ids=[*BODIES])
def test_a_body_that_is_no_request_is_a_400(strict: Running, body: bytes) -> None:
    assert_refused(strict.ask("POST", CHAT, body, {"x-api-key": KEY}), 400)


@pytest.mark.parametrize("fields", [*FIELDS.values()], ids=[*FIELDS])
def test_a_field_beyond_its_bounds_is_a_400(strict: Running, fields: dict[str, Any]) -> None:
    assert_refused(strict.ask("POST", CHAT, body_of(**fields), {"x-api-key": KEY}), 400)


# --- bytes on the wire ---


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50 + b"\r\n\r\n", 400),  # TLS
        (b"GET /health\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /health HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
        (b"GET /hea lth HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: a\x00b\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nno colon\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost : localhost\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n", 400),
        (HEAD.encode() + b"content-length: -1\r\n\r\n", 400),
        (HEAD.encode() + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", 400),
        (HEAD.encode() + b"content-length: 0x10\r\n\r\n", 400),
        (HEAD.encode() + b"transfer-encoding: gzip\r\n\r\n", 501),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 9000, 431),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + b"a: b\r\n" * 3000, 431),
        (b"GET " + b"\r\n" * 2, 400),
    ],
)  # fmt: skip
def test_what_is_not_http_is_refused_in_shape(strict: Running, data: bytes, status: int) -> None:
    found = send(strict, data)
    assert_refused(found, status)
    assert found[1]["connection"] == "close"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            421,
        ),  # h11 takes the version, and the Host is missing
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 431),
        (b"GET /health?" + b"a" * 9000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 9000 + b"\r\n\r\n", 431),
    ],
)
def test_what_is_barely_http_is_refused_in_shape(strict: Running, data: bytes, status: int) -> None:
    assert_refused(send(strict, data), status)


@pytest.mark.parametrize(
    "rest",
    [
        "content-length: 100001\r\n\r\n",
        "content-length: 99999999999999999999\r\n\r\n",
        "transfer-encoding: chunked\r\n\r\n" + "ffff\r\n" + "a" * 65535 + "\r\n9999\r\n" + "a" * 39321,
    ],
)  # fmt: skip
def test_a_body_that_is_too_large_is_refused(strict: Running, rest: str) -> None:
    assert_refused(send(strict, (HEAD + rest).encode()), 413)


def test_a_body_that_waits_for_its_100_is_told_to_come(strict: Running) -> None:
    with strict.connect() as connection:
        connection.sendall(f"{HEAD}content-length: 2\r\nexpect: 100-continue\r\n\r\n".encode())
        told = b""
        while not told.endswith(b"\r\n\r\n"):
            told += connection.recv(1)
        assert told.startswith(b"HTTP/1.1 100 ")
        connection.sendall(b"{}")
        assert_refused(read_response(connection), 400)


def test_a_body_that_goes_on_behind_its_refusal_is_cut_off(strict: Running) -> None:
    with strict.connect() as connection:
        connection.sendall((HEAD + "transfer-encoding: chunked\r\n\r\n").encode())
        chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"

        def send_for_ever() -> None:
            while True:
                connection.sendall(chunk)

        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            send_for_ever()


@pytest.mark.parametrize("key", [KEY, "wrong"])
def test_a_body_of_tiny_chunks_is_refused_and_not_read_on(strict: Running, key: str) -> None:
    head = HEAD.replace(KEY, key) + "transfer-encoding: chunked\r\n\r\n"
    found = send(strict, head.encode() + b"1\r\na\r\n" * 2000)
    if found[0]:  # one that was refused before, for its key, is cut off in the middle of that
        assert found[0] in (400, 401)
        assert found[2]["error"]["code"] in ("tiny_chunks", "invalid_api_key")


def test_a_broken_chunk_behind_a_good_one_is_no_500(strict: Running) -> None:
    data = (HEAD + "transfer-encoding: chunked\r\n\r\n1\r\n{\r\nzz\r\n").encode()
    assert_refused(send(strict, data), 400)


def test_garbage_in_a_stream_ends_that_stream_alone(strict: Running) -> None:
    body = json.dumps(chat_body(strict.server, stream=True, max_tokens=100)).encode()
    with strict.connect() as connection:
        connection.sendall(f"{HEAD}content-length: {len(body)}\r\n\r\n".encode() + body)
        connection.sendall(b"\x00\x01garbage\r\n\r\n" * 5)
        while connection.recv(65536):
            pass


def test_requests_in_a_row_on_one_connection_are_answered_in_order(strict: Running) -> None:
    body = json.dumps(chat_body(strict.server)).encode()
    chat = f"{HEAD}content-length: {len(body)}\r\n\r\n".encode() + body
    probe = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    last = b"GET /nope HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    with strict.connect() as connection:
        connection.sendall(chat + probe + chat + last)
        found = b""
        while part := connection.recv(65536):
            found += part
    lines = [line for line in found.split(b"\r\n") if b"HTTP/1.1 " in line]
    assert [line.rpartition(b"HTTP/1.1 ")[2][:3] for line in lines] == [
        b"200",
        b"200",
        b"200",
        b"401",
    ]
    assert (
        found.index(b"chat.completion") < found.index(b"alive") < found.rindex(b"chat.completion")
    )


def test_one_connection_too_many_is_a_503_and_the_others_go_on(strict: Running) -> None:
    connections = [strict.connect() for _ in range(8)]
    try:
        with strict.connect() as one_more:
            found = read_response(one_more)
        assert_refused(found, 503)
        assert "retry-after" in found[1]
        connections[0].sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert read_response(connections[0])[0] == 200
    finally:
        for connection in connections:
            connection.close()
    server = strict.server._uvicorn
    strict.wait(lambda: not server.server_state.connections)  # the next one finds a place


# --- paths and methods ---


@pytest.mark.parametrize(
    "target",
    [
        "//v1/models", "/v1//models", "/v1/../metrics", "/%2e%2e/metrics", "/health/../metrics",
        "/./metrics", "/metrics/", "/metrics;x", "/METRICS", "/v1/models%00", "/%252e%252e/metrics", "http://x/metrics",
        "/health?/../metrics", "/..%5cmetrics", "/health%2f..%2fmetrics", "/page/../../server.py", "/index.html",
        "//health", "/health#x",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST", "TRACE", "CONNECT", "PROPFIND", "get"])
def test_no_spelling_of_a_path_gets_around_the_key(
    strict: Running, method: str, target: str
) -> None:
    data = f"{method} {target} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()
    found = send(strict, data)
    if target == "/health?/../metrics" and method in (
        "GET",
        "POST",
        "TRACE",
        "CONNECT",
        "PROPFIND",
        "get",
    ):
        assert found[0] == (200 if method == "GET" else 405)
    else:
        assert_refused(found, 401)


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("TRACE /health", 405), ("CONNECT localhost:80", 404), ("OPTIONS *", 404), ("BREW /v1/models", 405),
        ("GET http://localhost/v1/models", 404), ("GET /v1/models/../../etc/passwd", 404),
    ],
)  # fmt: skip
def test_odd_methods_and_targets_are_refused_with_a_key_too(
    strict: Running, request_line: str, status: int
) -> None:
    data = f"{request_line} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {KEY}\r\nconnection: close\r\n\r\n"
    assert_refused(send(strict, data.encode()), status)


@pytest.mark.parametrize("path", [CHAT, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("end", ["%0A", "%0a", "%0D%0A", "%00", "%0A%0A", "%7F", "%C2%85"])
def test_no_spelling_of_a_path_gets_a_body_around_its_checks(
    strict: Running, path: str, end: str
) -> None:
    body = json.dumps(chat_body(strict.server)).encode()
    head = f"POST {path}{end} HTTP/1.1\r\nhost: localhost\r\nx-api-key: {KEY}\r\ncontent-type: text/plain\r\n"
    data = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    assert_refused(send(strict, data), 404)


def test_an_upgrade_is_not_made(strict: Running) -> None:
    data = (
        f"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx-api-key: {KEY}\r\nconnection: upgrade\r\n"
        "upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: eA==\r\n\r\n"
    )
    status, headers, _ = send(strict, data.encode())
    assert status == 200
    assert "upgrade" not in headers


def test_many_at_once_each_get_their_own_and_an_answer_under_way_is_what_it_would_be_alone(
    tiny_server: Running,
) -> None:
    fields: dict[str, Any] = {"max_tokens": 60, "seed": 5, "temperature": 1}
    alone = tiny_server.chat(**fields)[2]["choices"][0]["message"]["content"]
    body = json.dumps(chat_body(tiny_server.server, stream=True, **fields)).encode()
    head = HEAD.replace(f"x-api-key: {KEY}\r\n", "")
    with tiny_server.connect() as connection:
        connection.sendall(
            f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body
        )
        for bad in BODIES.values():
            assert tiny_server.ask("POST", CHAT, bad)[0] in (400, 413)
        found = b""
        while part := connection.recv(65536):
            found += part
    told = [line[6:] for line in found.decode().splitlines() if line.startswith("data: {")]
    text = "".join(
        choice["delta"].get("content", "") for one in told for choice in json.loads(one)["choices"]
    )
    assert text == alone
