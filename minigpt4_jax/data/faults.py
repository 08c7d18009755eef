"""Samples that cannot be used: what is wrong with one, who stands in for it, and how many there were.

For: the one exception that a broken sample raises, the deterministic replacement, and the count by reason that is part
of a run's checkpoint. Not for: finding the faults (`sources.py`, `tar_index.py`, `pixels.py`, `encoding.py` do).

Differs from the original, which warns and skips whatever raises, so that nobody knows how much of a corpus is gone.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from minigpt4_jax.config import UserError

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 8
"""Stand-ins that are tried for one corrupt sample."""
NAMED_PER_REASON = 3
"""So many samples are named in the log for each reason; further ones are only counted."""
SMALLEST_BASE = 1000
"""A share is taken of at least so many samples (or the whole source), so that an early fault is no large share."""

TRAINING_SETTING = "data.max_corrupt_share"
"""Where a run says how many of its samples may be corrupt."""


class SampleFault(UserError):
    """A sample that cannot be used. `reason` is one of a few fixed words; the message names the sample."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Fault(NamedTuple):
    """A corrupt sample that the stream drew."""

    sample: int
    """Its index in its source."""
    reason: str
    message: str


def replacement(index: int, attempt: int, *, size: int) -> int:
    """Index of the stand-in for a corrupt sample: a hash of its index and of the attempt (from 1), and nothing else."""
    digest = hashlib.blake2b(struct.pack("<QI", index, attempt), digest_size=8).digest()
    return int.from_bytes(digest, "little") % size


class FaultCount:
    """Counts one source's corrupt samples over the part of the stream that was returned.

    A sample counts once, however often it is drawn: after a pass over the source the counts are exactly what is broken
    in it, after ten passes the same. Stand-ins that were tried and found broken count when they are drawn themselves.
    The state is in the checkpoint, so that a resumed run counts on from there; its size is one number per corrupt
    sample, which `max_share` bounds. With several processes each finds the faults of its own rows; `add_state` puts
    them together.
    """

    def __init__(
        self, name: str, size: int, *, max_share: float, setting: str = TRAINING_SETTING
    ) -> None:
        self.name, self.size, self._max_share, self._setting = name, size, max_share, setting
        self.drawn = 0
        """Samples drawn from the source so far, repetitions included."""
        self._reasons: dict[int, str] = {}
        self._counts: Counter[str] = Counter()

    def add(self, drawn: int, faults: Sequence[Fault]) -> None:
        """Counts a batch. Raises `UserError` when the share of corrupt samples is above the limit."""
        self.drawn += drawn
        for fault in faults:
            if fault.sample in self._reasons:
                continue
            self._reasons[fault.sample] = fault.reason
            self._counts[fault.reason] += 1
            count = self._counts[fault.reason]
            if count <= NAMED_PER_REASON:
                logger.warning(
                    "Corrupt sample in source %r (%s): %s", self.name, fault.reason, fault.message
                )
            if count == NAMED_PER_REASON:
                logger.warning("Further ones (%s) are counted, not named.", fault.reason)
        if faults:
            self._require_share(faults[-1].message)

    def counts(self) -> dict[str, int]:
        """Corrupt samples by reason."""
        return dict(self._counts)

    def get_state(self) -> dict[str, Any]:
        """JSON-like, for the checkpoint; equal counts give equal states."""
        faults: dict[str, list[int]] = {}
        for index, reason in sorted(self._reasons.items(), key=lambda item: (item[1], item[0])):
            faults.setdefault(reason, []).append(index)
        return {"size": self.size, "drawn": self.drawn, "faults": faults}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Counts on from `get_state`. Raises `UserError` when the source has another size than it had then."""
        if state["size"] != self.size:
            raise UserError(
                f"Source {self.name!r} has {self.size} samples; the run in this workdir had {state['size']}. Its order "
                "would change: put the files back, or start in a new workdir."
            )
        self.drawn = state["drawn"]
        self._reasons = {
            index: reason for reason, places in state["faults"].items() for index in places
        }
        self._counts = Counter(self._reasons.values())

    def add_state(self, state: Mapping[str, Any]) -> None:
        """Counts what another process of the run has found: the union of its samples and these.

        Twice is once. Raises `UserError` when the other reads another source, or the share of all is above the limit.
        """
        own = {"size": self.size, "drawn": self.drawn}
        if {key: state[key] for key in own} != own:
            raise UserError(
                f"Source {self.name!r} has {self.size} samples, {self.drawn} of them drawn, in one process and "
                f"{state['size']}, {state['drawn']} of them drawn, in another; expected the same files in every "
                "process. Give all hosts the same files."
            )
        new = {index: reason for reason, places in state["faults"].items() for index in places}
        self._reasons = new | self._reasons
        self._counts = Counter(self._reasons.values())
        if new:
            index, reason = next(reversed(new.items()))
            self._require_share(f"sample {index}, {reason}; its process has named it.")

    def _require_share(self, example: str) -> None:
        require_share(
            self.name,
            self._counts,
            of=min(self.size, max(self.drawn, SMALLEST_BASE)),
            max_share=self._max_share,
            example=example,
            setting=self._setting,
        )


def require_share(
    name: str,
    counts: Mapping[str, int],
    *,
    of: int,
    max_share: float,
    example: str,
    setting: str = TRAINING_SETTING,
) -> None:
    """Raises `UserError` if `counts` are more than `max_share` of `of` samples.

    Args:
        example: one of the faults.
        setting: what the user raises to allow more.
    """
    total = sum(counts.values())
    if total > max_share * of:
        raise UserError(
            f"{total} of {of} samples of source {name!r} are corrupt ({describe(counts)}); expected at most "
            f"{max_share:.2%} ({setting}). The last one: {example} Mend the files, or raise the limit."
        )


def describe(counts: Mapping[str, int]) -> str:
    """`3 empty image, 1 no caption`."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
