"""A reader of pictures with the real way of a picture, but for the tower: what several tests of it share."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from minigpt4_jax.image_cache import ImageCache, ImageEncoder, PreparedImage
from minigpt4_jax.serve_config import PicturesConfig
from minigpt4_jax.serving.errors import ApiError
from minigpt4_jax.serving.fetch import Fetcher
from minigpt4_jax.serving.pictures import PictureReader, PictureSource

SIZE = 8


def encode(pixels: np.ndarray) -> np.ndarray:
    """Stands for the tower: nothing is encoded before the engine asks."""
    raise AssertionError("encoded")


def encoder() -> ImageEncoder:
    return ImageEncoder(
        encode, ImageCache(0), model="fake", size=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3
    )


@contextmanager
def reader(
    config: PicturesConfig | None = None,
    *,
    prepare: Callable[[Any], PreparedImage] | None = None,
    decoded: Callable[[float], None] = lambda _: None,
    fetcher: Fetcher | None = None,
) -> Iterator[PictureReader]:
    made = PictureReader(
        prepare or encoder().prepare, config or PicturesConfig(), decoded=decoded, fetcher=fetcher
    )
    yield made
    made.close()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def sources(*urls: str) -> list[PictureSource]:
    return [PictureSource(url, f"pictures[{i}]") for i, url in enumerate(urls)]


def read(made: PictureReader, *urls: str) -> list[PreparedImage]:
    return asyncio.run(made.read(sources(*urls)))


def read_or_refusal(made: PictureReader, *urls: str) -> list[PreparedImage] | ApiError:
    try:
        return read(made, *urls)
    except ApiError as error:
        return error


def refusal(made: PictureReader, urls: Sequence[str]) -> ApiError | None:
    """None where all of them were read."""
    result = read_or_refusal(made, *urls)
    return result if isinstance(result, ApiError) else None
