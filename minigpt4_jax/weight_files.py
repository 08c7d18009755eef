"""Reads parts of tensors out of safetensors files, on a local disk or in a bucket.

For: `model_folder.py`, where a device of a pod asks for its slice of a kernel and nothing else may be read. Local files
are mapped into memory; of a bucket (`gs://...`, `s3://...`, through fsspec) only the bytes of the rows that were asked
for are fetched.
Not for: writing, and not for other people's files (`convert/sources.py` reads those with the safetensors library, which
reads local files only).

The format: eight bytes with the length of the header, little-endian; the header, JSON; the tensors, each at the offsets
that the header gives, C order, little-endian.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from minigpt4_jax.config import UserError

Array = npt.NDArray[Any]
Index = tuple[slice, ...]

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
}
"""The format's names of the dtypes that weights come in."""

_MOST_HEADER = 100_000_000  # bytes; the format's own limit


class _Bytes(Protocol):
    """A file of which parts are read."""

    size: int

    def read(self, start: int, stop: int) -> Array:
        """Bytes as `uint8`; a view where there is one."""


class _LocalFile:
    def __init__(self, path: Path) -> None:
        self.size = path.stat().st_size
        self._map = np.memmap(path, np.uint8, "r") if self.size else np.empty(0, np.uint8)

    def read(self, start: int, stop: int) -> Array:
        return self._map[start:stop]


class _BucketFile:
    def __init__(self, url: str) -> None:
        self._fs, self._path = open_filesystem(url)
        self.size = int(self._fs.size(self._path))

    def read(self, start: int, stop: int) -> Array:
        if start == stop:
            return np.empty(0, np.uint8)
        return np.frombuffer(self._fs.cat_file(self._path, start=start, end=stop), np.uint8)


class WeightFile:
    """One safetensors file.

    Raises:
        UserError: nothing there, or not a whole safetensors file.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        try:
            self._file: _Bytes = _BucketFile(where) if is_url(where) else _LocalFile(Path(where))
        except FileNotFoundError as error:
            raise UserError(f"There is no {where}; expected a file of the model folder.") from error
        try:
            self._tensors, self._start = self._read_header()
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{where} is not a whole safetensors file ({error}). Copy or convert the folder again."
            ) from error

    def _read_header(self) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(self._file.read(0, 8).tobytes(), "little")
        if not 0 < length <= min(_MOST_HEADER, self._file.size - 8):
            raise ValueError(f"a header of {length} bytes in a file of {self._file.size}")
        start = 8 + length
        header: dict[str, Any] = json.loads(self._file.read(8, start).tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            size = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
            if not 0 <= first <= last <= self._file.size - start or last - first != size:
                raise ValueError(
                    f"{name} lies at {first} to {last} of {self._file.size - start} bytes"
                )
        return header, start

    def names(self) -> tuple[str, ...]:
        """All tensors of the file."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name]["shape"])

    def dtype(self, name: str) -> np.dtype[Any]:
        """Dtype of a tensor."""
        return DTYPES[self._tensors[name]["dtype"]]

    def read(self, name: str, index: Index = ()) -> Array:
        """A part of a tensor, in its dtype: `index` has a slice with step 1 for each leading axis, all by default.

        Of a bucket the rows (first axis) that `index` names are fetched; what is cut from the other axes is fetched
        with them.
        """
        shape, dtype = self.shape(name), self.dtype(name)
        first = self._start + self._tensors[name]["data_offsets"][0]
        if not shape:
            data = self._file.read(first, first + dtype.itemsize)
            return data.view(dtype).reshape(())
        rows = range(*index[0].indices(shape[0])) if index else range(shape[0])
        row = math.prod(shape[1:]) * dtype.itemsize
        start = first + (rows[0] if rows else 0) * row
        part = self._file.read(start, start + len(rows) * row)
        if start % dtype.itemsize:  # NumPy reads no number across its alignment
            part = part.copy()
        return part.view(dtype).reshape(len(rows), *shape[1:])[(slice(None), *index[1:])]


def is_url(path: str) -> bool:
    """Whether `path` names a place in a bucket."""
    return "://" in path


def open_filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises:
        UserError: fsspec, or the package for this kind of bucket, is not installed.
    """
    try:
        import fsspec

        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{url} cannot be opened ({error}). Expected a local path, or a URL whose package is installed: gcsfs for "
            "gs://, s3fs for s3://."
        ) from error
    return fs, path
