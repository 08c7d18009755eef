"""minigpt4_jax.caption_file: rows that are whole, runs that go on, and runs that may not."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax.caption_file import CaptionFile
from minigpt4_jax.config import UserError

SETTINGS = {"prompt": "What is this?", "generation": {"temperature": 0.5}}
CAPTION = {"caption": "Eine Tür.", "finish_reason": "stop", "tokens": 3}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "captions.jsonl"


@pytest.fixture
def begun(out: Path) -> Path:
    """A run that was left after two captions and an error."""
    with CaptionFile(out, SETTINGS) as file:
        file.set_model("f1")
        file.write(("a.png", None), CAPTION)
        file.write(("b.png", None), {"error": "it is empty"})
        file.write(("a.png", "Why?"), CAPTION)
    return out


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_whole_as_soon_as_they_are_written(out: Path) -> None:
    with CaptionFile(out, SETTINGS) as file:
        file.write(("a/ü.png", None), CAPTION)
        assert read(out) == [{"image": "a/ü.png", **CAPTION}]
        file.write(("a.png", "Why?"), {"error": "no"})
        assert read(out)[1:] == [{"image": "a.png", "prompt": "Why?", "error": "no"}]
        assert file.errors == 1
    assert "Tür" in out.read_text(encoding="utf-8")


def test_a_name_that_is_not_utf8_comes_back_as_it_was(out: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    with CaptionFile(out, SETTINGS) as file:
        file.write((name, None), CAPTION)
    with CaptionFile(out, SETTINGS) as file:
        assert list(file.rows) == [(name, None)]


def test_a_run_goes_on_behind_its_rows(begun: Path) -> None:
    with CaptionFile(begun, SETTINGS) as file:
        assert file.rows == {
            ("a.png", None): False,
            ("b.png", None): True,
            ("a.png", "Why?"): False,
        }
        assert file.mended == []
        file.set_model("f1")
        file.write(("c.png", None), CAPTION)
    assert [row["image"] for row in read(begun)] == ["a.png", "b.png", "a.png", "c.png"]


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_torn_last_row_is_removed_and_said(cut: int, begun: Path) -> None:
    whole = begun.read_bytes()
    begun.write_bytes(whole[:-cut])
    with CaptionFile(begun, SETTINGS) as file:
        assert ("a.png", "Why?") not in file.rows
        (said,) = file.mended
        assert f"{len(whole.splitlines(keepends=True)[-1]) - cut} bytes" in said
        file.write(("a.png", "Why?"), CAPTION)
    assert begun.read_bytes() == whole


def test_errors_are_tried_again_if_asked(begun: Path) -> None:
    with CaptionFile(begun, SETTINGS, retry_errors=True) as file:
        assert list(file.rows) == [("a.png", None), ("a.png", "Why?")]
        assert file.mended == ["1 rows with errors were removed: they are tried again."]
        file.write(("b.png", None), CAPTION)
        with pytest.raises(
            UserError, match="another run"
        ):  # the new file is held as the old one was
            CaptionFile(begun, SETTINGS)
    assert [("error" in row, row["image"]) for row in read(begun)] == [
        (False, "a.png"), (False, "a.png"), (False, "b.png")
    ]  # fmt: skip
    assert sorted(path.name for path in begun.parent.iterdir()) == [
        "captions.jsonl", "captions.jsonl.meta.json"
    ]  # fmt: skip


def test_rows_of_another_prompt_or_setting_are_refused_with_the_difference(begun: Path) -> None:
    before = begun.read_bytes()
    changed = {**SETTINGS, "generation": {"temperature": 0.7}}
    said = r"with other settings: generation was \{'temperature': 0.5\}, is \{'temperature': 0.7\}"
    with pytest.raises(UserError, match=said):
        CaptionFile(begun, changed)
    with CaptionFile(begun, SETTINGS) as file, pytest.raises(UserError, match="other weights"):
        file.set_model("f2")
    assert begun.read_bytes() == before


def test_without_rows_any_settings_begin_anew(begun: Path) -> None:
    begun.write_bytes(b"")
    with CaptionFile(begun, {**SETTINGS, "prompt": "Why?"}) as file:
        file.set_model("f2")
        assert file.rows == {}


def break_meta(out: Path) -> None:
    out.with_name("captions.jsonl.meta.json").write_text("{")


def remove_meta(out: Path) -> None:
    out.with_name("captions.jsonl.meta.json").unlink()


def foreign_row(out: Path) -> None:
    out.write_bytes(b'{"image": 3}\n' + out.read_bytes())


def no_json(out: Path) -> None:
    out.write_bytes(out.read_bytes() + b"hello\n")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_meta, "cannot be read"),
        (remove_meta, "cannot be read"),
        (foreign_row, "Line 1 of .* is no row of captions"),
        (no_json, "Line 4 of .* is no row of captions: b'hello'"),
    ],
)
def test_a_file_that_is_not_ours_is_left_alone(
    damage: Callable[[Path], None], said: str, begun: Path
) -> None:
    damage(begun)
    before = begun.read_bytes()
    with pytest.raises(UserError, match=said):
        CaptionFile(begun, SETTINGS, retry_errors=True)
    assert begun.read_bytes() == before


def test_two_runs_cannot_write_one_file(out: Path) -> None:
    with (
        CaptionFile(out, SETTINGS),
        pytest.raises(UserError, match="is being written by another run"),
    ):
        CaptionFile(out, SETTINGS)
    with CaptionFile(out, SETTINGS):
        pass


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_row_that_cannot_be_written_whole_is_not_there(
    error: BaseException, begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, write = begun.read_bytes(), os.write

    def tear(file: int, data: bytes) -> int:
        if len(data) < 10:
            raise error
        return write(file, data[:-5])

    with CaptionFile(begun, SETTINGS) as file:
        monkeypatch.setattr(os, "write", tear)
        with pytest.raises(type(error)) as raised:
            file.write(("c.png", None), CAPTION)
        assert ("c.png", None) not in file.rows
    assert begun.read_bytes() == before
    if isinstance(raised.value, OSError):
        assert raised.value.filename == str(begun)
        assert raised.value.errno == errno.ENOSPC


def test_a_full_disk_is_said_when_a_run_begins_and_leaves_no_part_behind(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(path: Path, content: bytes) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(OSError, match="No space left") as raised:
        CaptionFile(out, SETTINGS)
    assert raised.value.filename == f"{out}.meta.json"
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_place_that_cannot_be_written_is_said_when_it_is_opened(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file or directory"):
        CaptionFile(tmp_path / "no" / "captions.jsonl", SETTINGS)
    with pytest.raises(OSError, match="Is a directory"):
        CaptionFile(tmp_path, SETTINGS)
