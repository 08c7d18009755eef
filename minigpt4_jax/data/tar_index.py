"""Where the pictures and captions lie in webdataset tars: found once, kept in a memory-mapped file beside them.

For: walking over the members of a tar by its headers (ustar, GNU long names, PAX; checksums verified), putting members
together to samples, saying what is broken, and the index file with its check for changed shards. Not for: reading
samples (`tar_shards.py`), judging pictures (`pixels.py`).

Differs from the original's `webdataset`, which streams shards through `tarfile`: there a zero block ends a shard in
silence and the members of a sample must be neighbours. Here the walk goes on behind damage, and members belong
together by their key (the path up to the first dot of the file name). Layout of the headers: POSIX.1-2017 `pax` and the
GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minigpt4_jax.config import UserError

BLOCK = 512
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSION = "json"
ROW = np.dtype(
    [
        ("shard", "<u4"),
        ("image_at", "<u8"),
        ("image_size", "<u4"),
        ("caption_at", "<u8"),
        ("caption_size", "<u4"),
    ]
)
"""One sample: 28 bytes, so that the index of 100 million samples is 2.8 GB on disk and nothing in memory."""

TRUNCATED, ZERO_BLOCK, BAD_CHECKSUM = "truncated tail", "zero block", "bad checksum"
DUPLICATE, ORDER = "duplicate key", "wrong member order"
NO_CAPTION, NO_IMAGE = "no caption", "no image"
"""The reasons in an index report. Samples of `ORDER` are whole and are used; the others are lost (of `ZERO_BLOCK` and
`TRUNCATED` perhaps only the mark)."""

_VERSION = 1
_MAX_NAME = 1 << 20  # bytes of a long name or a PAX header; more is damage
_NAMED = 10


class Member(NamedTuple):
    """A regular file in a tar: data at byte `offset`."""

    name: str
    offset: int
    size: int


class Damage(NamedTuple):
    """A place that is no tar; `name` is that of the member it cuts, if its header could be read."""

    reason: str
    offset: int
    name: str = ""


# --- members ------------------------------------------------------------------------------------------------------


def walk_members(descriptor: int, size: int) -> Iterator[Member | Damage]:
    """The regular files of a tar of `size` bytes in order, and its damage. Reads headers only.

    Behind damage the walk goes on at the next block that is a header. Where bytes were lost or added that are no
    multiple of 512, there is none: the rest of the file is part of the damage.
    """
    offset, name, next_size = 0, "", -1
    while True:
        block = os.pread(descriptor, BLOCK, offset)
        if len(block) < BLOCK:
            yield Damage(TRUNCATED, offset)
            return
        header = _parse(block)
        if header is None:
            zero = block.count(0) == BLOCK
            behind = _next_block(descriptor, offset + BLOCK, _is_header)
            if zero and _next_block(descriptor, offset + BLOCK, _is_not_zero) is None:
                return  # the end of the archive, as it should be
            yield Damage(ZERO_BLOCK if zero else BAD_CHECKSUM, offset)
            if behind is None:
                return
            offset, name, next_size = behind, "", -1
            continue
        kind = header.kind
        length = next_size if kind in b"0\x007" and next_size >= 0 else header.size
        data, end = offset + BLOCK, offset + BLOCK + length
        if end > size:
            yield Damage(TRUNCATED, offset, name or header.name)
            return
        offset = data + -(-length // BLOCK) * BLOCK
        if kind in b"Lx":
            if length > _MAX_NAME:
                yield Damage(BAD_CHECKSUM, data - BLOCK)
                continue
            text = os.pread(descriptor, length, data)
            if kind == b"L":
                name = text.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                records = _pax_records(text)
                name = records.get("path", name)
                next_size = int(records.get("size", next_size))
            continue
        if kind in b"0\x007":
            yield Member(name or header.name, data, length)
        if kind not in b"gK":  # these stand in front of another header
            name, next_size = "", -1


class _Header(NamedTuple):
    name: str
    size: int
    kind: bytes


def _parse(block: bytes) -> _Header | None:
    """A header block, or None if its checksum or a number in it is wrong (so is a block of zeros)."""
    try:
        stated = _number(block[148:156])
        size = _number(block[124:136])
    except ValueError:
        return None
    # The checksum field itself counts as spaces; old writers summed signed bytes.
    bare = block[:148] + b" " * 8 + block[156:]
    total = sum(bare)
    if stated not in (total, total - 256 * sum(byte > 127 for byte in bare)) or size < 0:
        return None
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return _Header(name.decode("utf-8", "surrogateescape"), size, block[156:157])


def _number(text: bytes) -> int:
    if text[0] & 0x80:  # GNU base 256
        return int.from_bytes(bytes([text[0] & 0x7F]) + text[1:], "big")
    return int(text.strip(b" \0") or b"0", 8)


def _pax_records(text: bytes) -> dict[str, str]:
    """`length key=value\\n` records; what does not have that form ends the list."""
    records: dict[str, str] = {}
    while text:
        length, _, _ = text.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(text):
            break
        key, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        text = text[int(length) :]
    if not records.get("size", "0").isdigit():
        del records["size"]
    return records


def _is_header(block: bytes) -> bool:
    return block[257:262] == b"ustar" and _parse(block) is not None


def _is_not_zero(block: bytes) -> bool:
    return block.count(0) != BLOCK


def _next_block(descriptor: int, offset: int, wanted: Callable[[bytes], bool]) -> int | None:
    """Offset of the first whole block from `offset` on that is `wanted`, or None."""
    step = 128 * BLOCK
    while chunk := os.pread(descriptor, step, offset):
        for start in range(0, len(chunk) - BLOCK + 1, BLOCK):
            if wanted(chunk[start : start + BLOCK]):
                return offset + start
        offset += step
    return None


# --- samples ------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """What indexing found to be broken: how often by reason, and the first of each by name."""

    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        """Counts a fault."""
        self.counts[reason] += 1
        names = self.named.setdefault(reason, [])
        if len(names) < _NAMED:
            names.append(where)


@dataclass
class _Group:
    """Members of one key."""

    image: Member | None = None
    caption: Member | None = None
    extensions: set[str] = field(default_factory=set)
    disordered: bool = False


def split_name(name: str) -> tuple[str, str]:
    """Key and extension: `a/b.c.JPG` -> (`a/b`, `c.jpg`). The extension is empty for a file without a dot."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def group_members(members: Iterator[Member | Damage], shard: str, report: Report) -> list[_Group]:
    """Puts the members of a shard together by key, in order of appearance, and reports what is wrong.

    Incomplete samples beside damage are part of it and not counted again. Of a repeated key the first members count;
    what a repetition brings that the first lacked is left out, since it may belong to another picture.
    """
    groups: dict[str, _Group] = {}
    damaged: set[str] = set()
    current, repeating, after_damage = "", False, False
    for member in members:
        key, extension = split_name(member.name)
        if isinstance(member, Damage):
            report.add(member.reason, f"{shard} at byte {member.offset}")
            damaged |= {current, key}
            after_damage = True
            continue
        if extension not in (*IMAGE_EXTENSIONS, CAPTION_EXTENSION) or key.endswith("/") or not key:
            continue
        if after_damage:
            damaged.add(key)
            after_damage = False
        if key != current:
            repeating = False
        group = groups.setdefault(key, _Group())
        if extension in group.extensions:
            if not repeating:
                report.add(DUPLICATE, f"{shard}: {key}")
            repeating = True
            damaged.add(key)
        elif not repeating:
            if group.extensions and key != current and not group.disordered:
                group.disordered = True
                report.add(ORDER, f"{shard}: {key}")
            group.extensions.add(extension)
            if extension == CAPTION_EXTENSION:
                group.caption = member
            else:
                group.image = group.image or member
        current = key
    for key, group in groups.items():
        if key not in damaged and group.image is None:
            report.add(NO_IMAGE, f"{shard}: {key}")
        if key not in damaged and group.image is not None and group.caption is None:
            report.add(NO_CAPTION, f"{shard}: {key}")
    return [group for group in groups.values() if group.image and group.caption]


