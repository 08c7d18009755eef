"""Pictures of strangers through the server's reader: a picture or a 4xx in our own words, and the server goes on."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from minigpt4_jax.data.images import MAX_JPEG_SCANS
from minigpt4_jax.image_cache import ImageKey
from minigpt4_jax.serving.errors import ApiError
from minigpt4_jax.serving.pictures import PictureReader
from tests.hostile_pictures import (
    Case,
    animated,
    bombs,
    broken_pngs,
    changed_files,
    cut_files,
    disguised,
    many_scans,
    odd_pictures,
    small_file,
    turned,
)
from tests.serving.picture_reading import data_url, read, read_or_refusal, reader

TAKEN = r"PNG, JPEG, WEBP, GIF, BMP"
OUR_WORDS = (
    rf"it is damaged or not a picture\. Expected one of {TAKEN}; copy, download or export it again\.",
    rf"it is an? [\w ,()`]+\. Expected one of {TAKEN}; convert it to one of these\.",
    r"(\d+|\d+ x \d+|far more) pixels; expected at most 50000000 in all\. Save a smaller copy\.",
    r"\d+ x \d+ pixels; expected at most 65500 on a side\. Save a smaller copy\.",
    r"a JPEG in \d+ scans; expected at most 100\. Save it again, not progressive\.",
)
"""All that a client is told of a file. A library's words would match none of them."""
SAID = re.compile(rf"Cannot open the picture: ({'|'.join(OUR_WORDS)})")
EMPTY = "The picture's data: URL has no picture in it."


@pytest.fixture(scope="module")
def server() -> Iterator[PictureReader]:
    with reader() as made:
        yield made


def key(server: PictureReader, data: bytes) -> ImageKey:
    return read(server, data_url(data))[0].key


def key_or_refusal(server: PictureReader, data: bytes) -> ImageKey | ApiError:
    """What the client gets. Refusals are checked here: their status, and that they are in our words."""
    result = read_or_refusal(server, data_url(data))
    if not isinstance(result, ApiError):
        return result[0].key
    assert (result.status, result.param) == (400, "pictures[0]")
    assert SAID.fullmatch(result.message) or result.message.startswith(EMPTY), result.message
    return result


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_file_cut_at_any_byte_is_refused_or_the_whole_picture(
    kind: str, server: PictureReader
) -> None:
    [(data, beginnings)] = [(data, all_) for name, data, all_ in cut_files() if name == kind]
    whole = key(server, data)
    results = [key_or_refusal(server, beginning) for beginning in beginnings]
    read_ones = [result for result in results if not isinstance(result, ApiError)]
    assert set(read_ones) <= {whole}
    assert len(read_ones) < 0.2 * len(beginnings)  # what comes behind the pixels may be missing


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_all_eight_orientations_are_one_upright_picture(kind: str, server: PictureReader) -> None:
    upright = key(server, small_file(kind))
    assert [key(server, turned(each, kind)) for each in range(1, 9)] == [upright] * 8


def test_an_animation_is_its_first_frame(server: PictureReader) -> None:
    for kind in ("GIF", "WEBP", "PNG"):
        assert key(server, animated(kind)) == key(server, small_file(kind))


GROUPS = [*bombs(), *odd_pictures(), *disguised(), *broken_pngs()]


@pytest.mark.parametrize("case", GROUPS, ids=[case.name for case in GROUPS])
def test_each_hostile_file_is_a_picture_or_a_refusal_in_our_words(
    case: Case, server: PictureReader
) -> None:
    result = key_or_refusal(server, case.data)
    if case.expected == "too large":
        assert isinstance(result, ApiError)
        assert result.code == "image_too_large", result
    elif case.expected != "either":
        assert isinstance(result, ApiError) == (case.expected == "refused"), result


def test_files_changed_by_chance_are_pictures_or_refusals_and_the_server_goes_on(
    server: PictureReader,
) -> None:
    results = [key_or_refusal(server, case.data) for case in changed_files(60)]
    refused = sum(isinstance(result, ApiError) for result in results)
    assert 0.2 < refused / len(results) < 0.95  # the corpus has both
    assert key(server, small_file("PNG")) == key(server, small_file("BMP"))


def test_the_number_of_scans_is_the_one_that_is_refused() -> None:
    assert many_scans(MAX_JPEG_SCANS).count(b"\xff\xda") == MAX_JPEG_SCANS
