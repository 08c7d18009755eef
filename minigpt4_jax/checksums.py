"""Sizes and checksums of the files of a folder: what was written is what is read, or it is said which file is not.

For: model folders and checkpoints. Orbax gives back arrays with flipped bits without a word, and dies of other damage
in a dozen ways; so every file is compared before one is opened. Model folders have CRC-32: it finds what disks, memory
and cut copies do (5 GB/s and more, so that it costs less than reading); it is no protection against people, for which
`convert/` compares SHA-256. The steps of a training run, a few tens of MB, have SHA-256.
Not for: what is in the files.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from minigpt4_jax.config import UserError

FILE = "checksums.json"
FORMAT = 2
"""The highest that is read. Raise it when an older version of this project must not read what this one writes."""

Kind = Literal["crc32", "sha256"]
_KINDS: dict[int, Kind] = {1: "crc32", 2: "sha256"}
"""Of the checksums in a folder of that format."""

LATE = ("commit_success.txt", "_CHECKPOINT_METADATA")
"""Orbax writes these after everything else, with the time, reads neither: compared once `add_late_checksums` ran."""
_CHUNK = 1 << 22  # bytes
_THREADS = 4


class NewerFormat(UserError):
    """The folder was written by a version that this one does not know."""


def write_checksums(
    folder: Path, *, kind: Kind = "crc32", known: Mapping[str, dict[str, Any]] | None = None
) -> None:
    """Writes `checksums.json` into `folder`, about every file below it but those of `LATE`.

    Args:
        known: by path below `folder`, what `file_checksum` would say: taken while the file was written.
    """
    names = sorted(name for name in _files(folder) if not _is_late(name))
    found = {name: entry for name, entry in (known or {}).items() if name in names}
    new = [name for name in names if name not in found]
    found |= _checksums(folder, new, kind=kind)
    _write(folder, kind, {name: found[name] for name in names})


def add_late_checksums(folder: Path) -> None:
    """Adds the files of `LATE` below `folder` to its `checksums.json`."""
    stored = json.loads((folder / FILE).read_text())
    kind = _KINDS[stored["format"]]
    late = sorted(name for name in _files(folder) if _is_late(name))
    _write(folder, kind, stored["files"] | _checksums(folder, late, kind=kind))


def _write(folder: Path, kind: Kind, files: dict[str, Any]) -> None:
    (format_,) = (number for number, its_kind in _KINDS.items() if its_kind == kind)
    partial = folder / f"{FILE}.partial"
    try:
        partial.write_text(json.dumps({"format": format_, "files": files}, indent=0) + "\n")
        os.replace(partial, folder / FILE)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _checksums(folder: Path, names: Collection[str], *, kind: Kind) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda name: file_checksum(folder / name, kind=kind), names)
        return dict(zip(names, sums, strict=True))


def damaged_files(folder: Path, *, contents: bool = True) -> list[str] | None:
    """Every difference between the files below `folder` and its `checksums.json`, one line each.

    Returns None where there is no `checksums.json`: nothing is known then.

    Args:
        contents: read every file; False compares names and sizes alone.

    Raises:
        NewerFormat: a later version of this project wrote the folder.
    """
    try:
        text = (folder / FILE).read_text()
        stored = json.loads(text)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        return [f"{FILE} cannot be read ({error})"]
    format_ = stored.get("format") if isinstance(stored, dict) else None
    if isinstance(format_, int) and format_ > FORMAT:
        raise NewerFormat(
            f"{folder} has the format {format_}; this version of minigpt4_jax reads up to {FORMAT}. Update it, or use "
            "the version that wrote the folder."
        )
    kind = _KINDS.get(format_) if type(format_) is int else None
    expected = stored.get("files") if kind else None
    if kind is None or not isinstance(expected, dict) or not text.endswith("\n"):
        return [f"{FILE} is not a list of checksums"]
    present = {name for name in _files(folder) if name in expected or not _is_late(name)}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - present)]
    problems += [f"{name} does not belong there" for name in sorted(present - expected.keys())]
    both = sorted(present & expected.keys())
    if contents:
        sums = _checksums(folder, both, kind=kind)
    else:
        sums = {name: _size(folder / name, expected[name]) for name in both}
    for name, found in sums.items():
        problems += _differences(name, found, expected[name], kind=kind)
    return problems


def _size(file: Path, expected: Any) -> dict[str, Any]:
    """As `file_checksum`, with the size that the file has and the checksum that it should have."""
    try:
        return {**(expected if isinstance(expected, dict) else {}), "bytes": file.stat().st_size}
    except OSError as error:
        return {"unreadable": error.strerror}


def _is_late(name: str) -> bool:
    return name.rpartition("/")[2] in LATE


def _files(folder: Path) -> Iterator[str]:
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in (FILE, f"{FILE}.partial"):
            yield file.relative_to(folder).as_posix()


def file_checksum(file: Path, *, kind: Kind = "crc32") -> dict[str, Any]:
    """`{"bytes", kind}` of a file, the checksum in hexadecimal, or `{"unreadable": why}`."""
    crc, digest, size = 0, hashlib.sha256(), 0
    try:
        with file.open("rb") as f:
            while chunk := f.read(_CHUNK):
                size += len(chunk)
                if kind == "crc32":
                    crc = zlib.crc32(chunk, crc)
                else:
                    digest.update(chunk)
    except OSError as error:
        return {"unreadable": error.strerror}
    return {"bytes": size, kind: f"{crc:08x}" if kind == "crc32" else digest.hexdigest()}


def _differences(name: str, found: dict[str, Any], expected: Any, *, kind: Kind) -> list[str]:
    if found == expected:
        return []
    if "unreadable" in found or not isinstance(expected, dict):
        return [f"{name} cannot be compared ({found.get('unreadable', 'no checksum')})"]
    key = "bytes" if found["bytes"] != expected.get("bytes") else kind
    return [f"{name} has {key} {found[key]}, expected {expected.get(key)}"]
