"""`minigpt4_jax.serving.fetch`: what is fetched, and that nothing else is ever connected to."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import ssl
import threading
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.serve_config import PicturesConfig
from minigpt4_jax.serving.errors import ApiError
from minigpt4_jax.serving.fetch import Fetcher, is_public
from minigpt4_jax.serving.pictures import PictureReader
from tests.hostile_urls import ADDRESSES, LISTED, NUMERIC_SPELLINGS, PUBLIC_ADDRESSES, URLS
from tests.serving.picture_hosts import NAME, Guard, Script, answer, host, make_certificate
from tests.serving.picture_reading import data_url, read, reader
from tests.serving.test_pictures import PNG

PUBLIC = ("93.184.216.34", 443)


def config(**changed: Any) -> PicturesConfig:
    values = {"fetch_hosts": LISTED, "fetch_plain_http": True, "fetch_timeout_s": 20.0, **changed}
    return PicturesConfig(**values)


TRUSTS_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the system's certificates take 50 ms


def fetcher(config: PicturesConfig, **changed: Any) -> Fetcher:
    return Fetcher(config, **{"verify": TRUSTS_NOBODY, **changed})


def fetch(made: Fetcher, url: str) -> bytes:
    try:
        return asyncio.run(made.fetch(url, param="p"))
    finally:
        made.close()


def refused(made: Fetcher, url: str) -> str:
    with pytest.raises(ApiError) as caught:
        fetch(made, url)
    error = caught.value
    assert (error.status, error.param, error.code) == (400, "p", "failed_to_download_image")
    return error.message


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Guard:
    return Guard(monkeypatch)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return make_certificate(tmp_path_factory.mktemp("certificate"), NAME)


def test_a_picture_arrives_by_https_from_the_address_that_was_checked(
    certificate: tuple[ssl.SSLContext, ssl.SSLContext],
    guard: Guard,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    server, client = certificate
    with host(answer(PNG), server) as there:
        asked: list[str] = []
        fetching = fetcher(
            config(),
            resolve=lambda name, port: [there.address],
            is_allowed=lambda address: not asked.append(address),  # type: ignore[func-returns-value]
            verify=client,
        )
        with reader(fetcher=fetching) as made:
            [prepared] = read(made, f"https://{NAME.upper()}/a%20b/c.png?x=1&y=%2F#z")
        with reader() as made:
            assert prepared.key == read(made, data_url(PNG))[0].key
    assert there.names == [NAME]
    [request] = there.requests
    lines = request.decode().split("\r\n")
    assert lines[0] == "GET /a%20b/c.png?x=1&y=%2F HTTP/1.1"
    assert f"Host: {NAME}" in lines
    assert "Accept-Encoding: identity" in lines
    assert not any(
        line.lower().startswith(("cookie", "authorization", "referer")) for line in lines
    )
    assert asked == [there.address[0]]
    assert guard.connected == [there.address]
    assert NAME not in guard.looked_up


def test_a_certificate_for_another_name_or_of_a_stranger_is_refused(
    certificate: tuple[ssl.SSLContext, ssl.SSLContext], tmp_path: Path
) -> None:
    other, trusting_other = make_certificate(tmp_path, "evil.test")
    for server, client in ((other, trusting_other), (certificate[0], None)):
        with host(answer(PNG), server) as there:
            made = fetcher(
                config(),
                resolve=lambda *_, there=there: [there.address],
                is_allowed=lambda _: True,
                verify=client,
            )
            assert "could not be reached" in refused(made, f"https://{NAME}/a.png")
        assert there.requests == []


@pytest.mark.parametrize("url", URLS)
def test_no_hostile_spelling_of_a_url_leads_to_a_connection_or_a_lookup(
    url: str, guard: Guard
) -> None:
    asked: list[str] = []

    def resolve(name: str, port: int) -> list[tuple[str, int]]:
        asked.append(name)
        return [PUBLIC]

    message = refused(fetcher(config(), resolve=resolve), url)
    assert asked == []
    assert guard.connected == guard.looked_up == []
    assert "evil" not in message
    assert "example" not in message


def test_the_same_spellings_are_refused_by_a_reader_whatever_is_switched_on(guard: Guard) -> None:
    for settings in (PicturesConfig(), config(fetch_plain_http=False), config()):
        made = PictureReader(lambda _: pytest.fail("prepared"), settings, decoded=lambda _: None)
        for url in URLS:
            with pytest.raises(ApiError) as caught:
                read(made, url)
            assert caught.value.status == 400
            assert caught.value.param == "pictures[0]"
        made.close()
    assert guard.connected == guard.looked_up == []


@pytest.mark.parametrize("spelling", NUMERIC_SPELLINGS)
def test_an_address_inside_is_refused_although_its_spelling_is_listed(
    spelling: str, guard: Guard
) -> None:
    for scheme in ("https", "http"):
        made = fetcher(config(fetch_hosts=(spelling,)))  # with the system's own lookup
        message = refused(made, f"{scheme}://{spelling}/a.png")
        said = ("no pictures from that host", "has no address", "no valid URL")
        assert any(each in message for each in said)
    assert guard.connected == []


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_listed_name_that_leads_inside_is_refused(address: str, guard: Guard) -> None:
    for answers in ([address], ["93.184.216.34", address], [address, "2606:4700:4700::1111"]):
        made = fetcher(config(), resolve=lambda _, port, to=answers: [(each, port) for each in to])
        assert address not in refused(made, f"https://{NAME}/a.png")
    assert guard.connected == []


def test_addresses_of_the_open_internet_are_public() -> None:
    assert [each for each in PUBLIC_ADDRESSES if not is_public(each)] == []


def test_a_name_is_looked_up_once_and_a_second_answer_changes_nothing(guard: Guard) -> None:
    with host(answer(PNG)) as there, host(answer(PNG)) as inside:
        answers = iter([[there.address], [inside.address]])
        made = fetcher(config(), resolve=lambda *_: next(answers), is_allowed=lambda _: True)
        assert fetch(made, f"http://{NAME}/a.png") == PNG
        assert next(answers) == [inside.address]
    assert guard.connected == [there.address]
    assert inside.requests == []


def test_a_second_address_is_tried_where_the_first_does_not_answer(guard: Guard) -> None:
    with host(answer(b"")) as gone:
        pass
    with host(answer(PNG)) as there:
        made = fetcher(
            config(), resolve=lambda *_: [gone.address, there.address], is_allowed=lambda _: True
        )
        assert fetch(made, f"http://{NAME}/a.png") == PNG
    assert guard.connected == [gone.address, there.address]


def zeros() -> Iterable[bytes]:
    return itertools.repeat(bytes(65536))


def chunked(pieces: Iterable[bytes]) -> Iterable[bytes]:
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    for piece in pieces:
        yield f"{len(piece):x}\r\n".encode() + piece + b"\r\n"


ELSEWHERE = "http://127.0.0.1:1/a.png"
BOMB = gzip.compress(bytes(10**7))
HOSTILE_ANSWERS: dict[str, tuple[Script, str]] = {
    **{
        f"redirect {code}": (
            answer(b"", f"Location: {ELSEWHERE}", status=f"{code} Elsewhere"),
            "redirect, which is not followed",
        )
        for code in (300, 301, 302, 303, 304, 307, 308)
    },
    "refresh": (answer(b"", f"Refresh: 0; url={ELSEWHERE}", status="404 No"), "status 404"),
    "server error": (answer(b"secret of the host", status="500 No"), "status 500"),
    "empty success": (answer(b"", status="204 None"), "status 204"),
    "part": (answer(PNG, status="206 Part"), "status 206"),
    "declared too long": (
        lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: 100001\r\n\r\n"],
        "more than",
    ),
    "absurd length": (
        lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n"],
        "broke off",
    ),
    "negative length": (lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"], "broke off"),
    "two lengths": (
        lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nabc"],
        "broke off",
    ),
    "endless chunks": (lambda: chunked(zeros()), "more than 100000 bytes"),
    "endless body": (
        lambda: itertools.chain([b"HTTP/1.1 200 OK\r\n\r\n"], zeros()),
        "more than 100000 bytes",
    ),
    "broken chunk": (
        lambda: [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"],
        "broke off",
    ),
    "cut body": (
        lambda: [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + PNG[:10]],
        "broke off",
    ),
    "endless headers": (
        lambda: itertools.chain(
            [b"HTTP/1.1 200 OK\r\n"], itertools.repeat(b"X: " + b"y" * 999 + b"\r\n")
        ),
        "broke off",
    ),
    "one huge header": (
        lambda: itertools.chain([b"HTTP/1.1 200 OK\r\nX: "], itertools.repeat(b"y" * 65536)),
        "broke off",
    ),
    "gzip bomb": (answer(BOMB, "Content-Encoding: gzip"), "compressed"),
    "deflate bomb": (
        answer(zlib.compress(bytes(10**7)), "Content-Encoding: deflate"),
        "compressed",
    ),
    "compressed twice": (answer(gzip.compress(BOMB), "Content-Encoding: gzip, gzip"), "compressed"),
    "unknown encoding": (answer(PNG, "Content-Encoding: x-evil"), "compressed"),
    "no HTTP": (lambda: [b"SSH-2.0-OpenSSH_9.9\r\n"], "broke off"),
    "HTTP/0.9": (lambda: [b"<html>"], "broke off"),
    "silence": (list, "broke off"),
    "a line break in a header": (
        lambda: [b"HTTP/1.1 200 OK\r\nX: a\nb\x00\r\nContent-Length: 0\r\n\r\n"],
        "broke off",
    ),
    "switching protocols": (
        lambda: [b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"],
        "",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE_ANSWERS)
def test_a_hostile_answer_is_refused_and_leads_nowhere(kind: str, guard: Guard) -> None:
    script, said = HOSTILE_ANSWERS[kind]
    with host(script) as there:
        made = fetcher(
            config(max_bytes=100_000), resolve=lambda *_: [there.address], is_allowed=lambda _: True
        )
        message = refused(made, f"http://{NAME}/a.png")
    assert said in message
    assert len(there.requests) == 1
    assert guard.connected == [there.address]
    assert not any(
        word in message for word in ("127.0.0.1", "secret", "Errno", str(there.address[1]))
    )


@pytest.mark.parametrize("what", ["head", "body", "interim answers", "nothing", "handshake"])
def test_a_host_that_takes_for_ever_is_given_up(
    what: str, certificate: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    def drip() -> Iterable[bytes]:
        if what == "body":
            yield b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n"
        elif what == "head":
            yield b"HTTP/1.1 200 OK\r\nX: "
        while not there.stopped.wait(0.01):
            if what == "interim answers":
                yield b"HTTP/1.1 102 Processing\r\n\r\n"
            elif what != "nothing":
                yield b"x"

    scheme = "https" if what == "handshake" else "http"
    with host(drip) as there:  # a host without TLS says nothing in a handshake
        made = fetcher(
            config(fetch_timeout_s=0.2),
            resolve=lambda *_: [there.address],
            is_allowed=lambda _: True,
            verify=certificate[1],
        )
        message = refused(made, f"{scheme}://{NAME}/a.png")
        there.stopped.set()
    assert "did not arrive within 0.2 s" in message or "could not be reached" in message


def test_a_lookup_that_takes_for_ever_is_given_up_and_others_go_on() -> None:
    forever = threading.Event()

    def resolve(name: str, port: int) -> Sequence[tuple[str, int]]:
        if name != NAME:
            assert forever.wait(60)
        return [there.address]

    async def act() -> bytes:
        stuck = (made.fetch(f"http://{i}.example.net/", param="p") for i in range(4))
        results = await asyncio.gather(*stuck, return_exceptions=True)
        assert ["0.3 s" in str(result) for result in results] == [True] * 4
        made._config = config()  # the others are not what must be late
        return await made.fetch(f"http://{NAME}/a.png", param="p")

    with host(answer(PNG)) as there:
        made = fetcher(config(fetch_timeout_s=0.3), resolve=resolve, is_allowed=lambda _: True)
        try:
            assert asyncio.run(act()) == PNG
        finally:
            forever.set()
            made.close()


def test_a_name_without_an_address_is_refused(guard: Guard) -> None:
    def resolve(name: str, port: int) -> list[tuple[str, int]]:
        raise OSError("[Errno -2] Name or service not known")

    assert "has no address" in refused(fetcher(config(), resolve=resolve), f"https://{NAME}/")
    assert "has no address" in refused(fetcher(config(), resolve=lambda *_: []), f"https://{NAME}/")
    assert guard.connected == []


def test_plain_http_needs_its_switch(guard: Guard) -> None:
    made = fetcher(config(fetch_plain_http=False), resolve=lambda *_: pytest.fail("looked up"))
    assert "by https only" in refused(made, f"http://{NAME}/a.png")


@pytest.mark.parametrize(
    "pattern",
    [
        "*",
        "*.",
        "https://a.example.org",
        "a.example.org:443",
        "a/b",
        "*a.example.org",
        "a.*.org",
        "",
    ],
)
def test_a_list_of_hosts_that_is_none_is_refused_at_the_start(pattern: str) -> None:
    with pytest.raises(UserError, match=r"pictures\.fetch_hosts has .*; expected a host's name"):
        fetcher(config(fetch_hosts=(pattern,)))


def test_names_below_a_star_are_fetched_from_and_the_first_bad_source_is_named() -> None:
    with host(answer(PNG)) as there:
        fetching = fetcher(config(), resolve=lambda *_: [there.address], is_allowed=lambda _: True)
        with reader(fetcher=fetching) as made:
            assert len(read(made, "http://a.b.example.net/", data_url(PNG))) == 2
            with pytest.raises(ApiError) as caught:
                read(made, data_url(PNG), "http://evil.test/", data_url(b"no picture"))
    assert caught.value.param == "pictures[1]"
