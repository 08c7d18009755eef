"""checksums.py: what was written is what is read, or every file that is not is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigpt4_jax import checksums
from minigpt4_jax.checksums import (
    LATE,
    NewerFormat,
    add_late_checksums,
    damaged_files,
    write_checksums,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a").write_bytes(bytes(range(256)))
    (tmp_path / "deep" / "b").write_bytes(b"")
    write_checksums(tmp_path)
    return tmp_path


def test_an_untouched_folder_has_no_damage(folder: Path) -> None:
    assert damaged_files(folder) == []
    listed = json.loads((folder / "checksums.json").read_text())
    assert listed["files"]["a"] == {"bytes": 256, "crc32": "29058c73"}  # of the bytes 0 to 255
    assert set(listed["files"]) == {"a", "deep/b"}


def test_every_difference_is_named(folder: Path) -> None:
    (folder / "a").write_bytes(bytes(256))
    (folder / "deep" / "b").unlink()
    (folder / "c").touch()
    assert damaged_files(folder) == [
        "deep/b is missing",
        "c does not belong there",
        "a has crc32 0d968558, expected 29058c73",
    ]


def test_without_contents_names_and_sizes_are_compared_and_nothing_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a").write_bytes(bytes(256))
    monkeypatch.setattr(checksums, "file_checksum", None)
    assert damaged_files(folder, contents=False) == []
    (folder / "a").write_bytes(bytes(255))
    (folder / "deep" / "b").unlink()
    assert damaged_files(folder, contents=False) == [
        "deep/b is missing",
        "a has bytes 255, expected 256",
    ]


def test_large_files_are_read_in_pieces(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_CHUNK", 7)
    assert damaged_files(folder) == []


def test_without_checksums_nothing_is_known(tmp_path: Path) -> None:
    assert damaged_files(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 1}',
        '{"format": "1", "files": {}}',
        "\0",
        '{"format": 1, "files": {}}',
    ],
)
def test_a_broken_list_is_damage(text: str, folder: Path) -> None:
    (folder / "checksums.json").write_text(text)
    assert damaged_files(folder)


def test_a_later_format_is_not_taken_for_damage(folder: Path) -> None:
    (folder / "checksums.json").write_text(json.dumps({"format": checksums.FORMAT + 1}))
    with pytest.raises(NewerFormat, match="Update it"):
        damaged_files(folder)


def test_a_folder_with_sha256_is_compared_by_it_and_no_older_version_reads_it(
    folder: Path,
) -> None:
    write_checksums(folder, kind="sha256")
    listed = json.loads((folder / "checksums.json").read_text())
    assert listed["format"] == 2
    assert listed["files"]["deep/b"] == {
        "bytes": 0,
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    }
    assert damaged_files(folder) == []
    (folder / "a").write_bytes(bytes(256))
    assert damaged_files(folder) == [
        "a has sha256 5341e6b2646979a70e57653007a1f310169421ec9bdd9f1a5648f75ade005af1, expected "
        "40aff2e9d2d8922e47afd4648e6967497158785fbd1da870e7110266bf944880"
    ]


def test_files_written_late_are_compared_once_they_are_added(folder: Path) -> None:
    for name in (*LATE, f"deep/{LATE[0]}"):
        (folder / name).write_text("now")
    assert damaged_files(folder) == []
    add_late_checksums(folder)
    assert damaged_files(folder) == []
    (folder / LATE[0]).write_text("not")
    (folder / LATE[1]).unlink()
    (folder / "deep" / LATE[0]).write_text("not")
    problems = damaged_files(folder)
    assert problems is not None
    assert [problem.split(" has ")[0] for problem in problems] == [
        f"{LATE[1]} is missing",
        LATE[0],
        f"deep/{LATE[0]}",
    ]
