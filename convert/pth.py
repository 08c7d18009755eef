"""PyTorch files (`.pth`, `.pt`, `.bin`) read and written without PyTorch.

For: state dicts in both formats of `torch.save`, alone, under the key `model` (files of the original's trainer, of
BLIP-2) or in the shards of a Hugging Face folder; and for writing such a file that `torch.load` reads.
Not for: whole pickled modules, TorchScript, quantised, sparse, complex or float8 tensors: refused by name.

Nothing in a file is executed (`convert/pth_pickle.py`), and it is mapped, not read: one tensor at a time, as a view
where its bytes are in the machine's order.

Differs from the original, whose `torch.load` runs what the pickle says and holds the whole file in memory.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convert.pth_files import PthFile, open_pth
from convert.pth_pickle import STORAGES, Tensor, words
from convert.replacing import replacing
from convert.shards import add_tensors, check_index, shard_files
from minigpt4_jax.config import UserError

Array = npt.NDArray[Any]

ALIGNMENT = 64
"""Of a storage in the archives that we write, in bytes, as in torch's: a mapped tensor can then be used where it is."""
LISTED = 50
"""Names in an error message; a file can be made to have any number."""


class PthSource:
    """A PyTorch file, or a folder of shards with its `pytorch_model.bin.index.json`; a `TensorSource`.

    A `model` entry at the top is opened. Its neighbours (optimizer, epoch, ...) are no weights: they are left alone and
    named in `metadata["left_alone"]`.

    Raises:
        UserError: no PyTorch file, a damaged one, one that holds or asks for anything but tensors, or shards that do
            not fit their index.
        OSError: a file cannot be opened.
    """

    INDEX = "pytorch_model.bin.index.json"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors: dict[str, tuple[PthFile, Tensor]] = {}
        shards, indexed = shard_files(path, self.INDEX)
        self._shards = tuple(shards)
        left_alone: list[str] = []
        for shard in shards:
            file = open_pth(shard)
            tensors, others = _state_dict(file)
            left_alone += [name for name in others if name not in left_alone]
            add_tensors(self._tensors, {n: (file, tensor) for n, tensor in tensors.items()}, shard)
        check_index(path, indexed, set(self._tensors))
        self.metadata: Mapping[str, Any] = {"left_alone": left_alone} if left_alone else {}

    def describe(self) -> str:
        return str(self._path)

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name][1].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._tensors[name][1].storage.dtype

    def get(self, name: str) -> Array:
        """One tensor, read-only: a view of the mapped file, or a copy where its bytes are swapped or not aligned."""
        return _array(*self._tensors[name])

    def files(self) -> tuple[Path, ...]:
        return self._shards


