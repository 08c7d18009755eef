"""Picture files against the original's processors: decoded and resized bit for bit, normalised to 2e-6.

The original opens a file, converts it to RGB and goes on: transparency is dropped and EXIF orientation ignored. That
path is `Image.convert` and `preprocess` here; `load_image` differs from it on purpose, and how is tested as well.
Pillow 13 resizes very tall pictures in another pass order. The set holds both results, and the one that belongs to the
installed Pillow is expected, exactly.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from minigpt4_jax.data.images import load_image, preprocess

PROCESSED: dict[str, Any] = {"atol": 2e-6, "rtol": 0.0}
"""The tolerance of the sets' README for the processor's output on the same uint8 pixels."""

ZEROS, ONES = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)

UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}
"""EXIF orientation -> pixels as they are to be seen (EXIF 2.3, tag 0x0112)."""


def picture_file(golden: Any, name: str) -> Path:
    file: Path = golden.folder / "images" / name
    return file


def as_the_original_opens(golden: Any, name: str) -> Image.Image:
    return Image.open(picture_file(golden, name)).convert("RGB")


def held(golden: Any, name: str) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = golden.arrays(f"images/{Path(name).stem}.npz")
    return arrays


def version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


def differences_of_this_pillow(golden: Any) -> dict[str, np.ndarray]:
    """What the installed Pillow computes otherwise than the main files: `tall__resized_u8_224` -> its own result."""
    changed: dict[str, np.ndarray] = {}
    for file in sorted((golden.folder / "images").glob("pillow*_differences.json")):
        since = version(golden.report(f"images/{file.name}")["compared_with"])
        if version(PIL.__version__) >= since:
            changed |= golden.arrays(f"images/{file.stem}.npz")
    return changed


def side(key: str) -> int:
    """`eval_448` -> 448."""
    return int(key.rpartition("_")[2])


def test_golden_images_are_decoded_bit_for_bit(
    golden: Any, decoded_picture: tuple[str, str]
) -> None:
    name, key = decoded_picture
    image = as_the_original_opens(golden, name)
    np.testing.assert_array_equal(np.asarray(image), held(golden, name)[key])


def test_golden_images_are_what_the_report_says(golden: Any, picture: str) -> None:
    facts = golden.report("images/report.json")["files"][picture]
    with Image.open(picture_file(golden, picture)) as image:
        assert (image.mode, list(image.size)) == (facts["mode_as_opened"], facts["size_wh"])


def test_golden_images_are_resized_bit_for_bit(
    golden: Any, resized_picture: tuple[str, str]
) -> None:
    name, key = resized_picture
    expected = differences_of_this_pillow(golden).get(
        f"{Path(name).stem}__{key}", held(golden, name)[key]
    )
    found = preprocess(as_the_original_opens(golden, name), size=side(key), mean=ZEROS, std=ONES)
    np.testing.assert_array_equal(found, expected.astype(np.float32) / np.float32(255.0))


def test_golden_images_are_processed_as_by_the_original(
    golden: Any, processed_picture: tuple[str, str]
) -> None:
    name, key = processed_picture
    arrays, size = held(golden, name), side(key)
    steps = golden.report("images/report.json")["transforms"][f"blip2_image_eval_{size}"]
    (normalise,) = (step["Normalize"] for step in steps if "Normalize" in step)
    image, resized = as_the_original_opens(golden, name), f"resized_u8_{size}"
    if f"{Path(name).stem}__{resized}" in differences_of_this_pillow(golden):
        image = Image.fromarray(arrays[resized])  # the processor's output on the same uint8 pixels
    found = preprocess(image, size=size, mean=normalise["mean"], std=normalise["std"])
    np.testing.assert_allclose(found.transpose(2, 0, 1), arrays[key], **PROCESSED)


def test_golden_images_both_processors_are_the_one_preprocessing(golden: Any, picture: str) -> None:
    report = golden.report("images/report.json")
    assert picture in report["files"]
    assert report["train_equals_eval"]
    for name, steps in report["transforms"].items():
        assert [next(iter(step)) for step in steps] == ["Resize", "ToTensor", "Normalize"]
        assert steps == report["transforms"][name.replace("train", "eval")]
        resize = steps[0]["Resize"]
        assert (resize["size"], resize["interpolation"]) == ([side(name)] * 2, "bicubic")


def test_golden_images_where_the_original_crashes_ours_names_the_way(
    golden: Any, picture: str
) -> None:
    facts = golden.report("images/report.json")["files"][picture]
    size = side(sorted(golden.report("images/report.json")["transforms"])[0])
    with Image.open(picture_file(golden, picture)) as image:
        if isinstance(facts["pil_image_as_opened"], str):
            with pytest.raises(ValueError, match="expected RGB"):
                preprocess(image, size=size, mean=ZEROS, std=ONES)
            image = load_image(image)
        found = preprocess(image.convert("RGB"), size=size, mean=ZEROS, std=ONES)
    assert [found.shape[2], *found.shape[:2]] == facts["pil_image_converted"]


def test_golden_images_ours_differ_from_the_original_by_white_paper_and_orientation_only(
    golden: Any, picture: str
) -> None:
    with Image.open(picture_file(golden, picture)) as opened:
        orientation = opened.getexif().get(0x0112, 1)
        rgba = np.asarray(opened.convert("RGBA"), np.float64)
        original = np.asarray(opened.convert("RGB"))
    transparent = bool((rgba[..., 3] < 255).any())
    ours = np.asarray(load_image(picture_file(golden, picture)))
    if not transparent:
        np.testing.assert_array_equal(ours, UPRIGHT[orientation](original))
        return
    share = rgba[..., 3:] / 255.0
    on_white = UPRIGHT[orientation](rgba[..., :3] * share + 255.0 * (1.0 - share))
    assert np.abs(ours - on_white).max() <= 1.0  # one level: PIL composes in integers
    assert (ours != UPRIGHT[orientation](original)).any()


def test_golden_images_the_newer_pillow_differs_as_much_as_the_set_says(
    golden: Any, picture_difference: tuple[str, str]
) -> None:
    report, key = picture_difference
    stem, _, array = key.partition("__")
    facts = golden.report(f"images/{report}")["files"]
    (name,) = (file for file in facts if Path(file).stem == stem)
    newer = golden.arrays(f"images/{Path(report).stem}.npz")[key].astype(int)
    apart = np.abs(newer - held(golden, name)[array].astype(int))
    size = side(array)
    assert apart.max() == facts[name][f"resize_{size}_max_diff_in_levels"]
    share = facts[name][f"resize_{size}_share_of_values_that_differ"]
    assert (apart > 0).mean() == pytest.approx(share, rel=1e-9)
