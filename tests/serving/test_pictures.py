"""`minigpt4_jax.serving.pictures`: what URLs are taken, the limits, the order, and threads that do not come back."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minigpt4_jax.config import UserError
from minigpt4_jax.data.images import preprocess
from minigpt4_jax.image_cache import PreparedImage
from minigpt4_jax.serve_config import PicturesConfig
from minigpt4_jax.serving import pictures
from minigpt4_jax.serving.errors import ApiError
from minigpt4_jax.serving.fetch import Fetcher
from minigpt4_jax.serving.pictures import PictureReader
from tests.hostile_urls import LOCAL_FILE
from tests.planted import encoded
from tests.serving.picture_reading import SIZE, data_url, encoder, read, reader, refusal, sources

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
WAIT_S = 60.0  # generous: only a test that fails waits so long


def plain(colour: tuple[int, int, int], side: int = 16) -> bytes:
    return encoded(Image.new("RGB", (side, side), colour), "PNG")


PNG = plain(COLOURS[0])
BASE64 = base64.b64encode(PNG).decode()


def test_pictures_come_back_prepared_and_in_order() -> None:
    seconds: list[float] = []
    with reader(decoded=seconds.append) as made:
        prepared = read(made, *(data_url(plain(colour)) for colour in COLOURS))
    for one, colour in zip(prepared, COLOURS, strict=True):
        expected = preprocess(
            Image.new("RGB", (16, 16), colour), size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3
        )
        assert one.pixels is not None
        np.testing.assert_array_equal(one.pixels, expected)
    assert len(seconds) == 3
    assert min(seconds) > 0


def test_a_picture_has_the_key_that_its_file_has_without_a_server() -> None:
    data = encoded(Image.effect_noise((30, 20), 80).convert("RGBA"), "PNG")
    with reader() as made:
        assert read(made, data_url(data))[0].key == encoder().prepare(data).key


def test_no_picture_is_no_picture() -> None:
    with reader() as made:
        assert read(made) == []


@pytest.mark.parametrize(
    ("url", "said", "code"),
    [
        (BASE64, "no scheme", "invalid_image_url"),
        ("", "no scheme", "invalid_image_url"),
        ("../etc/passwd", "no scheme", "invalid_image_url"),
        ("//images.example.org/a.png", "no scheme", "invalid_image_url"),
        (LOCAL_FILE, "not taken from file:", "invalid_image_url"),
        (LOCAL_FILE.upper(), "not taken from file:", "invalid_image_url"),
        ("ftp://images.example.org/a.png", "not taken from ftp:", "invalid_image_url"),
        ("blob:https://a.example.org/1", "not taken from blob:", "invalid_image_url"),
        ("javascript:alert(1)", "not taken from javascript:", "invalid_image_url"),
        ("http://images.example.org/a.png", "no pictures from http:", "invalid_image_url"),
        ("https://images.example.org/a.png", "no pictures from https:", "invalid_image_url"),
        (data_url(b"hello, world"), "not a picture", "invalid_image_format"),
        (data_url(PNG[:44]), "damaged", "image_parse_error"),
    ],
)
def test_what_is_not_taken_is_refused_with_what_is(url: str, said: str, code: str) -> None:
    with reader() as made:
        error = refusal(made, [url])
    assert error is not None
    assert (error.status, error.param, error.code) == (400, "pictures[0]", code)
    assert said in error.message
    assert "xpected" in error.message


@pytest.mark.parametrize(
    ("limits", "said", "code"),
    [
        ({"max_bytes": len(PNG) - 1}, f"{len(PNG)} bytes; expected", "image_file_too_large"),
        ({"max_pixels": 255}, "16 x 16 pixels; expected at most 255", "image_too_large"),
        ({"max_side": 15}, "at most 15 on a side", "image_too_large"),
        ({"formats": ("JPEG", "GIF")}, "one of JPEG, GIF;", "invalid_image_format"),
    ],
)
def test_the_limits_of_the_configuration_hold(limits: dict[str, Any], said: str, code: str) -> None:
    exact = {"max_bytes": len(PNG), "max_pixels": 256, "max_side": 16, "formats": ("PNG",)}
    with reader(PicturesConfig(**exact)) as made:
        assert len(read(made, data_url(PNG))) == 1
    with reader(PicturesConfig(**limits)) as made:
        error = refusal(made, [data_url(PNG)])
    assert error is not None
    assert (error.status, error.code) == (400, code)
    assert said in error.message


def test_too_many_pictures_are_refused_at_the_first_above_the_limit() -> None:
    with reader(PicturesConfig(max_count=2)) as made:
        error = refusal(made, [data_url(PNG)] * 3)
    assert error is not None
    assert (error.status, error.param, error.code) == (400, "pictures[2]", "too_many_images")


def test_the_first_bad_picture_is_named_whatever_fails_first() -> None:
    slow = data_url(encoded(Image.effect_noise((1500, 1500), 90), "PNG")[:-40])
    with reader() as made:
        error = refusal(made, [data_url(PNG), slow, data_url(b"no picture")])
    assert error is not None
    assert error.param == "pictures[1]"


def test_an_unknown_format_in_the_configuration_is_refused_at_once() -> None:
    with pytest.raises(UserError, match=r"pictures\.formats has FITS; expected some of PNG"):
        PictureReader(encoder().prepare, PicturesConfig(formats=("FITS",)), decoded=lambda _: None)


def test_plain_http_from_no_host_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="expected hosts to fetch from"):
        PictureReader(
            encoder().prepare, PicturesConfig(fetch_plain_http=True), decoded=lambda _: None
        )


def test_a_fault_of_ours_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def prepare(_: Any) -> PreparedImage:
        raise RuntimeError("0x7f0000 in a secret place")

    with reader(prepare=prepare) as made:
        error = refusal(made, [data_url(PNG)])
    assert error is not None
    assert error.status == 500
    assert "secret" not in error.message
    assert "0x7f0000 in a secret place" in caplog.text


class Gate:
    """A `prepare` that does not come back before it is told to."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.open = threading.Event()
        self.blocks = True
        self.peak = self.inside = 0
        self._lock = threading.Lock()
        self._prepare = encoder().prepare

    def prepare(self, picture: Any) -> PreparedImage:
        with self._lock:
            self.inside += 1
            self.peak = max(self.peak, self.inside)
        self.entered.release()
        assert not self.blocks or self.open.wait(WAIT_S)
        with self._lock:
            self.inside -= 1
        return self._prepare(picture)

    async def wait_for(self, count: int) -> None:
        for _ in range(count):
            assert await asyncio.to_thread(self.entered.acquire, timeout=WAIT_S)


