"""data/tfds_builders.py: what TFDS users get: splits, features and bytes, without TensorFlow."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data import sources
from minigpt4_jax.data.images import load_image
from minigpt4_jax.data.tfds_builders import NAMES, builders, prepare
from tests.planted import jpeg, plant


def test_cc_sbu_align_is_prepared_and_read_with_the_library_alone(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    folder = write_align(tmp_path / "align", range(4))
    version = prepare("cc_sbu_align", folder, tmp_path / "data")
    assert version == tmp_path / "data" / "cc_sbu_align" / "1.0.0"

    source = tfds.builder_from_directory(version).as_data_source(split="train[:75%]")
    assert len(source) == 3
    for example in source:
        number = int(example["caption"].decode().removeprefix("thing "))
        np.testing.assert_array_equal(example["image"], np.asarray(load_image(jpeg(number))))
        assert example["image_id"].decode() == f"annotation {number} (picture {number})"
    assert "tensorflow" not in sys.modules


def test_tars_are_prepared_without_what_their_index_refuses(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    planted = plant(tmp_path / "tars")
    # Six of thirty samples are lost by the index: far more than 1 %.
    with pytest.raises(
        UserError, match=r"'image_caption_tars' are corrupt .*\(max_corrupt_share\)"
    ):
        prepare("image_caption_tars", planted.folder, tmp_path / "data")
    version = prepare(
        "image_caption_tars", planted.folder, tmp_path / "data", max_corrupt_share=0.5
    )
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = tfds.builder_from_directory(version).as_data_source(split="train", decoders=decoders)
    captions = {example["caption"].decode() for example in source}
    assert (
        planted.captions < captions
    )  # and the two with a broken picture: pictures are copied as they are
    assert len(source) == len(planted.captions) + sum(planted.read_faults.values())
    assert "tensorflow" not in sys.modules


def write_align(folder: Path, numbers: range) -> Path:
    """A `cc_sbu_align` folder of so many pictures."""
    (folder / "image").mkdir(parents=True)
    for number in numbers:
        (folder / "image" / f"{number}.jpg").write_bytes(jpeg(number))
    annotations = [{"image_id": n, "caption": f"thing {n}"} for n in numbers]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    return folder


@pytest.fixture
def vanishing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures 1 and 3 are there when the folder is checked, and gone when they are read."""
    real = sources.read_file

    def read_file(path: Path) -> bytes:
        if path.stem in ("1", "3"):
            path.unlink(missing_ok=True)
        return real(path)

    monkeypatch.setattr(sources, "read_file", read_file)


@pytest.mark.usefixtures("vanishing")
def test_samples_that_cannot_be_read_are_left_out_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import tensorflow_datasets as tfds

    folder = write_align(tmp_path / "align", range(6))
    version = prepare("cc_sbu_align", folder, tmp_path / "data", max_corrupt_share=0.4)
    source = tfds.builder_from_directory(version).as_data_source(split="train")
    captions = {example["caption"].decode() for example in source}
    assert captions == {f"thing {number}" for number in (0, 2, 4, 5)}
    said = [
        record.getMessage() for record in caplog.records if "cc_sbu_align" in record.getMessage()
    ]
    assert "Left out of 'cc_sbu_align': 2 unreadable" in said
    named = [line for line in said if line.startswith("Corrupt sample in source 'cc_sbu_align'")]
    assert [line.partition(" (No such file")[0][-5:] for line in named] == ["1.jpg", "3.jpg"]


@pytest.mark.usefixtures("vanishing")
def test_past_the_share_nothing_is_prepared(tmp_path: Path) -> None:
    folder = write_align(tmp_path / "align", range(6))
    with pytest.raises(
        UserError, match=r"2 of 6 .*\(2 unreadable\); expected at most 20.00% \(max_corrupt_share\)"
    ):
        prepare("cc_sbu_align", folder, tmp_path / "data", max_corrupt_share=0.2)
    assert not (tmp_path / "data" / "cc_sbu_align" / "1.0.0").exists()


def test_the_builders_are_those_that_are_offered() -> None:
    assert tuple(builders()) == NAMES
    with pytest.raises(
        UserError, match="no builder 'coco'; expected one of cc_sbu_align, image_caption_tars"
    ):
        prepare("coco", "x", "y")
