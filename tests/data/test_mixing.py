"""data/mixing.py: every cycle holds every source exactly as often as its weight says."""

from __future__ import annotations

from collections import Counter

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data.mixing import Mixture, whole_weights


@pytest.mark.parametrize(
    ("weights", "whole"),
    [
        ([115, 14], [115, 14]), ([115.0, 14.0], [115, 14]), ([0.3, 0.7], [3, 7]), ([2, 4, 6], [1, 2, 3]),
        ([1.5, 1], [3, 2]), ([0.1], [1]), ([1e-3, 1], [1, 1000]),
    ],
)  # fmt: skip
def test_weights_are_read_as_the_decimals_they_are_written_as(
    weights: list[float], whole: list[int]
) -> None:
    assert whole_weights([float(w) for w in weights]) == whole


@pytest.mark.parametrize("weights", [[115, 14], [0.3, 0.7], [1, 1, 1], [50, 30, 10, 40]])
def test_any_whole_number_of_cycles_has_the_exact_ratio(weights: list[float]) -> None:
    mixture = Mixture([float(w) for w in weights])
    for cycles in (1, 7):
        picks = [mixture[i] for i in range(cycles * mixture.cycle)]
        counts = Counter(source for source, _ in picks)
        assert [counts[s] for s in range(len(weights))] == [cycles * w for w in mixture.weights]
        for source in counts:  # each source's own stream, in order, with nothing left out
            assert [place for s, place in picks if s == source] == list(range(counts[source]))


def test_no_source_is_ever_more_than_one_sample_from_its_share() -> None:
    mixture = Mixture([115.0, 14.0])
    taken = [0, 0]
    for position in range(3 * 129):
        taken[mixture[position][0]] += 1
        for source, weight in enumerate((115, 14)):
            assert abs(taken[source] - (position + 1) * weight / 129) < 1


def test_the_source_that_is_furthest_behind_its_share_is_next_and_the_first_of_equals() -> None:
    # Behind by, in quarters, once the sample is counted: 1 3 | 2 2 | -1 5 | 0 4.
    mixture = Mixture([1.0, 3.0])
    assert [mixture[position] for position in range(5)] == [(1, 0), (0, 0), (1, 1), (1, 2), (1, 3)]


def test_a_position_far_out_is_as_exact() -> None:
    mixture = Mixture([115.0, 14.0])
    cycles = 10**15
    source, place = mixture[cycles * 129]
    assert (source, place) == (mixture[0][0], cycles * 115)


@pytest.mark.parametrize("weights", [[1.0, 0.0], [1.0, -2.0], [float("nan"), 1.0], [1.0, 1e-7]])
def test_weights_that_give_no_ratio_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match="weights of the sources are"):
        Mixture(weights)
