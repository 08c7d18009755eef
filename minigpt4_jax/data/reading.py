"""One sample of the stream, in two steps: its words, then its picture; a corrupt one gives its place to a stand-in.

For: reading, encoding and decoding what a place of the global order asks for. Not for: the order (`pipeline.py`), which
samples make a batch (`windows.py`), counting what was corrupt (`faults.py`).

Two steps because the words decide a batch's length and its order, on which all processes of a run must agree: each
reads the words of all samples, and the pictures of its own. What is drawn depends on seed, source, sample and pass
alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from minigpt4_jax.config import UserError
from minigpt4_jax.data.batches import ExampleTokens, Shape, size_of
from minigpt4_jax.data.datasets import Part, image_offsets
from minigpt4_jax.data.encoding import Encoder
from minigpt4_jax.data.faults import MAX_ATTEMPTS, Fault, SampleFault, replacement
from minigpt4_jax.data.padding import Padding
from minigpt4_jax.data.pixels import PictureReader

MAX_MISFITS = 100
"""Stand-ins that may be too long for the batch, before the row is left blank."""


class Pick(NamedTuple):
    """A place in the stream: which sample, and the how-manieth time."""

    part: int
    sample: int
    epoch: int


class Words(NamedTuple):
    """The words of a pick, or of the stand-in for what is corrupt already in them."""

    pick: Pick
    sample: int
    """Whose words these are."""
    attempt: int
    """0: the pick's own; else the how-manieth stand-in."""
    tokens: ExampleTokens
    name: str
    image_row: int
    """Among the source's own pictures."""
    faults: tuple[SampleFault, ...]
    """Of the samples that were tried before."""
    misfits: int
    """Stand-ins that were passed over because they are too long."""


class Sample(NamedTuple):
    """A row of a batch."""

    part: int
    number: int
    """In its source; of a corrupt sample that of the one in its place."""
    tokens: ExampleTokens
    image_index: int
    """Among the pictures of all sources."""
    pixels: np.ndarray | None
    fault: Fault | None


class SampleReader:
    """Reads the sample of a pick; for a corrupt one, that of its stand-in in the same source.

    Args:
        padding: words that it cannot hold are corrupt.
        pictures: decodes pictures; None leaves them to a feature cache.
        bad_images: what is wrong with pictures that the cache could not encode, by number among all.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        encoder: Encoder,
        *,
        padding: Padding,
        seed: int,
        pictures: PictureReader | None,
        bad_images: Mapping[int, SampleFault],
    ) -> None:
        self._parts, self._encoder, self._padding, self._seed = parts, encoder, padding, seed
        self._pictures, self._bad_images = pictures, bad_images
        self._offsets = image_offsets(parts)

    def read_words(self, pick: Pick) -> Words:
        """Raises `UserError` when the sample and all its stand-ins are corrupt."""
        words = self._try(pick, 0, (), misfits=0, shape=None)
        assert words is not None  # without a shape every length fits
        return words

    def read_picture(self, words: Words, *, shape: Shape) -> Sample:
        """The finished sample: at most (tokens, targets) as `shape`, which its batch has already.

        For a picture that is corrupt the next stand-in comes whose words are not too long. If none is found although
        some were only too long, the row is blank: the words stay, none of them counts, and the picture is zeros.
        Raises `UserError` when the sample and all its stand-ins are corrupt.
        """
        tried: Words | None = words
        while tried is not None:
            try:
                pixels = self._read_pixels(tried)
            except SampleFault as fault:
                words = words._replace(faults=(*tried.faults, fault))
                tried = self._try(
                    words.pick,
                    tried.attempt + 1,
                    words.faults,
                    misfits=tried.misfits,
                    shape=shape,
                )
                continue
            return self._sample(tried, pixels)
        return self._blank(words)

    def _try(
        self,
        pick: Pick,
        attempt: int,
        faults: tuple[SampleFault, ...],
        *,
        misfits: int,
        shape: Shape | None,
    ) -> Words | None:
        """The words of the first attempt from `attempt` on that are good and fit `shape`; None: leave the row blank."""
        size = len(self._parts[pick.part].source)
        while len(faults) <= MAX_ATTEMPTS and misfits < MAX_MISFITS:
            index = replacement(pick.sample, attempt, size=size) if attempt else pick.sample
            try:
                words = self._encode(pick, index)
            except SampleFault as fault:
                faults = (*faults, fault)
            else:
                if shape is None or all(np.less_equal(size_of(words.tokens), shape)):
                    return words._replace(attempt=attempt, faults=faults, misfits=misfits)
                misfits += 1
            attempt += 1
        if misfits:
            return None
        raise UserError(
            f"Sample {pick.sample} of source {self._parts[pick.part].name!r} is corrupt, and so are all {MAX_ATTEMPTS} "
            f"that were tried in its place. The first: {faults[0]} The last: {faults[-1]} Mend the files."
        )

    def _draws(self, pick: Pick, index: int) -> tuple[int, np.random.Generator]:
        """The prompt that is drawn for a sample, and the generator behind that draw."""
        rng = np.random.default_rng((self._seed, pick.part, pick.epoch, index))
        # Drawn for every sample, also for one with its own prompt, so that adding a prompt moves no other draw.
        return int(rng.integers(self._encoder.num_prompts)), rng

    def _encode(self, pick: Pick, index: int) -> Words:
        part = self._parts[pick.part]
        example = part.source[index]
        row = self._offsets[pick.part] + example.image_row
        if row in self._bad_images:
            bad = self._bad_images[row]
            raise SampleFault(bad.reason, f"{example.name}, {bad}")
        choice, _ = self._draws(pick, index)
        tokens = self._encoder.encode(example, choice, process=part.process)
        self._padding.require_fit(tokens, example.name)
        # Without the picture, where a record holds both: a window of them would fill the memory.
        return Words(pick, index, 0, tokens, example.name, example.image_row, (), 0)

    def _read_pixels(self, words: Words) -> np.ndarray | None:
        if self._pictures is None:
            return None
        _, rng = self._draws(words.pick, words.sample)
        image = self._parts[words.pick.part].source.read_image(words.image_row)
        return self._pictures(image, words.name, rng=rng)

    def _sample(self, words: Words, pixels: np.ndarray | None) -> Sample:
        fault = None
        if words.faults:
            first = words.faults[0]
            fault = Fault(words.pick.sample, first.reason, str(first))
        row = self._offsets[words.pick.part] + words.image_row
        return Sample(words.pick.part, words.sample, words.tokens, row, pixels, fault)

    def _blank(self, words: Words) -> Sample:
        assert self._pictures is not None  # only a picture's fault comes this late
        tokens = replace(words.tokens, loss_mask=np.zeros_like(words.tokens.loss_mask))
        side = self._pictures.size
        pixels = np.zeros((side, side, 3), np.float32)
        return self._sample(words._replace(tokens=tokens), pixels)
