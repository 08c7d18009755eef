"""Sizes and CRC-32 of the files of a folder: what was written is what is read, or it is said which file is not.

For: model folders and checkpoints. Orbax gives back arrays with flipped bits without a word, and dies of other damage
in a dozen ways; so every file is compared before one is opened. CRC-32 finds what disks, memory and cut copies do (5
GB/s and more, so that it costs less than reading); it is no protection against people, for which `convert/` compares
SHA-256.
Not for: what is in the files.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from minigpt4_jax.config import UserError

FILE = "checksums.json"
FORMAT = 1
"""Of the folder as a whole. Raise it when an older version of this project must not read what this one writes."""

_LEFT_OUT = (FILE, "commit_success.txt", "_CHECKPOINT_METADATA")
"""Orbax writes the last two after everything else, with the time, and reads neither."""
_CHUNK = 1 << 22  # bytes
_THREADS = 4


class NewerFormat(UserError):
    """The folder was written by a version that this one does not know."""


def write_checksums(folder: Path, *, known: Mapping[str, dict[str, Any]] | None = None) -> None:
    """Writes `checksums.json` into `folder`, about every file below it.

    Args:
        known: by path below `folder`, what `file_checksum` would say: taken while the file was written.
    """
    names = sorted(_files(folder))
    found = {name: entry for name, entry in (known or {}).items() if name in names}
    new = [name for name in names if name not in found]
    with ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda name: file_checksum(folder / name), new)
        found |= dict(zip(new, sums, strict=True))
    found = {name: found[name] for name in names}
    partial = folder / f"{FILE}.partial"
    partial.write_text(json.dumps({"format": FORMAT, "files": found}, indent=0) + "\n")
    os.replace(partial, folder / FILE)


def damaged_files(folder: Path) -> list[str] | None:
    """Every difference between the files below `folder` and its `checksums.json`, one line each.

    Returns None where there is no `checksums.json`: nothing is known then.

    Raises:
        NewerFormat: a later version of this project wrote the folder.
    """
    try:
        stored = json.loads((folder / FILE).read_text())
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
    expected = stored.get("files") if format_ == FORMAT else None
    if not isinstance(expected, dict):
        return [f"{FILE} is not a list of checksums"]
    present = set(_files(folder))
    problems = [f"{name} is missing" for name in sorted(expected.keys() - present)]
    problems += [f"{name} does not belong there" for name in sorted(present - expected.keys())]
    both = sorted(present & expected.keys())
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, found in zip(
            both, pool.map(lambda n: file_checksum(folder / n), both), strict=True
        ):
            problems += _differences(name, found, expected[name])
    return problems


def _files(folder: Path) -> Iterator[str]:
    for file in folder.rglob("*"):
        if file.is_file() and file.name not in (*_LEFT_OUT, f"{FILE}.partial"):
            yield file.relative_to(folder).as_posix()


def file_checksum(file: Path) -> dict[str, Any]:
    """`{"bytes", "crc32"}` of a file, or `{"unreadable": why}`."""
    crc, size = 0, 0
    try:
        with file.open("rb") as f:
            while chunk := f.read(_CHUNK):
                crc, size = zlib.crc32(chunk, crc), size + len(chunk)
    except OSError as error:
        return {"unreadable": error.strerror}
    return {"bytes": size, "crc32": f"{crc:08x}"}


def _differences(name: str, found: dict[str, Any], expected: Any) -> list[str]:
    if found == expected:
        return []
    if "unreadable" in found or not isinstance(expected, dict):
        return [f"{name} cannot be compared ({found.get('unreadable', 'no checksum')})"]
    key = "bytes" if found["bytes"] != expected.get("bytes") else "crc32"
    return [f"{name} has {key} {found[key]}, expected {expected.get(key)}"]
