"""data/padding.py: the shapes of a run are announced, and what no bucket holds is named."""

from __future__ import annotations

import pytest

from minigpt4_jax.data.batches import ExampleTokens, join_example, size_of
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.padding import Padding, batch_shapes
from minigpt4_jax.train_config import DataConfig

BUCKETS = Padding(length_multiple=8, buckets=(20, 25, 30), max_text_len=10)


def example(prompt: int, answer: int) -> ExampleTokens:
    return join_example([1] * prompt, [7] * answer)


@pytest.mark.parametrize(
    ("longest", "length"), [(5, 20), (20, 20), (21, 25), (25, 25), (26, 30), (30, 30)]
)
def test_the_first_bucket_that_holds_the_longest_sample_is_the_length(
    longest: int, length: int
) -> None:
    examples = [example(3, 1), example(longest - 2, 2)]
    assert BUCKETS.shape_of(examples) == (length, 16)


def test_without_buckets_both_lengths_follow_the_samples() -> None:
    padding = Padding(length_multiple=8, max_text_len=10)
    assert padding.shape_of([example(3, 1), example(7, 2)]) == (16, 8)
    assert padding.shapes() == []
    padding.require_fit(example(1000, 50), "picture 7")


def test_a_runs_shapes_are_its_buckets_and_room_for_its_longest_answer() -> None:
    data = DataConfig(length_buckets=(44, 48, 52, 65), max_text_len=32, length_multiple=12)
    assert batch_shapes(data) == [(length, 36) for length in (44, 48, 52, 65)]
    assert batch_shapes(DataConfig()) == []


@pytest.mark.parametrize(
    ("fits", "too_much", "said"),
    [
        (example(20, 10), example(21, 10), "picture 7 has 31 tokens in all; expected at most 30"),
        (example(4, 16), example(4, 17), "picture 7 has 17 tokens to predict.* at most 16"),
    ],
)
def test_a_sample_that_no_bucket_holds_is_named(
    fits: ExampleTokens, too_much: ExampleTokens, said: str
) -> None:
    BUCKETS.require_fit(fits, "picture 7")
    with pytest.raises(SampleFault, match=said):
        BUCKETS.require_fit(too_much, "picture 7")


def test_the_size_of_a_sample_is_its_tokens_and_its_targets() -> None:
    assert size_of(join_example([1, 2], [5, 6, 7], ignored_targets=(6,))) == (5, 2)
