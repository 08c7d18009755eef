"""data/sources.py: the `cc_sbu_align` folder, and everything that is wrong with one said at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.sources import CcSbuAlign, Exchange, Source


def write_set(folder: Path, annotations: Any, *, images: Sequence[str] = ()) -> Path:
    (folder / "image").mkdir()
    for name in images:
        (folder / "image" / f"{name}.jpg").write_bytes(name.encode())
    (folder / "filter_cap.json").write_text(json.dumps(annotations))
    return folder


def test_both_forms_of_the_annotation_file_are_read(tmp_path: Path) -> None:
    annotations = [
        {"image_id": "x", "caption": "a"},
        {"image_id": 7, "caption": "b", "prompt": "p"},
    ]
    for name, content in (("list", annotations), ("object", {"annotations": annotations})):
        (tmp_path / name).mkdir()
        source = CcSbuAlign(write_set(tmp_path / name, content, images=["x", "7"]))
        assert isinstance(source, Source)
        assert [source[i].exchanges for i in range(len(source))] == [
            (Exchange(None, "a"),), (Exchange("p", "b"),),
        ]  # fmt: skip
        assert source[1].name == "annotation 1 (picture 7)"
        assert source.read_image(source[1].image_row) == b"7"


def test_pictures_are_numbered_once_in_order_of_appearance(tmp_path: Path) -> None:
    annotations = [{"image_id": i, "caption": "c"} for i in ("b", "a", "b", "c")]
    source = CcSbuAlign(write_set(tmp_path, annotations, images=["a", "b", "c"]))
    assert [path.stem for path in source.image_paths] == ["b", "a", "c"]
    assert (len(source), source.num_images) == (4, 3)
    assert [source[i].image_row for i in range(4)] == [0, 1, 0, 2]


def test_all_missing_pictures_are_told_together(tmp_path: Path) -> None:
    annotations = [{"image_id": i, "caption": "c"} for i in range(15)]
    write_set(tmp_path, annotations, images=["0", "1", "2"])
    with pytest.raises(UserError) as raised:
        CcSbuAlign(tmp_path)
    message = str(raised.value)
    assert "12 problem(s)" in message
    assert message.count("there is no") == 10
    assert "and 2 more" in message


@pytest.mark.parametrize(
    ("annotation", "problem"),
    [
        ("text", "expected an object"),
        ({"caption": "c"}, "image_id is None"),
        ({"image_id": True, "caption": "c"}, "image_id is True"),
        ({"image_id": "../secret", "caption": "c"}, "without a folder"),
        ({"image_id": "x"}, "caption is None"),
        ({"image_id": "x", "caption": "  "}, "expected text"),
        ({"image_id": "x", "caption": "c", "prompt": 3}, "prompt is 3"),
    ],
)
def test_broken_annotations_are_told_by_number(
    tmp_path: Path, annotation: Any, problem: str
) -> None:
    annotations = [{"image_id": "x", "caption": "c"}, annotation]
    write_set(tmp_path, annotations, images=["x"])
    with pytest.raises(UserError, match=f"(?s)1 problem.*annotation 1: .*{problem}"):
        CcSbuAlign(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"images": []}', '"text"', "[]"])
def test_a_file_without_annotations_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "filter_cap.json").write_text(content)
    with pytest.raises(UserError, match=r"filter_cap\.json"):
        CcSbuAlign(tmp_path)


def test_a_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Expected a folder with filter_cap\.json and image/"):
        CcSbuAlign(tmp_path)


def test_a_picture_that_vanished_is_a_fault_with_its_path(tmp_path: Path) -> None:
    write_set(tmp_path, [{"image_id": "x", "caption": "c"}], images=["x"])
    source = CcSbuAlign(tmp_path)
    (tmp_path / "image" / "x.jpg").unlink()
    with pytest.raises(SampleFault, match=r"Cannot read .*x\.jpg \(No such file") as raised:
        source.read_image(0)
    assert raised.value.reason == "unreadable"
