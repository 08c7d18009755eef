"""Pictures that are meant to break a server, and odd ones that it has to take.

For the tests and for the count in `docs/reliability.md` (`tools/hostile_input.py`). All are made here, from nothing but
their formats' rules; what is drawn at random is drawn with a fixed seed.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from tests.hostile_urls import LOCAL_FILE
from tests.planted import encoded

TAKEN = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

Expected = Literal["taken", "refused", "too large", "either"]


@dataclass(frozen=True)
class Case:
    """A file, and what becomes of it. `too large`: refused for that, and so before it is decoded;
    `either`: a picture or a refusal, but nothing else."""

    name: str
    data: bytes
    expected: Expected


def small() -> Image.Image:
    """Eight blocks of one colour each, none like its mirror image: what JPEG keeps whichever way it lies."""
    colours = np.random.default_rng(7).integers(0, 256, (2, 4, 3)).astype(np.uint8)
    return Image.fromarray(np.kron(colours, np.ones((8, 8, 1), np.uint8)))


def small_file(kind: str, **options: object) -> bytes:
    exact = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    return encoded(small(), kind, **exact, **options)


def chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(
    width: int,
    height: int,
    *chunks: bytes,
    bits: int = 8,
    colour: int = 2,
    rows: bytes = b"",
    magic: bytes = PNG_MAGIC,
) -> bytes:
    """A PNG with a header, `chunks`, and whatever rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"".join(
        [magic, header, *chunks, chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")]
    )


def with_chunk(inserted: bytes) -> bytes:
    """The small PNG with one chunk more, behind its header."""
    data = small_file("PNG")
    return data[:33] + inserted + data[33:]


def with_segment(marker: int, content: bytes) -> bytes:
    """The small JPEG with one segment more, behind its start."""
    data = small_file("JPEG")
    return data[:2] + struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content + data[2:]


def turned(orientation: int, kind: str) -> bytes:
    """The small picture lying as `orientation` says (EXIF 2.3, tag 0x0112): upright, all eight are one picture."""
    lying = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # it takes a turn to the right to set it upright
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    image = small() if orientation == 1 else small().transpose(lying[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    return encoded(image, kind, exif=exif, **options)


def many_scans(count: int, side: int = 64) -> bytes:
    """A progressive JPEG whose last scan comes again and again: a pass over all pixels for few bytes each."""
    data = encoded(Image.new("RGB", (side, side), (200, 30, 30)), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (count - data.count(b"\xff\xda")) + b"\xff\xd9"


def animated(kind: str, **options: object) -> bytes:
    """Three frames of which the first is the small picture."""
    others = [Image.new("RGB", small().size, (i, i, i)) for i in (0, 255)]
    return small_file(kind, save_all=True, append_images=others, duration=100, **options)


def cut_files() -> Iterator[tuple[str, bytes, list[bytes]]]:
    """Small files, each with all its beginnings."""
    for kind in TAKEN:
        data = small_file(kind) if kind != "BMP" else encoded(Image.new("RGB", (5, 3)), "BMP")
        yield kind, data, [data[:length] for length in range(len(data))]


def bombs() -> Iterator[Case]:
    """Small files with large pictures, or with much else."""
    unpacked = bytes(50 * 2**20)
    packed = zlib.compress(unpacked, 9)
    yield Case("49 Mpx in 6 kB", png(7000, 7000, bits=1, colour=0, rows=bytes(7000 * 876)), "taken")
    for width, height in (
        (7001, 7200),
        (20_000, 20_000),
        (2**31 - 1, 2**31 - 1),
        (2**32 - 1, 1),
        (65_501, 1),
        (1, 65_501),
    ):
        yield Case(f"PNG {width} x {height}", png(width, height), "too large")
    yield Case("PNG 0 x 0", png(0, 0), "refused")
    yield Case("PNG 0 x 5", png(0, 5), "refused")
    yield Case("PNG without its rows", png(5000, 5000), "refused")
    yield Case("more rows than it has", png(4, 4, rows=unpacked), "either")
    yield Case("1 x 65500", encoded(Image.new("L", (1, 65_500)), "PNG"), "taken")
    yield Case("65500 x 1", encoded(Image.new("RGB", (65_500, 1)), "JPEG"), "taken")
    for name, inserted in (
        ("zTXt", b"x\0\0" + packed),
        ("iTXt", b"x\0\1\0\0\0" + packed),
        ("iCCP", b"x\0\0" + packed),
    ):
        yield Case(f"{name} of 50 MB", with_chunk(chunk(name.encode(), inserted)), "either")
    yield Case("2,000 text chunks", with_chunk(chunk(b"tEXt", b"x\0" + bytes(100)) * 2000), "taken")
    yield from endless_headers()
    yield Case("JPEG in 101 scans", many_scans(101), "too large")
    yield Case("JPEG in 20,000 scans", many_scans(20_000), "too large")
    yield Case("JPEG in 100 scans", many_scans(100), "taken")
    data = small_file("JPEG")
    frame = data.index(b"\xff\xc0")
    huge = data[: frame + 5] + struct.pack(">HH", 65_500, 65_500) + data[frame + 9 :]
    yield Case("JPEG 65500 x 65500", huge, "too large")
    header = huge[frame : frame + 19]
    yield Case(
        "JPEG with a second frame", data[: frame + 19] + header + data[frame + 19 :], "too large"
    )
    gif = bytearray(small_file("GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    yield Case("GIF with a huge screen", bytes(gif), "too large")
    gif[6:10] = struct.pack("<HH", 1, 1)
    place = gif.index(b",", 13 + 3 * 2 ** ((gif[10] & 7) + 1))
    gif[place + 5 : place + 9] = struct.pack("<HH", 65_535, 65_535)
    yield Case("GIF with a frame beyond its screen", bytes(gif), "too large")
    bmp = bytearray(small_file("BMP"))
    for name, width, height in (("huge", 2**31 - 1, 2**31 - 1), ("upside down", 32, -(2**31))):
        bmp[18:26] = struct.pack("<ii", width, height)
        yield Case(f"BMP {name}", bytes(bmp), "too large")
    webp = b"VP8X" + struct.pack("<IB3x", 10, 2) + b"\xff\x3f\0" * 2
    yield Case("WebP 16384 x 16384", riff(webp), "too large")


def endless_headers() -> Iterator[Case]:
    """Headers of so many parts that going through them is the attack; 20 MB of each took seconds."""
    parts = 25_000
    jpeg, gif = small_file("JPEG"), small_file("GIF")
    colours = 13 + 3 * 2 ** ((gif[10] & 7) + 1)
    for name, data in {
        "PNG texts": with_chunk(chunk(b"tEXt", b"x\0") * parts),
        "PNG chunks of nobody": with_chunk(chunk(b"prVt", b"") * parts),
        "JPEG comments": jpeg[:2] + b"\xff\xfe\0\x02" * parts + jpeg[2:],
        "JPEG profiles": jpeg[:2] + b"\xff\xe2\0\x02" * parts + jpeg[2:],
        "JPEG filling": jpeg[:2] + b"\xff" * parts + jpeg[2:],
        "GIF comments": gif[:colours] + b"\x21\xfe\x01x\0" * parts + gif[colours:],
        "GIF comment in blocks": gif[:colours]
        + b"\x21\xfe"
        + b"\x01x" * parts
        + b"\0"
        + gif[colours:],
        "GIF filling": gif[:colours] + b"\x01" * parts + gif[colours:],
    }.items():
        yield Case(f"25,000 {name}", data, "refused")


def riff(content: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(content) + 4) + b"WEBP" + content


def odd_pictures() -> Iterator[Case]:
    """What cameras and programs do write."""
    image = small()
    grey16 = Image.fromarray(np.arange(0, 65_536, 64, dtype=np.uint16).reshape(32, 32))
    palette = image.quantize(4)
    for name, data in {
        "1 x 1": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "1 bit": encoded(image.convert("1"), "PNG"),
        "grey": encoded(image.convert("L"), "PNG"),
        "grey with alpha": encoded(image.convert("LA"), "PNG"),
        "RGBA": encoded(image.convert("RGBA"), "PNG"),
        "16-bit grey": encoded(grey16, "PNG"),
        "16-bit RGB": png(2, 2, bits=16, rows=(b"\0" + bytes(12)) * 2),
        "palette": encoded(palette, "PNG"),
        "palette with a transparent entry": encoded(palette, "PNG", transparency=1),
        "palette with alpha": encoded(palette, "PNG", transparency=b"\0\x80\xff\x40"),
        "CMYK": encoded(image.convert("CMYK"), "JPEG"),
        "progressive": encoded(image, "JPEG", progressive=True),
        "animated GIF": animated("GIF"),
        "animated WebP": animated("WEBP"),
        "APNG": animated("PNG"),
        "APNG with another first picture": animated("PNG", default_image=True),
        "MPO": encoded(image, "MPO", save_all=True, append_images=[image.rotate(180)]),
        "32-bit BMP": encoded(image.convert("RGBA"), "BMP"),
        "pixels in thousands of chunks": scattered(),
        "broken colour profile": encoded(image, "PNG", icc_profile=b"no profile" * 50),
        "broken colour profile in a JPEG": encoded(image, "JPEG", icc_profile=bytes(range(256))),
        "text in the first bytes after the end": small_file("PNG") + b"<script>alert(1)</script>",
        "a page in a comment": encoded(image, "GIF", comment=b"<html><script>alert(1)</script>"),
        "broken EXIF": encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        "EXIF that names itself": encoded(
            image, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + exif_loop()
        ),
        "broken EXIF in a PNG": with_chunk(chunk(b"eXIf", b"MM\0*garbage")),
        "broken EXIF in a WebP": encoded(image, "WEBP", exif=b"garbage"),
        "XMP without an end": with_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta" * 900),
        "rotations that there are not": encoded(image, "JPEG", exif=orientation_tag(9)),
        "a rotation beyond all": encoded(image, "JPEG", exif=orientation_tag(65_535)),
    }.items():
        yield Case(name, data, "taken")


def scattered() -> bytes:
    """Noise, two bytes of it to a chunk: many parts behind the header are no fault."""
    noise = random.Random(1).randbytes(101 * 300)
    rows = zlib.compress(b"".join(b"\0" + noise[i : i + 300] for i in range(0, 30_000, 300)))
    data = b"".join(chunk(b"IDAT", rows[i : i + 2]) for i in range(0, len(rows), 2))
    whole = png(100, 100)
    return whole[:33] + data + whole[-12:]


def exif_loop() -> bytes:
    """A directory whose only entry and whose successor are the directory itself."""
    return struct.pack("<HHHIII", 1, 0x8769, 4, 1, 8, 8)


def orientation_tag(value: int) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, value, 0, 0)


def disguised() -> Iterator[Case]:
    """What is no picture, or none of those that are taken, whatever it is called."""
    image = small()
    card = b"SIMPLE  =                    T".ljust(80)
    fits = (card + b"END".ljust(80)).ljust(2880)
    for name, data in {
        "nothing": b"",
        "one byte": b"\x89",
        "text": b"hello, world",
        "zeros": bytes(10_000),
        "HTML": b"<!DOCTYPE html><html><script>fetch('/')</script></html>",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='%b'/></svg>"
        % LOCAL_FILE.encode(),
        "SVG with a head": b"<?xml version='1.0'?>\n<!-- a --> <!DOCTYPE svg>\n<!-- b -->\n<svg></svg>",
        "comments without an SVG": b"<!---->" * 585,
        "comments and blanks without an SVG": b"<!-- -->\n" * 450,
        "a comment without an end": b"<!--" * 1000,
        "document types without an SVG": b"<!DOCTYPE svg> " * 270,
        "blanks": b" \n" * 5000,
        "XML heads": b"<?xml " * 700,
        "XML with entities": b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM '%b'>]><a>&b;</a>"
        % LOCAL_FILE.encode(),
        "PDF": b"%PDF-1.7\n1 0 obj<</Type/Catalog/OpenAction 2 0 R>>endobj",
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%id) (w) file\n%%EOF\n",
        "EPS with a DOS header": b"\xc5\xd0\xd3\xc6" + bytes(28) + b"%!PS-Adobe-3.0 EPSF-3.0",
        "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(300),
        "FITS": fits,
        "FITS, packed": fits.replace(b"END", b"ZCMPTYPE= 'GZIP_1'") + zlib.compress(bytes(10**6)),
        "ZIP": b"PK\x03\x04" + bytes(64),
        "gzip": b"\x1f\x8b\x08" + bytes(64),
        "HEIC": b"\0\0\0\x18ftypheic" + bytes(64),
        "MP4": b"\0\0\0\x18ftypisom" + bytes(64),
        "JPEG XL": b"\xff\x0a" + bytes(64),
        "JPEG 2000": encoded(image, "JPEG2000"),
        "AVIF": encoded(image, "AVIF"),
        "TIFF": encoded(image, "TIFF"),
        "ICO": encoded(image, "ICO"),
        "ICNS": encoded(image, "ICNS"),
        "PPM": encoded(image, "PPM"),
        "TGA": encoded(image, "TGA"),
        "PCX": encoded(image, "PCX"),
        "DDS": encoded(image, "DDS"),
        "SGI": encoded(image, "SGI"),
        "QOI": encoded(image, "QOI"),
        "a pickle": b"\x80\x04\x95\x1e\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
        "an ELF program": b"\x7fELF\x02\x01\x01" + bytes(100),
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
        "PNG with text-mode line ends": small_file("PNG").replace(b"\r\n", b"\n"),
        "TIFF called PNG by its first bytes": PNG_MAGIC + encoded(image, "TIFF"),
        "data URL in a data URL": b"data:image/png;base64,iVBORw0KGgo=",
        "a path": b"/etc/passwd",
        **{f"only the start of {kind}": small_file(kind)[:16] for kind in TAKEN},
    }.items():
        yield Case(name, data, "refused")


def broken_pngs() -> Iterator[Case]:
    """Chunks that say what cannot be."""
    rows = (b"\0" + bytes(12)) * 4
    yield Case("unknown bit depth", png(4, 4, bits=7, rows=rows), "refused")
    yield Case("unknown colour type", png(4, 4, colour=5, rows=rows), "refused")
    yield Case("palette without one", png(4, 4, colour=3, rows=(b"\0" + bytes(4)) * 4), "either")
    wrong = bytearray(small_file("PNG"))
    wrong[29] ^= 1
    yield Case("wrong checksum of the header", bytes(wrong), "refused")
    for name, length in (("huge", 2**31 - 1), ("negative", 2**32 - 1), ("short", 3)):
        data = small_file("PNG")
        yield Case(
            f"chunk of {name} length", data[:33] + struct.pack(">I", length) + data[37:], "either"
        )
    second = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    yield Case("a second header", png(4, 4, second, rows=rows), "refused")
    whole = png(4, 4, rows=rows)
    yield Case("a header at the end", whole[:-12] + second + whole[-12:], "either")
    control = chunk(b"acTL", struct.pack(">II", 2**31, 0))
    frame = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 30_000, 30_000, 9, 9, 0, 0, 9, 9))
    yield Case("animation of impossible frames", png(4, 4, control, frame, rows=rows), "either")
    yield Case("rows that are not packed", small_file("PNG")[:41] + b"not zlib at all", "refused")
    yield Case("short header", PNG_MAGIC + chunk(b"IHDR", b"\0\0\0\4"), "refused")
    yield Case("no rows", PNG_MAGIC + chunk(b"IEND", b""), "refused")
    yield Case("zero-length rows", png(4, 4, rows=b""), "refused")
    yield Case("unknown filter", png(4, 4, rows=(b"\x09" + bytes(12)) * 4), "either")


def changed_files(count: int) -> Iterator[Case]:
    """`count` of each format with bytes changed, taken out, put in and exchanged, by chance."""
    draw = random.Random(2026)
    for kind in TAKEN:
        whole = small_file(kind)
        for number in range(count):
            data = bytearray(whole)
            for _ in range(draw.choice((1, 2, 8))):
                place = draw.randrange(len(data))
                what = draw.randrange(4)
                if what == 0:
                    data[place] = draw.randrange(256)
                elif what == 1:
                    data[place : place + 2] = draw.choice((b"\xff\xff", b"\0\0", b"\x7f\xff"))
                elif what == 2:
                    del data[place : place + draw.randrange(1, 9)]
                else:
                    data[place:place] = draw.randbytes(draw.randrange(1, 9))
            yield Case(f"{kind} changed {number}", bytes(data), "either")


def all_cases(changed: int) -> Iterator[Case]:
    """Everything, with `changed` changed files of each format."""
    for kind, _, beginnings in cut_files():
        for length, data in enumerate(beginnings):
            yield Case(f"{kind} cut at {length}", data, "either")
    for orientation in range(1, 9):
        for kind in ("JPEG", "PNG", "WEBP"):
            yield Case(f"{kind} of orientation {orientation}", turned(orientation, kind), "taken")
    for cases in (bombs(), odd_pictures(), disguised(), broken_pngs(), changed_files(changed)):
        yield from cases
