"""Claims about `minigpt4_jax.data.datasets`, on folders of empty picture files: the stream never opens them."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data.datasets import CcSbuAlign, Pipeline, make_pipeline
from minigpt4_jax.data.prompts import CHATML
from minigpt4_jax.data.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def write_set(folder: Path, annotations: Any, *, images: Sequence[str] = ()) -> Path:
    (folder / "image").mkdir()
    for name in images:
        (folder / "image" / f"{name}.jpg").touch()
    (folder / "filter_cap.json").write_text(json.dumps(annotations))
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CcSbuAlign:
    annotations = [{"image_id": i, "caption": f"thing {i}"} for i in range(10)]
    annotations[3]["prompt"] = "Own?"
    folder = tmp_path_factory.mktemp("set")
    return CcSbuAlign(write_set(folder, annotations, images=[str(i) for i in range(10)]))


def pipeline(source: CcSbuAlign, **changes: Any) -> Pipeline:
    settings: dict[str, Any] = {
        "seed": 42, "batch_size": 4, "prompts": ("One?", "Two?"), "template": CHATML, "tokenizer": TOKENIZER,
        "num_image_tokens": 2, "max_text_len": 16, "length_multiple": 8,
    }  # fmt: skip
    return make_pipeline(source, **(settings | changes))


def take(source: CcSbuAlign, count: int, **changes: Any) -> list[Any]:
    with pipeline(source, **changes) as stream:
        return list(islice(stream, count))


def assert_same(left: Sequence[Any], right: Sequence[Any]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


def text(batch: Any, row: int) -> str:
    ids = batch["token_ids"][row][batch["attention_mask"][row]].tolist()
    return TOKENIZER.decode([i for i in ids if i >= 0], skip_special=False)


def test_both_forms_of_the_annotation_file_are_read(tmp_path: Path) -> None:
    annotations = [
        {"image_id": "x", "caption": "a"},
        {"image_id": 7, "caption": "b", "prompt": "p"},
    ]
    for name, content in (("list", annotations), ("object", {"annotations": annotations})):
        (tmp_path / name).mkdir()
        source = CcSbuAlign(write_set(tmp_path / name, content, images=["x", "7"]))
        assert [(source[i].image_id, source[i].caption, source[i].prompt) for i in range(len(source))] == [
            ("x", "a", None), ("7", "b", "p"),
        ]  # fmt: skip
        assert source[1].image_path == tmp_path / name / "image" / "7.jpg"


def test_pictures_are_numbered_once_in_order_of_appearance(tmp_path: Path) -> None:
    annotations = [{"image_id": i, "caption": "c"} for i in ("b", "a", "b", "c")]
    source = CcSbuAlign(write_set(tmp_path, annotations, images=["a", "b", "c"]))
    assert source.image_ids == ("b", "a", "c")
    assert len(source) == 4
    assert [source.image_row(i) for i in source.image_ids] == [0, 1, 2]


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


def test_the_stream_depends_on_the_seed_alone(source: CcSbuAlign) -> None:
    first = take(source, 6)
    assert_same(first, take(source, 6))
    assert_same(first, take(source, 6, num_threads=0))
    assert_same(first, take(source, 6, num_threads=2, prefetch=3))
    other = take(source, 6, seed=43)
    assert [b["image_index"].tolist() for b in first] != [b["image_index"].tolist() for b in other]


@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_resumed_stream_continues_with_the_very_next_batch(source: CcSbuAlign, done: int) -> None:
    with pipeline(source) as stream:
        list(islice(stream, done))
        state = json.loads(json.dumps(stream.get_state()))
        rest = list(islice(stream, 4))
    with pipeline(source) as resumed:
        resumed.set_state(state)
        assert_same(rest, list(islice(resumed, 4)))


def test_the_position_counts_batches_returned_not_batches_made_ahead(source: CcSbuAlign) -> None:
    with pipeline(source, prefetch=5) as stream:
        next(stream)
        time.sleep(0.05)
        assert stream.get_state() == {"next_index": 1}


@pytest.mark.parametrize("state", [{}, {"next_index": -1}, {"next_index": "3"}, {"other": 1}])
def test_a_position_of_something_else_is_refused(source: CcSbuAlign, state: dict[str, Any]) -> None:
    with pipeline(source) as stream, pytest.raises(UserError, match="data position"):
        stream.set_state(state)


def test_every_epoch_shows_each_example_once_in_a_new_order(source: CcSbuAlign) -> None:
    rows = np.concatenate([b["image_index"] for b in take(source, 10)]).reshape(4, 10)
    for epoch in rows:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in rows}) == 4


def test_without_shuffling_the_order_is_the_files(source: CcSbuAlign) -> None:
    (batch,) = take(source, 1, shuffle=False)
    assert batch["image_index"].tolist() == [0, 1, 2, 3]
    assert [text(batch, row).rsplit("\n", 1)[1] for row in range(4)] == [
        f"thing {i}<|im_end|>" for i in range(4)
    ]


def test_prompts_are_drawn_per_sample_and_an_own_prompt_wins(source: CcSbuAlign) -> None:
    asked = Counter(
        (
            int(batch["image_index"][row]) == 3,
            text(batch, row).split("\n")[1].split("<|im_end|>")[0],
        )
        for batch in take(source, 50)
        for row in range(4)
    )
    assert asked.keys() == {(True, "Own?"), (False, "One?"), (False, "Two?")}
    assert asked[True, "Own?"] == 20
    assert 60 <= asked[False, "One?"] <= 120


def test_the_bare_picture_can_be_the_prompt(source: CcSbuAlign) -> None:
    (batch,) = take(source, 1, prompts=(None,), shuffle=False)
    assert text(batch, 0) == "thing 0<|im_end|>"
    assert "Own?" in text(batch, 3)


def test_all_over_long_answers_are_told_before_the_first_batch(source: CcSbuAlign) -> None:
    with pytest.raises(UserError, match=r"(?s)10 problem\(s\).*picture 0.*8 tokens.*at most 7"):
        pipeline(source, max_text_len=7)


def test_sequences_longer_than_the_model_are_told_before_the_first_batch(
    source: CcSbuAlign,
) -> None:
    longest = max(int(b["attention_mask"].sum(axis=1).max()) for b in take(source, 5))
    pipeline(source, max_positions=longest).close()
    with pytest.raises(UserError, match=f"has {longest} tokens in all"):
        pipeline(source, max_positions=longest - 1)


def test_cut_answers_are_counted(source: CcSbuAlign) -> None:
    with pipeline(source, max_text_len=7, truncate=True) as stream:
        assert stream.cut_answers == 10
        assert int(next(stream)["target_mask"].sum()) == 4 * 7
    with pipeline(source) as stream:
        assert stream.cut_answers == 0


def test_no_prompt_at_all_is_refused(source: CcSbuAlign) -> None:
    with pytest.raises(UserError, match="no prompt to ask with"):
        pipeline(source, prompts=())


def test_closing_ends_the_threads_and_may_be_repeated(source: CcSbuAlign) -> None:
    before = threading.active_count()
    stream = pipeline(source, num_threads=2)
    next(stream)
    stream.close()
    stream.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before
