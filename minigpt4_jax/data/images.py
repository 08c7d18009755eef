"""A picture file to the float array that the image tower reads.

For: opening pictures of unknown origin safely, and the one preprocessing of this project. Not for: batches,
caches, or anything on a device.

Differs from the original: it drops the alpha channel and ignores the EXIF orientation of a file, and crashes on a
PIL picture that is not RGB. Here a picture is turned upright and laid on white first (`upright`, `flatten_on_white`:
apart from `preprocess`, so that the original's behaviour stays within reach). `preprocess` is the original's. Colour
profiles are ignored, as there.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from PIL import ExifTags, Image, UnidentifiedImageError

from minigpt4_jax.config import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""The formats that are opened, by PIL's names; others are refused before a decoder sees them."""
MAX_JPEG_SCANS = 100
"""A progressive JPEG comes in about ten scans. Each costs a pass over all its pixels and as little as fifty bytes, so a
file of 20 MB could ask for hours (libjpeg-turbo's `-maxscans` is against the same)."""
MAX_HEADER_READS = 20_000
"""Reads of a file until its pixels begin. Headers have some dozens of parts; 20 MB of empty ones, or of filling between
them, kept PIL busy for 5 to 19 s, and with `_warnings_filter` everybody else who opens a picture."""
PREPROCESSING = "1"
"""Version of `preprocess`: whoever changes its numbers counts on, because kept embeddings are found by it."""

FOREIGN = (
    (rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1|avif|avis)", "an HEIC or AVIF picture"),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "a video"),
    (rb"\xff\x0a|\x00\x00\x00\x0cJXL ", "a JPEG XL picture"),
    (rb"\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51", "a JPEG 2000 picture"),
    (rb"%PDF-", "a PDF document"),
    (
        # Atomic: `.*?-->` that may also run over the next comments has twice as many ways for each, and a search keeps
        # every thread waiting (CWE-1333).
        rb"\s*+(<\?xml[^>]*+>\s*+)?+(?>(?><!--.*?-->|<!DOCTYPE svg[^>]*+>)\s*+)*+<svg\b",
        "an SVG drawing",
    ),
    (rb"(?i:\s*+<(!doctype html|html|head)\b)", "a web page"),
    (rb"8BPS", "a Photoshop document"),
    (rb"version https://git-lfs", "a Git LFS pointer (`git lfs pull` fetches the picture)"),
    (rb"PK\x03\x04|\x1f\x8b", "an archive"),
)
"""How files begin that people take for pictures, and what they are: for the message only. Nothing here may step back
over what it has matched: the files are strangers'."""

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the picture upright (EXIF 2.3, tag 0x0112); 1 and unknown values leave it."""
_ORIENTATION_KEYS = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PictureLimits:
    """What is opened at all; all of it is checked before anything is decoded."""

    max_bytes: int = 64 * 1024 * 1024
    """Of the file."""
    max_pixels: int = 100_000_000
    max_side: int = 100_000_000
    """The longer side, in pixels."""
    formats: tuple[str, ...] = FORMATS
    """Some of `FORMATS`."""


PictureFault = Literal["empty", "too many bytes", "too large", "format", "damaged", "samples"]


class PictureError(UserError):
    """A picture that cannot be opened.

    Attributes:
        plain: what is wrong and what to do, in words and numbers of this file alone: neither the picture's name nor
            the text of a library, which may tell about memory and files (CVE-2026-22778).
        fault: what is wrong, for programs.
    """

    def __init__(self, message: str, *, plain: str, fault: PictureFault) -> None:
        super().__init__(message)
        self.plain, self.fault = plain, fault


def _refusal(
    name: str, what: str, *, advice: str, fault: PictureFault, said: str = ""
) -> PictureError:
    """`said` is a library's word for it: for the message, never for `plain`."""
    detail = f" ({said})" if said else ""
    message = f"Cannot open {name}: {what}{detail}. {advice}"
    return PictureError(message, plain=f"{what}. {advice}", fault=fault)


