"""An index is believed only as far as it can be checked. (Whole folders: `test_sources.py`, `test_pth.py`.)"""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.shards import add_tensors, check_index, shard_files
from minigpt4_jax.config import UserError

INDEX = "model.index.json"


def test_one_file_has_no_index(tmp_path: Path) -> None:
    (tmp_path / "w.bin").touch()
    assert shard_files(tmp_path / "w.bin", INDEX) == ([tmp_path / "w.bin"], None)


def test_shards_come_once_each_and_in_order(tmp_path: Path) -> None:
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).touch()
    (tmp_path / INDEX).write_text('{"weight_map": {"x": "b.bin", "y": "a.bin", "z": "b.bin"}}')
    files = [tmp_path / "a.bin", tmp_path / "b.bin"]
    assert shard_files(tmp_path, INDEX) == (files, {"x", "y", "z"})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "holds no 'weight_map'"),
        (b'{"weight_map": {"a": 3}}', "holds no 'weight_map'"),
        (b'{"weight_map": {"a": "../a.bin"}}', "to files beside it"),
        (b'{"weight_map": {"a": "a.bin"}}', r"are not there: a\.bin"),
    ],
    ids=["cut", "no text", "nested", "a list", "a number", "a path", "a missing shard"],
)
def test_an_index_that_cannot_be_followed_is_refused(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        shard_files(tmp_path, INDEX)


def test_a_name_in_two_shards_and_names_that_differ_from_the_index_are_listed() -> None:
    with pytest.raises(UserError, match="an earlier shard has too: a"):
        add_tensors({"a": 1, "b": 2}, {"a": 3, "c": 4}, Path("shard"))
    with pytest.raises(UserError, match=r"Only in the index: \['a'\]; only in the shards: \['c'\]"):
        check_index(Path("folder"), {"a", "b"}, {"b", "c"})
