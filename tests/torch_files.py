"""Writes a `.pth` as PyTorch's zip format has it, without torch: a flat dict of tensors, perhaps under `model`.

For tests of what reads such files. Written from the format's side (pickle opcodes, one stored member per tensor); not
for everything that `torch.save` can do.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}


def write_pth(path: Path, arrays: Mapping[str, np.ndarray], *, under: str | None = None) -> Path:
    """A state dict, or `{under: state dict, "epoch": 0}` as trainers save it."""
    body = _dict(arrays)
    if under is not None:
        body = b"}(" + _text(under) + body + _text("epoch") + _number(0) + b"u"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02" + body + pickle.STOP)
        file.writestr("archive/byteorder", "little")
        for key, array in enumerate(arrays.values()):
            file.writestr(f"archive/data/{key}", np.ascontiguousarray(array).tobytes())
        file.writestr("archive/version", "3\n")
    return path


def _dict(arrays: Mapping[str, np.ndarray]) -> bytes:
    items = b"".join(
        _text(name) + _tensor(key, array) for key, (name, array) in enumerate(arrays.items())
    )
    return b"}(" + items + b"u"


def _tensor(key: int, array: np.ndarray) -> bytes:
    strides = [int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)]
    storage = b"(" + _text("storage") + b"ctorch\n" + STORAGES[array.dtype.name].encode() + b"\n"
    storage += _text(str(key)) + _text("cpu") + _number(array.size) + b"tQ"
    arguments = storage + _number(0) + _tuple(array.shape) + _tuple(strides) + b"\x89"
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + hooks + b"tR"


def _text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def _number(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _tuple(numbers: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"
