"""Claims about `minigpt4_jax.data.images`, on pictures made here."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from minigpt4_jax.config import UserError
from minigpt4_jax.data.images import PictureLimits, load_image, preprocess
from tests.planted import encoded

RED, GREEN, WHITE = (255, 0, 0), (0, 128, 0), (255, 255, 255)


def test_paths_bytes_and_pil_pictures_are_the_same_picture(tmp_path: Path) -> None:
    image = Image.fromarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3))
    data = encoded(image, "PNG")
    path = tmp_path / "p.png"
    path.write_bytes(data)
    for source in (path, str(path), data, image):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image))


def test_a_rotated_photograph_comes_out_upright() -> None:
    image = Image.new("RGB", (40, 20), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    assert load_image(encoded(image, "JPEG", exif=exif)).size == (20, 40)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    loaded = load_image(encoded(image.convert(mode), "PNG"))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (0, 0, 0)]


def test_a_transparent_palette_entry_is_laid_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    loaded = load_image(encoded(image, "PNG", transparency=0))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, GREEN]


def test_a_transparent_colour_of_an_rgb_picture_is_laid_on_white() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), GREEN)
    loaded = load_image(encoded(image, "PNG", transparency=RED))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [WHITE, GREEN]


def test_half_transparent_is_half_white() -> None:
    loaded = load_image(Image.new("RGBA", (1, 1), (0, 0, 0, 51)))
    assert loaded.getpixel((0, 0)) == (204, 204, 204)


def test_sixteen_bit_grey_is_scaled_and_not_clipped() -> None:
    image = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    loaded = load_image(encoded(image, "PNG"))
    assert [loaded.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.new("RGB", (3, 2), WHITE).convert(mode)
    assert load_image(image).getpixel((0, 0)) == WHITE


def test_a_cmyk_photograph_keeps_its_colours() -> None:
    data = encoded(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=100)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(np.asarray(load_image(data)) - np.array(RED)).max() <= 2


def test_the_transparent_grey_of_a_sixteen_bit_png_is_white() -> None:
    image = Image.fromarray(np.array([[1000, 2000]], np.uint16))
    loaded = load_image(encoded(image, "PNG", transparency=1000))
    assert [loaded.getpixel((x, 0))[0] for x in range(2)] == [255, 8]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.zeros((2, 2), np.float32), "floating point.*Expected 8 or 16 bits"),
        (np.full((2, 2), 65536, np.int32), "between 65536 and 65536.*Expected 0 to 65535"),
        (np.full((2, 2), -1, np.int32), "between -1 and -1"),
    ],
)
def test_samples_of_unknown_range_are_refused_and_not_guessed(
    values: np.ndarray, said: str
) -> None:
    with pytest.raises(UserError, match=f"Cannot open the picture: .*{said}"):
        load_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_thin_pictures_fill_the_square(size: tuple[int, int]) -> None:
    values = preprocess(
        load_image(encoded(Image.new("RGB", size, RED), "PNG")),
        size=4,
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    np.testing.assert_array_equal(values, np.broadcast_to(np.float32([1, 0, 0]), (4, 4, 3)))


def test_an_animation_is_its_first_frame() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert load_image(data).getpixel((0, 0)) == RED


def test_a_given_pil_picture_is_not_changed() -> None:
    image = Image.new("RGBA", (3, 2), (0, 0, 0, 0))
    load_image(image)
    assert (image.mode, image.getpixel((0, 0))) == ("RGBA", (0, 0, 0, 0))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png_with(chunk: bytes) -> bytes:
    """A red 4x4 PNG with a further chunk behind its header."""
    data = encoded(Image.new("RGB", (4, 4), RED), "PNG")
    return data[:33] + chunk + data[33:]


def test_a_text_chunk_that_unpacks_to_gigabytes_is_refused() -> None:
    bomb = zlib.compress(bytes(80_000_000), 9)
    with pytest.raises(UserError, match="Decompressed data too large"):
        load_image(png_with(png_chunk(b"zTXt", b"Comment\0\0" + bomb)))


def test_a_broken_colour_profile_changes_nothing() -> None:
    chunk = png_chunk(b"iCCP", b"p\0\0" + b"this is not zlib")
    assert load_image(png_with(chunk)).getpixel((0, 0)) == RED
    profile = encoded(Image.new("RGB", (8, 8), RED), "JPEG", icc_profile=b"no profile")
    assert load_image(profile).size == (8, 8)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_broken_exif_block_is_said_and_the_pixels_are_used(
    exif: bytes, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    image = Image.new("RGB", (4, 2), RED)
    with caplog.at_level(logging.WARNING):
        loaded = load_image(encoded(image, kind, exif=exif, lossless=True))
    assert (loaded.size, loaded.getpixel((0, 0))) == ((4, 2), RED)
    (line,) = caplog.messages
    assert line.startswith("the picture: ")


def test_turning_is_done_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        once = load_image(encoded(Image.new("RGB", (40, 20), RED), kind, exif=exif))
        assert once.size == (20, 40)
        assert load_image(once).size == (20, 40)


def test_a_picture_of_20000_by_20000_is_refused_by_its_header_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def decode(image: ImageFile.ImageFile) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    for side, said in ((20_000, "400000000 pixels"), (12_000, "12000 x 12000 pixels")):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header)
        data += png_chunk(b"IDAT", zlib.compress(bytes(1000))) + png_chunk(b"IEND", b"")
        with pytest.raises(UserError, match=f"{said}; expected at most 100000000"):
            load_image(data)


def test_a_large_file_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: no disk is used
    with pytest.raises(UserError, match=f"{1 << 40} bytes; expected at most"):
        load_image(path)


def test_too_large_pictures_are_refused_before_they_are_decoded() -> None:
    data = encoded(Image.new("RGB", (50, 20)), "PNG")
    with pytest.raises(UserError, match="50 x 20 pixels; expected at most 999 in all"):
        load_image(data, limits=PictureLimits(max_pixels=999))
    with pytest.raises(UserError, match="50 x 20 pixels; expected at most 49 on a side"):
        load_image(data, limits=PictureLimits(max_side=49))
    assert load_image(data, limits=PictureLimits(max_pixels=1000, max_side=50)).size == (50, 20)
    with pytest.raises(UserError, match=f"{len(data)} bytes; expected at most"):
        load_image(data, limits=PictureLimits(max_bytes=len(data) - 1))
    with pytest.raises(UserError, match="Expected one of JPEG, GIF;"):
        load_image(data, limits=PictureLimits(formats=("JPEG", "GIF")))


def test_preprocess_scales_then_normalises_each_channel() -> None:
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.25, 2.0)
    values = preprocess(Image.new("RGB", (9, 5), (255, 0, 51)), size=4, mean=mean, std=std)
    assert values.shape == (4, 4, 3)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, np.broadcast_to([1.0, -1.0, 0.1], (4, 4, 3)), atol=1e-6)


def test_preprocess_fills_the_square_whatever_the_shape() -> None:
    image = Image.new("RGB", (40, 10), RED)
    image.paste(GREEN, (20, 0, 40, 10))
    values = preprocess(image, size=8, mean=(0.0,) * 3, std=(1.0,) * 3)
    np.testing.assert_allclose(values[:, 0], np.broadcast_to([1.0, 0, 0], (8, 3)), atol=1e-6)
    np.testing.assert_allclose(values[:, -1], np.broadcast_to([0, 128 / 255, 0], (8, 3)), atol=1e-6)


def test_preprocess_resizes_the_eight_bit_picture_with_pils_bicubic() -> None:
    image = Image.effect_noise((31, 17), 80).convert("RGB")
    expected = np.asarray(image.resize((12, 12), Image.Resampling.BICUBIC)) / 255.0
    values = preprocess(image, size=12, mean=(0.0,) * 3, std=(1.0,) * 3)
    np.testing.assert_allclose(values, expected, atol=1e-7)


def test_preprocess_refuses_what_did_not_come_from_load_image() -> None:
    with pytest.raises(ValueError, match="RGBA; expected RGB"):
        preprocess(Image.new("RGBA", (2, 2)), size=2, mean=(0.0,) * 3, std=(1.0,) * 3)
