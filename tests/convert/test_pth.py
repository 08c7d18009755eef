"""PyTorch files are read without torch: every layout, one tensor at a time, and nothing in them is executed."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from convert import pth, pth_pickle, pth_zip
from convert.pth import PthSource, write_pth
from convert.sources import open_source
from minigpt4_jax.config import UserError
from tools import fuzz_pth
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
    write_zip64,
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


# --- layouts ---


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
    for broken in ("{", "[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../m-1.bin"}}'):
        (tmp_path / PthSource.INDEX).write_text(broken)
        with pytest.raises(UserError, match="pytorch_model"):
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


# --- writing ---


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


# --- refusals ---


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("build", ["zip", "legacy", "bare", "neighbour"])
@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, getattr, np.array], ids=str)
def test_a_global_that_tensors_do_not_need_is_named_and_not_called(
    tmp_path: Path, build: str, function: Any
) -> None:
    canary = tmp_path / "canary"
    argument = f"__import__('os').mkdir({str(canary)!r})" if function is eval else str(canary)
    argument = f"touch {canary}" if function is os.system else argument
    whole = pickle.dumps({"x": Runs(function, argument)}, 2)
    content = {
        "zip": zip_file(whole, {}),
        "legacy": legacy_file(whole, {}),
        "bare": whole,
        "neighbour": zip_file(plain(text("model") + b"}" + text("optimizer") + whole[2:-1]), {}),
    }[build]
    path = put(tmp_path, content)
    asked = f"{function.__module__}.{function.__name__}".replace("builtins", "__builtin__")
    with pytest.raises(UserError, match=rf"asks for the Python object {asked}, .*was executed"):
        PthSource(path)
    assert not canary.exists()
    if function in (os.system, os.mkdir):  # the bait works
        pickle.loads(whole)
        assert canary.exists()


@pytest.mark.parametrize(
    ("opcodes", "reason"),
    [
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "protocol is 4"),
        (b"\x80\x02(ios\nsystem\n.", r"opcode b'i' at byte 3"),
        (b"\x80\x02]]s.", "finds no dict"),
        (b"\x80\x02}b.", "finds no OrderedDict"),
        (b"\x80\x02}}b.", "finds no OrderedDict"),
        (b"\x80\x02R.", "finds no value"),
        (b"\x80\x02N)R.", "calls what is no function"),
        (b"\x80\x02" + name("torch", "FloatStorage") + b")R.", "calls what is no function"),
        (b"\x80\x02" + name("torch", "Size") + b"NR.", "without arguments"),
        (b"\x80\x02" + name("torch", "Size") + b")R.", "torch.Size"),
        (b"\x80\x02" + name("collections", "OrderedDict") + b"K\1\x85R.", "than pairs"),
        (b"\x80\x02" + name("collections", "OrderedDict") + b"](Ne\x85R.", "than pairs"),
        (b"\x80\x02" + name("torch._utils", "_rebuild_tensor_v2") + b")R.", "parts"),
        (b"\x80\x02" + name("torch._utils", "_rebuild_parameter") + b")R.", "no tensor"),
        (b"\x80\x02}(K\1u.", "key has no value"),
        (b"\x80\x02})K\1s.", "has a tuple for a key"),
        (b"\x80\x02}K\1K\1sK\1K\2s.", "has the key '1' twice"),
        (b"\x80\x02h\0.", "value 0, which it never stored"),
        (b"\x80\x02q\0.", "finds no object"),
        (b"\x80\x02t.", "finds no mark"),
        (b"\x80\x02NN.", "left over"),
        (b"\x80\x02(N.", "left over"),
        (b"\x80\x02NQ.", "no storage"),
        (b"\x80\x02X\xff\xff\xff\xffab.", "cut off"),
        (b"\x80\x02X\1\0\0\0\xff.", "not UTF-8"),
        (b"\x80\x02cab", "has no end"),
        (b"\x80\x02N", "cut off"),
        (b"\x80\x02N.N", "bytes follow its pickle"),
        (b"\x80\x02" + storage("Float", "0", -1) + b".", "no length"),
        (b"\x80\x02" + storage("Float", "0", 4, view=b"N") + b".", "holds a Storage"),
        (b"\x80\x02" + storage("Float", "0", 4, view=b"(X\0\0\0\0K\3K\2t") + b".", "beyond it"),
        (b"\x80\x02" + storage("Float", "0", 4, view=b"K\3") + b".", "is no \\(name"),
        (b"\x80\x02" + name("torch", "QUInt8Storage") + b".", "object torch.QUInt8Storage"),
        (b"\x80\x02N.", "holds a NoneType; expected a state dict"),
        (b"\x80\x02}X\1\0\0\0aK\1s.", "no tensors: a. Expected a state dict"),
        (b"\x80\x02}K\5K\1s.", "no tensors: 5"),
    ],
)  # fmt: skip
def test_a_pickle_that_torch_would_not_write_is_refused(
    tmp_path: Path, opcodes: bytes, reason: str
) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("w/data.pkl", opcodes)
    with pytest.raises(UserError, match=reason):
        PthSource(put(tmp_path, out.getvalue()))


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


@pytest.mark.parametrize(
    ("storages", "little", "reason"),
    [
        ({"0": (4, bytes(16))}, False, "another byte order"),
        ({"0": (3, bytes(12))}, True, "longer or shorter"),
        ({"0": (4, bytes(15))}, True, "ends before its storages"),
        ({"0": (4, bytes(16)), "9": (4, bytes(16))}, True, "uses the storage 9"),
        ({}, True, "no storage: there is no 0"),
    ],
)
def test_a_damaged_file_of_the_old_format_is_refused(
    tmp_path: Path, storages: Any, little: bool, reason: str
) -> None:
    value = plain(text("x") + tensor(storage("Float", "0", 4, view=b"N"), (4,), (1,)))
    with pytest.raises(UserError, match=reason):
        PthSource(put(tmp_path, legacy_file(value, storages, little=little)))


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


def test_a_pipe_and_a_folder_without_an_index_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pth")
    with pytest.raises(UserError, match="is no file"):
        PthSource(tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"There is no .*index"):
        PthSource(tmp_path)


# --- bombs: small files that ask for much ---

MANY = 50_000
BOMBS = {
    "lists": b"]" * MANY,
    "dicts": b"}K\1K\1s" * MANY,
    "a tuple nested again and again": b")" + b"\x85" * MANY,
    "the same as a key": b"})" + b"\x85" * MANY + b"Ns",
    "a list in itself": b"]q\0" + b"h\0a" * MANY,
    "a mark in a mark": b"(" * MANY,
    "many memos": b"N" + b"".join(b"r" + struct.pack("<I", 2**32 - 1 - i) for i in range(MANY)),
    "a string as long as four gigabytes": b"X\xff\xff\xff\xff",
    "numbers of 255 bytes": (b"\x8a\xff" + b"\x7f" * 255) * 1_000,
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_takes_memory_in_proportion_to_its_length(tmp_path: Path, bomb: str) -> None:
    path = put(tmp_path, zip_file(b"\x80\x02" + BOMBS[bomb] + b".", {}))
    tracemalloc.start()
    with pytest.raises(UserError):
        PthSource(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 120 * path.stat().st_size + 100_000


def test_a_pickle_of_more_steps_than_allowed_is_refused(tmp_path: Path) -> None:
    enough = b"\x80\x02" + b"N" * pth_pickle.MAX_STEPS
    with pytest.raises(UserError, match="left over"):
        PthSource(put(tmp_path, zip_file(enough[:-1] + b".", {})))
    with pytest.raises(UserError, match="more than 1,000,000 steps"):
        PthSource(put(tmp_path, zip_file(enough + b".", {})))


def test_a_list_of_pairs_cannot_be_made_into_dicts_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pth_pickle, "MAX_STEPS", 50_000)
    count = 1_000
    pairs = b"](" + b"".join(b"](" + number(i) + b"Ne" for i in range(count)) + b"eq\0"
    again = name("collections", "OrderedDict") + b"q\1h\0\x85R" + b"h\1h\0\x85R" * count
    path = put(tmp_path, zip_file(b"(" + pairs + again + b"t", {}))
    tracemalloc.start()
    with pytest.raises(UserError, match="more than 50,000 steps"):
        PthSource(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000  # not paid for: 1,000 dicts of 1,000 entries, forty megabytes


def test_an_archive_with_too_many_records_is_refused_before_they_are_read(tmp_path: Path) -> None:
    content = bytearray(zip_of(ARRAYS))
    end = content.index(b"PK\5\6")
    start = struct.unpack_from("<I", content, end + 16)[0]
    long_end = pth_zip.END64.pack(b"PK\6\6", 44, 45, 45, 0, 0, 10**6, 10**6, end - start, start)
    locator = pth_zip.END64_LOCATOR.pack(b"PK\6\7", 0, end, 1)
    path = put(tmp_path, bytes(content[:end] + long_end + locator + content[end:]))
    with pytest.raises(UserError, match="1,000,000 records; at most 100,000"):
        PthSource(path)


# --- mutations ---


def test_mutated_files_end_in_a_result_or_a_message(tmp_path: Path) -> None:
    report = fuzz_pth.fuzz(tmp_path, inputs=600, seed=11)
    assert report.crashes == []
    assert report.inputs == 600
    assert report.read > 20
    assert report.refused > 300


def test_the_fuzzer_sees_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(path: Path) -> Any:
        shell = f"touch {tmp_path / fuzz_pth.CANARY}".encode()
        return pickle.loads(b"cos\nsystem\n(S'%s'\ntR." % shell)

    monkeypatch.setattr(fuzz_pth, "PthSource", careless)
    report = fuzz_pth.fuzz(tmp_path, inputs=1, seed=0)
    assert "executed" in report.crashes[0]
    monkeypatch.setattr(fuzz_pth, "PthSource", lambda path: 1 / 0)
    assert "ZeroDivisionError" in fuzz_pth.fuzz(tmp_path, inputs=1, seed=0).crashes[0]


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
