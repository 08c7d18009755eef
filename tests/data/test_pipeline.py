"""Claims about `minigpt4_jax.data.pipeline`: order, resume, mixing, and what becomes of corrupt samples."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data.datasets import Part
from minigpt4_jax.data.encoding import Encoder
from minigpt4_jax.data.faults import SampleFault, replacement
from minigpt4_jax.data.pipeline import Pipeline, make_pipeline
from minigpt4_jax.data.pixels import PictureReader
from minigpt4_jax.data.prompts import CHATML
from minigpt4_jax.data.sources import Example, Exchange
from minigpt4_jax.data.tokenizer import byte_tokenizer
from tests.planted import jpeg

TOKENIZER = byte_tokenizer()
READER = PictureReader(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Things:
    """`size` examples with a picture each; those in `broken` have none that can be read."""

    in_memory = True

    def __init__(self, size: int, *, word: str = "thing", broken: Sequence[int] = ()) -> None:
        self.num_images, self._word, self._broken = size, word, set(broken)

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Example:
        question = "Own?" if index == 3 else None
        return Example(f"picture {index}", index, (Exchange(question, f"{self._word} {index}"),))

    def read_image(self, row: int) -> bytes:
        return b"" if row in self._broken else jpeg(row)


@pytest.fixture(scope="module")
def source() -> Things:
    return Things(10)


def encoder(**changes: Any) -> Encoder:
    settings = {"prompts": ("One?", "Two?"), "num_image_tokens": 2, "max_text_len": 16}
    return Encoder(CHATML, TOKENIZER, **(settings | changes))


OF_ENCODER = {"prompts", "max_text_len", "max_positions", "truncate"}


def pipeline(source: Things | Sequence[Part], **changes: Any) -> Pipeline:
    parts = [Part("things", source)] if isinstance(source, Things) else source
    words = {name: changes.pop(name) for name in OF_ENCODER & set(changes)}
    settings: dict[str, Any] = {
        "seed": 42, "batch_size": 4, "length_multiple": 8, "max_corrupt_share": 1.0,
    }  # fmt: skip
    return make_pipeline(parts, encoder(**words), **(settings | changes))


def take(source: Things | Sequence[Part], count: int, **changes: Any) -> list[Any]:
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


def test_the_stream_depends_on_the_seed_alone(source: Things) -> None:
    first = take(source, 6)
    assert_same(first, take(source, 6))
    assert_same(first, take(source, 6, num_threads=0))
    assert_same(first, take(source, 6, num_threads=2, prefetch=3))
    other = take(source, 6, seed=43)
    assert [b["image_index"].tolist() for b in first] != [b["image_index"].tolist() for b in other]


@pytest.mark.parametrize("done", [0, 1, 5])
def test_a_resumed_stream_continues_with_the_very_next_batch(source: Things, done: int) -> None:
    with pipeline(source) as stream:
        list(islice(stream, done))
        state = json.loads(json.dumps(stream.get_state()))
        rest = list(islice(stream, 4))
    with pipeline(source) as resumed:
        resumed.set_state(state)
        assert_same(rest, list(islice(resumed, 4)))


def test_the_position_counts_batches_returned_not_batches_made_ahead(source: Things) -> None:
    with pipeline(source, prefetch=5) as stream:
        next(stream)
        time.sleep(0.05)
        state = stream.get_state()
        assert state["next_index"] == 1
        assert state["sources"] == {"things": {"size": 10, "drawn": 4, "faults": {}}}


GOOD: dict[str, Any] = {"things": {"size": 10, "drawn": 4, "faults": {}}}


@pytest.mark.parametrize(
    "state",
    [
        {}, {"next_index": 1}, {"next_index": -1, "sources": GOOD}, {"next_index": "3", "sources": GOOD},
        {"next_index": 1, "sources": {}}, {"next_index": 1, "sources": {"other": GOOD["things"]}},
    ],
)  # fmt: skip
def test_a_position_of_something_else_is_refused(source: Things, state: dict[str, Any]) -> None:
    with pipeline(source) as stream, pytest.raises(UserError, match="data position"):
        stream.set_state(state)


def test_every_epoch_shows_each_example_once_in_a_new_order(source: Things) -> None:
    rows = np.concatenate([b["image_index"] for b in take(source, 10)]).reshape(4, 10)
    for epoch in rows:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in rows}) == 4


def test_without_shuffling_the_order_is_the_files(source: Things) -> None:
    (batch,) = take(source, 1, shuffle=False)
    assert batch["image_index"].tolist() == [0, 1, 2, 3]
    assert [text(batch, row).rsplit("\n", 1)[1] for row in range(4)] == [
        f"thing {i}<|im_end|>" for i in range(4)
    ]


def test_prompts_are_drawn_per_sample_and_an_own_prompt_wins(source: Things) -> None:
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


def test_the_bare_picture_can_be_the_prompt(source: Things) -> None:
    (batch,) = take(source, 1, prompts=(None,), shuffle=False)
    assert text(batch, 0) == "thing 0<|im_end|>"
    assert "Own?" in text(batch, 3)


def test_all_over_long_answers_are_told_before_the_first_batch(source: Things) -> None:
    with pytest.raises(UserError, match=r"(?s)10 problem\(s\).*picture 0.*8 tokens.*at most 7"):
        pipeline(source, max_text_len=7)


def test_sequences_longer_than_the_model_are_told_before_the_first_batch(
    source: Things,
) -> None:
    longest = max(int(b["attention_mask"].sum(axis=1).max()) for b in take(source, 5))
    pipeline(source, max_positions=longest).close()
    with pytest.raises(UserError, match=f"has {longest} tokens in all"):
        pipeline(source, max_positions=longest - 1)


def test_cut_answers_are_counted(source: Things) -> None:
    with pipeline(source, max_text_len=7, truncate=True) as stream:
        assert stream.cut_answers == 10
        assert int(next(stream)["target_mask"].sum()) == 4 * 7
    with pipeline(source) as stream:
        assert stream.cut_answers == 0


def test_no_prompt_at_all_is_refused(source: Things) -> None:
    with pytest.raises(UserError, match="no prompt to ask with"):
        pipeline(source, prompts=())


def test_closing_ends_the_threads_and_may_be_repeated(source: Things) -> None:
    before = threading.active_count()
    stream = pipeline(source, num_threads=2)
    next(stream)
    stream.close()
    stream.close()
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_all_threads_work_where_there_are_more_than_batches_are_made_ahead() -> None:
    threads = 12
    together = threading.Barrier(threads)
    met = threading.Event()

    class Slow(Things):
        def read_image(self, row: int) -> bytes:
            if not met.is_set():
                together.wait(timeout=30)  # raises where a thread is missing
                met.set()
            return super().read_image(row)

    take(Slow(10), 1, num_threads=threads, batch_size=1, pictures=READER)
    assert met.is_set()


def test_an_ever_longer_run_keeps_giving_batches_of_one_source_alone(source: Things) -> None:
    with pipeline([Part("a", source, 3.0)]) as stream:
        assert stream.batches_per_epoch == 2.5


# --- several sources ---


def mixed() -> list[Part]:
    return [
        Part("big", Things(50, word="big"), 5.0),
        Part("small", Things(7, word="small"), 2.0, str.upper),
    ]


def words(batches: Sequence[Any]) -> list[str]:
    """The answers, in order."""
    rows = [text(batch, row) for batch in batches for row in range(len(batch["token_ids"]))]
    return [row.rsplit("\n", 1)[1].removesuffix("<|im_end|>") for row in rows]


def test_mixing_ratios_are_exact_over_every_cycle() -> None:
    answers = words(take(mixed(), 35, batch_size=7))
    for first in range(0, len(answers), 7):
        cycle = answers[first : first + 7]
        assert Counter(answer.split(" ")[0] for answer in cycle) == {"big": 5, "SMALL": 2}


def test_each_source_of_a_mixture_is_seen_once_a_pass_in_its_own_order() -> None:
    answers = words(take(mixed(), 35, batch_size=7))
    small = [answer for answer in answers if answer.startswith("SMALL")]
    passes = [small[first : first + 7] for first in range(0, 70, 7)]
    for one in passes:
        assert sorted(one) == [f"SMALL {number}" for number in range(7)]
    assert len({tuple(one) for one in passes}) > 1
    big = [answer for answer in answers if answer.startswith("big")]
    assert sorted(big[:50]) == sorted(f"big {number}" for number in range(50))


def test_pictures_of_all_sources_are_numbered_through() -> None:
    batches = take(mixed(), 10, batch_size=7)
    rows = np.concatenate([batch["image_index"] for batch in batches])
    for answer, row in zip(words(batches), rows, strict=True):
        word, number = answer.split(" ")
        assert row == int(number) + (50 if word == "SMALL" else 0)


def test_a_mixture_resumes_with_the_very_next_batch() -> None:
    with pipeline(mixed(), pictures=READER) as stream:
        list(islice(stream, 5))
        state = json.loads(json.dumps(stream.get_state()))
        rest = list(islice(stream, 4))
        end = stream.get_state()
    with pipeline(mixed(), pictures=READER) as resumed:
        resumed.set_state(state)
        assert_same(rest, list(islice(resumed, 4)))
        assert resumed.get_state() == end


def test_one_pass_lasts_until_the_longest_source_was_seen() -> None:
    with pipeline(mixed(), batch_size=7) as stream:
        assert stream.batches_per_epoch == 10  # 50 big ones, five in each batch


def test_a_source_too_large_for_the_shuffle_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt4_jax.data.pipeline.MAX_EXAMPLES", 9)
    with pytest.raises(UserError, match="has 10 samples; expected at most 9"):
        pipeline(Things(10))


# --- pixels and corrupt samples ---


def test_pixels_are_those_of_the_samples_picture(source: Things) -> None:
    rng = np.random.default_rng(0)
    for batch in take(source, 3, pictures=READER):
        assert batch["pixels"].shape == (4, 8, 8, 3)
        for row, picture in zip(batch["pixels"], batch["image_index"], strict=True):
            np.testing.assert_array_equal(row, READER(jpeg(int(picture)), "x", rng=rng))
    assert "pixels" not in take(source, 1)[0]


def test_crops_differ_between_epochs_and_not_between_runs() -> None:
    crop = PictureReader(size=8, mean=READER.mean, std=READER.std, random_resized_crop=True)
    batches = take(Things(4), 3, pictures=crop, shuffle=False)
    assert_same(batches, take(Things(4), 3, pictures=crop, shuffle=False, num_threads=3))
    assert (batches[0]["pixels"] != batches[1]["pixels"]).any(axis=(1, 2, 3)).all()
    assert_same(batches[1:], take_from(1, Things(4), 2, pictures=crop, shuffle=False))


def take_from(done: int, source: Things, count: int, **changes: Any) -> list[Any]:
    """As `take`, by an iterator that is set to a position first."""
    with pipeline(source, **changes) as stream:
        sources = {"things": {"size": len(source), "drawn": 0, "faults": {}}}
        stream.set_state({"next_index": done, "sources": sources})
        return list(islice(stream, count))


def test_a_corrupt_sample_gives_its_place_to_the_same_stand_in_every_time() -> None:
    broken = [2, 5, 6]
    with pipeline(Things(10, broken=broken), pictures=READER, shuffle=False) as stream:
        batches = list(islice(stream, 5))
        assert stream.fault_counts() == {"things": {"empty image": 3}}
    expected = []
    for index in list(range(10)) * 2:
        tries = (index, *(replacement(index, attempt, size=10) for attempt in range(1, 9)))
        expected.append(next(i for i in tries if i not in broken))
    assert np.concatenate([b["image_index"] for b in batches]).tolist() == expected


def test_counts_are_of_the_batches_returned_and_go_on_after_a_resume() -> None:
    broken = [0, 3, 4, 9]
    things = Things(10, broken=broken)
    with pipeline(things, pictures=READER, shuffle=False, prefetch=8) as stream:
        next(stream)
        time.sleep(0.05)
        assert stream.fault_counts() == {"things": {"empty image": 2}}  # 0 and 3 of the first four
        state = json.loads(json.dumps(stream.get_state()))
    with pipeline(things, pictures=READER, shuffle=False) as resumed:
        resumed.set_state(state)
        for expected in (3, 4, 4, 4, 4):
            next(resumed)
            assert resumed.fault_counts() == {"things": {"empty image": expected}}
        assert resumed.get_state()["sources"]["things"]["faults"] == {"empty image": broken}


def test_pictures_the_feature_cache_could_not_encode_are_replaced_too(
    source: Things, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {7: SampleFault("damaged image", "it is bad")}
    with pipeline(source, bad_images=bad) as stream:
        rows = np.concatenate([batch["image_index"] for batch in islice(stream, 5)])
        assert stream.fault_counts() == {"things": {"damaged image": 1}}
    assert 7 not in rows
    assert "picture 7, it is bad" in caplog.text


def test_too_large_a_share_stops_the_stream_with_a_name() -> None:
    with (
        pipeline(Things(10, broken=[1]), pictures=READER, max_corrupt_share=0.05) as stream,
        pytest.raises(UserError, match=r"1 of 10 samples of source 'things'.*5\.00%.*picture 1"),
    ):
        list(islice(stream, 3))


def test_a_source_without_a_good_sample_stops_with_the_first_and_the_last() -> None:
    with (
        pipeline(Things(5, broken=range(5)), pictures=READER, shuffle=False) as stream,
        pytest.raises(UserError, match=r"Sample 0 of source 'things' is corrupt.*all 8"),
    ):
        next(stream)


def test_words_that_do_not_fit_are_replaced_where_they_are_read_late() -> None:
    late = Things(10)
    late.in_memory = False
    with pipeline(late, max_text_len=8) as stream:
        next(stream)
    long = Things(11)  # "thing 10" has nine tokens with its end symbol
    long.in_memory = False
    with pipeline(long, max_text_len=8) as stream:
        list(islice(stream, 3))
        assert stream.fault_counts() == {"things": {"text does not fit": 1}}