_warnings_filter = threading.Lock()  # Python has one list of warning filters for all threads


def load_image(
    source: str | Path | bytes | Image.Image, *, limits: PictureLimits | None = None
) -> Image.Image:
    """Opens a picture as upright RGB: a path, the bytes of a file, or a PIL picture (which is left as it is).

    The first frame of an animation, EXIF orientation applied, transparency laid on white, 16-bit samples scaled to 8.
    A broken EXIF block is named in the log, and the picture taken as it lies. Nothing but a regular file is read, and
    no more of it than `limits` allows (None: the defaults of `PictureLimits`), which are for files and bytes alone.
    Raises `UserError`, with the name of the file, for one that is missing; of its kind `PictureError` for one that is
    no picture, damaged or too large.
    """
    limits = limits or PictureLimits()
    if isinstance(source, Image.Image):
        name, image = "the picture", source
    else:
        name = "the picture" if isinstance(source, bytes) else f"the picture {str(source)!r}"
        data = source if isinstance(source, bytes) else _read(source, name, limits.max_bytes)
        image = _open(data, name, limits)
    with _damage(name, limits):
        # Only TIFF reads its header again while it decodes; others decode side by side, outside of the lock.
        with _warnings_to_log(name) if image.format == "TIFF" else contextlib.nullcontext():
            image.load()
        image = upright(image, name=name)
    try:
        return flatten_on_white(image)
    except ValueError as error:
        raise PictureError(
            f"Cannot open {name}: {error}",
            plain="the range of its samples is not known. Expected 8 or 16 bits per sample; save it so.",
            fault="samples",
        ) from error


def _read(path: str | Path, name: str, max_bytes: int) -> bytes:
    """The bytes of a regular file. Never waits (a FIFO) and never reads without end (a device)."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a device, pipe or socket"
            raise UserError(f"Cannot open {name}: it is {kind}. Expected a file.")
        # O_NONBLOCK: should a FIFO have taken its place, opening it would wait for somebody to write into it.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if found.st_size > max_bytes:
                raise _too_many_bytes(name, found.st_size, max_bytes)
            return file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        if isinstance(error, OSError) and error.errno == errno.ENOENT:
            raise UserError(
                f"There is no picture at {str(path)!r}. Expected a file; a path with spaces needs quotes."
            ) from error
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"Cannot open {name}: {reason}. Expected a file that you may read; check the path and its permissions."
        ) from error


class _File(io.BytesIO):
    """Counts reads until `left` is None."""

    left: int | None = MAX_HEADER_READS

    def read(self, size: int | None = -1, /) -> bytes:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise _TooManyParts(f"more than {MAX_HEADER_READS} parts before its pixels")
        return super().read(size)


class _TooManyParts(Exception):
    """A class of its own, because PIL takes those of Python for another format's file."""


def _open(data: bytes, name: str, limits: PictureLimits) -> Image.Image:
    """Reads the header; refuses what is no picture, and what is too large, before a decoder sees it."""
    if not data:
        raise _refusal(
            name, "it is empty (0 bytes)", advice="Copy or download it again.", fault="empty"
        )
    if len(data) > limits.max_bytes:
        raise _too_many_bytes(name, len(data), limits.max_bytes)
    try:
        with _damage(name, limits), _warnings_to_log(name):
            file = _File(data)
            image = Image.open(file, formats=limits.formats)
            file.left = None
    except PictureError as error:
        kind = next((kind for start, kind in FOREIGN if re.match(start, data[:4096], re.S)), None)
        if kind is None or not isinstance(error.__cause__, UnidentifiedImageError):
            raise
        advice = f"Expected one of {', '.join(limits.formats)}; convert it to one of these."
        raise _refusal(name, f"it is {kind}", advice=advice, fault="format") from error
    width, height = image.size
    if width * height > limits.max_pixels:
        raise _too_many_pixels(name, f"{width} x {height}", limits.max_pixels)
    if max(width, height) > limits.max_side:
        raise _refusal(
            name,
            f"{width} x {height} pixels; expected at most {limits.max_side} on a side",
            advice="Save a smaller copy.",
            fault="too large",
        )
    # Inside of a scan the bytes FF DA cannot stand: FF is followed by 00 there (ITU T.81, B.1.1.5).
    if data.startswith(b"\xff\xd8") and (scans := data.count(b"\xff\xda")) > MAX_JPEG_SCANS:
        raise _refusal(
            name,
            f"a JPEG in {scans} scans; expected at most {MAX_JPEG_SCANS}",
            advice="Save it again, not progressive.",
            fault="too large",
        )
    return image


