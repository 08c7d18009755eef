"""training/lines.py: rows are written at once, and those that a disk refused are written later, each once."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt4_jax.training.lines import LineFile


@contextlib.contextmanager
def disk_of(size: int) -> Iterator[None]:
    """The kernel cuts every file of this process at `size` bytes (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_is_in_the_file_when_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_text("old\n")
    file = LineFile(path)
    file.write("one")
    assert path.read_text() == "old\none\n"
    file.close()
    file.close()


def test_lines_that_a_full_disk_refused_are_written_once_it_has_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows"
    file = LineFile(path)
    with disk_of(10):
        for number in range(5):
            file.write(f"line {number}")
    assert path.read_text() == "line 0\nlin"  # as far as there was room
    assert len(caplog.messages) == 1
    assert "kept in memory" in caplog.messages[0]
    file.write("line 5")
    file.close()
    assert path.read_text().splitlines() == [f"line {number}" for number in range(6)]


def test_lines_that_are_lost_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = LineFile(tmp_path / "rows")
    with disk_of(3):
        file.write("line 0")
        file.write("line 1")
        file.close()
    assert "its last 2 lines could not be written" in caplog.messages[-1]
