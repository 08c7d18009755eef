"""A file that is no whole PyTorch file of either format is refused, and opening it does not hang."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from convert.pth import PthSource
from minigpt4_jax.config import UserError
from tools.pth_bytes import (
    legacy_file,
    plain,
    put,
    storage,
    tensor,
    text,
)


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


def test_a_pipe_and_a_folder_without_an_index_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w.pth")
    with pytest.raises(UserError, match="is no file"):
        PthSource(tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"There is no .*index"):
        PthSource(tmp_path)