def read_caption(data: bytes) -> str:
    """The `caption` of a sample's JSON. Raises `ValueError` that says what is there instead."""
    try:
        entry = json.loads(data)
    except ValueError as error:
        raise ValueError(f"its JSON is broken ({error})") from error
    caption = entry.get("caption") if isinstance(entry, dict) else None
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError(f"its caption is {caption!r}; expected text")
    return caption


def index_shard(path: Path, number: int, report: Report) -> np.ndarray:
    """Rows (`ROW`) of one shard's usable samples. Raises `UserError` when the file cannot be opened."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"Cannot open the shard {path} ({error.strerror or error}).") from error
    try:
        members = walk_members(descriptor, os.fstat(descriptor).st_size)
        rows = []
        for group in group_members(members, path.name, report):
            image, caption = group.image, group.caption
            assert image is not None
            assert caption is not None
            try:
                read_caption(os.pread(descriptor, caption.size, caption.offset))
            except ValueError as error:
                report.add(NO_CAPTION, f"{path.name}: {caption.name}: {error}")
                continue
            rows.append((number, image.offset, image.size, caption.offset, caption.size))
        return np.array(rows, ROW)
    finally:
        os.close(descriptor)


# --- the index file -----------------------------------------------------------------------------------------------


class Index(NamedTuple):
    """An opened index."""

    rows: np.ndarray
    """[N] of `ROW`, memory-mapped."""
    report: Report


def shard_table(shards: Sequence[Path], root: Path) -> list[list[Any]]:
    """Name, size in bytes and time of change in ns of each shard: an index holds as long as these do."""
    table = []
    for shard in shards:
        facts = shard.stat()
        table.append([os.path.relpath(shard, root), facts.st_size, facts.st_mtime_ns])
    return table


def read_index(path: Path, table: list[list[Any]]) -> Index | None:
    """The index at `path`, or None if there is none for shards as in `table`."""
    try:
        with path.open("rb") as file:
            file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(8), "little")
            file.seek(-8 - length, os.SEEK_END)
            facts = json.loads(file.read(length))
    except (OSError, ValueError):
        return None
    if facts.get("version") != _VERSION or facts.get("shards") != table:
        return None
    rows = np.zeros(0, ROW)
    if facts["rows"]:
        # A plain array over the map: an index into `np.memmap` itself takes several times as long.
        rows = np.asarray(np.memmap(path, ROW, mode="r", shape=(facts["rows"],)))
    return Index(rows, Report(Counter(facts["counts"]), facts["named"]))


def write_index(
    path: Path,
    shards: Sequence[Path],
    table: list[list[Any]],
    *,
    progress: Callable[[int, int], None],
) -> None:
    """Indexes all shards into `path`: the rows, then the facts about them as JSON, then its length in 8 bytes.

    `progress(done, of)` is called after each shard. Half an index never stands at `path`.
    """
    report, count = Report(), 0
    # Two runs may index at once; in containers all of them are process 1.
    beside = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        with beside.open("wb") as file:
            for number, shard in enumerate(shards):
                rows = index_shard(shard, number, report)
                file.write(rows.tobytes())
                count += len(rows)
                progress(number + 1, len(shards))
            facts = {
                "version": _VERSION,
                "shards": table,
                "rows": count,
                "counts": dict(report.counts),
                "named": report.named,
            }
            tail = json.dumps(facts).encode()
            file.write(tail + len(tail).to_bytes(8, "little"))
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"Cannot write the index {path} ({error.strerror or error}). Set the source's `index` to a file in a "
            "folder that can be written."
        ) from error
    finally:
        beside.unlink(missing_ok=True)
