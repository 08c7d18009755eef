"""A base model plus a weight delta, added tensor by tensor when asked for: how Vicuna v0 and v1.1 were published.

For: any two sources with the same names (Hugging Face folders; Meta's shards read as such). A v0 delta has one row of
embedding and head more than its base, the `[PAD]` token that FastChat added: that row of the base counts as zero, so
the row of the result is the delta's own.
Not for: quantised bases, and deltas against anything but the model they were made from: nothing in the files tells.

Differs from FastChat's `apply_delta`, which loads both models (30 to 60 GB), casts both to float16, adds in place, and
since v1.1 cannot add a v0 delta. Here two tensors of one dtype are added in float32 and rounded once to that dtype:
for float16 that is what FastChat's addition on a CPU gives, bit for bit. Where the dtypes differ the sum stays
float32: neither is rounded to the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.rules import Array, Excuse
from convert.sources import TensorSource
from minigpt4_jax.config import UserError

GROWN = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors that may have one row more in the delta: both of them, or neither."""
BLOCK = 1 << 21
"""Elements that are added at a time, so that no float32 copy of a whole tensor is held."""


class DeltaSource:
    """`base + delta`.

    Args:
        excuses: of the tables: what they leave out (buffers) may be on one side only, and passes through.

    Raises:
        UserError: names or shapes that differ, all of them listed.
    """

    def __init__(
        self, base: TensorSource, delta: TensorSource, *, excuses: tuple[Excuse, ...]
    ) -> None:
        self._base, self._delta = base, delta
        self.metadata: Mapping[str, Any] = base.metadata
        ours, theirs = dict.fromkeys(base.names()), dict.fromkeys(delta.names())
        self._names = tuple(ours | theirs)
        self._both = ours.keys() & theirs.keys()
        problems = [
            f"{name} is only in the {'base' if name in ours else 'delta'}"
            for name in self._names
            if name not in self._both and not any(e.matches(name) for e in excuses)
        ]
        problems += self._shape_problems()
        if problems:
            raise UserError(
                f"{delta.describe()} is no delta for {base.describe()}: {len(problems)} tensor(s) do not fit.\n"
                + "\n".join(f"  {line}" for line in _shown(problems))
                + "\nExpected the LLaMA of the same size that the delta was made from (Vicuna v0 and v1.1: LLaMA 1)."
            )

    def describe(self) -> str:
        return f"{self._base.describe()} + {self._delta.describe()}"

    def names(self) -> tuple[str, ...]:
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        return self._side(name).shape(name)

    def dtype(self, name: str) -> np.dtype[Any]:
        if name not in self._both:
            return self._side(name).dtype(name)
        base, delta = self._base.dtype(name), self._delta.dtype(name)
        return base if base == delta else np.dtype(np.float32)

    def files(self) -> tuple[Path, ...]:
        return (*self._base.files(), *self._delta.files())

    def get(self, name: str) -> Array:
        if name not in self._both:
            return self._side(name).get(name)
        base, delta = self._base.get(name), self._delta.get(name)
        total = np.empty(delta.shape, self.dtype(name))
        step = max(1, BLOCK // max(1, delta[:1].size))
        for start in range(0, len(delta), step):
            rows = slice(start, min(start + step, len(delta)))
            added = delta[rows].astype(np.float32)
            # Fewer rows where the delta has one more: that one is the delta's own.
            held = base[rows]
            added[: len(held)] += held.astype(np.float32)
            with np.errstate(over="ignore"):  # what float16 cannot hold is reported as not finite
                total[rows] = added
        return total

    def _side(self, name: str) -> TensorSource:
        """Where a tensor's shape is read: the delta, unless only the base has it."""
        return self._delta if name in self._both or name in self._delta.names() else self._base

    def _shape_problems(self) -> list[str]:
        grown = [name for name in GROWN if name in self._both and self._is_grown(name)]
        held = [name for name in GROWN if name in self._both]
        return [
            f"{name} is {list(self._base.shape(name))} in the base and {list(self._delta.shape(name))} in the delta"
            for name in self._names
            if name in self._both
            and self._base.shape(name) != self._delta.shape(name)
            and not (grown == held and name in grown)
        ]

    def _is_grown(self, name: str) -> bool:
        (rows, *rest), (more, *others) = self._base.shape(name), self._delta.shape(name)
        return more == rows + 1 and rest == others


def _shown(problems: list[str]) -> list[str]:
    """One line for all layers of a tensor."""
    grouped: dict[str, list[str]] = {}
    for line in problems:
        grouped.setdefault(re.sub(r"(?<=layers\.)\d+(?=\.)", "*", line), []).append(line)
    return [
        members[0] if len(members) == 1 else f"{pattern} (layers {_numbers(members)})"
        for pattern, members in grouped.items()
    ]


def _numbers(lines: list[str]) -> str:
    found = (re.search(r"layers\.(\d+)\.", line) for line in lines)
    return ", ".join(match.group(1) for match in found if match)
