"""Which source gives the next sample, in exact ratios.

For: the order in which several sources take turns. Not for: the order inside a source (Grain shuffles that).

Differs from the original, which draws the source of each sample at random; here a cycle of as many samples as the
weights add up to holds every source exactly as often as its weight says. Grain's own `MapDataset.mix` is not used:
it scales the smallest weight to 100 and cuts the others to whole numbers, so that 115:14 becomes 821:100.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from minigpt4_jax.config import UserError

MAX_CYCLE = 1_000_000


def whole_weights(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the ratio of `weights`, read as the decimals they are written as (0.3 is 3/10).

    Raises `UserError` when a weight is not above 0, or the numbers add up to more than a million.
    """
    if not all(weight > 0 and math.isfinite(weight) for weight in weights):
        raise UserError(
            f"The weights of the sources are {list(weights)}; expected numbers above 0. Take a source out of "
            "data.sources to leave it unused."
        )
    fractions = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * common) for fraction in fractions]
    divisor = math.gcd(*whole)
    whole = [weight // divisor for weight in whole]
    if sum(whole) > MAX_CYCLE:
        raise UserError(
            f"The weights of the sources are {list(weights)}, a cycle of {sum(whole)} samples; expected at most "
            f"{MAX_CYCLE}. Round them."
        )
    return whole


class Mixture:
    """A selection map for Grain: position in the stream -> (source, position in that source's own stream).

    Inside a cycle the sources are spread evenly: each sample comes from the source that is furthest behind its share
    (the first of those equally far).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = whole_weights(weights)
        self.cycle = sum(self.weights)
        self._source = np.zeros(self.cycle, np.int32)
        self._place = np.zeros(self.cycle, np.int32)
        shares = np.asarray(self.weights, np.int64)
        taken = np.zeros(len(self.weights), np.int64)
        for position in range(self.cycle):
            source = int(np.argmax(shares * (position + 1) - taken * self.cycle))
            self._source[position], self._place[position] = source, taken[source]
            taken[source] += 1

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        cycle, position = divmod(index, self.cycle)
        source = int(self._source[position])
        return source, cycle * self.weights[source] + int(self._place[position])
