"""PyTorch files put together byte by byte, right and wrong ones.

For: `tests/convert/test_pth.py` and `tools/fuzz_pth.py`, which need files that torch would not write, and files of its
older formats without torch.
Not for: writing weights (`convert.pth.write_pth`). Written from the format's side: nothing of the reader is used here.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

PROTO, STOP = b"\x80\x02", b"."
MAGIC = 0x1950A86A20F9469CFC6C
KINDS = {"f4": "Float", "f8": "Double", "f2": "Half", "i8": "Long", "u1": "Byte", "b1": "Bool"}


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value: int) -> bytes:
    width = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([width]) + value.to_bytes(width, "little", signed=True)


def numbers(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def ordered(entries: bytes) -> bytes:
    """An OrderedDict of keys and values, with the attribute that `state_dict()` gives it."""
    metadata = b"}" + text("_metadata") + b"}s"
    return name("collections", "OrderedDict") + b")R(" + entries + b"u" + metadata + b"b"


def plain(entries: bytes) -> bytes:
    """A dict."""
    return b"}(" + entries + b"u"


def storage(kind: str, key: str, numel: int, *, view: bytes | None = None) -> bytes:
    """A storage by its persistent id. `view`: the sixth part of legacy files."""
    parts = text("storage") + name("torch", f"{kind}Storage") + text(key) + text("cuda:0")
    return b"(" + parts + number(numel) + (view or b"") + b"tQ"


def tensor(
    stored: bytes, shape: Iterable[int], strides: Iterable[int], *, offset: int = 0
) -> bytes:
    """`_rebuild_tensor_v2` of it."""
    counts = number(offset) + numbers(shape) + numbers(strides)
    hooks = name("collections", "OrderedDict") + b")R"
    return (
        name("torch._utils", "_rebuild_tensor_v2")
        + b"("
        + stored
        + counts
        + b"\x89"
        + hooks
        + b"tR"
    )


def zip_file(value: bytes, storages: Mapping[str, bytes], *, order: bytes = b"little") -> bytes:
    """The zip format around the opcodes of a value (or a whole pickle)."""
    whole = value if value.startswith(PROTO) else PROTO + value + STOP
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        records = {"data.pkl": whole, "byteorder": order, "version": b"3\n"}
        records |= {f"data/{key}": content for key, content in storages.items()}
        for record, content in records.items():
            archive.writestr(zipfile.ZipInfo(f"weights/{record}"), content)
    return out.getvalue()


def write_zip64(path: Path, value: bytes, storages: Mapping[str, bytes | int]) -> None:
    """The zip format with every size and place in zip64 fields. A storage that is a number is a hole of so many bytes:
    zeros that take no room on the disk."""
    records: dict[str, bytes | int] = {"data.pkl": PROTO + value + STOP, "version": b"3\n"}
    records |= {f"data/{key}": content for key, content in storages.items()}
    directory, full = b"", 2**32 - 1
    with path.open("wb") as file:
        for record, content in records.items():
            label = f"weights/{record}".encode()
            at, size = file.tell(), content if isinstance(content, int) else len(content)
            check = 0 if isinstance(content, int) else zlib.crc32(content)
            field = struct.pack("<2H2Q", 1, 16, size, size)
            room = -(at + 30 + len(label) + len(field) + 4) % 64  # aligned, as torch's are
            field += struct.pack("<2H", 0x4246, room) + bytes(room)
            file.write(
                struct.pack(
                    "<4s5H3L2H",
                    b"PK\3\4",
                    45,
                    0,
                    0,
                    0,
                    0,
                    check,
                    full,
                    full,
                    len(label),
                    len(field),
                )
            )
            file.write(label + field)
            if isinstance(content, int):
                file.seek(size, 1)
            else:
                file.write(content)
            field = struct.pack("<2H3Q", 1, 24, size, size, at)
            sizes = (check, full, full, len(label), len(field), 0, 0, 0, 0, full)
            directory += (
                struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, *sizes) + label + field
            )
        at, count = file.tell(), len(records)
        file.write(directory)
        long_end = file.tell()
        sizes = (count, count, len(directory), at)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, *sizes))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, long_end, 1))
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, full, full, 0))


def legacy_file(
    value: bytes, storages: Mapping[str, tuple[int, bytes]], *, little: bool = True
) -> bytes:
    """The format before 1.6. `storages`: key -> number of elements, bytes."""
    facts = {"protocol_version": 1001, "little_endian": little, "type_sizes": {"int": 4}}
    whole = value if value.startswith(PROTO) else PROTO + value + STOP
    heads = [pickle.dumps(head, 2) for head in (MAGIC, 1001, facts)]
    keys = pickle.dumps(list(storages), 2)
    raw = [struct.pack("<q", numel) + content for numel, content in storages.values()]
    return b"".join([*heads, whole, keys, *raw])


def state_dict(arrays: Mapping[str, np.ndarray], *, view: bytes | None = None) -> bytes:
    """An OrderedDict of tensors, one storage `0`, `1`, ... each, in the arrays' order."""
    entries = b""
    for key, (label, array) in enumerate(arrays.items()):
        kind = KINDS[array.dtype.str[1:]]
        strides = [step // array.itemsize for step in np.zeros_like(array, order="C").strides]
        entries += text(label)
        entries += tensor(storage(kind, str(key), array.size, view=view), array.shape, strides)
    return ordered(entries)


def zip_of(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Arrays as torch saves a state dict."""
    stored = {str(key): array.tobytes() for key, array in enumerate(arrays.values())}
    return zip_file(state_dict(arrays), stored)


def legacy_of(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The same in the old format."""
    stored = {str(key): (x.size, x.tobytes()) for key, x in enumerate(arrays.values())}
    return legacy_file(state_dict(arrays, view=b"N"), stored)


def put(folder: Path, content: bytes) -> Path:
    """Writes `weights.pth`."""
    path = folder / "weights.pth"
    path.write_bytes(content)
    return path
