"""A picture file to the float array that the image tower reads.

For: opening pictures of unknown origin safely, and the one preprocessing of this project. Not for: batches,
caches, or anything on a device.

Differs from the original: it drops the alpha channel and ignores the EXIF orientation of a file, and crashes on a
PIL picture that is not RGB. Here a picture is turned upright and laid on white first (`upright`, `flatten_on_white`:
apart from `preprocess`, so that the original's behaviour stays within reach). `preprocess` is the original's.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError

from minigpt4_jax.config import UserError

MAX_FILE_BYTES = 64 * 1024 * 1024
MAX_PIXELS = 100_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""The formats that are opened, by PIL's names; others are refused before a decoder sees them."""


def load_image(source: str | Path | bytes | Image.Image) -> Image.Image:
    """Opens a picture as upright RGB: a path, the bytes of a file, or a PIL picture (which is left as it is).

    The first frame of an animation, EXIF orientation applied, transparency laid on white, 16-bit samples scaled to 8.
    Raises `UserError`, with the name of the file, for one that is missing, no picture, damaged or too large.
    """
    if isinstance(source, Image.Image):
        return flatten_on_white(upright(source))
    name = "the picture" if isinstance(source, bytes) else f"the picture {source}"
    data = source if isinstance(source, bytes) else _read(Path(source), name)
    if len(data) > MAX_FILE_BYTES:
        raise UserError(
            f"Cannot open {name}: {len(data)} bytes; expected at most {MAX_FILE_BYTES}. Save a smaller copy."
        )
    try:
        with warnings.catch_warnings():
            # PIL warns about large pictures; the limit below is ours and is an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise UserError(
                f"Cannot open {name}: {width} x {height} pixels; expected at most {MAX_PIXELS} in all. "
                "Save a smaller copy."
            )
        image.seek(0)
        image.load()
        return flatten_on_white(upright(image))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(
            f"Cannot open {name}: more than {MAX_PIXELS} pixels. Save a smaller copy."
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        # PIL reports damage in many ways, SyntaxError (a broken PNG) among them.
        # Its own text for an unknown format is the address of our buffer.
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(
            f"Cannot open {name}: it is damaged or not a picture ({reason}). "
            f"Expected one of {', '.join(FORMATS)}."
        ) from error


def _read(path: Path, name: str) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UserError(f"Cannot open {name}: {error.strerror or error}.") from error


def upright(image: Image.Image) -> Image.Image:
    """Turns a picture as its EXIF orientation asks. A picture without one comes back as it is."""
    return ImageOps.exif_transpose(image)


def flatten_on_white(image: Image.Image) -> Image.Image:
    """Any mode to RGB; where the picture is transparent, white shows through."""
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bits(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        paper = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, layer).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit (`I;16`, `I`) and float (`F`) grey to 8 bits. PIL's own conversion clips at 255 instead of scaling."""
    values = np.asarray(image).astype(np.float64)
    full = 65535.0 if image.mode.startswith("I") else 255.0
    scaled = np.clip(np.nan_to_num(values) * (255.0 / full), 0.0, 255.0)
    return Image.fromarray(np.round(scaled).astype(np.uint8))


def preprocess(
    image: Image.Image, *, size: int, mean: Sequence[float], std: Sequence[float]
) -> Float[np.ndarray, "size size 3"]:
    """RGB picture to float32 [size, size, 3]: resized to a square whatever its shape (PIL bicubic, antialiased),
    scaled to [0, 1], then normalised by `mean` and `std` per channel.

    Raises `ValueError` when the picture is not RGB: run it through `load_image` first.
    """
    if image.mode != "RGB":
        raise ValueError(
            f"The picture's mode is {image.mode}; expected RGB. Open it with load_image."
        )
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    values = np.asarray(resized, dtype=np.float32) / np.float32(255.0)
    return (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
