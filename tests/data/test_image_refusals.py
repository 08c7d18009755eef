"""`minigpt4_jax.data.images`: files that are no picture, or none that can be read, and what each is called."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from minigpt4_jax.config import UserError
from minigpt4_jax.data.images import MAX_JPEG_SCANS, PictureError, load_image
from tests.hostile_pictures import many_scans
from tests.planted import encoded

RED = (255, 0, 0)


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
        (b" \n<!-- a --><!-- b --><!DOCTYPE svg>\n<!-- c -->\n<svg>", "an SVG drawing"),
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


def test_finding_its_name_takes_no_longer_however_often_the_beginning_could_match() -> None:
    # A process of its own, which can be ended: a search for a pattern lets no other thread run.
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            "from minigpt4_jax.data.images import PictureError, load_image\n"
            "for data in (b'<!---->' * 64, b'<!-- -->\\n' * 64, b'<!DOCTYPE svg> ' * 64):\n"
            "    try: load_image(data)\n"
            "    except PictureError as error: print(error.fault)",
        ],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert ended.stdout.split() == ["format"] * 3


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


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert load_image(many_scans(MAX_JPEG_SCANS)).size == (64, 64)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(UserError, match="a JPEG in 101 scans; expected at most 100"):
        load_image(many_scans(MAX_JPEG_SCANS + 1))


@pytest.mark.parametrize(
    ("data", "fault", "plain"),
    [
        (b"", "empty", "it is empty (0 bytes). Copy"),
        (b"hello", "format", "it is damaged or not a picture. Expected one of PNG, JPEG"),
        (b"%PDF-1.7", "format", "it is a PDF document. Expected one of PNG, JPEG"),
        (many_scans(3)[:400], "damaged", "it is damaged or not a picture. Expected one of PNG"),
        (
            encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"),
            "samples",
            "the range of its samples is not known. Expected 8 or 16 bits",
        ),
    ],
)
def test_the_plain_words_have_neither_the_name_of_the_file_nor_the_librarys_text(
    tmp_path: Path, data: bytes, fault: str, plain: str
) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(data)
    with pytest.raises(PictureError, match=r"holiday\.jpg") as caught:
        load_image(path)
    assert caught.value.fault == fault
    assert caught.value.plain.startswith(plain)
    assert "(" not in caught.value.plain.replace("(0 bytes)", "")
