"""The seeded, resumable stream of training batches over one or several sources.

For: the global order (Grain's shuffle), turns among sources in exact ratios, prompts drawn, words tokenised, pictures
decoded when the run trains from pixels, corrupt samples replaced. Not for: the sources, placing arrays on devices.

Differs from the original: the order is a function of seed and position, so that a run continues exactly where it
stopped; a sample is seen once a pass; and what is broken is counted instead of skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minigpt4_jax.config import UserError
from minigpt4_jax.data.batches import Batch, ExampleTokens, collate
from minigpt4_jax.data.datasets import Part, image_offsets
from minigpt4_jax.data.encoding import Encoder
from minigpt4_jax.data.faults import (
    MAX_ATTEMPTS,
    Fault,
    FaultCount,
    SampleFault,
    describe,
    replacement,
)
from minigpt4_jax.data.mixing import Mixture
from minigpt4_jax.data.pixels import PictureReader

if TYPE_CHECKING:
    import grain

logger = logging.getLogger(__name__)

MAX_EXAMPLES = 2**32
"""Grain's shuffle is silently wrong for a source with more."""


class _Pick(NamedTuple):
    """A place in the stream: which sample, and the how-manieth time."""

    part: int
    sample: int
    epoch: int


class _Sample(NamedTuple):
    part: int
    number: int
    tokens: ExampleTokens
    image_row: int
    pixels: np.ndarray | None
    fault: Fault | None


class _Made(NamedTuple):
    """A batch and what happened while it was made; counted when the batch is returned, not when it is made."""

    batch: Batch
    drawn: list[int]
    faults: list[list[Fault]]
    cut_answers: int


