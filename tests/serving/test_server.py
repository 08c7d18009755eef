"""server.py, app.py, chat_route.py: a real uvicorn around the tiny model, from the socket to the engine and back."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import pytest

from minigpt4_jax import MiniGPT4
from minigpt4_jax.config import UserError
from minigpt4_jax.serve_config import (
    AccessConfig,
    LimitsConfig,
    ServeConfig,
)
from minigpt4_jax.serving import chat_route
from minigpt4_jax.serving.server import bind
from tests.serving.fakes import FakeModel
from tests.serving.running import (
    CHAT,
    LONG,
    Held,
    Running,
    chat_body,
    open_stream,
    read_all,
    read_until,
    run_server,
    wait_until,
)


def config(**fields: Any) -> ServeConfig:
    return ServeConfig(
        model="tiny", port=0, context=128, num_slots=fields.pop("num_slots", 1), **fields
    )


@pytest.fixture(scope="module")
def model(make_model: Callable[..., MiniGPT4]) -> MiniGPT4:
    """With one slot; a server has it for itself until it ends."""
    return make_model(num_slots=1)


def left(running: Running) -> bool:
    """Whether the server knows that its only client is gone: the engine's next step frees the slot."""
    return running.idle or bool(running.server.scheduler._jobs.over)


def events(body: bytes) -> list[Any]:
    """The `data:` events of a stream; `[DONE]` as it is."""
    data = [line[6:] for line in body.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(one) if one != "[DONE]" else one for one in data]


# --- routes ---


def test_probes_answer_without_a_body_worth_stealing(tiny_server: Running) -> None:
    assert tiny_server.ask("GET", "/health")[::2] == (200, {"status": "alive"})
    assert tiny_server.ask("GET", "/ready")[::2] == (200, {"status": "ready"})


def test_models_are_told_as_open_webui_and_vllm_bench_read_them(tiny_server: Running) -> None:
    status, _, body = tiny_server.ask("GET", "/v1/models")
    assert (status, body["object"]) == (200, "list")
    (card,) = body["data"]
    assert (card["id"], card["root"], card["max_model_len"]) == ("tiny", "tiny", 128)
    assert tiny_server.ask("GET", "/v1/models/tiny")[2] == card
    status, _, body = tiny_server.ask("GET", "/v1/models/gpt-4")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert tiny_server.ask("GET", "/v1/models/org/tiny")[2]["error"]["code"] == "model_not_found"


def test_text_becomes_ids_and_text_again(tiny_server: Running) -> None:
    status, _, body = tiny_server.ask("POST", "/tokenize", {"model": "tiny", "prompt": "ab ä"})
    assert (status, body["count"], body["max_model_len"]) == (200, 5, 128)
    found = tiny_server.ask("POST", "/detokenize", {"tokens": body["tokens"]})
    assert found[::2] == (200, {"prompt": "ab ä"})


def test_metrics_count_what_was_answered_and_what_was_refused(tiny_server: Running) -> None:
    def value(name: str) -> float:
        text = tiny_server.ask("GET", "/metrics")[2].decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    lengths, refused = (
        'minigpt4:request_success_total{engine="0",finished_reason="length"',
        ('minigpt4:rejected_requests_total{engine="0",model_name="tiny",reason="invalid_api_key"'),
    )
    before = (
        value(lengths),
        value('minigpt4:http_responses_total{engine="0",model_name="tiny",route="other"'),
    )
    assert tiny_server.chat()[0] == 200
    assert tiny_server.ask("GET", "/never/there")[0] == 404
    tiny_server.wait(lambda: value(lengths) > before[0])  # told behind the answer's last byte
    assert (
        value('minigpt4:http_responses_total{engine="0",model_name="tiny",route="other"')
        == before[1] + 1
    )
    assert value(refused) == 0


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", CHAT, 405, "POST"), ("DELETE", "/health", 405, "GET"), ("PUT", "/v1/models", 405, "GET"),
        ("POST", "/metrics", 405, "GET"), ("GET", "/v1", 404, None), ("GET", "/docs", 404, None),
        ("GET", "/v1/chat/completions/", 404, None), ("POST", "/v1/completions", 404, None),
    ],
)  # fmt: skip
def test_what_no_route_knows_is_refused_in_shape(
    tiny_server: Running, method: str, path: str, status: int, allow: str | None
) -> None:
    found, headers, body = tiny_server.ask(method, path)
    assert (found, headers.get("allow")) == (status, allow)
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "x-request-id" in headers


