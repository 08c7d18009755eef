"""A picture's bytes to the tower's input during training, with the random crop of the released weights.

For: the training stream that decodes pictures itself, and saying in one word what is wrong with a picture.
Not for: decoding and resizing (`images.py`), chat (never cropped), the feature cache (one view per picture).

Differs from the original's last version, which has no crop. `random_resized_crop` is what it had when the published
MiniGPT-4 weights were trained (`RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=bicubic)`, no flip). The law of
the box is that of torchvision's `RandomResizedCrop.get_params` (https://github.com/pytorch/vision,
torchvision/transforms/transforms.py); the numbers drawn are others, as they come from another generator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from PIL import Image

from minigpt4_jax.config import UserError
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.images import load_image, preprocess

CROP_SCALE = (0.5, 1.0)
"""Area of the box as a share of the picture's."""
CROP_RATIO = (3 / 4, 4 / 3)
"""Width of the box over its height."""
_CROP_ATTEMPTS = 10
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<svg")

EMPTY, MARKUP, DAMAGED = "empty image", "HTML instead of an image", "damaged image"
"""The reasons for which a picture is refused."""


def open_picture(data: bytes, name: str) -> Image.Image:
    """`load_image` for a sample: RGB, upright. Raises `SampleFault` with one of the reasons and with `name`."""
    if not data:
        raise SampleFault(EMPTY, f"{name}: the file of the picture has 0 bytes.")
    if data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_MARKUP):
        start = data[:32].decode("ascii", "replace")
        raise SampleFault(
            MARKUP, f"{name}: the file of the picture is a page: it starts {start!r}."
        )
    try:
        return load_image(data)
    except UserError as error:
        raise SampleFault(DAMAGED, f"{name}: {error}") from error


def draw_crop(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random box (left, top, right, bottom) in pixels inside a picture of `width` x `height`.

    Area share uniform in `CROP_SCALE`, log of the ratio uniform in that of `CROP_RATIO`, place uniform; if ten draws
    do not fit, the largest centred box whose ratio is allowed.
    """
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(*CROP_SCALE)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    w, h = width, height
    if width / height < ratio:
        h = round(width / ratio)
    elif width / height > ratio:
        w = round(height * ratio)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


@dataclass(frozen=True, kw_only=True)
class PictureReader:
    """Bytes of a picture file -> float32 [size, size, 3], normalised."""

    size: int
    """Side in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    random_resized_crop: bool = False

    def __call__(
        self, data: bytes, name: str, *, rng: np.random.Generator
    ) -> Float[np.ndarray, "H W 3"]:
        """Raises `SampleFault` for a picture that cannot be used. Only a crop draws from `rng`."""
        image = open_picture(data, name)
        if self.random_resized_crop:
            image = image.crop(draw_crop(*image.size, rng))
        return preprocess(image, size=self.size, mean=self.mean, std=self.std)
