"""Archives that torch writes are mapped, beyond 4 GB too; damaged, compressed and overlapping ones are refused."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import pth_zip
from convert.pth import PthSource
from minigpt4_jax.config import UserError
from tools.pth_bytes import (
    legacy_file,
    plain,
    put,
    storage,
    tensor,
    text,
    write_zip64,
    zip_file,
    zip_of,
)

ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.bias": np.arange(5, dtype=np.int64),
    "c": np.array(7, np.float16),
    "d": np.zeros((0, 3), np.float64),
    "e": np.array([True, False]),
}


def test_files_beyond_4_gb_are_read(tmp_path: Path) -> None:
    """A hole of 4 GiB stands for a storage, so nothing of it is on the disk."""
    path, numel = tmp_path / "w.pth", 2**30 + 3
    value = plain(
        text("hole") + tensor(storage("Float", "0", numel), (numel,), (1,))
        + text("behind") + tensor(storage("Float", "1", 2), (2,), (1,))
    )  # fmt: skip
    behind = np.array([3, 4], np.float32)
    write_zip64(path, value, {"0": 4 * numel, "1": behind.tobytes()})
    with zipfile.ZipFile(path) as archive:  # the file is a zip archive to others too
        assert archive.read("weights/data/1") == behind.tobytes()
    source = PthSource(path)
    assert source.get("hole")[-1] == 0
    np.testing.assert_array_equal(source.get("behind"), behind)


def repacked(*, method: int = zipfile.ZIP_STORED, extra: tuple[str, bytes] | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(zip_of(ARRAYS))) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), method)
        if extra:
            new.writestr(*extra)
    return out.getvalue()


def patched(at: int, form: str, value: int) -> bytes:
    """The good archive with one field of the first entry of its directory (`at` < 46) or of its end replaced."""
    content = bytearray(zip_of(ARRAYS))
    base = content.index(b"PK\1\2") if at < 46 else content.index(b"PK\5\6") - 46
    struct.pack_into(form, content, base + at, value)
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: repacked(method=zipfile.ZIP_DEFLATED), "'weights/data.pkl' is compressed"),
        (lambda: repacked(extra=("weights/constants.pkl", b"")), "TorchScript archive"),
        (lambda: repacked(extra=("other/data.pkl", b"")), "2 records of the name TOP/data.pkl"),
        (lambda: zip_of(ARRAYS)[:-1], "is missing"),
        (lambda: zip_of(ARRAYS)[:-30], "is missing"),
        (lambda: zip_of(ARRAYS) + b"x", "bytes follow its end"),
        (lambda: b"PK\3\4" + zip_of(ARRAYS), "not where it says"),
        (lambda: patched(8, "<H", 1), "is encrypted"),
        (lambda: patched(10, "<H", 8), "is compressed"),
        (lambda: patched(24, "<I", 1), "is compressed"),
        (lambda: patched(42, "<I", 77), "not where the directory says"),
        (lambda: patched(42, "<I", 2**31), "lies behind its end"),
        (lambda: patched(42, "<I", 2**32 - 1), "no zip64 field"),
        (lambda: patched(28, "<H", 2**16 - 1), "is damaged"),
        (lambda: patched(46 + 10, "<H", 2**16 - 1), "is cut off"),
        (lambda: patched(46 + 10, "<H", 1), "longer than it says"),
        (lambda: patched(46 + 4, "<H", 1), "split archive"),
        (lambda: patched(46 + 16, "<I", 5), "not where it says"),
        (lambda: zip_file(plain(b""), {}, order=b"middle"), "byte order is b'middle'"),
        (lambda: zip_file(plain(b""), {}).replace(b"data.pkl", b"data.pkx"), "has 0 records"),
        (lambda: bytes(257) + b"ustar" + bytes(99), "tar archive"),
        (lambda: b"", "is empty"),
        (lambda: pickle.dumps(5, 2), "another pickle than"),
        (lambda: legacy_file(plain(b""), {}).replace(b"M\xe9\x03", b"M\xea\x03", 1), "number than 1001"),
    ],
)  # fmt: skip
def test_archives_that_torch_would_not_write_are_refused(
    tmp_path: Path, content: Any, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        PthSource(put(tmp_path, content()))


def test_records_of_one_name_and_records_that_overlap_are_refused(tmp_path: Path) -> None:
    good = zip_file(plain(b""), {"0": bytes(99), "1": b"x"})
    with pytest.raises(UserError, match="two records of the name 'weights/data/0'"):
        PthSource(put(tmp_path, good.replace(b"data/1", b"data/0")))
    # The first storage claims the second, header and all: the same bytes would be counted twice.
    content = bytearray(good)
    entry = content.rindex(b"weights/data/0") - pth_zip.CENTRAL.size
    struct.pack_into("<2I", content, entry + 20, 150, 150)
    with pytest.raises(UserError, match="its records overlap"):
        PthSource(put(tmp_path, bytes(content)))


def test_an_archive_with_too_many_records_is_refused_before_they_are_read(tmp_path: Path) -> None:
    content = bytearray(zip_of(ARRAYS))
    end = content.index(b"PK\5\6")
    start = struct.unpack_from("<I", content, end + 16)[0]
    long_end = pth_zip.END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, 10**6, 10**6, end - start, start)
    locator = pth_zip.END64_LOCATOR.pack(b"PK\6\7", 0, end, 1)
    path = put(tmp_path, bytes(content[:end] + long_end + locator + content[end:]))
    with pytest.raises(UserError, match="1,000,000 records; at most 100,000"):
        PthSource(path)