def test_every_route_but_probes_and_page_wants_a_key(model: MiniGPT4) -> None:
    key = "a-key-0123456789ab"
    with run_server(model, config(), keys=(key,)) as running:
        paths = json.loads(json.dumps(running.server.app.openapi()))["paths"]
        for path, methods in {**paths, "/openapi.json": {"get": {}}, "/none": {"get": {}}}.items():
            (method,) = methods
            expected = 200 if path in ("/health", "/ready") else 401
            path = path.replace("{model_id}", "tiny")
            assert running.ask(method.upper(), path)[0] == expected, path
        assert (
            running.ask("GET", "/v1/models", headers={"authorization": f"Bearer {key}"})[0] == 200
        )
        assert running.ask("GET", "/openapi.json", headers={"x-api-key": key})[0] == 200


def test_cors_is_closed_until_an_origin_is_listed(tiny_server: Running, model: MiniGPT4) -> None:
    origin = "https://chat.example.org"
    asked = {"origin": origin, "access-control-request-method": "POST"}
    status, headers, _ = tiny_server.ask("OPTIONS", CHAT, headers=asked)
    assert status == 405
    assert not [name for name in headers if name.startswith("access-control")]
    access = AccessConfig(cors_origins=(origin,))
    with run_server(model, config(access=access), keys=("k" * 20,)) as running:
        status, headers, _ = running.ask("OPTIONS", CHAT, headers=asked)
        assert (status, headers["access-control-allow-origin"]) == (200, origin)
        other = {**asked, "origin": "https://evil.example"}
        status, headers, body = running.ask("OPTIONS", CHAT, headers=other)
        assert (status, "access-control-allow-origin" in headers) == (400, False)
        assert body["error"]["code"] == "cors_not_allowed"
        assert "Origin" in headers["vary"]
        # A refusal too can be read by the listed page, and by no other.
        status, headers, _ = running.ask("POST", CHAT, b"{}", {"origin": origin})
        assert (status, headers["access-control-allow-origin"]) == (401, origin)
        headers = running.ask("POST", CHAT, b"{}", {"origin": "https://evil.example"})[1]
        assert "access-control-allow-origin" not in headers


# --- answers ---


def test_a_stream_says_what_the_whole_answer_says(tiny_server: Running) -> None:
    fields: dict[str, Any] = {"max_tokens": 12, "temperature": 1, "seed": 3, "n": 2}
    status, _, whole = tiny_server.chat(**fields)
    assert status == 200
    status, headers, body = tiny_server.chat(
        **fields, stream=True, stream_options={"include_usage": True}
    )
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    *chunks, done = events(body)
    assert done == "[DONE]"
    text = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk["choices"]:
            text[choice["index"]] += choice["delta"].get("content", "")
    assert text == {c["index"]: c["message"]["content"] for c in whole["choices"]}
    usage = chunks[-1]["usage"]
    assert usage["completion_tokens"] == whole["usage"]["completion_tokens"] == 24


def test_the_description_says_what_each_event_of_a_stream_is(tiny_server: Running) -> None:
    _, _, described = tiny_server.ask("GET", "/openapi.json")
    content = described["paths"][CHAT]["post"]["responses"]["200"]["content"]
    last, chunk = content["text/event-stream"]["itemSchema"]["properties"]["data"]["anyOf"]
    _, _, body = tiny_server.chat(stream=True, stream_options={"include_usage": True})
    *chunks, done = events(body)
    assert done == last["const"]
    for each in chunks:
        jsonschema_rs.validate(chunk["contentSchema"], each)
    with pytest.raises(jsonschema_rs.ValidationError):
        jsonschema_rs.validate(chunk["contentSchema"], {**chunks[0], "object": "chat.completion"})


def test_a_request_id_goes_through_to_the_answer(tiny_server: Running) -> None:
    body = chat_body(tiny_server.server)
    _, headers, answer = tiny_server.ask("POST", CHAT, body, {"x-request-id": "mine-1"})
    assert headers["x-request-id"] == "mine-1"
    assert answer["id"] == "chatcmpl-mine-1"


def test_tokens_that_a_slot_still_held_are_told_as_cached() -> None:
    model = FakeModel()
    begun = model.fake._begun

    def reuse(generation: Any) -> None:
        generation.reused = 9
        begun(generation)

    model.fake._begun = reuse  # type: ignore[method-assign]
    with run_server(model, config()) as running:
        status, _, body = running.chat()
    assert (status, body["usage"]["prompt_tokens_details"]["cached_tokens"]) == (200, 9)


