"""Writes a safetensors file tensor by tensor, so that memory is bounded by the largest one.

For: model folders and exports, of which every shape and dtype is known before the first value is read. The format
(https://github.com/huggingface/safetensors, "Format"): the length of a JSON header as 8 bytes, little-endian, the
header (dtype, shape and place of every tensor), then the values, row by row, little-endian, without gaps.
Not for: reading (`sources.SafetensorsSource`), several files (`export.py`).

Differs from `safetensors.numpy.save_file`, which wants all arrays at once and copies them into one buffer.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any, TypedDict

import numpy as np
import numpy.typing as npt

from convert.replacing import replacing
from minigpt4_jax.config import UserError
from minigpt4_jax.weight_files import DTYPES

Array = npt.NDArray[Any]
Entry = tuple[str, tuple[int, ...], npt.DTypeLike, Array | Callable[[], Array]]
"""Name, shape, dtype, and the values or a function that reads them when their turn comes."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_ALIGNMENT = (
    8  # bytes: the header is filled up with spaces, so that every tensor is aligned to its dtype
)
_CHUNK = 1 << 24  # bytes


class Written(TypedDict):
    """What `checksums.json` says of a file."""

    bytes: int
    crc32: str
    """Eight hexadecimal digits."""


def write_safetensors(
    path: Path,
    entries: Iterable[Entry],
    *,
    metadata: Mapping[str, str] | None = None,
    on_tensor: Callable[[int, int, str], None] | None = None,
) -> Written:
    """Writes `path`; it appears whole or not at all, and replaces a file that was there.

    Tensors are read one after the other, those of larger items first (float32 before bfloat16, else in the given
    order): so each starts at a multiple of its item size, as readers that map the file want it.

    Args:
        entries: the tensors. Arrays need not be contiguous.
        metadata: texts for the header.
        on_tensor: called after every tensor with (done, total, name).

    Returns:
        Size and CRC-32 of the file, computed while it is written.

    Raises:
        UserError: no room (checked before anything is read), no permission, a tensor that cannot be read.
        ValueError: a dtype that the format does not know, a name twice, values that are not as announced.
    """
    ordered = sorted(entries, key=lambda entry: -np.dtype(entry[2]).itemsize)
    header, size = _header(ordered, dict(metadata or {}))
    with replacing(path) as partial:
        require_room(path.parent, size, what=path.name)
        with partial.open("wb") as file:
            crc = _write(file, header, 0)
            for done, (name, shape, dtype, values) in enumerate(ordered, start=1):
                crc = _write(file, _bytes(path, name, shape, np.dtype(dtype), values), crc)
                if on_tensor is not None:
                    on_tensor(done, len(ordered), name)
            file.flush()
            os.fsync(file.fileno())
    return {"bytes": size, "crc32": f"{crc:08x}"}


def tensor_bytes(shape: Iterable[int], dtype: npt.DTypeLike) -> int:
    """Bytes of a tensor's values."""
    size = np.dtype(dtype).itemsize
    for n in shape:
        size *= n
    return size


def require_room(folder: Path, needed: int, *, what: str) -> None:
    """Raises `UserError` when the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{what} needs {needed / 1e9:.2f} GB; {folder} has {free / 1e9:.2f} GB free. Free some space, or choose "
            "another place."
        )


def _header(entries: list[Entry], metadata: dict[str, str]) -> tuple[Array, int]:
    """The bytes before the first value, and the size of the whole file."""
    described: dict[str, Any] = {_METADATA: metadata} if metadata else {}
    at = 0
    for name, shape, dtype, _ in entries:
        if name in described or name == _METADATA:
            raise ValueError(f"The tensor name {name!r} is taken; expected every name once.")
        if np.dtype(dtype) not in _NAMES:
            raise ValueError(
                f"{name} is {np.dtype(dtype)}; expected one of {', '.join(_NAMES.values())}."
            )
        end = at + tensor_bytes(shape, dtype)
        described[name] = {
            "dtype": _NAMES[np.dtype(dtype)],
            "shape": [int(n) for n in shape],
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    whole = len(text).to_bytes(8, "little") + text
    return np.frombuffer(whole, np.uint8), len(whole) + at


def _bytes(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    values: Array | Callable[[], Array],
) -> Array:
    """The tensor as the file holds it, uint8 `[bytes]`; a view where it can be one."""
    try:
        array = np.asarray(values() if callable(values) else values)
    except OSError as error:
        raise UserError(
            f"{name} cannot be read for {path} ({error}). Check the disk that its source is on."
        ) from error
    if array.shape != tuple(shape) or array.dtype != dtype:
        raise ValueError(
            f"{name} is {array.dtype} {list(array.shape)}; {dtype} {list(shape)} was announced."
        )
    # (A dtype of the other byte order is not equal to the native one and is refused above.)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _write(file: IO[bytes], data: Array, crc: int) -> int:
    """Writes uint8 `[bytes]`; returns the running CRC-32."""
    for at in range(0, data.size, _CHUNK):
        chunk = data[at : at + _CHUNK].data
        file.write(chunk)
        crc = zlib.crc32(chunk, crc)
    return crc
