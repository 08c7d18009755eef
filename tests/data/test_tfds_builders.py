"""data/tfds_builders.py: what TFDS users get: splits, features and bytes, without TensorFlow."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data.images import load_image
from minigpt4_jax.data.tfds_builders import NAMES, builders, prepare
from tests.planted import jpeg, plant


def test_cc_sbu_align_is_prepared_and_read_with_the_library_alone(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    folder = tmp_path / "align"
    (folder / "image").mkdir(parents=True)
    for number in range(4):
        (folder / "image" / f"{number}.jpg").write_bytes(jpeg(number))
    annotations = [{"image_id": n, "caption": f"thing {n}"} for n in range(4)]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
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
    version = prepare("image_caption_tars", planted.folder, tmp_path / "data")
    decoders = {"image": tfds.decode.SkipDecoding()}
    source = tfds.builder_from_directory(version).as_data_source(split="train", decoders=decoders)
    captions = {example["caption"].decode() for example in source}
    assert (
        planted.captions < captions
    )  # and the two with a broken picture: pictures are copied as they are
    assert len(source) == len(planted.captions) + sum(planted.read_faults.values())
    assert "tensorflow" not in sys.modules


def test_the_builders_are_those_that_are_offered() -> None:
    assert tuple(builders()) == NAMES
    with pytest.raises(
        UserError, match="no builder 'coco'; expected one of cc_sbu_align, image_caption_tars"
    ):
        prepare("coco", "x", "y")
