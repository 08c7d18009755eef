"""`minigpt4_jax.serving.data_urls`: which spellings of RFC 2397 are taken."""

from __future__ import annotations

import base64

import pytest
from PIL import Image

from minigpt4_jax.serving.data_urls import parse_data_url
from minigpt4_jax.serving.errors import ApiError
from tests.planted import encoded

PNG = encoded(Image.new("RGB", (16, 16), (255, 0, 0)), "PNG")
BASE64 = base64.b64encode(PNG).decode()
assert BASE64.endswith("=")  # the cases below need a padded one


def decode(url: str, *, max_bytes: int = 10_000) -> bytes:
    return parse_data_url(url, param="p", max_bytes=max_bytes).decode()


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,",
        "DATA:Image/PNG;BASE64,",
        "data:image/jpeg;base64,",  # the declared type is not believed
        "data:image/png;charset=utf-8;name=x;base64,",
        "data:application/octet-stream;base64,",
    ],
)
def test_spellings_that_are_taken(head: str) -> None:
    assert decode(head + BASE64) == PNG


@pytest.mark.parametrize(
    ("url", "said", "code"),
    [
        ("data:", "not in base64", "invalid_image_url"),
        ("data:image/png," + BASE64, "not in base64", "invalid_image_url"),
        ("data:image/png;base64" + BASE64, "not in base64", "invalid_image_url"),
        ("data:image/png;base64;x=1," + BASE64, "not in base64", "invalid_image_url"),
        (f"data:image/png;x={'y' * 300};base64,{BASE64}", "longer than 256", "invalid_image_url"),
        (f"data:text/html;base64,{BASE64}", "not declare", "unsupported_image_media_type"),
        (f"data:;base64,{BASE64}", "not declare", "unsupported_image_media_type"),
        ("data:image/png;base64,", "no picture in it", "empty_image_file"),
        ("data:image/png;base64,====", "not in base64", "invalid_base64_image"),
        (f"data:image/png;base64,{BASE64[:40]}\n{BASE64[40:]}", "base64", "invalid_base64_image"),
        (f"data:image/png;base64,{BASE64[:41]}", "multiple of 4", "invalid_base64_image"),
        (f"data:image/png;base64,{BASE64}AAAA", "base64", "invalid_base64_image"),
        (
            f"data:image/png;base64,{BASE64.replace('=', '%3D')}",
            "percent signs",
            "invalid_base64_image",
        ),
        (f"data:image/png;base64,é{BASE64}", "base64", "invalid_base64_image"),
        (f"data:image/png;base64,_-{BASE64[2:]}", "base64", "invalid_base64_image"),
    ],
)
def test_spellings_that_are_refused(url: str, said: str, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        decode(url)
    error = caught.value
    assert (error.status, error.param, error.code) == (400, "p", code)
    assert said in error.message
    assert "xpected" in error.message


@pytest.mark.parametrize("length", range(1, 8))
def test_the_length_that_the_limit_sees_is_the_length_that_is_decoded(length: int) -> None:
    url = "data:image/png;base64," + base64.b64encode(bytes(length)).decode()
    assert decode(url, max_bytes=length) == bytes(length)
    if length > 1:
        with pytest.raises(ApiError, match=f"has {length} bytes; expected at most {length - 1}"):
            decode(url, max_bytes=length - 1)


def test_too_many_bytes_are_refused_by_their_length_before_they_are_decoded() -> None:
    with pytest.raises(ApiError, match="3000 bytes; expected at most 1000") as caught:
        parse_data_url("data:image/png;base64," + "*" * 4000, param="p", max_bytes=1000)
    assert caught.value.code == "image_file_too_large"
