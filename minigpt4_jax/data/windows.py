"""Which samples of the global order make a batch: one after the other, or sorted by length within a window.

For: cutting the order into batches as a pure function of seed and position. Not for: the order itself and reading
(`pipeline.py`, `reading.py`), to which length a batch is padded (`padding.py`).

Differs from the original, whose batches hold whatever comes: where the samples of several batches are drawn together
and sorted by length, those of a length meet, and less is padded.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
from jaxtyping import Int

from minigpt4_jax.data.reading import Words


def arrange(
    lengths: Sequence[int], batch_size: int, *, rng: np.random.Generator
) -> Int[np.ndarray, "W B"]:
    """The places of a window's samples, batch by batch; every place once.

    Samples are sorted by length (equal ones stay in their order) and cut into batches of `batch_size`, and the batches
    are shuffled. A window of a single batch keeps its order.
    """
    if len(lengths) == batch_size:
        return np.arange(batch_size)[None]
    places = np.argsort(np.asarray(lengths), kind="stable").reshape(-1, batch_size)
    return rng.permutation(places, axis=0)


class Windows:
    """The words of window `n`, batch by batch: each read once, whichever of its batches is asked for first.

    Safe to ask from several threads: those that need the same window read it together, a batch's worth each in turn.
    Whatever is read again gives the same, so how many windows are kept is a matter of speed alone.

    Args:
        read: position in the global order -> the words of the sample there.
        size: batches in a window.
        kept: windows that are remembered.
    """

    def __init__(
        self,
        read: Callable[[int], Words],
        *,
        size: int,
        batch_size: int,
        seed: int,
        kept: int,
    ) -> None:
        self._read, self._size, self._batch_size = read, size, batch_size
        self._seed, self._kept = seed, kept
        self._windows: OrderedDict[int, _Window] = OrderedDict()
        self._lock = threading.Lock()

    def batch(self, number: int) -> list[Words]:
        """The samples of batch `number` of the run, in their order. Raises what reading any of its window raises."""
        index, place = divmod(number, self._size)
        with self._lock:
            window = self._windows.setdefault(index, _Window(self._size))
            self._windows.move_to_end(index)
            if len(self._windows) > self._kept:
                self._windows.popitem(last=False)
        self._help_read(index, window)
        words = [one for part in window.parts for one in part.result()]
        with window.lock:
            if window.order is None:
                # Five numbers: a sample's own draws are seeded with four, and shorter seeds are filled up with zeros.
                rng = np.random.default_rng((self._seed, index, 0, 0, 1))
                lengths = [len(one.tokens.token_ids) for one in words]
                window.order = arrange(lengths, self._batch_size, rng=rng)
        return [words[position] for position in window.order[place].tolist()]

    def _help_read(self, index: int, window: _Window) -> None:
        """Reads parts of the window until every one is somebody's."""
        while True:
            with window.lock:
                number = next(window.unread, None)
            if number is None:
                return
            part = window.parts[number]
            first = (index * self._size + number) * self._batch_size
            try:
                part.set_result([self._read(first + place) for place in range(self._batch_size)])
            except BaseException as error:  # whatever it is: the other threads wait for this part
                part.set_exception(error)
                raise


class _Window:
    def __init__(self, size: int) -> None:
        self.lock = threading.Lock()
        self.unread = iter(range(size))
        self.parts: list[Future[list[Words]]] = [Future() for _ in range(size)]
        """A batch's worth of the order each."""
        self.order: Int[np.ndarray, "W B"] | None = None
