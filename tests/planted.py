"""A small corpus of webdataset tars with planted faults, and what a reader has to say about it.

Not for: the rules of the format; the tars are put together byte by byte here, with Python's `tarfile` for the headers.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

END = bytes(2 * 512)
HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def member(name: str, data: bytes, *, format: int = tarfile.USTAR_FORMAT) -> bytes:
    """Header, data and padding of one file."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(format) + data + bytes(-len(data) % 512)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """A picture as a file of the kind that PIL calls `kind`."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(number: int) -> bytes:
    """A 28-pixel picture that depends on `number`."""
    pixels = np.full((28, 28, 3), 255, np.uint8)
    pixels[: 4 + number % 24, : 28 - number % 20] = (number * 37 % 256, number * 91 % 256, 128)
    return encoded(Image.fromarray(pixels), "JPEG", quality=90)


def caption(number: int) -> bytes:
    """The JSON of sample `number`, as img2dataset writes it."""
    return json.dumps({"caption": f"thing {number}", "url": f"http://x/{number}.jpg"}).encode()


def sample(number: int, *, image: bytes | None = None, words: bytes | None = None) -> bytes:
    """The two members of sample `number`."""
    return member(f"{number:05d}.jpg", jpeg(number) if image is None else image) + member(
        f"{number:05d}.json", caption(number) if words is None else words
    )


def samples(numbers: Iterable[int]) -> bytes:
    """Good samples one after the other."""
    return b"".join(sample(number) for number in numbers)


def zero_header(tar: bytes, name: str) -> bytes:
    """Sets the header block of a member to zeros."""
    at = header_at(tar, name)
    return tar[:at] + bytes(512) + tar[at + 512 :]


def flip_checksum(tar: bytes, name: str) -> bytes:
    """Changes one byte of a member's header (in its time), so that the checksum is wrong."""
    at = header_at(tar, name) + 140
    return tar[:at] + bytes([tar[at] ^ 1]) + tar[at + 1 :]


def header_at(tar: bytes, name: str) -> int:
    """Offset of a member's header."""
    at = tar.index(name.encode() + b"\0")
    assert at % 512 == 0
    return at


@dataclass
class Planted:
    """What is in the corpus."""

    folder: Path
    index_faults: dict[str, int] = field(default_factory=dict)
    """By reason, as the index must report them."""
    read_faults: dict[str, int] = field(default_factory=dict)
    """By reason, as the stream must count them in one pass."""
    captions: set[str] = field(default_factory=set)
    """Of all samples that can be used."""


def plant(folder: Path) -> Planted:
    """Writes eight shards with the seven faults (and a few more of the same kinds)."""
    folder.mkdir(parents=True, exist_ok=True)
    swapped = b"".join(
        [
            member("00062.jpg", jpeg(62)),
            sample(63),
            member("00062.json", caption(62)),
        ]
    )
    shards = {
        "00-good": samples(range(8)) + END,
        # The last picture is cut in its data.
        "01-truncated": samples([10, 11, 12]) + sample(13)[:700],
        "02-zero": zero_header(samples([20, 21, 22]), "00021.json") + END,
        "03-checksum": flip_checksum(samples([30, 31, 32, 33]), "00032.jpg") + END,
        "04-duplicate": samples([40, 41]) + sample(40, words=b'{"caption": "second"}') + END,
        "05-order": samples([60, 61]) + swapped + END,
        "06-pictures": sample(70, image=b"") + samples([71]) + sample(72, image=HTML) + END,
        "07-caption": member("00080.jpg", jpeg(80))
        + sample(81)
        + sample(82, words=b'{"url": "x"}')
        + END,
    }
    for name, content in shards.items():
        (folder / f"{name}.tar").write_bytes(content)
    usable = [*range(8), 10, 11, 12, 20, 22, 30, 31, 33, 40, 41, 60, 61, 62, 63, 71, 81]
    return Planted(
        folder,
        {
            "truncated tail": 1,
            "zero block": 1,
            "bad checksum": 1,
            "duplicate key": 1,
            "wrong member order": 1,
            "no caption": 2,
        },
        {"empty image": 1, "HTML instead of an image": 1},
        {f"thing {number}" for number in usable},
    )
