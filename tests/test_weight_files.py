"""Parts of safetensors files are read exactly, from a disk and from a bucket, and a broken file is called broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from minigpt4_jax.config import UserError
from minigpt4_jax.weight_files import WeightFile

ARRAYS: dict[str, np.ndarray] = {
    "bf16": np.arange(24).reshape(4, 6).astype(ml_dtypes.bfloat16),
    "f32": np.arange(60, dtype=np.float32).reshape(5, 3, 4),
    "byte": np.arange(3, dtype=np.uint8),  # makes what follows start at an odd place
    "f64": np.arange(5, dtype=np.float64),
    "one": np.asarray(2.5, np.float16),
    "none": np.zeros((0, 4), np.float32),
}


@pytest.fixture(params=["disk", "bucket"])
def where(request: Any, tmp_path: Path) -> str:
    file = tmp_path / "w.safetensors"
    save_file(ARRAYS, file)
    if request.param == "disk":
        return str(file)
    fsspec.filesystem("memory").pipe_file("/bucket/w.safetensors", file.read_bytes())
    return "memory://bucket/w.safetensors"


def test_whole_tensors(where: str) -> None:
    file = WeightFile(where)
    assert set(file.names()) == set(ARRAYS)
    for name, x in ARRAYS.items():
        assert file.shape(name) == x.shape
        assert file.dtype(name) == x.dtype
        read = file.read(name)
        assert read.dtype == x.dtype
        np.testing.assert_array_equal(read, x)


@pytest.mark.parametrize(
    "index",
    [(slice(1, 3),), (slice(None), slice(2, 5)), (slice(3, 4), slice(0, 1)), (slice(2, 2),)],
)
def test_parts_of_tensors(where: str, index: tuple[slice, ...]) -> None:
    file = WeightFile(where)
    for name in ("bf16", "f32"):
        np.testing.assert_array_equal(file.read(name, index), ARRAYS[name][index])


def test_a_bucket_is_asked_for_the_rows_and_not_for_the_file(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = WeightFile(where)
    asked: list[int] = []
    read = file._file.read
    monkeypatch.setattr(
        file._file, "read", lambda a, b: (asked.append(b - a), read(a, b))[1], raising=False
    )
    file.read("f32", (slice(2, 3), slice(None), slice(1, 2)))
    assert asked == [3 * 4 * 4]


def header(start: int, stop: int, shape: list[int], dtype: str = "F32") -> bytes:
    text = json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}})
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        (1 << 40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (3).to_bytes(8, "little") + b"abc",
        header(0, 8, [2]) + b"1234",
        header(0, 4, [2]) + b"12345678",
        header(-4, 4, [2]) + b"12345678",
        header(0, 8, [2], "F7") + b"12345678",
        header(0, 8, [-2]) + b"12345678",
    ],
)
def test_a_broken_file_is_called_broken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        WeightFile(str(tmp_path / "w.safetensors"))


def test_a_missing_file_and_an_unknown_kind_of_bucket_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no"):
        WeightFile(str(tmp_path / "w.safetensors"))
    with pytest.raises(UserError, match="There is no"):
        WeightFile("memory://bucket/nothing")
    with pytest.raises(UserError, match="nosuch"):
        WeightFile("nosuch://bucket/w.safetensors")
