"""data/pixels.py: what is wrong with a picture in one word, and the law of the random crop."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.images import load_image, preprocess
from minigpt4_jax.data.pixels import CROP_RATIO, CROP_SCALE, PictureReader, draw_crop, open_picture
from tests.planted import HTML, jpeg

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty image"),
        (HTML, "HTML instead of an image"),
        (b"\xef\xbb\xbf \n<html>", "HTML instead of an image"),
        (b"<?xml version='1.0'?>", "HTML instead of an image"),
        (jpeg(1)[:-200], "damaged image"),
        (b"anything", "damaged image"),
    ],
)
def test_a_broken_picture_has_a_reason_and_a_name(data: bytes, reason: str) -> None:
    with pytest.raises(SampleFault, match=r"7\.tar") as raised:
        open_picture(data, "sample 7.tar")
    assert raised.value.reason == reason


def test_without_a_crop_pixels_are_what_chat_sees() -> None:
    reader = PictureReader(size=20, mean=MEAN, std=STD)
    rng = np.random.default_rng(0)
    pixels = reader(jpeg(3), "x", rng=rng)
    expected = preprocess(load_image(jpeg(3)), size=20, mean=MEAN, std=STD)
    np.testing.assert_array_equal(pixels, expected)
    assert rng.random() == np.random.default_rng(0).random()  # nothing was drawn


def test_a_crop_is_that_box_of_the_picture_and_depends_on_the_generator_alone() -> None:
    reader = PictureReader(size=20, mean=MEAN, std=STD, random_resized_crop=True)
    noise = np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    seen = set()
    for seed in range(5):
        pixels = reader(buffer.getvalue(), "x", rng=np.random.default_rng(seed))
        box = draw_crop(60, 40, np.random.default_rng(seed))
        left, top, right, bottom = box
        cut = Image.fromarray(noise[top:bottom, left:right])
        np.testing.assert_array_equal(pixels, preprocess(cut, size=20, mean=MEAN, std=STD))
        seen.add(box)
    assert len(seen) == 5


def test_boxes_follow_the_law_of_torchvision() -> None:
    # Square picture, so that rejection does not bend the law much: area and log ratio are uniform, places too.
    size, rng = 1000, np.random.default_rng(0)
    boxes = np.array([draw_crop(size, size, rng) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    width, height = right - left, bottom - top
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= size).all()
    assert (bottom <= size).all()
    share, ratio = width * height / size**2, width / height
    assert share.min() > CROP_SCALE[0] - 2e-3
    assert share.max() <= CROP_SCALE[1]
    assert ratio.min() > CROP_RATIO[0] - 3e-3
    assert ratio.max() < CROP_RATIO[1] + 3e-3
    # Both signs of the log ratio alike; small areas are never refused, large ones where the ratio does not fit.
    assert abs(np.log(ratio).mean()) < 0.01
    small = share < 0.7
    quartiles = np.quantile(np.log(ratio[small]), [0.25, 0.75])
    np.testing.assert_allclose(quartiles, np.array([-0.5, 0.5]) * math.log(4 / 3), atol=0.02)
    np.testing.assert_allclose(np.quantile(share[small], 0.5), 0.6, atol=0.01)
    free = (size - width) > 100
    np.testing.assert_allclose((left[free] / (size - width[free])).mean(), 0.5, atol=0.02)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((1000, 10), (493, 0, 506, 10)),  # 13 = round(10 * 4 / 3) wide, in the middle
        ((10, 1000), (0, 493, 10, 506)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_where_no_box_fits_the_middle_is_taken(
    size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    assert draw_crop(*size, np.random.default_rng(3)) == box
