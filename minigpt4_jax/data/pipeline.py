"""The seeded, resumable stream of training batches over one or several sources.

For: the one global order (Grain's shuffle, turns among sources in exact ratios), each process's share of its batches,
and the position that a checkpoint keeps. Not for: the sources, reading a sample (`reading.py`), which samples make a
batch (`windows.py`), placing arrays on devices.

Differs from the original: the order is a function of seed and position, whatever the number of processes, so that a run
continues exactly where it stopped; a sample is seen once a pass; and what is broken is counted instead of skipped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minigpt4_jax.config import UserError
from minigpt4_jax.data.batches import Batch, pad_batch
from minigpt4_jax.data.datasets import Part
from minigpt4_jax.data.encoding import Encoder
from minigpt4_jax.data.faults import Fault, FaultCount, SampleFault, describe
from minigpt4_jax.data.mixing import Mixture
from minigpt4_jax.data.padding import Padding
from minigpt4_jax.data.pixels import PictureReader
from minigpt4_jax.data.reading import Pick, SampleReader
from minigpt4_jax.data.windows import Windows

if TYPE_CHECKING:
    import grain

logger = logging.getLogger(__name__)

MAX_EXAMPLES = 2**32
"""Grain's shuffle is silently wrong for a source with more."""


MAX_BATCHES = 2**62
"""In an endless stream."""


class _Made(NamedTuple):
    """A batch and what happened while it was made; counted when the batch is returned, not when it is made."""

    batch: Batch
    """This process's rows."""
    drawn: list[int]
    """Samples by source, of the rows of all processes."""
    faults: list[list[Fault]]
    """By source, of this process's rows."""
    cut_answers: int