@pytest.mark.parametrize("stream", [False, True])
def test_what_never_becomes_an_answer_is_an_http_error_streamed_or_not(
    tiny_server: Running, stream: bool
) -> None:
    for fields, status, code in [
        ({"model": "gpt-4"}, 404, "model_not_found"),
        ({"max_tokens": 2000}, 400, "context_length_exceeded"),
        ({"tools": [{}]}, 400, "unsupported_parameter"),
    ]:
        found, _, body = tiny_server.chat(stream=stream, **fields)
        assert (found, body["error"]["code"]) == (status, code)


# --- clients that go away ---


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(model: MiniGPT4, stream: bool) -> None:
    with run_server(model, config()) as running:
        held = Held(model)
        connection = open_stream(running, max_tokens=90, stream=stream)
        held.let(4)
        wait_until(lambda: running.server.scheduler.load().busy_slots == 1)
        connection.close()
        wait_until(lambda: left(running))
        # Far fewer steps than the answer would have taken.
        held.let(20)
        wait_until(lambda: running.idle)
        held.go_on()
        assert running.chat()[0] == 200
    assert running.codes == [0]


def test_a_half_closed_socket_counts_as_gone(model: MiniGPT4) -> None:
    with run_server(model, config()) as running:
        connection = open_stream(running, **LONG)
        read_until(connection, b"data: ")
        connection.shutdown(socket.SHUT_WR)
        read_all(connection)
        connection.close()
        wait_until(lambda: running.idle)


def test_a_client_that_reads_nothing_is_given_up_and_its_slot_freed(
    model: MiniGPT4, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "minigpt4_jax.serving")
    # Each event is made larger than what the system buffers for a connection.
    monkeypatch.setattr(
        chat_route, "_event", lambda data: b": " + b"x" * 2**23 + b"\n\ndata: " + data + b"\n\n"
    )
    limits = LimitsConfig(write_timeout_s=0.2)
    with run_server(model, config(limits=limits)) as running:
        held = Held(model)
        with open_stream(running, **LONG) as connection:
            held.let(4)
            wait_until(lambda: "took nothing for 0.2 s" in caplog.text)
            wait_until(lambda: left(running))
            # Far from the end of the answer: only giving it up frees the slot.
            held.let(2)
            wait_until(lambda: running.idle)
            while part := connection.recv(2**20):
                assert b"[DONE]" not in part
        monkeypatch.undo()
        held.go_on()
        assert running.chat()[0] == 200


# --- waiting ---


def test_who_waits_is_told_so_and_one_too_many_is_sent_away(
    model: MiniGPT4, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_route, "QUEUED_AFTER_S", 0.01)
    limits = LimitsConfig(max_waiting=1)
    with run_server(model, config(limits=limits)) as running:
        held = Held(model)
        with open_stream(running, **LONG) as first:
            read_until(first, b": queued ")
            wait_until(lambda: running.server.scheduler.load().running == 1)
            with open_stream(running, **LONG) as second:
                read_until(second, b": queued 1\n")
                status, headers, body = running.chat()
                assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
                assert int(headers["retry-after"]) >= 1
                held.go_on()
                for connection in (first, second):
                    read_until(connection, b"data: [DONE]")


def test_a_request_whose_time_is_over_is_a_408_and_in_a_stream_an_event(model: MiniGPT4) -> None:
    def late() -> float:
        return time.monotonic() + LimitsConfig().request_timeout_s

    with run_server(model, config()) as running:
        scheduler = running.server.scheduler
        for stream in (False, True):
            held = Held(model)
            with open_stream(running, max_tokens=90, stream=stream) as connection:
                held.let(4)
                wait_until(lambda: scheduler.load().busy_slots == 1)
                began = read_until(connection, b"data: ") if stream else b""
                scheduler._clock = late
                held.go_on()
                found = began + read_until(connection, b'"request_timeout"')
                scheduler._clock = time.monotonic
            status = b"HTTP/1.1 200 " if stream else b"HTTP/1.1 408 "
            assert found.startswith(status)
            assert b"[DONE]" not in found
            if not stream:  # the openai client asks again otherwise
                assert b"x-should-retry: false\r\n" in found
            wait_until(lambda: running.idle)


# --- the socket ---


def test_a_taken_port_is_said_with_what_to_do() -> None:
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"port is {port}, which another .*port=8001"):
            bind("127.0.0.1", port)


def test_localhost_is_its_ipv4_address_whatever_stands_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", 0, 0, 0)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: [*found])
    with bind("localhost", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("host", "said"), [("no.such.host.invalid", "which is no address"), ("192.0.2.1", "cannot be listened on")]
)  # fmt: skip
def test_a_host_of_another_machine_is_said(host: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        bind(host, 0)
