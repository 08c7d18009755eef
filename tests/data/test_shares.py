"""data/pipeline.py with several processes, with length buckets and with windows: one order, whoever makes which rows.

The processes are pipelines of one Python process: a share depends on its number and theirs, on nothing else of a host.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.config import UserError
from minigpt4_jax.data.datasets import Part
from minigpt4_jax.data.encoding import Encoder
from minigpt4_jax.data.pipeline import Pipeline, make_pipeline
from minigpt4_jax.data.pixels import PictureReader
from minigpt4_jax.data.prompts import VICUNA_V0
from minigpt4_jax.data.tokenizer import byte_tokenizer
from tests.data.sets import Captioned

CROPS = PictureReader(size=8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), random_resized_crop=True)
BATCH = 8
PLAIN: dict[str, Any] = {}
BUCKETS: dict[str, Any] = {"length_buckets": (12, 16, 20, 24)}
WINDOW: dict[str, Any] = BUCKETS | {"bucket_window": 3}
BROKEN = (3, 4, 11, 20)
TOO_LONG = 7
"""In the small source: a caption that is found too long when it is read."""


def parts() -> list[Part]:
    """Lengths from 1 to 12 characters; corrupt pictures in one source, a corrupt caption in the other."""
    big = [f"{n}" + "a" * (n * 7 % 11) for n in range(30)]
    small = ["b" * (1 + n * 5 % 12) if n != TOO_LONG else "b" * 30 for n in range(9)]
    return [
        Part("big", Captioned(big, broken=BROKEN), 2.0),
        Part("small", Captioned(small, late=True), 1.0, str.upper),
    ]


def pipeline(of: Sequence[Part] | None = None, **changes: Any) -> Pipeline:
    encoder = Encoder(
        VICUNA_V0, byte_tokenizer(), prompts=(None,), num_image_tokens=2, max_text_len=21
    )
    settings: dict[str, Any] = {
        "seed": 42, "batch_size": BATCH, "length_multiple": 4, "max_corrupt_share": 1.0, "pictures": CROPS,
    }  # fmt: skip
    return make_pipeline(parts() if of is None else of, encoder, **(settings | changes))


class Hosts:
    """So many processes, at the same batch."""

    def __init__(self, count: int, **changes: Any) -> None:
        self.pipelines = [
            pipeline(process_index=index, process_count=count, **changes) for index in range(count)
        ]

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for one in self.pipelines:
            one.close()

    def take(self, count: int) -> list[dict[str, np.ndarray]]:
        """Whole batches, put together from everybody's rows."""
        shares = zip(*(islice(one, count) for one in self.pipelines), strict=True)
        return [{name: np.concatenate([s[name] for s in of]) for name in of[0]} for of in shares]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; every process must find the same."""
        states = [json.loads(json.dumps(one.get_state())) for one in self.pipelines]
        first, *others = [one.merge_states(states) for one in self.pipelines]
        assert all(other == first for other in others)
        return json.loads(json.dumps(first))

    def set_state(self, state: dict[str, Any]) -> None:
        for one in self.pipelines:
            one.set_state(state)


def assert_same(found: Sequence[Any], expected: Sequence[Any]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Six batches of one process, and the state behind them, by the name of the settings."""
    found = {}
    for name, changes in (("plain", PLAIN), ("buckets", BUCKETS), ("window", WINDOW)):
        with Hosts(1, **changes) as host:
            found[name] = (changes, host.take(6), host.state())
    return found


@pytest.mark.parametrize("name", ["plain", "buckets", "window"])
@pytest.mark.parametrize("count", [2, 4])
def test_the_shares_of_several_hosts_are_the_batches_of_one_row_for_row(
    alone: dict[str, Any], name: str, count: int
) -> None:
    changes, batches, state = alone[name]
    with Hosts(count, num_threads=2, **changes) as hosts:
        assert_same(hosts.take(6), batches)
        assert hosts.state() == state
    assert state["sources"]["big"] == {
        "size": 30, "drawn": 32, "faults": {"empty image": list(BROKEN)},
    }  # fmt: skip
    assert state["sources"]["small"] == {
        "size": 9, "drawn": 16, "faults": {"text does not fit": [TOO_LONG]},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["plain", "window"])
def test_two_hosts_then_one_then_two_continue_the_order_and_the_counts(
    alone: dict[str, Any], name: str
) -> None:
    changes, batches, state = alone[name]
    position, found = None, []
    for count, steps in ((2, 1), (1, 3), (2, 2)):
        with Hosts(count, **changes) as hosts:
            if position is not None:
                hosts.set_state(position)
            found += hosts.take(steps)
            position = hosts.state()
    assert_same(found, batches)
    assert position == state


def test_a_resume_at_any_batch_of_a_window_goes_on_exactly(alone: dict[str, Any]) -> None:
    changes, batches, end = alone["window"]
    with Hosts(1, num_threads=0, **changes) as host:
        states = [host.state()]
        for _ in range(6):
            host.take(1)
            states.append(host.state())
    assert states[-1] == end
    with Hosts(1, num_threads=0, **changes) as host:
        for done in reversed(range(6)):
            host.set_state(states[done])
            assert_same(host.take(1), [batches[done]])
            assert host.state() == states[done + 1]


def test_a_host_reads_the_words_of_all_rows_and_the_pictures_of_its_own() -> None:
    sets = [Captioned(["a" * (1 + n % 5) for n in range(24)]) for _ in range(2)]
    for index, source in enumerate(sets):
        host = pipeline(
            [Part("set", source)], process_index=index, process_count=2, num_threads=0, **WINDOW
        )
        with host:
            list(islice(host, 3))
    assert [source.pictures_read.total() for source in sets] == [12, 12]
    assert set(sets[0].pictures_read) | set(sets[1].pictures_read) == set(range(24))


