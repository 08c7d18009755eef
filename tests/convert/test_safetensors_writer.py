"""A file written tensor by tensor is the file that the safetensors library reads, and comes whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import tracemalloc
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from convert import safetensors_writer
from convert.safetensors_writer import Entry, write_safetensors
from convert.sources import SafetensorsSource
from minigpt4_jax.config import UserError
from minigpt4_jax.weight_files import DTYPES


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def arrays() -> dict[str, np.ndarray]:
    """Every dtype of the format, odd sizes so that offsets would be crooked, and the shapes that are easy to forget."""
    rng = np.random.default_rng(0)
    made = {f"x.{name}": rng.integers(0, 2, (3, 5)).astype(d) for name, d in DTYPES.items()}
    made["half"] = rng.normal(size=(7, 3)).astype(np.float16)
    made["brain"] = rng.normal(size=(5, 3)).astype(ml_dtypes.bfloat16)
    made["odd float32 values"] = np.array([np.nan, -0.0, np.inf, 1e-45], np.float32)
    made["scalar"] = np.array(2.5, np.float64)
    made["empty"] = np.zeros((0, 4), np.float32)
    made["transposed"] = rng.normal(size=(6, 4)).astype(np.float32).T
    made["every second row"] = rng.normal(size=(6, 4)).astype(np.float32)[::2]
    made["名前"] = np.ones(2, np.int8)
    return made


def entries(made: dict[str, np.ndarray]) -> list[Entry]:
    return [(name, x.shape, x.dtype, x) for name, x in made.items()]


def test_the_safetensors_library_reads_every_dtype_and_shape_bit_for_bit(tmp_path: Path) -> None:
    made = arrays()
    write_safetensors(
        tmp_path / "m.safetensors", entries(made), metadata={"format": "pt", "é": "ü"}
    )
    read = load_file(tmp_path / "m.safetensors")
    assert read.keys() == made.keys()
    for name, x in made.items():
        assert (read[name].dtype, read[name].shape) == (x.dtype, x.shape), name
        assert bits(read[name]) == bits(x), name
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "é": "ü"}
    source = SafetensorsSource(tmp_path / "m.safetensors")
    assert bits(source.get("brain")) == bits(made["brain"])


def test_every_tensor_starts_at_a_multiple_of_its_item_size(tmp_path: Path) -> None:
    made = arrays()
    write_safetensors(tmp_path / "m.safetensors", entries(made))
    data = (tmp_path / "m.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    for name, x in made.items():
        begin, end = header[name]["data_offsets"]
        assert (8 + length + begin) % x.dtype.itemsize == 0, name
        assert data[8 + length + begin : 8 + length + end] == bits(x), name


def test_size_and_crc_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    written = write_safetensors(path, entries(arrays()))
    data = path.read_bytes()
    assert written == {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}


def test_tensors_larger_than_a_chunk_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_writer, "_CHUNK", 7)
    x = np.arange(100, dtype=np.float32)
    written = write_safetensors(tmp_path / "m.safetensors", [("x", x.shape, x.dtype, x)])
    assert bits(load_file(tmp_path / "m.safetensors")["x"]) == bits(x)
    assert written["crc32"] == f"{zlib.crc32((tmp_path / 'm.safetensors').read_bytes()):08x}"


def test_functions_are_called_once_each_and_one_tensor_is_in_memory_at_a_time(
    tmp_path: Path,
) -> None:
    count, each, called = 8, 4 << 20, list[Any]()

    def make(i: int) -> np.ndarray:
        called.append(i)
        return np.full(each, i, np.uint8)

    tracemalloc.start()
    write_safetensors(
        tmp_path / "m.safetensors",
        [(f"t{i}", (each,), np.uint8, lambda i=i: make(i)) for i in range(count)],
        on_tensor=lambda done, total, name: called.append((done, total, name)),
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert called == [x for i in range(count) for x in (i, (i + 1, count, f"t{i}"))]
    assert peak < 2.5 * each, f"{peak / each:.1f} tensors"


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    one = np.ones(3, np.float32)
    write_safetensors(path, [("x", one.shape, one.dtype, one)])
    before = path.read_bytes()

    def broken() -> np.ndarray:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(UserError, match=r"y cannot be read for .*m\.safetensors"):
        write_safetensors(path, [("x", (3,), one.dtype, one), ("y", (3,), one.dtype, broken)])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    one = np.ones(3, np.float32)
    with pytest.raises(UserError, match=r"file/m\.safetensors cannot be written"):
        write_safetensors(tmp_path / "file" / "m.safetensors", [("x", (3,), one.dtype, one)])


def test_room_is_checked_before_a_tensor_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free=10))

    def read() -> np.ndarray:
        raise AssertionError("was read")

    with pytest.raises(UserError, match=r"needs 0\.00 GB"):
        write_safetensors(tmp_path / "m.safetensors", [("x", (3,), np.float32, read)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("x", (3,), np.float32, np.ones(4, np.float32)), r"float32 \[4\]; float32 \[3\] was"),
        (("x", (3,), np.float32, np.ones(3, np.float16)), r"float16 \[3\]; float32 \[3\] was"),
        (("x", (3,), np.float32, np.ones(3, ">f4")), r">f4 \[3\]; float32"),
        (("x", (3,), np.complex64, np.ones(3, np.complex64)), "x is complex64; expected one of"),
        (("__metadata__", (3,), np.float32, np.ones(3, np.float32)), "is taken"),
        (("twice", (3,), np.float32, np.ones(3, np.float32)), "'twice' is taken"),
    ],
)
def test_what_is_not_as_announced_is_refused(tmp_path: Path, entry: Entry, message: str) -> None:
    first: Entry = ("twice", (1,), np.float32, np.ones(1, np.float32))
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "m.safetensors", [first, entry])
    assert not list(tmp_path.iterdir())
