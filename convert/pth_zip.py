"""Where the records of an uncompressed zip archive lie, so that they can be memory-mapped.

For: the archives that `torch.save` writes, zip64 too.
Not for: compressed, encrypted, split or self-extracting archives; those are refused by name, since PyTorch never writes
them and nothing in them can be mapped.

Not Python's `zipfile`: it makes an object of half a kilobyte for every 46 bytes of a damaged directory, believes its
offsets, and does not tell where a record's bytes begin. Checksums are not compared (torch does not either, unless
asked; a damaged weight is found by the SHA-256 of its file).

Format: https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT (sections 4.3.7, 4.3.12 to 4.3.16, 4.5.3).
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import NamedTuple, NoReturn

from minigpt4_jax.config import UserError

START = b"PK\3\4"
"""The first bytes of an archive: its first record."""
MAX_RECORDS = 100_000
"""A PyTorch file has one for each storage and some five more."""

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
END64_LOCATOR = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
ENCRYPTED = 1 | 1 << 6 | 1 << 13


def zip_records(data: mmap.mmap, path: Path) -> dict[bytes, tuple[int, int]]:
    """Name of each record -> position of its first byte and their number.

    Raises:
        UserError: no whole archive, or one with records that are compressed, encrypted, of one name or overlapping.
    """
    return _Directory(data, path).records()


class _Entry(NamedTuple):
    """What the directory says of a record."""

    name: bytes
    flags: int
    method: int
    packed: int
    size: int
    offset: int


class _Directory:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path = data, path

    def fail(self, reason: str) -> NoReturn:
        raise UserError(
            f"{self._path} is not a whole PyTorch file ({reason}). Expected the zip archive that torch.save writes; "
            "fetch it again."
        )

    def records(self) -> dict[bytes, tuple[int, int]]:
        count, first, stop = self._bounds()
        entries: dict[bytes, _Entry] = {}
        at = first
        for _ in range(count):
            entry, at = self._entry(at, stop)
            if entry.name in entries:
                self.fail(f"it has two records of the name {_shown(entry.name)}")
            entries[entry.name] = entry
        if at != stop:
            self.fail("its directory is longer than it says")
        if any(name.endswith(b"/constants.pkl") for name in entries):
            raise UserError(
                f"{self._path} is a TorchScript archive: a program with its weights. Expected weights alone; save the "
                "module's state_dict() with torch."
            )
        found = {name: (self._first_byte(entry), entry.size) for name, entry in entries.items()}
        runs = sorted((entry.offset, sum(found[name])) for name, entry in entries.items())
        for (_, stop), (start, _) in zip(runs, [*runs[1:], (first, 0)], strict=True):
            if stop > start:
                self.fail("its records overlap")
        return found

    def _entry(self, at: int, stop: int) -> tuple[_Entry, int]:
        """The entry of the directory at a position, and the position behind it."""
        if at + CENTRAL.size > stop:
            self.fail("its directory is cut off")
        head = CENTRAL.unpack_from(self._data, at)
        flags, method, packed, size, offset = head[3], head[4], head[8], head[9], head[16]
        name_at = at + CENTRAL.size
        extra_at = name_at + head[10]
        after = extra_at + head[11] + head[12]
        if head[0] != b"PK\1\2" or after > stop:
            self.fail("its directory is damaged")
        extra = self._data[extra_at : extra_at + head[11]]
        size, packed, offset = self._long_fields(extra, size, packed, offset)
        name = self._data[name_at:extra_at]
        return _Entry(name, flags, method, packed, size, offset), after

    def _bounds(self) -> tuple[int, int, int]:
        """Number of records; first byte of the directory and the one behind it."""
        end_at = self._data.rfind(b"PK\5\6", max(0, len(self._data) - END.size - 0xFFFF))
        if end_at < 0 or end_at + END.size > len(self._data):
            self.fail("the directory at its end is missing; it is cut off")
        _, disk, first_disk, _, count, size, at, comment = END.unpack_from(self._data, end_at)
        if end_at + END.size + comment != len(self._data):
            self.fail("bytes follow its end")
        stop = end_at
        locator_at = end_at - END64_LOCATOR.size
        if locator_at >= 0 and self._data[locator_at : locator_at + 4] == b"PK\6\7":
            stop = END64_LOCATOR.unpack_from(self._data, locator_at)[2]
            if stop + END64.size > locator_at or self._data[stop : stop + 4] != b"PK\6\6":
                self.fail("its zip64 directory is damaged")
            disk, first_disk, _, count, size, at = END64.unpack_from(self._data, stop)[4:]
        if disk or first_disk:
            self.fail("it is one part of a split archive")
        if at + size != stop:
            self.fail("its directory is not where it says; it is cut off, or something was put in")
        if count > MAX_RECORDS:
            self.fail(f"it has {count:,} records; at most {MAX_RECORDS:,} are read")
        return count, at, stop

    def _long_fields(
        self, extra: bytes, size: int, packed: int, offset: int
    ) -> tuple[int, int, int]:
        """Size, packed size and offset, where those that are full are replaced by the zip64 field's."""
        fields = [size, packed, offset]
        wanted = [k for k, value in enumerate(fields) if value == 0xFFFFFFFF]
        at = 0
        while wanted and at + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, at)
            at += 4
            if kind == 1 and length >= 8 * len(wanted) and at + 8 * len(wanted) <= len(extra):
                for k, value in zip(
                    wanted, struct.unpack_from(f"<{len(wanted)}Q", extra, at), strict=True
                ):
                    fields[k] = value
                wanted = []
            at += length
        if wanted:
            self.fail("a record of more than 4 GB has no zip64 field")
        return fields[0], fields[1], fields[2]

    def _first_byte(self, entry: _Entry) -> int:
        if entry.offset + LOCAL.size > len(self._data):
            self.fail(f"its record {_shown(entry.name)} lies behind its end")
        head = LOCAL.unpack_from(self._data, entry.offset)
        name_at = entry.offset + LOCAL.size
        if head[0] != START or self._data[name_at : name_at + head[9]] != entry.name:
            self.fail(f"its record {_shown(entry.name)} is not where the directory says")
        if (entry.flags | head[2]) & ENCRYPTED:
            self.fail(f"its record {_shown(entry.name)} is encrypted")
        if entry.method or head[3] or entry.packed != entry.size:
            self.fail(
                f"its record {_shown(entry.name)} is compressed; torch.save never does that, so it was packed again: "
                "unpack it and use the file inside"
            )
        return int(name_at + head[9] + head[10])


def _shown(name: bytes) -> str:
    return repr(name[:80].decode("utf-8", "replace"))
