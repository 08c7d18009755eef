"""guards.py: each guard refuses what it should, in OpenAI's shape, and lets everything else through."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from minigpt4_jax.serving import guards
from minigpt4_jax.serving.errors import overloaded, timed_out
from minigpt4_jax.serving.guards import (
    HostGuard,
    InFlight,
    KeyGuard,
    PathGuard,
    allowed_names,
    host_name,
)
from tests.serving.asgi import CHAT, ask, echo, framed, run

KEYS = ("first-key-0123456789", "second-key-0123456789")


def keyed(app: ASGIApp, keys: Sequence[str] = ()) -> ASGIApp:
    return framed(KeyGuard(app, keys=keys, open_paths=("/health", "/")))


# --- ids, headers, errors ---


def test_every_response_has_an_id_and_a_sane_one_of_the_client_is_kept() -> None:
    assert run(framed(echo), headers={"x-request-id": "abc-1.2_Z"}).headers["x-request-id"] == (
        "abc-1.2_Z"
    )
    ids = {run(framed(echo)).headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3


@pytest.mark.parametrize("given", ["a b", "x" * 65, "a\tb", "ä", "a;b", "<b>"])
def test_an_id_that_could_write_into_the_log_is_replaced(given: str) -> None:
    found = run(framed(echo), headers={"x-request-id": given}).headers["x-request-id"]
    assert found != given
    assert guards.SANE_ID.fullmatch(found)


def test_every_response_has_the_headers_unless_its_route_says_otherwise() -> None:
    async def cached(scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    found = run(framed(echo)).headers
    assert {name: found[name] for name in guards.HEADERS} == guards.HEADERS
    assert run(framed(cached)).headers["cache-control"] == "no-cache"


def test_a_mistake_of_ours_is_a_500_without_its_text_and_a_traceback_with_the_id_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("secret at 0x7f00")

    reply = run(framed(broken), method="GET", headers={"x-request-id": "the-id"})
    assert reply.status == 500
    assert reply.error["code"] == "internal_error"
    assert b"secret" not in reply.body
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "[the-id]" in record.getMessage()


def test_a_mistake_behind_the_first_byte_cuts_the_connection_and_sends_no_second_response() -> None:
    cut: list[bool] = []

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["abort"] = lambda: cut.append(True)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError

    reply = run(framed(broken), method="GET")
    assert (reply.status, reply.body, cut) == (200, b"", [True])


def test_a_refusal_has_its_status_and_headers_and_is_counted() -> None:
    async def busy(scope: Scope, receive: Receive, send: Send) -> None:
        raise overloaded("Full.", retry_after_s=7)

    codes: list[str] = []
    reply = run(framed(busy, codes.append), method="GET")
    assert (reply.status, reply.headers["retry-after"]) == (429, "7")
    assert reply.error == {
        "message": "Full.",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert codes == ["rate_limit_exceeded"]


def test_what_took_all_of_its_time_is_not_to_be_asked_again() -> None:
    async def late(scope: Scope, receive: Receive, send: Send) -> None:
        raise timed_out("Too late.")

    reply = run(framed(late), method="GET")
    assert (reply.status, reply.headers["x-should-retry"]) == (408, "false")


def test_an_error_is_forgotten_before_its_refusal_is_sent() -> None:
    class Body:
        """What the traceback of an error holds."""

    alive: list[bool] = []

    async def failing(scope: Scope, receive: Receive, send: Send) -> None:
        body = Body()
        seen.append(weakref.ref(body))
        try:
            raise KeyError(id(body))
        except KeyError:
            raise overloaded("Full.", retry_after_s=1) from None

    seen: list[weakref.ref[Body]] = []

    async def scenario() -> None:
        scope: Scope = {
            "type": "http", "method": "GET", "path": "/", "raw_path": b"/", "headers": [], "client": None,
        }  # fmt: skip

        async def send(message: Message) -> None:
            alive.append(seen[0]() is not None)

        async def receive() -> Message:
            raise AssertionError

        await framed(failing)(scope, receive, send)

    asyncio.run(scenario())
    assert alive == [False, False]


@pytest.mark.parametrize("path", [f"{CHAT}\n", f"{CHAT}\r\n", "/health\x00", "\x7f", "/a\x85"])
def test_a_path_with_control_characters_is_no_route(path: str) -> None:
    reply = run(framed(PathGuard(echo)), path=path, headers={"transfer-encoding": ""})
    assert (reply.status, reply.error["code"]) == (404, "not_found")
    assert run(framed(PathGuard(echo)), path=CHAT).status == 200


def test_the_log_has_the_path_and_neither_query_nor_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run(keyed(echo, KEYS), method="GET", headers={"authorization": f"Bearer {KEYS[0]}"})
    (line,) = [r.getMessage() for r in caplog.records if r.name.endswith("access")]
    assert f"GET {CHAT} 200" in line
    assert KEYS[0] not in caplog.text


def test_a_refused_body_is_read_and_dropped_so_that_the_refusal_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guards, "LINGER_S", 0.05)
    app = keyed(echo, KEYS)
    for hang in (False, True):
        reply = run(app, parts=[b"x"] * 50, hang=hang)
        assert (reply.status, reply.headers["connection"]) == (401, "close")
        assert reply.error["code"] == "invalid_api_key"


# --- hosts ---


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("localhost", "localhost"), ("LOCALHOST:80", "localhost"), ("127.0.0.1:8000", "127.0.0.1"),
        ("[::1]:8000", "::1"), ("[::1]", "::1"), ("", ""), ("a b", ""), ("localhost@evil.example", ""),
        ("evil.example/localhost", ""), ("evil.example\\localhost", ""), ("::1", ""), ("localhost:80:80", ""),
        ("localhost:x", ""), ("localhost.evil.example", "localhost.evil.example"),
    ],
)  # fmt: skip
def test_a_host_header_is_read_as_a_name_or_not_at_all(host: str, name: str) -> None:
    assert host_name(host) == name


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200), ("127.0.0.1:1", 200), ("[::1]:8000", 200), ("LocalHost:8000", 200),
        ("evil.example", 421), ("localhost.evil.example", 421), ("127.0.0.1.evil.example:8000", 421), ("", 421),
    ],
)  # fmt: skip
def test_a_name_that_was_rebound_to_this_machine_is_refused(host: str, status: int) -> None:
    names = allowed_names("127.0.0.1", loopback=True, allowed_hosts=())
    app = framed(HostGuard(echo, names=names, open_paths=("/health",)))
    assert run(app, method="GET", headers={"host": host}).status == status
    assert run(app, method="GET", path="/health", headers={"host": host}).status == 200


def test_listed_names_replace_the_usual_ones_and_elsewhere_every_name_is_answered_to() -> None:
    assert allowed_names("0.0.0.0", loopback=False, allowed_hosts=()) == ()
    names = allowed_names("127.0.0.1", loopback=True, allowed_hosts=("chat.example.org",))
    app = framed(HostGuard(echo, names=names, open_paths=()))
    assert run(app, method="GET", headers={"host": "chat.example.org"}).status == 200
    assert run(app, method="GET", headers={"host": "localhost"}).status == 421
    everybody = framed(HostGuard(echo, names=(), open_paths=()))
    assert run(everybody, method="GET", headers={"host": "any.example"}).status == 200


# --- keys ---


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("header", ["authorization: Bearer", "authorization: bearer", "x-api-key:"])
def test_any_of_the_keys_opens_in_either_header(key: str, header: str) -> None:
    name, _, scheme = header.partition(":")
    value = f"{scheme.strip()} {key}".strip()
    assert run(keyed(echo, KEYS), headers={name: value}).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {}, {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": "Bearer "},
        {"authorization": f"Basic {KEYS[0]}"}, {"authorization": KEYS[0]}, {"x-api-key": KEYS[0][:-1]},
        {"x-api-key": KEYS[0] + "x"}, {"x-api-key": KEYS[0].upper()}, {"authorization": "Bearer ä"},
        {"authorization": "Bearer no", "x-api-key": KEYS[0]},
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_what_to_send(headers: dict[str, str]) -> None:
    reply = run(keyed(echo, KEYS), headers=headers)
    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert reply.error["code"] == "invalid_api_key"
    assert "Authorization: Bearer KEY" in reply.error["message"]
    assert not any(key in reply.body.decode() for key in KEYS)


def test_every_key_is_compared_so_that_the_clock_tells_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        seen.append((one, other))
        return one == other

    monkeypatch.setattr(guards.hmac, "compare_digest", compare)
    run(keyed(echo, KEYS), headers={"x-api-key": KEYS[0]})
    assert len(seen) == len(KEYS)
    assert {len(digest) for pair in seen for digest in pair} == {32}


@pytest.mark.parametrize(
    "path", ["/", "/health", "//", "/health/", "//health", "/Health", "/health/../metrics", "/x"]
)
def test_only_the_exact_open_paths_are_open(path: str) -> None:
    expected = 200 if path in ("/", "/health") else 401
    assert run(keyed(echo, KEYS), method="GET", path=path).status == expected


# --- how many at once ---


async def together(app: ASGIApp, asked: Sequence[dict[str, Any]], release: asyncio.Event) -> Any:
    """Begins all, lets every one go as far as it can, then releases those that are inside."""
    tasks = [asyncio.create_task(ask(app, **one)) for one in asked]
    for _ in range(20):
        await asyncio.sleep(0)
    inside = sum(not task.done() for task in tasks)
    release.set()
    return inside, [reply.status for reply in await asyncio.gather(*tasks)]


@pytest.mark.parametrize(
    ("clients", "inside", "statuses"),
    [
        (["1.1.1.1"] * 3, 2, [200, 200, 429]),
        (["1.1.1.1", "2.2.2.2", "1.1.1.1", "3.3.3.3"], 3, [200, 200, 200, 429]),
        (["2001:db8::1", "2001:db8::2", "2001:db8::3"], 2, [200, 200, 429]),
        (["::ffff:1.1.1.1", "1.1.1.1", "1.1.1.1"], 2, [200, 200, 429]),
    ],
)
def test_one_caller_and_all_together_have_a_bound_and_a_place_is_free_again_behind_it(
    clients: list[str], inside: int, statuses: list[int]
) -> None:
    async def scenario() -> None:
        release = asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            await release.wait()
            await echo(scope, receive, send)

        app = keyed(InFlight(slow, max_per_caller=2, max_total=3))
        assert await together(app, [{"client": client} for client in clients], release) == (
            inside,
            statuses,
        )
        assert (await ask(app, client=clients[0])).status == 200

    asyncio.run(scenario())


def test_a_key_counts_the_same_from_everywhere_and_reading_alone_is_not_counted() -> None:
    async def scenario() -> None:
        release = asyncio.Event()

        async def slow(scope: Scope, receive: Receive, send: Send) -> None:
            await release.wait()
            await echo(scope, receive, send)

        app = keyed(InFlight(slow, max_per_caller=1, max_total=9), KEYS)
        asked = [
            {"client": "1.1.1.1", "headers": {"x-api-key": KEYS[0]}},
            {"client": "2.2.2.2", "headers": {"x-api-key": KEYS[0]}},
            {"client": "1.1.1.1", "headers": {"x-api-key": KEYS[1]}},
            {"client": "1.1.1.1", "headers": {"x-api-key": KEYS[0]}, "method": "GET"},
        ]
        assert await together(app, asked, release) == (3, [200, 429, 200, 200])

    asyncio.run(scenario())
