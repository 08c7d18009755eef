"""A source with given captions for tests of the stream, some of whose pictures are broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from minigpt4_jax.data.sources import Example, Exchange
from tests.planted import jpeg


class Captioned:
    """One picture per caption; those in `broken` are empty files. `late`: its words are not in memory."""

    def __init__(
        self, captions: Sequence[str], *, broken: Collection[int] = (), late: bool = False
    ) -> None:
        self.in_memory, self.num_images = not late, len(captions)
        self._captions, self._broken = captions, set(broken)
        self.pictures_read: Counter[int] = Counter()

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> Example:
        return Example(f"caption {index}", index, (Exchange(None, self._captions[index]),))

    def read_image(self, row: int) -> bytes:
        self.pictures_read[row] += 1
        return b"" if row in self._broken else jpeg(row)
