"""Claims about `minigpt4_jax.data.images`, on pictures made here."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "F"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert load_image(Image.new("L", (3, 2), 255).convert("RGB").convert(
        "L" if mode == "F" else mode
    ).convert(mode)).getpixel((0, 0)) == WHITE  # fmt: skip


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
        b"",
        b"not a picture",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encoded(Image.effect_noise((64, 64), 50), "PNG")[:900],
        encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900],
    ],
    ids=["empty", "text", "svg", "cut png", "cut jpeg"],
)
def test_what_is_no_whole_picture_is_refused_by_name(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"Cannot open the picture .*holiday\.jpg"):
        load_image(path)


def test_formats_off_the_list_are_refused_although_pil_can_read_them() -> None:
    data = encoded(Image.new("RGB", (16, 16)), "ICO")
    assert Image.open(io.BytesIO(data)).size == (16, 16)
    with pytest.raises(UserError, match="Expected one of PNG, JPEG"):
        load_image(data)


def test_missing_files_and_folders_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.png: No such file"):
        load_image(tmp_path / "none.png")
    with pytest.raises(UserError, match="Is a directory"):
        load_image(tmp_path)


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