def _state_dict(file: PthFile) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by name, each proven to lie inside its storage; and the entries beside `model`."""
    weights, others = file.value, []
    if isinstance(weights, dict) and isinstance(weights.get("model"), dict):
        others = [words(str(name)) for name in weights if name != "model"]
        weights = weights["model"]
    if not isinstance(weights, dict):
        raise UserError(
            f"{file.path} holds {words(weights)}; expected a state dict, or one under the key 'model'."
        )
    odd = [
        words(str(name))
        for name, value in weights.items()
        if not isinstance(value, Tensor) or not isinstance(name, str)
    ]
    if odd:
        more = f" and {len(odd) - LISTED} more" if len(odd) > LISTED else ""
        raise UserError(
            f"{file.path} holds entries that are no tensors: {', '.join(odd[:LISTED])}{more}. Expected a state dict, "
            "or one under the key 'model'."
        )
    for name, tensor in weights.items():
        problem = _problem(file, tensor)
        if problem:
            raise UserError(
                f"{file.path}: the tensor {words(name)!r} {problem}. The file is damaged or was edited; fetch it again."
            )
    return weights, others


def _problem(file: PthFile, tensor: Tensor) -> str | None:
    """Why the tensor cannot be cut out of the file; None where it can."""
    storage = tensor.storage
    if storage.key not in file.places:
        return f"has no storage: there is no {words(storage.key)}"
    have, need = file.places[storage.key][1], storage.numel * storage.dtype.itemsize
    if need > have:
        return f"needs {need} bytes of storage; there are {have}"
    if math.prod(max(n, 1) for n in tensor.shape) * storage.dtype.itemsize >= 2**62:
        return "is larger than any array"
    count = math.prod(tensor.shape)
    last = tensor.offset + sum(
        (n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True)
    )
    if count and last >= storage.size:
        return f"reaches element {last} of a storage that has {storage.size}"
    if count > storage.size:
        return f"has {count} elements in a storage of {storage.size}: it repeats some, which no weights do"
    return None


def _array(file: PthFile, tensor: Tensor) -> Array:
    dtype = tensor.storage.dtype
    if 0 in tensor.shape:
        empty: Array = np.zeros(tensor.shape, dtype)
        empty.flags.writeable = False
        return empty
    # Whole numbers of the same width: they can be swapped and copied whatever the bytes mean.
    bits = np.dtype(f"{'>' if file.big_endian else '<'}u{dtype.itemsize}")
    first = file.places[tensor.storage.key][0]
    view: Array = np.ndarray(
        tensor.shape,
        bits,
        buffer=file.data,
        offset=first + (tensor.storage.first + tensor.offset) * dtype.itemsize,
        # The step of an axis of length 1 is never taken and can be anything.
        strides=[
            step * dtype.itemsize if n > 1 else 0
            for n, step in zip(tensor.shape, tensor.strides, strict=True)
        ],
    )
    if not (bits.isnative and view.flags.aligned):
        view = view.astype(bits.newbyteorder("="))
        view.flags.writeable = False
    return view.view(dtype)


# --- writing ---

Entries = Mapping[str, "Array | Entries"]
"""Arrays by name; a dict among them becomes a dict in the file."""


def write_pth(path: Path, entries: Entries) -> None:
    """Writes dicts of arrays so that `torch.load(path, weights_only=True)` reads them; the file appears whole or not.

    The bytes depend on the arrays alone. `{"model": {...}}` is what the original's `ckpt:` expects.

    Args:
        entries: arrays in a dtype that torch stores (`STORAGES`), any strides.

    Raises:
        UserError: another dtype, or a file that cannot be written.
    """
    written = _Pickler()
    written.value(entries)
    with (
        replacing(path) as partial,
        partial.open("wb") as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        little = {
            "data.pkl": b"\x80\x02" + b"".join(written.parts) + b".",
            "byteorder": b"little",
        }
        for name, content in little.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
        for key, array in enumerate(written.arrays):
            info = zipfile.ZipInfo(f"archive/data/{key}")
            info.file_size = array.nbytes
            long = array.nbytes > zipfile.ZIP64_LIMIT // 2
            info.extra = _padding(file.tell() + 30 + len(info.filename.encode()) + 20 * long)
            with archive.open(info, "w", force_zip64=long) as record:
                record.write(_little_endian(array).data)
        archive.writestr(zipfile.ZipInfo("archive/version"), b"3\n")


def _padding(data_at: int) -> bytes:
    """A field of the local header that moves the data from `data_at` to the next multiple of `ALIGNMENT`."""
    size = -(data_at + 4) % ALIGNMENT
    return struct.pack("<2H", 0x4246, size) + bytes(size)


def _little_endian(array: Array) -> Array:
    bits = np.dtype(f"u{array.dtype.itemsize}")
    flat = np.ascontiguousarray(array).reshape(-1).view(bits)
    return flat.astype(bits.newbyteorder("<"), copy=False).view(np.uint8)


class _Pickler:
    """The pickle of dicts and tensors, and the arrays that go beside it."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.arrays: list[Array] = []

    def value(self, value: Array | Entries) -> None:
        if isinstance(value, Mapping):
            self.parts.append(b"}(")
            for name, entry in value.items():
                self.text(name)
                self.value(entry)
            self.parts.append(b"u")
        else:
            self.tensor(np.asarray(value))

    def tensor(self, array: Array) -> None:
        kinds = [name for name, dtype in STORAGES.items() if dtype == array.dtype]
        if not kinds:
            raise UserError(
                f"An array is {array.dtype}; a PyTorch file can hold "
                f"{', '.join(str(dtype) for dtype in STORAGES.values())}."
            )
        steps = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
        self.parts.append(b"ctorch._utils\n_rebuild_tensor_v2\n((")
        self.text("storage")
        self.parts.append(b"ctorch\n%s\n" % kinds[0].removeprefix("torch.").encode())
        self.text(str(len(self.arrays)))
        self.text("cpu")
        self.number(array.size)
        self.parts.append(b"tQ")
        self.number(0)
        for counts in (array.shape, steps):
            self.parts.append(b"(")
            for count in counts:
                self.number(count)
            self.parts.append(b"t")
        self.parts.append(b"\x89ccollections\nOrderedDict\n)RtR")
        self.arrays.append(array)

    def text(self, text: str) -> None:
        encoded = text.encode()
        self.parts.append(b"X" + struct.pack("<I", len(encoded)) + encoded)

    def number(self, number: int) -> None:
        width = number.bit_length() // 8 + 1
        self.parts.append(b"\x8a" + bytes([width]) + number.to_bytes(width, "little"))