@pytest.mark.parametrize(
    ("batch_size", "count", "said"), [(10, 4, "Set it to 8 or 12"), (3, 4, "Set it to 4,")]
)
def test_a_batch_that_cannot_be_shared_evenly_names_sizes_that_can(
    batch_size: int, count: int, said: str
) -> None:
    with pytest.raises(UserError, match=f"batch_size is {batch_size} with {count} .*{said}"):
        pipeline(batch_size=batch_size, process_count=count)


def test_hosts_that_stand_apart_or_read_other_files_are_refused() -> None:
    with pipeline() as one, pipeline() as other, pipeline(parts()[:1]) as fewer:
        next(one)
        with pytest.raises(UserError, match="stand at different batches"):
            one.merge_states([one.get_state(), other.get_state()])
        next(other)
        state = other.get_state()
        state["sources"]["big"]["size"] = 31
        with pytest.raises(UserError, match="expected the same files in every process"):
            one.merge_states([one.get_state(), state])
        assert list(fewer.get_state()["sources"]) == ["big"]


def test_the_share_of_corrupt_samples_is_that_of_all_hosts() -> None:
    # Of thirty samples four are broken; no host has met more than three of them.
    with Hosts(4, max_corrupt_share=3.5 / 30) as hosts:
        hosts.take(6)
        known = [host.fault_counts()["big"].get("empty image", 0) for host in hosts.pipelines]
        assert max(known) <= 3
        with pytest.raises(UserError, match=r"4 of 30 samples of source 'big' are corrupt"):
            hosts.state()


# --- length buckets and windows ---


def sound() -> list[Part]:
    """Forty-eight good samples: two windows make a pass."""
    return [Part("set", Captioned(["a" * (1 + n % 13) for n in range(48)]))]


@pytest.mark.parametrize("changes", [BUCKETS, WINDOW])
def test_batches_have_the_smallest_announced_shape_that_holds_them(changes: dict[str, Any]) -> None:
    with pipeline(sound(), pictures=None, **changes) as stream:
        batches = list(islice(stream, 9))
    for batch in batches:
        longest = batch["attention_mask"].sum(axis=1).max()
        length = min(bucket for bucket in changes["length_buckets"] if bucket >= longest)
        assert batch["token_ids"].shape == (BATCH, length)
        assert batch["target_ids"].shape == (BATCH, 24)  # 21, rounded up
    assert len({batch["token_ids"].shape for batch in batches}) > 1


def test_a_corrupt_picture_changes_no_shape(alone: dict[str, Any]) -> None:
    """Its process alone knows of it; the others have padded the batch already."""
    for changes, batches, _ in alone.values():
        with pipeline(pictures=None, **changes) as stream:
            words_alone = list(islice(stream, 6))
        assert [b["token_ids"].shape for b in batches] == [b["token_ids"].shape for b in words_alone]  # fmt: skip


def efficiency(batches: Sequence[Any]) -> float:
    real = sum(batch["attention_mask"].sum() for batch in batches)
    return float(real / sum(batch["attention_mask"].size for batch in batches))


def test_a_window_pads_less_than_single_batches(alone: dict[str, Any]) -> None:
    found = {name: efficiency(alone[name][1]) for name in alone}
    assert found["window"] > found["buckets"] + 0.05


def test_a_window_holds_the_samples_of_its_part_of_the_order_each_once() -> None:
    rows = []
    for changes in (BUCKETS, WINDOW):
        with pipeline(sound(), pictures=None, **changes) as stream:
            batches = list(islice(stream, 12))
        rows.append(np.concatenate([b["image_index"] for b in batches]).reshape(4, 3 * BATCH))
    for straight, window in zip(*rows, strict=True):
        assert straight.tolist() != window.tolist()
        assert sorted(straight.tolist()) == sorted(window.tolist())
        assert len(set(window.tolist())) == 3 * BATCH


@settings(deadline=None, max_examples=10)
@given(
    count=st.sampled_from([1, 2, 4]),
    window=st.integers(1, 4),
    done=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_hosts_from_any_batch_on_make_the_rows_of_one_host_from_the_start(
    count: int, window: int, done: int, seed: int
) -> None:
    changes = {"seed": seed, "bucket_window": window, "num_threads": 0, "pictures": None} | BUCKETS
    with Hosts(1, **changes) as one, Hosts(count, **changes) as hosts:
        batches = one.take(done + 2)
        at = {"next_index": done, "sources": one.state()["sources"]}
        hosts.set_state(at)
        assert_same(hosts.take(2), batches[done:])


def test_samples_that_no_bucket_holds_are_told_before_the_first_batch() -> None:
    source = Captioned(["a" * n for n in (1, 9, 10, 11)])
    with pytest.raises(
        UserError, match=r"(?s)1 problem\(s\).*caption 3 has 17 tokens in all; expected at most 16"
    ):
        pipeline([Part("set", source)], length_buckets=(12, 16))


def test_buckets_must_hold_what_a_source_that_is_read_late_may_hold() -> None:
    late = [Part("web", Captioned(["a"], late=True))]
    with pytest.raises(UserError, match=r"ends at 23; expected at least 24, .*source 'web'"):
        pipeline(late, length_buckets=(12, 23))
    pipeline(late, length_buckets=(12, 24)).close()
