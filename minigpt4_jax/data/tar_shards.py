"""Webdataset tars (`jpg`/`jpeg`/`png`/`webp` + `json` with `caption`) as a random-access source.

For: the original's stage-1 corpora as `img2dataset` writes them. Local and network file systems only: samples are read
by `pread` at any place, in any order, from any thread. Not for: object stores (convert to ArrayRecord, see
`array_records.py`), finding the members (`tar_index.py`).

Differs from the original, which draws shards with replacement and shuffles within 1000 samples: every sample has an
index, so the shuffle is global and each is seen once a pass.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigpt4_jax.config import UserError
from minigpt4_jax.data.faults import SampleFault, describe
from minigpt4_jax.data.sources import NO_CAPTION, UNREADABLE, Example, Exchange
from minigpt4_jax.data.tar_index import (
    BLOCK,
    Index,
    read_caption,
    read_index,
    shard_table,
    write_index,
)

logger = logging.getLogger(__name__)

MAX_OPEN = 128
"""Shards that are kept open."""
_LOGGED_FAULTS = 3
_WILDCARDS = "*?["


class TarShards:
    """All samples of a set of tars.

    The index is built on first use, and again whenever a shard's name, size or time of change is another.

    Args:
        path: a folder (all its `*.tar`) or a pattern such as `laion/*/0*.tar`.
        index: the index file; None keeps it in the folder of the shards.
        progress: called with the shards done and their number while indexing.

    Raises `UserError` when there is no shard, none has a usable sample, or the index cannot be written.
    """

    in_memory = False

    def __init__(
        self,
        path: str | Path,
        *,
        index: str | Path | None = None,
        progress: Callable[[int, int], None] = lambda done, of: None,
    ) -> None:
        root, pattern = _split_pattern(Path(path))
        self._shards = sorted(root.glob(pattern))
        if not self._shards:
            raise UserError(
                f"There is no shard at {path}; expected a folder with *.tar files, or a pattern such as "
                f"{root / '*.tar'}."
            )
        self._table = shard_table(self._shards, root)
        name = hashlib.sha256(pattern.encode()).hexdigest()[:8]
        self._index_path = Path(index) if index else root / f"minigpt4_index_{name}.bin"
        found = read_index(self._index_path, self._table)
        if found is None:
            if self._index_path.exists():
                logger.warning("%s is of other shards; indexing again.", self._index_path)
            write_index(self._index_path, self._shards, self._table, progress=progress)
        self._open()
        if self.report.counts:
            logger.warning("Faults in %s: %s", path, describe(self.report.counts))
            for reason, names in self.report.named.items():
                logger.warning("  %s: %s", reason, "; ".join(names[:_LOGGED_FAULTS]))
        if not len(self._rows):
            raise UserError(
                f"No sample of {path} can be used ({describe(self.report.counts) or 'no member fits'}); expected "
                "members KEY.jpg (or jpeg, png, webp) and KEY.json with a caption."
            )

    def _open(self) -> None:
        found: Index | None = read_index(self._index_path, self._table)
        if found is None:
            raise UserError(
                f"The index {self._index_path} was changed by somebody else. Run again."
            )
        self._rows, self.report = found
        self._names = [shard.name for shard in self._shards]
        self.num_images = len(self._rows)
        self._descriptors: OrderedDict[int, _Descriptor] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("_shards", "_table", "_index_path")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        shard, image_at, _, offset, size = self._rows[index].item()
        name = self._name(shard, image_at)
        try:
            caption = read_caption(self._read(shard, offset, size, name))
        except ValueError as error:
            raise SampleFault(NO_CAPTION, f"{name}: {error}.") from error
        return Example(name, index, (Exchange(None, caption),))

    def read_image(self, row: int) -> bytes:
        shard, offset, size, _, _ = self._rows[row].item()
        return self._read(shard, offset, size, self._name(shard, offset))

    def _name(self, shard: int, image_at: int) -> str:
        """Shard and byte of the picture's header: `tar tvRf` counts the same place in blocks of 512."""
        return f"{self._names[shard]} at byte {image_at - BLOCK}"

    def _read(self, shard: int, offset: int, size: int, name: str) -> bytes:
        try:
            data = self._descriptor(shard).read(size, offset)
        except OSError as error:
            raise SampleFault(
                UNREADABLE, f"Cannot read {name} ({error.strerror or error})."
            ) from error
        if len(data) != size:
            raise SampleFault(
                UNREADABLE, f"{name} has {len(data)} of {size} bytes: the shard was changed."
            )
        return data

    def _descriptor(self, shard: int) -> _Descriptor:
        with self._lock:
            descriptor = self._descriptors.get(shard)
            if descriptor is None:
                descriptor = self._descriptors[shard] = _Descriptor(self._shards[shard])
                if len(self._descriptors) > MAX_OPEN:
                    self._descriptors.popitem(last=False)
            else:
                self._descriptors.move_to_end(shard)
            return descriptor


class _Descriptor:
    """An open file, closed when the last thread that reads from it lets go of it.

    The number stays inside: on its own it could be closed, and be another file's, before it is read from.
    """

    def __init__(self, path: Path) -> None:
        self._number = os.open(path, os.O_RDONLY)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._number, size, offset)

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)


def _split_pattern(path: Path) -> tuple[Path, str]:
    """Folder without wildcards, and the pattern inside it."""
    if path.is_dir():
        return path, "*.tar"
    parts = path.parts
    for place, part in enumerate(parts):
        if any(sign in part for sign in _WILDCARDS):
            return Path(*parts[:place]), str(Path(*parts[place:]))
    return path.parent, path.name
