"""`tools.hostile_input`: what it counts, and that it would say so if something went wrong."""

from __future__ import annotations

import asyncio

import pytest

from minigpt4_jax.serving.fetch import Fetcher
from tests.hostile_pictures import Case, small_file
from tests.hostile_urls import ADDRESSES, NUMERIC_SPELLINGS, URLS
from tools import hostile_input
from tools.hostile_input import count_addresses, count_pictures


def test_pictures_are_counted_by_what_became_of_them() -> None:
    cases = [
        Case("good", small_file("PNG"), "taken"),
        Case("bad", b"no picture", "refused"),
        Case("good, to be refused", small_file("GIF"), "refused"),
    ]
    counted = count_pictures(cases)
    assert counted["cases"] == 3
    assert counted["outcomes"] == {"400 invalid_image_format": 1, "a picture": 2}
    assert counted["wrong"] == ["good, to be refused"]


def test_no_address_is_connected_to_and_a_connection_would_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attempts = len(URLS) + len(NUMERIC_SPELLINGS) + 2 * len(ADDRESSES)
    assert count_addresses() == {"attempts": attempts, "refused": attempts, "connections": []}
    # A fetcher that lets one address pass. Nothing listens there.
    monkeypatch.setattr(hostile_input, "URLS", URLS[:1])
    monkeypatch.setattr(hostile_input, "ADDRESSES", ())
    monkeypatch.setattr(
        Fetcher, "_addresses", lambda *_: asyncio.sleep(0, result=[("127.0.0.1", 1)])
    )
    seen = count_addresses()["connections"]
    assert set(seen) == {"('127.0.0.1', 1)"}