def with_gate(
    config: PicturesConfig, act: Callable[[PictureReader, Gate], Any]
) -> tuple[Any, Gate]:
    gate = Gate()
    with reader(config, prepare=gate.prepare) as made:
        try:
            return asyncio.run(act(made, gate)), gate
        finally:
            gate.open.set()


def test_no_more_pictures_are_decoded_at_once_than_there_are_threads() -> None:
    async def act(made: PictureReader, gate: Gate) -> list[PreparedImage]:
        reading = [asyncio.create_task(made.read(sources(data_url(PNG)))) for _ in range(6)]
        await gate.wait_for(2)
        gate.open.set()
        return [(await one)[0] for one in reading]

    prepared, gate = with_gate(PicturesConfig(num_threads=2), act)
    assert len(prepared) == 6
    assert gate.peak == 2


def test_the_event_loop_goes_on_while_a_picture_is_decoded() -> None:
    async def act(made: PictureReader, gate: Gate) -> bool:
        reading = asyncio.create_task(made.read(sources(data_url(PNG))))
        await gate.wait_for(1)
        waiting = not reading.done()  # and we are here: nothing blocks
        gate.open.set()
        return waiting and len(await reading) == 1

    assert with_gate(PicturesConfig(), act)[0]


async def error_of(reading: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await reading
    return caught.value


def give_time(made: PictureReader, seconds: float = WAIT_S) -> None:
    """To the pictures from here on: a busy machine must not decide whether one that is read comes back."""
    made._config = replace(made._config, decode_timeout_s=seconds)


def test_stuck_threads_fail_their_request_and_others_take_their_place() -> None:
    async def act(made: PictureReader, gate: Gate) -> tuple[ApiError, ApiError, bool]:
        first = await error_of(made.read(sources(data_url(PNG))))
        second = await error_of(made.read(sources(data_url(PNG))))
        # One was replaced, and that one is stuck as well: there is no third, and work waits in vain.
        give_time(made, 0.05)
        third = await error_of(made.read(sources(data_url(PNG))))
        give_time(made)
        gate.open.set()
        whole = len(await made.read(sources(data_url(PNG)))) == 1
        return first, second, (third.status, third.retry_after_s) == (429, 2) and whole

    config = PicturesConfig(num_threads=1, decode_timeout_s=1.0)  # in which a thread begins
    (first, second, recovered), gate = with_gate(config, act)
    assert (first.status, second.status) == (408, 408)
    assert "longer than 1 s" in first.message
    assert recovered
    assert gate.peak == 2


def test_a_client_that_leaves_does_not_keep_a_stuck_thread_for_ever() -> None:
    async def act(made: PictureReader, gate: Gate) -> int:
        leaving = asyncio.create_task(made.read(sources(data_url(PNG), data_url(PNG))))
        await gate.wait_for(1)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        gate.blocks = False
        give_time(made)
        # It waits for the only thread, which is replaced when the time of the first is over.
        assert len(await made.read(sources(data_url(PNG)))) == 1
        return gate.inside

    config = PicturesConfig(num_threads=1, decode_timeout_s=1.0)  # in which a thread begins
    inside, _ = with_gate(config, act)
    assert inside == 1


def test_too_many_waiting_pictures_are_refused_with_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PENDING", 2)

    async def act(made: PictureReader, gate: Gate) -> ApiError:
        reading = asyncio.create_task(made.read(sources(data_url(PNG), data_url(PNG))))
        await gate.wait_for(1)
        error = await error_of(made.read(sources(data_url(PNG))))
        gate.open.set()
        await reading
        assert len(await made.read(sources(*[data_url(PNG)] * 3))) == 3  # alone, it may
        return error

    error, _ = with_gate(PicturesConfig(num_threads=1), act)
    assert (error.status, error.retry_after_s) == (429, 2)


def test_one_caller_leaves_room_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_PENDING", 4)
    monkeypatch.setattr(pictures, "MAX_PENDING_OF_ONE", 2)

    async def act(made: PictureReader, gate: Gate) -> ApiError:
        two = sources(*[data_url(PNG)] * 2)
        reading = asyncio.create_task(made.read(two, caller="a"))
        await gate.wait_for(1)
        error = await error_of(made.read(two[:1], caller="a"))
        others = asyncio.create_task(made.read(two, caller="b"))
        await asyncio.sleep(0)
        assert (await error_of(made.read(two[:1], caller="c"))).status == 429
        gate.open.set()
        assert [len(await each) for each in (reading, others)] == [2, 2]
        assert len(await made.read(two, caller="a")) == 2
        return error

    error, _ = with_gate(PicturesConfig(num_threads=1), act)
    assert (error.status, error.retry_after_s) == (429, 2)
    assert "of this key or address" in error.message


def test_a_fault_in_one_fetch_ends_the_others() -> None:
    ended: list[str] = []

    class Broken(Fetcher):
        async def fetch(self, url: str, *, param: str) -> bytes:
            if param == "pictures[1]":
                await asyncio.sleep(0)
                raise RuntimeError("of ours")
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(param)
            raise AssertionError

    config = PicturesConfig(fetch_hosts=("images.example.org",))
    with reader(config, fetcher=Broken(config)) as made:
        urls = [f"https://images.example.org/{i}.png" for i in range(3)]
        with pytest.raises(ExceptionGroup) as caught:
            asyncio.run(made.read(sources(*urls)))
    assert caught.value.subgroup(RuntimeError) is not None
    assert sorted(ended) == ["pictures[0]", "pictures[2]"]


def test_behind_close_nothing_is_read() -> None:
    with reader() as made:
        made.close()
        error = refusal(made, [data_url(PNG)])
    assert error is not None
    assert error.status == 503
