"""A file takes its place whole, or the old one stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.replacing import replacing
from minigpt4_jax.config import UserError


def test_the_file_takes_its_place_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with replacing(path) as partial:
        partial.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("full"), KeyError("bug")])
def test_after_a_failure_the_old_file_is_there_and_nothing_else(
    tmp_path: Path, error: Exception
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with replacing(path) as partial:
            partial.write_text("ha")
            raise error

    expected = UserError if isinstance(error, OSError) else KeyError
    with pytest.raises(expected, match="cannot be written" if expected is UserError else "bug"):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
