"""Claims about `minigpt4_jax.data.images`, on pictures made here."""

from __future__ import annotations

import io
import logging
import os
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from minigpt4_jax.config import UserError
from minigpt4_jax.data import images
from minigpt4_jax.data.images import load_image, preprocess

RED, GREEN, WHITE = (255, 0, 0), (0, 128, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


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


@pytest.mark.parametrize(
    "data",
    [
        b"not a picture",
        encoded(Image.effect_noise((64, 64), 50), "PNG")[:900],
        encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900],
    ],
    ids=["text", "cut png", "cut jpeg"],
)
def test_what_is_no_whole_picture_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"Cannot open the picture .*holiday\.jpg"):
        load_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_a_file_that_was_cut_anywhere_is_refused_or_whole(kind: str) -> None:
    data = encoded(Image.effect_noise((12, 8), 80).convert("RGB"), kind)
    whole = np.asarray(load_image(data))
    refused = 0
    for length in range(len(data)):
        try:
            np.testing.assert_array_equal(np.asarray(load_image(data[:length])), whole)
        except UserError:
            refused += 1
    assert refused > 0.8 * len(data)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(64), "an HEIC or AVIF picture"),
        (encoded(Image.new("RGB", (8, 8)), "AVIF"), "an HEIC or AVIF picture"),
        (b"\0\0\0\x18ftypisom" + bytes(64), "a video"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"<?xml version='1.0'?>\n<!-- x -->\n<svg xmlns='x'/>", "an SVG drawing"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"PK\x03\x04" + bytes(64), "an archive"),
    ],
)
def test_what_people_take_for_a_picture_is_called_by_its_name(
    tmp_path: Path, data: bytes, kind: str
) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        load_image(path)
    assert f"holiday.jpg': it is {kind}" in str(caught.value)
    assert "Expected one of PNG, JPEG" in str(caught.value)


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    (tmp_path / "p.png").touch()
    with pytest.raises(UserError, match=r"p\.png': it is empty \(0 bytes\)"):
        load_image(tmp_path / "p.png")


def test_formats_off_the_list_are_refused_although_pil_can_read_them() -> None:
    data = encoded(Image.new("RGB", (16, 16)), "ICO")
    assert Image.open(io.BytesIO(data)).size == (16, 16)
    with pytest.raises(UserError, match="Expected one of PNG, JPEG"):
        load_image(data)


def test_missing_files_and_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no picture at .*none\.png'"):
        load_image(tmp_path / "none.png")
    with pytest.raises(UserError, match=r"it is a folder\. Expected a file"):
        load_image(tmp_path)


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_fifo, "a device, pipe or socket"),
        (make_device, "a device, pipe or socket"),
        (make_loop, "symbolic links"),
    ],
)
def test_what_would_never_end_is_refused_at_once(
    make: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    make(tmp_path / "p.png")
    results: list[str] = []

    def read() -> None:
        with pytest.raises(UserError) as caught:
            load_image(tmp_path / "p.png")
        results.append(str(caught.value))

    reader = threading.Thread(target=read, daemon=True)  # a test that would hang fails instead
    reader.start()
    reader.join(timeout=20)
    assert results
    assert said in results[0]


@pytest.fixture
def locked_file(tmp_path: Path) -> Path:
    path = tmp_path / "p.png"
    path.write_bytes(encoded(Image.new("RGB", (2, 2)), "PNG"))
    path.chmod(0)
    return path


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Permissions mean nothing to root, so root becomes nobody for a moment."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


def test_a_file_without_permission_is_refused_with_the_way_out(
    locked_file: Path, unprivileged: None
) -> None:
    with pytest.raises(UserError, match=r"Permission denied.*check the path and its permissions"):
        load_image(locked_file)


@pytest.mark.parametrize("name", ["new\nline.png", "caf\udce9.png", "zero\0.png", "esc\x1b[2J.png"])
def test_odd_names_are_shown_in_one_printable_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_image(str(tmp_path / name))
    assert str(caught.value).isprintable()
    assert repr(name)[1:-1] in str(caught.value)


def test_an_odd_name_is_no_reason_to_refuse_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9\n.png"
    path.write_bytes(encoded(Image.new("RGB", (2, 2), RED), "PNG"))
    assert load_image(path).getpixel((0, 0)) == RED


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


def test_too_large_pictures_are_refused_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encoded(Image.new("RGB", (50, 20)), "PNG")
    monkeypatch.setattr(images, "MAX_PIXELS", 999)
    with pytest.raises(UserError, match="50 x 20 pixels; expected at most 999"):
        load_image(data)
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    assert load_image(data).size == (50, 20)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", len(data) - 1)
    with pytest.raises(UserError, match=f"{len(data)} bytes; expected at most"):
        load_image(data)


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
