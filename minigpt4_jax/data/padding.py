"""The shapes that batches are padded to.

For: rounding lengths up, length buckets, and which samples fit. Not for: filling the arrays (`batches.py`), which
samples make a batch (`windows.py`).

Differs from the original, which pads a batch to its longest sample: here a run has few shapes, since each is a program
to compile. With buckets all of them are known before the first batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minigpt4_jax.data.batches import ExampleTokens, Shape, padded_shape, round_up, size_of
from minigpt4_jax.data.encoding import TEXT_FAULT
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.train_config import DataConfig


@dataclass(frozen=True, kw_only=True)
class Padding:
    """How a batch's shape follows from its samples."""

    length_multiple: int
    buckets: tuple[int, ...] = ()
    """Lengths in tokens, ascending. Empty: the longest sample, rounded up to `length_multiple`."""
    max_text_len: int
    """Longest answer in tokens: with buckets, every batch has places for as many targets, rounded up."""

    @property
    def num_targets(self) -> int:
        """Places for targets in a batch, with buckets."""
        return round_up(self.max_text_len, self.length_multiple)

    def shapes(self) -> list[Shape]:
        """Every (length, targets) that a batch can have; empty without buckets, where only the samples tell."""
        return [(length, self.num_targets) for length in self.buckets]

    def shape_of(self, examples: Sequence[ExampleTokens]) -> Shape:
        """Of the batch of these samples; with buckets they must be such that `require_fit` passes."""
        if not self.buckets:
            return padded_shape(examples, length_multiple=self.length_multiple)
        longest = max(size_of(example)[0] for example in examples)
        return next(length for length in self.buckets if length >= longest), self.num_targets

    def require_fit(self, example: ExampleTokens, name: str) -> None:
        """Raises `SampleFault` that names a sample which no bucket holds."""
        if not self.buckets:
            return
        length, targets = size_of(example)
        if length > self.buckets[-1]:
            raise SampleFault(
                TEXT_FAULT,
                f"{name} has {length} tokens in all; expected at most {self.buckets[-1]}, the last of "
                "data.length_buckets. Add a longer one, or shorten the prompt or the answer.",
            )
        if targets > self.num_targets:
            raise SampleFault(
                TEXT_FAULT,
                f"{name} has {targets} tokens to predict, its answers together; expected at most {self.num_targets} "
                "(data.max_text_len, which data.length_buckets makes the room for all of them). Raise the limit.",
            )


def make_padding(data: DataConfig) -> Padding:
    """As a run's settings say."""
    return Padding(
        length_multiple=data.length_multiple,
        buckets=data.length_buckets,
        max_text_len=data.max_text_len,
    )


def batch_shapes(data: DataConfig) -> list[Shape]:
    """Every (length, targets) that a batch of a run can have; empty without `data.length_buckets`."""
    return make_padding(data).shapes()