@contextlib.contextmanager
def _damage(name: str, limits: PictureLimits) -> Iterator[None]:
    """Turns whatever PIL raises for a broken file into a `PictureError`."""
    try:
        yield
    except (
        Image.DecompressionBombError
    ) as error:  # far above our limit; PIL does not tell the sides
        count = re.search(r"\d+", str(error))
        raise _too_many_pixels(
            name, count.group() if count else "far more", limits.max_pixels
        ) from error
    except Exception as error:
        # A decoder among hostile bytes: OSError, SyntaxError, struct.error, IndexError, MemoryError ... all mean the
        # same. PIL's own text for an unknown format is the address of our buffer.
        unknown = isinstance(error, UnidentifiedImageError)
        raise _refusal(
            name,
            "it is damaged or not a picture",
            advice=f"Expected one of {', '.join(limits.formats)}; copy, download or export it again.",
            fault="format" if unknown else "damaged",
            said="unknown format" if unknown else " ".join(str(error).split()) or repr(error),
        ) from error


def _too_many_bytes(name: str, count: int, most: int) -> PictureError:
    return _refusal(
        name,
        f"{count} bytes; expected at most {most}",
        advice="Save a smaller copy.",
        fault="too many bytes",
    )


def _too_many_pixels(name: str, count: str, most: int) -> PictureError:
    return _refusal(
        name,
        f"{count} pixels; expected at most {most} in all",
        advice="Save a smaller copy.",
        fault="too large",
    )


@contextlib.contextmanager
def _warnings_to_log(name: str) -> Iterator[None]:
    """What PIL warns of (with its own source line) becomes a line of the log that names the picture."""
    with _warnings_filter, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        # PIL warns about large pictures; the limit here is ours and is an error.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
    for warning in said:
        _log.warning("%s: %s", name, " ".join(str(warning.message).split()))


def upright(image: Image.Image, *, name: str = "the picture") -> Image.Image:
    """Turns a picture as its EXIF orientation asks. A picture without one comes back as it is.

    An EXIF block that cannot be read is no reason to refuse the pixels: the picture comes back as it is, and the log
    says so under `name`.
    """
    try:
        with _warnings_to_log(name):
            orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception as error:  # PIL reports a broken block in many ways, struct.error among them
        _log.warning("%s: its EXIF block cannot be read (%s); taken as it lies.", name, error)
        return image
    if not isinstance(orientation, int) or orientation not in _TRANSPOSE:
        return image
    turned = image.transpose(_TRANSPOSE[orientation])
    for key in _ORIENTATION_KEYS:  # turned once is enough
        turned.info.pop(key, None)
    return turned


def flatten_on_white(image: Image.Image) -> Image.Image:
    """Any mode to RGB; where the picture is transparent, white shows through.

    Raises `ValueError` for samples whose range is not known: floating point, and integers beyond 16 bits.
    """
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
    """16-bit grey (`I;16`, `I`) to 8 bits. PIL's own conversion clips at 255 instead of scaling."""
    if image.mode.startswith("F"):
        raise ValueError(
            "its samples are floating point, and what counts as white is not in the file. Expected 8 or 16 bits per "
            "sample; save it so."
        )
    values = np.asarray(image)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise ValueError(
            f"its samples lie between {low} and {high}. Expected 0 to 65535 (16 bits) at most; save it so."
        )
    scaled = ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # the one grey that a PNG names as see-through
        scaled[values == transparent] = 255
    return Image.fromarray(scaled)


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
