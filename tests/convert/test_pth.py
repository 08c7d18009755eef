"""PyTorch files are read without torch: every layout, one tensor at a time; and written so that they come back."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert import pth
from convert.pth import PthSource, write_pth
from convert.sources import open_source
from minigpt4_jax.config import UserError
from tools.pth_bytes import (
    legacy_file,
    legacy_of,
    name,
    number,
    ordered,
    plain,
    put,
    state_dict,
    storage,
    tensor,
    text,
    zip_file,
    zip_of,
)

ROOT = Path(__file__).parents[2]


ARRAYS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.bias": np.arange(5, dtype=np.int64),
    "c": np.array(7, np.float16),
    "d": np.zeros((0, 3), np.float64),
    "e": np.array([True, False]),
}


KINDS = [
    *(np.float16, np.float32, np.float64, ml_dtypes.bfloat16),
    *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.bool_),
]


def require_equal(source: PthSource, arrays: dict[str, np.ndarray]) -> None:
    assert source.names() == tuple(arrays)
    for label, x in arrays.items():
        assert source.shape(label) == x.shape
        assert source.dtype(label) == source.get(label).dtype == x.dtype
        np.testing.assert_array_equal(source.get(label), x)


@pytest.mark.parametrize("build", [zip_of, legacy_of])
def test_both_formats_give_names_shapes_dtypes_and_values(tmp_path: Path, build: Any) -> None:
    source = open_source(put(tmp_path, build(ARRAYS)))
    assert isinstance(source, PthSource)
    require_equal(source, ARRAYS)
    assert source.metadata == {}
    assert source.files() == (tmp_path / "weights.pth",)


@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_is_written_and_read_back_bit_for_bit(tmp_path: Path, kind: Any) -> None:
    rng = np.random.default_rng(3)
    bits = rng.integers(0, 2 if kind is np.bool_ else 256, 24 * np.dtype(kind).itemsize, np.uint8)
    arrays = {"x": bits.view(kind).reshape(2, 3, 4), "y": bits.view(kind)[:1].reshape(())}
    write_pth(tmp_path / "w.pth", arrays)
    source = PthSource(tmp_path / "w.pth")
    for label, x in arrays.items():
        assert source.dtype(label) == x.dtype
        assert source.shape(label) == x.shape
        assert source.get(label).tobytes() == x.tobytes()


def test_transposed_arrays_are_written_as_they_look(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    write_pth(tmp_path / "w.pth", {"x": x})
    require_equal(PthSource(tmp_path / "w.pth"), {"x": x})


@pytest.mark.parametrize("big", [False, True])
def test_strided_views_of_a_shared_storage_are_cut_out(tmp_path: Path, big: bool) -> None:
    base = np.arange(24, dtype=np.float32)
    stored = storage("Float", "0", 24)
    value = ordered(
        text("transposed") + tensor(stored, (4, 6), (1, 4))
        + text("every other") + tensor(stored, (3,), (2,), offset=5)
        + text("one long axis") + tensor(stored, (1, 3), (10**15, 1), offset=21)
    )  # fmt: skip
    content, order = base.astype(">f4" if big else "<f4").tobytes(), b"big" if big else b"little"
    source = PthSource(put(tmp_path, zip_file(value, {"0": content}, order=order)))
    expected = {
        "transposed": base.reshape(6, 4).T,
        "every other": base[5:11:2],
        "one long axis": base[None, 21:24],
    }
    require_equal(source, expected)
    assert not any(source.get(label).flags.writeable for label in expected)


def test_views_of_a_storage_in_the_old_format_start_where_they_say(tmp_path: Path) -> None:
    base = np.arange(10, dtype=np.float64)
    view = b"(" + text("v") + number(4) + number(6) + b"t"
    value = plain(
        text("x") + tensor(storage("Double", "0", 10, view=view), (2, 2), (2, 1), offset=1)
    )
    source = PthSource(put(tmp_path, legacy_file(value, {"0": (10, base.tobytes())})))
    require_equal(source, {"x": base[5:9].reshape(2, 2)})


def test_files_of_python_2_and_the_first_rebuild_function_are_read(tmp_path: Path) -> None:
    stored = storage("Float", "0", 2, view=b"N")
    old = name("torch._utils", "_rebuild_tensor") + b"(" + stored + b"K\0K\2\x85K\1\x85tR"
    pairs = b"](](U\1x" + old + b"ee"
    value = name("collections", "OrderedDict") + pairs + b"\x85R"
    source = PthSource(put(tmp_path, legacy_file(value, {"0": (2, b"\0" * 8)})))
    require_equal(source, {"x": np.zeros(2, np.float32)})


def test_parameters_and_torch_sizes_are_seen_through(tmp_path: Path) -> None:
    inner = tensor(storage("Float", "0", 2), (2,), (1,))
    sized = inner.replace(
        b"(" + number(2) + b"t", name("torch", "Size") + b"(" + number(2) + b"t\x85R", 1
    )
    assert sized != inner  # fmt: skip
    hooks = b"\x88" + name("collections", "OrderedDict") + b")R"
    value = plain(
        text("x") + name("torch._utils", "_rebuild_parameter") + b"(" + sized + hooks + b"tR"
    )
    source = PthSource(put(tmp_path, zip_file(value, {"0": bytes(8)})))
    require_equal(source, {"x": np.zeros(2, np.float32)})


def test_what_lies_beside_the_model_is_left_alone_and_named(tmp_path: Path) -> None:
    trainer = plain(
        text("model") + state_dict(ARRAYS)
        + text("optimizer") + plain(text("state") + b"}" + text("lr") + b"G" + struct.pack(">d", 0.1))
        + text("scaler") + b"N" + text("epoch") + b"K\3"
    )  # fmt: skip
    stored = {str(key): x.tobytes() for key, x in enumerate(ARRAYS.values())}
    source = PthSource(put(tmp_path, zip_file(trainer, stored)))
    require_equal(source, ARRAYS)
    assert source.metadata == {"left_alone": ["optimizer", "scaler", "epoch"]}


def test_shards_read_like_one_file(tmp_path: Path) -> None:
    write_pth(tmp_path / "m-1.bin", {"a": ARRAYS["a.weight"]})
    write_pth(tmp_path / "m-2.bin", {"b": ARRAYS["b.bias"]})
    index = {"weight_map": {"a": "m-1.bin", "b": "m-2.bin"}}
    (tmp_path / PthSource.INDEX).write_text(json.dumps(index))
    source = open_source(tmp_path)
    assert isinstance(source, PthSource)
    require_equal(source, {"a": ARRAYS["a.weight"], "b": ARRAYS["b.bias"]})
    (tmp_path / "m-2.bin").unlink()
    with pytest.raises(UserError, match=r"not there: m-2\.bin"):
        open_source(tmp_path)


def test_nothing_is_read_before_get_and_then_only_that_tensor(tmp_path: Path) -> None:
    big = np.arange(4_000_000, dtype=np.float32)
    write_pth(tmp_path / "w.pth", {f"x{i}": big + i for i in range(4)})
    tracemalloc.start()
    source = PthSource(tmp_path / "w.pth")
    assert source.shape("x3") == big.shape
    assert source.get("x3")[5] == 8.0
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def golden_files() -> list[Path]:
    folder = Path(os.environ.get("MINIGPT4_GOLDEN", ROOT / "tests" / "golden"))
    return sorted({*folder.rglob("*.pth"), *folder.rglob("*.bin")})


@pytest.mark.parametrize("path", golden_files(), ids=lambda path: path.name)
def test_golden_files_of_torch_are_read_whole(path: Path) -> None:
    source = PthSource(path)
    assert source.names()
    for label in source.names():
        x = source.get(label)
        assert (x.shape, x.dtype) == (source.shape(label), source.dtype(label))
        assert np.isfinite(x).all()
        assert x.dtype.kind in "iu" or x.any()


def test_the_written_file_depends_on_the_arrays_alone_and_keeps_storages_aligned(
    tmp_path: Path,
) -> None:
    for path in (tmp_path / "one.pth", tmp_path / "two.pth"):
        write_pth(path, {"model": ARRAYS})
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.pth").read_bytes()
    source = PthSource(tmp_path / "one.pth")
    require_equal(source, ARRAYS)
    places = pth.open_pth(tmp_path / "one.pth").places
    assert {first % pth.ALIGNMENT for first, _ in places.values()} == {0}


def test_an_array_that_torch_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="An array is complex64; a PyTorch file can hold float64"):
        write_pth(tmp_path / "w.pth", {"x": np.zeros(2, np.complex64)})
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_pth(tmp_path / "file" / "w.pth", {"x": np.zeros(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("shape", "strides", "offset", "numel", "reason"),
    [
        ((5,), (1,), 0, 4, "reaches element 4 of a storage that has 4"),
        ((2, 2), (3, 1), 0, 4, "reaches element 4"),
        ((1,), (1,), 4, 4, "reaches element 4"),
        ((), (), 4, 4, "reaches element 4"),
        ((2,), (2**62,), 0, 4, "reaches element"),
        ((2**40,), (0,), 0, 4, "it repeats some"),
        ((2**31, 2**31), (0, 0), 0, 4, "larger than any array"),
        ((0, 2**62), (1, 1), 0, 4, "larger than any array"),
        ((4,), (1,), 0, 5, "needs 20 bytes of storage; there are 16"),
        ((4,), (1,), 0, 2**70, "bytes of storage; there are 16"),
        ((-1,), (1,), 0, 4, "no counts"),
        ((1,), (-1,), 3, 4, "no counts"),
        ((1,), (1, 1), 0, 4, "no shape"),
        ((1,) * 65, (1,) * 65, 0, 4, "no shape"),
        ((1,), (1,), -1, 4, "no storage"),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused_when_the_file_is_opened(
    tmp_path: Path, shape: Any, strides: Any, offset: int, numel: int, reason: str
) -> None:
    value = plain(text("x") + tensor(storage("Float", "0", numel), shape, strides, offset=offset))
    with pytest.raises(UserError, match=reason):
        PthSource(put(tmp_path, zip_file(value, {"0": bytes(16)})))


def test_a_tensor_without_a_storage_and_one_that_is_negated_when_used_are_refused(
    tmp_path: Path,
) -> None:
    whole = tensor(storage("Float", "0", 1), (1,), (1,))
    with pytest.raises(UserError, match="'x' has no storage: there is no 0"):
        PthSource(put(tmp_path, zip_file(plain(text("x") + whole), {"1": bytes(4)})))
    negated = whole[:-2] + b"}" + text("neg") + b"\x88stR"
    with pytest.raises(UserError, match="lazy negation"):
        PthSource(put(tmp_path, zip_file(plain(text("x") + negated), {"0": bytes(4)})))


def test_reading_and_writing_need_no_torch(tmp_path: Path) -> None:
    put(tmp_path, zip_of(ARRAYS))
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from pathlib import Path\n"
        "from convert.sources import open_source\n"
        "from convert.pth import write_pth\n"
        "source = open_source(Path('weights.pth'))\n"
        "write_pth(Path('again.pth'), {name: source.get(name) for name in source.names()})"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, timeout=120
    )
    assert done.returncode == 0
    require_equal(PthSource(tmp_path / "again.pth"), ARRAYS)