class Pipeline:
    """An endless iterator of `Batch`, whose position can be saved and restored, and which must be closed.

    A context manager. `get_state()` is JSON-like: the batches returned, and for each source its size, the samples drawn
    and the indices of the corrupt ones among them. An iterator over the same sources, seed and settings that is given
    it continues with the very next batch and the same counts, whatever the number of processes was and is: the position
    is that of the global order. With several processes each knows the corrupt samples of its own rows only, so a
    checkpoint keeps what `merge_states` makes of the states of all.
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
        """The position after the batch that was returned last; of the corrupt samples those that this process knows."""
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

    def merge_states(self, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """One state for a checkpoint, from that of every process at the same step (this one's among them).

        To be called by every process with the same `states`: each then counts on from the corrupt samples that all have
        found. The share that a run allows (`max_corrupt_share`) is of all processes only here; in between it stops a
        process whose own rows hold as many. Raises `UserError` when the share is too large, and when processes stand at
        different positions or read different files.
        """
        here = self.get_state()
        for state in states:
            if state["next_index"] != here["next_index"]:
                raise UserError(
                    f"The processes of this run stand at different batches ({here['next_index']} and "
                    f"{state['next_index']}); expected the same. Start it again from its last checkpoint."
                )
            for count in self._counts:
                count.add_state(state["sources"][count.name])
        return self.get_state()

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
    length_buckets: Sequence[int] = (),
    bucket_window: int = 1,
    max_corrupt_share: float,
    pictures: PictureReader | None = None,
    bad_images: Mapping[int, SampleFault] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    num_threads: int = 1,
    prefetch: int = 8,
) -> Pipeline:
    """The stream of training batches over `parts`.

    Words in memory are checked here, so that nothing about them can fail hours later. Which example comes when, which
    prompt it is asked with and how it is cropped depends only on `seed` and the position in the stream.

    With several processes, process i makes rows [i * B / n, (i + 1) * B / n) of each batch, and all of them together
    the batch that one would make. All pad to the same shape: that of the whole batch, so each reads and tokenises the
    words of all rows, and decodes the pictures of its own. What that costs stays the same however many processes
    there are: a caption's bytes and its tokens for every row (an ArrayRecord's caption comes with its picture's bytes).
    All need the same files.

    Args:
      seed: 0 to 2**32 - 1.
      batch_size: of all processes together.
      length_multiple: sequences and targets are padded up to a multiple of this.
      length_buckets: sequences are padded up to the first of these lengths instead (see `padding.py`).
      bucket_window: so many batches are drawn together, sorted by length and shuffled (see `windows.py`). The words of
        all of them are read before the first one is made.
      max_corrupt_share: of each source, 0 to 1; more stops the stream (see `FaultCount`).
      pictures: decodes the pictures into `Batch["pixels"]`; None leaves them to a feature cache, by `image_index`.
      bad_images: what is wrong with pictures that the feature cache could not encode, by `image_index`.
      num_threads: batches are made ahead by this many threads; 0 makes them when asked for.
      prefetch: how many batches are made ahead; at least one for each thread.

    Raises `UserError` that lists every over-long sample in memory together, for a batch that the processes cannot share
    evenly, and for buckets that end below the longest sample that may come.
    """
    import grain  # imports JAX if it finds it: only training pays for that

    _require_even_shares(batch_size, process_count)
    prefetch = max(
        prefetch, num_threads
    )  # Grain has no more batches in the making than it makes ahead
    padding = Padding(
        length_multiple=length_multiple,
        buckets=tuple(length_buckets),
        max_text_len=encoder.max_text_len,
    )
    _require_room(padding, parts, encoder)
    cut_answers = sum(
        encoder.check(part.source, process=part.process, require_fit=padding.require_fit)
        for part in parts
        if part.source.in_memory
    )
    reader = SampleReader(
        parts, encoder, padding=padding, seed=seed, pictures=pictures, bad_images=bad_images or {}
    )
    streams = [
        _stream(grain, number, len(part.source), seed=seed + number, shuffle=shuffle)
        for number, part in enumerate(parts)
    ]
    mixture = Mixture([part.weight for part in parts])
    picks = (
        streams[0] if len(streams) == 1 else grain.MapDataset.select_from_datasets(streams, mixture)
    )
    windows = Windows(
        lambda position: reader.read_words(picks[position]),
        size=bucket_window,
        batch_size=batch_size,
        seed=seed,
        kept=2 + prefetch // bucket_window,
    )
    share = batch_size // process_count
    own = slice(process_index * share, (process_index + 1) * share)
    batches = grain.MapDataset.range(MAX_BATCHES).map(
        _BatchMaker(windows, reader, parts, padding=padding, own=own)
    )
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


def _require_even_shares(batch_size: int, process_count: int) -> None:
    if batch_size % process_count:
        below = batch_size // process_count * process_count
        fitting = [size for size in (below, below + process_count) if size]
        raise UserError(
            f"data.batch_size is {batch_size} with {process_count} processes; expected a multiple of their number, as "
            f"each makes as many rows. Set it to {' or '.join(map(str, fitting))}, or start another number of "
            "processes."
        )


def _require_room(padding: Padding, parts: Sequence[Part], encoder: Encoder) -> None:
    """Of sources that are read as they come, the settings alone say how long a sample may get."""
    late = [part.name for part in parts if not part.source.in_memory]
    if late and padding.buckets and padding.buckets[-1] < encoder.max_length:
        raise UserError(
            f"data.length_buckets ends at {padding.buckets[-1]}; expected at least {encoder.max_length}, the longest "
            f"prompt and an answer of data.max_text_len tokens, which source {late[0]!r} may hold. Add that length."
        )


def _stream(grain: Any, part: int, size: int, *, seed: int, shuffle: bool) -> Any:
    """The endless order of one source's samples, anew in every epoch."""
    if size > MAX_EXAMPLES:
        raise UserError(f"A source has {size} samples; expected at most {MAX_EXAMPLES}. Split it.")
    dataset = grain.MapDataset.source(range(size)).seed(seed % 2**32)
    if shuffle:
        dataset = dataset.shuffle()
    return dataset.repeat().map_with_index(
        lambda place, index: Pick(part, int(index), place // size)
    )


class _BatchMaker:
    """Makes this process's rows (`own`) of a batch, given its number."""

    def __init__(
        self,
        windows: Windows,
        reader: SampleReader,
        parts: Sequence[Part],
        *,
        padding: Padding,
        own: slice,
    ) -> None:
        self._windows, self._reader, self._parts = windows, reader, parts
        self._padding, self._own = padding, own

    def __call__(self, number: int) -> _Made:
        rows = self._windows.batch(int(number))
        shape = self._padding.shape_of([row.tokens for row in rows])
        samples = [self._reader.read_picture(row, shape=shape) for row in rows[self._own]]
        tokens = [sample.tokens for sample in samples]
        batch = pad_batch(tokens, [sample.image_index for sample in samples], shape=shape)
        batch["source"] = np.asarray([sample.part for sample in samples], np.int32)
        batch["sample_index"] = np.asarray([sample.number for sample in samples], np.int64)
        pixels = [sample.pixels for sample in samples if sample.pixels is not None]
        if pixels:
            batch["pixels"] = np.stack(pixels)
        numbers = range(len(self._parts))
        drawn = np.bincount([row.pick.part for row in rows], minlength=len(numbers)).tolist()
        faults = [
            [s.fault for s in samples if s.part == part and s.fault is not None] for part in numbers
        ]
        late = [not part.source.in_memory for part in self._parts]
        cut = sum(sample.tokens.cut_tokens > 0 and late[sample.part] for sample in samples)
        return _Made(batch, drawn, faults, cut)
