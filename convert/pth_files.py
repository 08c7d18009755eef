"""A PyTorch file, mapped into memory: what its pickle says, and where the bytes of its storages lie.

For: both formats of `torch.save`. Since 1.6 a zip archive (`TOP/data.pkl`, `TOP/data/KEY`, `TOP/byteorder`);
before, and with `_use_new_zipfile_serialization=False`, five pickles in a row (magic number, protocol, facts of the
machine, the value, the storages' keys) and the storages behind them, each with its length as 8 bytes.
Not for: what the value means (`convert/pth.py`), TorchScript archives, whole pickled modules, the tar format of 2016.

Differs from the original, whose `torch.load` copies every storage into memory before a tensor is looked at.
https://github.com/pytorch/pytorch, torch/serialization.py: `_load`, `_legacy_load`.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from convert.pth_pickle import Storage, unpickle, words
from convert.pth_zip import START, zip_records
from minigpt4_jax.config import UserError

MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of a legacy file."""
LEGACY_PROTOCOL = 1001
"""The second."""


@dataclass(frozen=True, kw_only=True)
class PthFile:
    """An open file; the map lives as long as an array that looks into it."""

    path: Path
    data: mmap.mmap
    value: Any
    """Of the pickle; tensors are `Tensor` records."""
    places: Mapping[str, tuple[int, int]]
    """Key of each storage -> position of its first byte, and how many there are."""
    big_endian: bool


def open_pth(path: Path) -> PthFile:
    """Maps a file and reads its pickle; no storage is touched.

    Raises:
        UserError: no PyTorch file, a damaged one, or one whose pickle asks for more than tensors and plain values.
        OSError: the file cannot be opened.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; expected a PyTorch file.")
    with path.open("rb") as file:
        if file.seek(0, 2) == 0:
            _fail(path, "it is empty")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _open_zip(path, data) if data[:4] == START else _open_legacy(path, data)


def _fail(path: Path, reason: str) -> NoReturn:
    raise UserError(
        f"{path} is not a whole PyTorch file ({reason}). Expected what torch.save writes; fetch it again."
    )


def _open_zip(path: Path, data: mmap.mmap) -> PthFile:
    records = zip_records(data, path)
    pickles = [name for name in records if name.count(b"/") == 1 and name.endswith(b"/data.pkl")]
    if len(pickles) != 1:
        _fail(path, f"the archive has {len(pickles)} records of the name TOP/data.pkl")
    top = pickles[0].removesuffix(b"data.pkl")
    first, size = records.get(top + b"byteorder", (0, 0))
    order = data[first : first + min(size, 16)] or b"little"  # before 2.1 it is not written
    if order not in (b"little", b"big"):
        _fail(path, f"its byte order is {order!r}, which is neither little nor big")
    start, size = records[pickles[0]]
    read = unpickle(data, start, end=start + size, where=str(path))
    if read.stop != start + size:
        _fail(path, "bytes follow its pickle")
    prefix = top + b"data/"
    places = {
        name.removeprefix(prefix).decode("utf-8", "surrogateescape"): place
        for name, place in records.items()
        if name.startswith(prefix)
    }
    return PthFile(
        path=path, data=data, value=read.value, places=places, big_endian=order == b"big"
    )


def _open_legacy(path: Path, data: mmap.mmap) -> PthFile:
    if data[257:262] == b"ustar":
        raise UserError(
            f"{path} is a tar archive, which PyTorch wrote until 2016. Expected its zip format; load the file with "
            "torch and save it again."
        )
    end, where = len(data), str(path)
    magic = unpickle(data, 0, end=end, where=where)
    if type(magic.value) is not int or magic.value != MAGIC:
        _fail(path, "it starts with another pickle than PyTorch's number")
    protocol = unpickle(data, magic.stop, end=end, where=where)
    if type(protocol.value) is not int or protocol.value != LEGACY_PROTOCOL:
        _fail(path, f"its format has another number than {LEGACY_PROTOCOL}")
    machine = unpickle(data, protocol.stop, end=end, where=where)
    if not isinstance(machine.value, dict) or machine.value.get("little_endian") is not True:
        _fail(path, "it was written by a machine with another byte order, which is not read")
    main = unpickle(data, machine.stop, end=end, where=where)
    last = unpickle(data, main.stop, end=end, where=where)
    if not isinstance(last.value, list) or not all(type(key) is str for key in last.value):
        _fail(path, "its list of storages is damaged")
    return PthFile(
        path=path,
        data=data,
        value=main.value,
        places=_legacy_places(path, data, last.stop, last.value, main.storages),
        big_endian=False,
    )


def _legacy_places(
    path: Path, data: mmap.mmap, at: int, keys: list[str], storages: dict[str, Storage]
) -> dict[str, tuple[int, int]]:
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        if key not in storages or key in places:
            _fail(path, f"no tensor, or an earlier one, uses the storage {words(key)}")
        if at + 8 > len(data):
            _fail(path, "it ends before its storages do")
        (numel,) = struct.unpack_from("<q", data, at)
        size = numel * storages[key].dtype.itemsize
        if numel != storages[key].numel:
            _fail(path, f"the storage {words(key)} is longer or shorter than its tensors say")
        if at + 8 + size > len(data):
            _fail(path, "it ends before its storages do")
        places[key] = (at + 8, size)
        at += 8 + size
    return places
