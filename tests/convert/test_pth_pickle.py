"""A pickle calls nothing, whatever it names; what torch would not write is refused, and memory is bounded."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import pth_pickle
from convert.pth import PthSource
from minigpt4_jax.config import UserError
from tools.pth_bytes import (
    legacy_file,
    name,
    number,
    plain,
    put,
    storage,
    text,
    zip_file,
)


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