class Pipeline:
    """An endless iterator of `Batch`, whose position can be saved and restored, and which must be closed.

    A context manager. `get_state()` is JSON-like: the batches returned, and for each source its size, the samples drawn
    and the indices of the corrupt ones among them. An iterator over the same sources, seed and settings that is given
    it continues with the very next batch and the same counts.
    """

    def __init__(
        self,
        dataset: grain.IterDataset[_Made],
        counts: Sequence[FaultCount],
        *,
        batches_per_epoch: float,
        cut_answers: int,
    ) -> None:
        self._iterator = iter(dataset)
        self._counts = counts
        self._closed = False
        self.batches_per_epoch = batches_per_epoch
        """Batches until every example was seen; epochs follow each other without a short batch between."""
        self.cut_answers = cut_answers
        """Answers cut by `truncate`: all examples of sources in memory, of others those returned by this iterator."""

    def __iter__(self) -> Pipeline:
        return self

    def __next__(self) -> Batch:
        """Raises `UserError` when more of a source is corrupt than the run allows."""
        made: _Made = next(self._iterator)
        for count, drawn, faults in zip(self._counts, made.drawn, made.faults, strict=True):
            count.add(drawn, faults)
        if made.cut_answers and not self.cut_answers:
            logger.warning("Answers longer than data.max_text_len are cut.")
        self.cut_answers += made.cut_answers
        return made.batch

    def fault_counts(self) -> dict[str, dict[str, int]]:
        """Corrupt samples by source and reason: each once, of the part of the stream that was returned."""
        return {count.name: count.counts() for count in self._counts}

    def get_state(self) -> dict[str, Any]:
        """The position after the batch that was returned last."""
        sources = {count.name: count.get_state() for count in self._counts}
        return {**self._iterator.get_state(), "sources": sources}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position that `get_state` gave. Raises `UserError` for anything else."""
        index, sources = state.get("next_index"), state.get("sources")
        known = isinstance(sources, dict) and list(sources) == [c.name for c in self._counts]
        if (
            set(state) != {"next_index", "sources"}
            or not isinstance(index, int)
            or index < 0
            or not known
        ):
            raise UserError(
                f"The data position is {state!r}; expected {{'next_index': a number, 'sources': ...}} as a checkpoint "
                "of this pipeline holds it."
            )
        for count in self._counts:
            count.set_state(state["sources"][count.name])
        self._iterator.set_state({"next_index": index})

    def close(self) -> None:
        """Stops the worker threads and says how much was corrupt. Safe to call twice."""
        close = getattr(self._iterator, "close", None)
        if close is not None:
            close()
        if not self._closed:
            for name, counts in self.fault_counts().items():
                if counts:
                    logger.warning("Corrupt samples met in source %r: %s", name, describe(counts))
        self._closed = True

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def make_pipeline(
    parts: Sequence[Part],
    encoder: Encoder,
    *,
    seed: int,
    batch_size: int,
    length_multiple: int,
    max_corrupt_share: float,
    pictures: PictureReader | None = None,
    bad_images: Mapping[int, SampleFault] | None = None,
    shuffle: bool = True,
    num_threads: int = 1,
    prefetch: int = 8,
) -> Pipeline:
    """The stream of training batches over `parts`.

    Words in memory are checked here, so that nothing about them can fail hours later. Which example comes when, which
    prompt it is asked with and how it is cropped depends only on `seed` and the position in the stream.

    Args:
      seed: 0 to 2**32 - 1.
      length_multiple: sequences and targets are padded up to a multiple of this.
      max_corrupt_share: of each source, 0 to 1; more stops the stream (see `FaultCount`).
      pictures: decodes the pictures into `Batch["pixels"]`; None leaves them to a feature cache, by `image_index`.
      bad_images: what is wrong with pictures that the feature cache could not encode, by `image_index`.
      num_threads: batches are made ahead by this many threads; 0 makes them when asked for.
      prefetch: how many batches are made ahead.

    Raises `UserError` that lists every over-long sample in memory together.
    """
    import grain  # imports JAX if it finds it: only training pays for that

    cut_answers = sum(
        encoder.check(part.source, process=part.process) for part in parts if part.source.in_memory
    )
    reader = _SampleReader(
        parts, encoder, seed=seed, pictures=pictures, bad_images=bad_images or {}
    )
    streams = [
        _stream(grain, number, len(part.source), seed=seed + number, shuffle=shuffle)
        for number, part in enumerate(parts)
    ]
    mixture = Mixture([part.weight for part in parts])
    picks = (
        streams[0] if len(streams) == 1 else grain.MapDataset.select_from_datasets(streams, mixture)
    )

    def make_batch(samples: Sequence[_Sample]) -> _Made:
        batch = collate(
            [sample.tokens for sample in samples],
            [sample.image_row for sample in samples],
            length_multiple=length_multiple,
        )
        batch["source"] = np.asarray([sample.part for sample in samples], np.int32)
        batch["sample_index"] = np.asarray([sample.number for sample in samples], np.int64)
        if pictures is not None:
            batch["pixels"] = np.stack([s.pixels for s in samples if s.pixels is not None])
        drawn = np.bincount([sample.part for sample in samples], minlength=len(parts)).tolist()
        faults = [
            [s.fault for s in samples if s.part == number and s.fault is not None]
            for number in range(len(parts))
        ]
        cut = sum(s.tokens.cut_tokens > 0 and not parts[s.part].source.in_memory for s in samples)
        return _Made(batch, drawn, faults, cut)

    batches = picks.map(reader).batch(batch_size, drop_remainder=True, batch_fn=make_batch)
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=prefetch if num_threads else 0
    )
    longest = max(
        len(part.source) / weight for part, weight in zip(parts, mixture.weights, strict=True)
    )
    return Pipeline(
        batches.to_iter_dataset(options),
        [FaultCount(p.name, len(p.source), max_share=max_corrupt_share) for p in parts],
        batches_per_epoch=longest * mixture.cycle / batch_size,
        cut_answers=cut_answers,
    )


def _stream(grain: Any, part: int, size: int, *, seed: int, shuffle: bool) -> Any:
    """The endless order of one source's samples, anew in every epoch."""
    if size > MAX_EXAMPLES:
        raise UserError(f"A source has {size} samples; expected at most {MAX_EXAMPLES}. Split it.")
    dataset = grain.MapDataset.source(range(size)).seed(seed % 2**32)
    if shuffle:
        dataset = dataset.shuffle()
    return dataset.repeat().map_with_index(
        lambda place, index: _Pick(part, int(index), place // size)
    )


class _SampleReader:
    """Makes the sample of a pick; for a corrupt one, that of its stand-in in the same source."""

    def __init__(
        self,
        parts: Sequence[Part],
        encoder: Encoder,
        *,
        seed: int,
        pictures: PictureReader | None,
        bad_images: Mapping[int, SampleFault],
    ) -> None:
        self._parts, self._encoder, self._seed = parts, encoder, seed
        self._pictures, self._bad_images = pictures, bad_images
        self._offsets = image_offsets(parts)

    def __call__(self, pick: _Pick) -> _Sample:
        size, index = len(self._parts[pick.part].source), pick.sample
        faults: list[SampleFault] = []
        for attempt in range(1 + MAX_ATTEMPTS):
            if attempt:
                index = replacement(pick.sample, attempt, size=size)
            try:
                sample = self._read(pick._replace(sample=index))
            except SampleFault as fault:
                faults.append(fault)
                continue
            first = Fault(pick.sample, faults[0].reason, str(faults[0])) if faults else None
            return sample._replace(fault=first)
        raise UserError(
            f"Sample {pick.sample} of source {self._parts[pick.part].name!r} is corrupt, and so are all {MAX_ATTEMPTS} "
            f"that were tried in its place. The first: {faults[0]} The last: {faults[-1]} Mend the files."
        )

    def _read(self, pick: _Pick) -> _Sample:
        part = self._parts[pick.part]
        rng = np.random.default_rng((self._seed, pick.part, pick.epoch, pick.sample))
        # Drawn for every sample, also for one with its own prompt, so that adding a prompt moves no other draw.
        choice = int(rng.integers(self._encoder.num_prompts))
        example = part.source[pick.sample]
        row = self._offsets[pick.part] + example.image_row
        if row in self._bad_images:
            bad = self._bad_images[row]
            raise SampleFault(bad.reason, f"{example.name}, {bad}")
        tokens = self._encoder.encode(example, choice, process=part.process)
        pixels = None
        if self._pictures is not None:
            image = example.image
            if image is None:
                image = part.source.read_image(example.image_row)
            pixels = self._pictures(image, example.name, rng=rng)
        return _Sample(pick.part, pick.sample, tokens, row, pixels, None)
