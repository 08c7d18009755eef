"""The sources that a run's settings name, opened.

For: `data.sources` (or its short form `data.folder`) to objects with their weights and caption processors. Not for: the
formats themselves (`sources.py`, `jsonl.py`, `tar_shards.py`, `array_records.py`), or the stream (`pipeline.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from minigpt4_jax.config import UserError
from minigpt4_jax.data.array_records import ArrayRecordSource, TfdsSource
from minigpt4_jax.data.captions import as_it_is, get_processor
from minigpt4_jax.data.faults import TRAINING_SETTING, require_share
from minigpt4_jax.data.jsonl import Jsonl
from minigpt4_jax.data.sources import CcSbuAlign, Source
from minigpt4_jax.data.tar_index import ORDER
from minigpt4_jax.data.tar_shards import TarShards
from minigpt4_jax.train_config import DataConfig, SourceConfig

Progress = Callable[[int, int], None]


class Part(NamedTuple):
    """One source of a run."""

    name: str
    source: Source
    weight: float = 1.0
    process: Callable[[str], str] = as_it_is
    """Applied to every answer."""


def open_sources(config: DataConfig, *, progress: Progress = lambda done, of: None) -> list[Part]:
    """Opens every source of `config`, in the order of the settings.

    Args:
        progress: called with shards done and their number while tars are indexed.

    Raises `UserError` for a source that cannot be used, or tars of which more than `max_corrupt_share` is lost.
    """
    parts = []
    for name, settings in config.all_sources().items():
        source = _open(settings, progress)
        require_intact(name, source, max_share=config.max_corrupt_share)
        process = get_processor(settings.caption_processor)
        parts.append(Part(name, source, settings.weight, process))
    return parts


def require_intact(
    name: str, source: Source, *, max_share: float, setting: str = TRAINING_SETTING
) -> None:
    """Raises `UserError` when more than `max_share` of the samples of tars were lost already by their index.

    Other sources have nothing to lose before a sample is read. `setting`: see `faults.require_share`.
    """
    if not isinstance(source, TarShards):
        return
    lost = {why: n for why, n in source.report.counts.items() if why != ORDER}
    if lost:
        total = len(source) + sum(lost.values())
        example = next(names[-1] for why, names in source.report.named.items() if why in lost)
        require_share(
            name, lost, of=total, max_share=max_share, example=f"{example}.", setting=setting
        )


def _open(settings: SourceConfig, progress: Progress) -> Source:
    match settings.kind:
        case "cc_sbu_align":
            return CcSbuAlign(settings.path)
        case "jsonl":
            return Jsonl(settings.path)
        case "tar":
            return TarShards(settings.path, index=settings.index or None, progress=progress)
        case "array_record":
            return ArrayRecordSource(settings.path)
        case "tfds":
            return TfdsSource(settings.path)
    raise UserError(f"There is no kind of source {settings.kind!r}.")


def image_offsets(parts: Sequence[Part]) -> list[int]:
    """Where each source's pictures begin when the pictures of all sources are numbered through."""
    offsets, total = [], 0
    for part in parts:
        offsets.append(total)
        total += part.source.num_images
    return offsets
