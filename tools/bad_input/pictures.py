"""The cases about picture files: refused, not even files, and odd ones that are read rightly."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from case import PHOTO, RED, Case, encoded, write
from PIL import Image


def chunk(kind: bytes, content: bytes) -> bytes:
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def png_header(width: int, height: int) -> bytes:
    """The first 33 bytes of a PNG, and pixels for one line."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))


def png_with(extra: bytes) -> bytes:
    data = encoded(Image.new("RGB", (4, 4), RED), "PNG")
    return data[:33] + extra + data[33:]


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def locked(name: str) -> Callable[[], None]:
    def make() -> None:
        write(name, encoded(Image.new("RGB", (4, 4)), "PNG"))()
        Path(name).chmod(0)
        os.chmod(".", 0o755)

    return make


def without_rights() -> None:
    """Root may read everything, so it becomes nobody."""
    if os.geteuid() == 0:
        os.seteuid(65534)


NOISE = Image.effect_noise((64, 64), 80).convert("RGB")


def refused(what: str, name: str, data: bytes | str, says: str) -> Case:
    return Case(
        group="Pictures that are refused",
        what=what,
        command=("minigpt4", "chat", name, "What is this?"),
        says=says,
        prepare=write(name, data),
    )


def odd(what: str, says: str, make: Callable[[], None], name: str = "p.png", **more: Any) -> Case:
    command = ("minigpt4", "chat", name, "What is this?")
    group = "Paths that are no pictures"
    return Case(group=group, what=what, command=command, says=says, prepare=make, **more)


def read(what: str, name: str, data: bytes, says: str) -> Case:
    return Case(
        group="Pictures that look odd and are read rightly",
        what=what,
        command=("load_image", name),
        says=says,
        code=0,
        prepare=write(name, data),
    )


HEIC = b"\0\0\0\x18ftypheic" + bytes(64)
PICTURES = (
    refused(
        "text called .png", "notes.png", "These are notes.", "unknown format.*Expected one of PNG"
    ),
    refused("an empty file", "p.png", b"", "it is empty"),
    refused("a PNG cut in half", "p.png", encoded(NOISE, "PNG")[:5000], "damaged"),
    refused("a JPEG cut in half", "p.jpg", encoded(NOISE, "JPEG")[:1500], "truncated"),
    refused("HEIC by another name", "IMG_1.jpg", HEIC, "an HEIC or AVIF picture"),
    refused("AVIF by another name", "p.jpg", encoded(PHOTO, "AVIF"), "an HEIC or AVIF picture"),
    refused("SVG by another name", "p.png", "<svg xmlns='x'/>", "an SVG drawing"),
    refused("PDF by another name", "p.jpg", "%PDF-1.7\n", "a PDF document"),
    refused("a web page saved as JPEG", "p.jpg", "<!doctype html><title>404</title>", "a web page"),
    refused(
        "20,000 x 20,000 pixels", "p.png", png_header(20_000, 20_000), "400000000 pixels; expected"
    ),
    refused(
        "12,000 x 12,000 pixels",
        "p.png",
        png_header(12_000, 12_000),
        "12000 x 12000 pixels; expected",
    ),
    refused(
        "a text chunk that unpacks to 80 MB",
        "p.png",
        png_with(chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000), 9))),
        "Decompressed data too large",
    ),
    refused(
        "floating-point samples", "p.tif", encoded(Image.new("F", (4, 4)), "TIFF"), "floating point"
    ),
    refused(
        "32-bit samples beyond 16 bits",
        "p.tif",
        encoded(Image.new("I", (4, 4), 99_999), "TIFF"),
        "Expected 0 to 65535",
    ),
    odd("no such file", "There is no picture at 'p.png'", lambda: None),
    odd("a folder", "it is a folder", lambda: os.mkdir("p.png")),
    odd("no permission to read it", "Permission denied", locked("p.png"), patch=without_rights),
    odd("a symbolic link to itself", "symbolic links", lambda: os.symlink("p.png", "p.png")),
    odd("a FIFO that nobody writes to", "a device, pipe or socket", lambda: os.mkfifo("p.png")),
    odd("/dev/zero", "a device, pipe or socket", lambda: None, name="/dev/zero"),
    odd(
        "a file of a terabyte",
        "bytes; expected at most",
        lambda: os.truncate(os.open("p.png", os.O_CREAT | os.O_RDWR), 1 << 40),
    ),
    odd(
        "a name with a line break that is not there", "holiday", lambda: None, name="holiday\n1.png"
    ),
    odd("a name that is not UTF-8 and not there", "udce9", lambda: None, name="caf\udce9.png"),
    read("a name that is not UTF-8", "caf\udce9\n.png", encoded(PHOTO, "PNG"), "4 x 2.*255, 0, 0"),
    read(
        "RGBA: transparency on white",
        "p.png",
        encoded(Image.new("RGBA", (4, 2), (0, 0, 0, 51)), "PNG"),
        "204, 204, 204",
    ),
    read("grey", "p.png", encoded(Image.new("L", (4, 2), 7), "PNG"), "7, 7, 7"),
    read(
        "palette with a transparent entry",
        "p.gif",
        encoded(Image.new("P", (4, 2)), "GIF", transparency=0),
        "255, 255, 255",
    ),
    read(
        "CMYK",
        "p.jpg",
        encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100),
        r"25[345], [012], [012]",
    ),
    read(
        "16 bits per sample: scaled, not clipped",
        "p.png",
        encoded(Image.fromarray(np.full((2, 4), 32768, np.uint16)), "PNG"),
        "128, 128, 128",
    ),
    read(
        "an animation: its first frame",
        "p.gif",
        encoded(PHOTO, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 2))]),
        "255, 0, 0",
    ),
    read(
        "EXIF says: turned by 90 degrees",
        "p.jpg",
        encoded(PHOTO, "JPEG", exif=orientation(6)),
        "2 x 4",
    ),
    read(
        "a broken EXIF block: said, pixels used",
        "p.png",
        encoded(PHOTO, "PNG", exif=b"Exif\0\0garbage"),
        "EXIF block cannot be read.*\n.*4 x 2",
    ),
    read(
        "a broken colour profile",
        "p.png",
        png_with(chunk(b"iCCP", b"p\0\0no zlib")),
        "4 x 4.*255, 0, 0",
    ),
    read("1 x 1 pixel", "p.png", encoded(Image.new("RGB", (1, 1), RED), "PNG"), "1 x 1.*255, 0, 0"),
    read(
        "1 x 5000 pixels",
        "p.png",
        encoded(Image.new("RGB", (1, 5000), RED), "PNG"),
        "1 x 5000.*255, 0, 0",
    ),
)
