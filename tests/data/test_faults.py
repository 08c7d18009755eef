"""data/faults.py: who stands in, what is counted, and when a run stops."""

from __future__ import annotations

import json
import logging

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data.faults import Fault, FaultCount, describe, replacement


def fault(sample: int, reason: str = "empty image") -> Fault:
    return Fault(sample, reason, f"Sample number {sample} is bad.")


def test_stand_ins_depend_on_index_and_attempt_alone_and_spread() -> None:
    assert replacement(5, 1, size=1000) == 501  # a checkpoint of one version resumes under the next
    first = [replacement(index, 1, size=100) for index in range(500)]
    assert set(first) <= set(range(100))
    assert len(set(first)) > 90
    assert len({replacement(7, attempt, size=10**9) for attempt in range(1, 9)}) == 8


def test_a_sample_counts_once_however_often_it_is_drawn() -> None:
    count = FaultCount("web", 100, max_share=1.0)
    count.add(4, [fault(3), fault(9, "no caption")])
    count.add(4, [fault(3), fault(5)])
    assert count.counts() == {"empty image": 2, "no caption": 1}
    assert count.drawn == 8


def test_counts_go_on_from_a_saved_state() -> None:
    count = FaultCount("web", 100, max_share=1.0)
    count.add(4, [fault(3), fault(9, "no caption")])
    again = FaultCount("web", 100, max_share=1.0)
    again.set_state(json.loads(json.dumps(count.get_state())))
    for one in (count, again):
        one.add(4, [fault(3), fault(8)])
    assert again.get_state() == count.get_state()
    assert again.counts() == {"empty image": 2, "no caption": 1}


def test_a_source_that_has_grown_is_refused() -> None:
    state = FaultCount("web", 100, max_share=1.0).get_state()
    with pytest.raises(UserError, match=r"'web' has 101 samples; the run in this workdir had 100"):
        FaultCount("web", 101, max_share=1.0).set_state(state)


def test_the_first_of_each_reason_are_named_and_the_rest_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    count = FaultCount("web", 10**6, max_share=1.0)
    with caplog.at_level(logging.WARNING):
        count.add(9, [*map(fault, range(5)), fault(7, "no caption")])
    named = [line for line in caplog.messages if "Sample number" in line]
    assert [line.split("number ")[1][0] for line in named] == ["0", "1", "2", "7"]
    assert "source 'web' (empty image)" in named[0]


@pytest.mark.parametrize(
    ("size", "drawn", "faults", "stops"),
    [
        (100, 4, 1, False),  # 1 % of the whole source
        (100, 4, 2, True),
        (50, 4, 1, True),  # 2 %
        (10**6, 10, 10, False),  # of at least a thousand
        (10**6, 11, 11, True),
        (10**6, 5000, 50, False),
        (10**6, 5000, 51, True),
        (100, 10_000, 2, True),  # drawn again and again: still 2 of 100
    ],
)
def test_a_run_stops_when_the_share_is_above_the_limit(
    size: int, drawn: int, faults: int, stops: bool
) -> None:
    count = FaultCount("web", size, max_share=0.01)
    if not stops:
        count.add(drawn, [fault(n) for n in range(faults)])
        return
    with pytest.raises(UserError, match=r"'web' are corrupt \(\d+ empty image\).*Sample number"):
        count.add(drawn, [fault(n) for n in range(faults)])


def test_counts_read_as_a_sentence() -> None:
    assert describe({"no caption": 1, "empty image": 3}) == "3 empty image, 1 no caption"
