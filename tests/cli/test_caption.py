"""minigpt4 caption on the tiny model: rows, going on, stopping, and what is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax import Chat, MiniGPT4, cli, cli_caption
from tests.cli.messages import assert_one_message


@pytest.fixture
def folder(picture: Path, second: Path, tmp_path: Path) -> Path:
    """Three pictures, one of which is none, and a text."""
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    shutil.copy(picture, folder / "a.png")
    shutil.copy(second, folder / "deeper" / "c.png")
    (folder / "b.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    (folder / "notes.txt").write_text("Hello.")
    return folder


@pytest.fixture
def command(folder: Path, options: list[str]) -> list[str]:
    out = folder / "captions.jsonl"
    return ["caption", str(folder), "--out", str(out), "--prompt", "What is this?", *options]


def read(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    return sorted((json.loads(line) for line in lines), key=lambda row: row["image"])


def must_not_load(*args: Any, **settings: Any) -> None:
    """Takes the place of what may not be called."""
    raise AssertionError("loaded")


def test_every_picture_gets_its_row_and_a_bad_one_is_not_the_end(
    folder: Path, command: list[str], chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command) == 2
    out, err = capsys.readouterr()
    first, bad, last = read(folder)
    expected = {"caption": chat.ask("What is this?"), "finish_reason": "length", "tokens": 12}
    assert first == {"image": "a.png", **expected}
    assert bad.keys() == {"image", "error"}
    assert "b.jpg': it is damaged or not a picture" in bad["error"]
    assert last["image"] == "deeper/c.png"
    assert last["caption"] != first["caption"]
    assert out == ""
    assert "3 pictures, 3 to caption.\nLeft out: 1 .txt.\n" in err
    assert "3/3" in err
    assert "minigpt4: 1 of 3 rows in" in err


def test_a_run_goes_on_where_it_was_stopped_and_says_how(
    folder: Path, command: list[str], second: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copy(second, folder / "b.jpg")
    bar = cli_caption._caption_bar

    def stop_after_two(file: Any, *, total: int) -> Any:
        class Stop:
            def __enter__(self) -> Any:
                return self.row_done

            def __exit__(self, *exc: object) -> None:
                pass

            def row_done(self) -> None:
                if len(file.rows) == 2:
                    raise KeyboardInterrupt

        return Stop()

    monkeypatch.setattr(cli_caption, "_caption_bar", stop_after_two)
    assert cli.main(command) == 130
    assert (
        "captions.jsonl has 2 rows; the same command goes on from there." in capsys.readouterr().err
    )
    stopped = read(folder)
    assert len(stopped) == 2
    monkeypatch.setattr(cli_caption, "_caption_bar", bar)
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert "3 pictures, 1 to caption." in err
    assert out == f"3 captions: {folder / 'captions.jsonl'}\n"
    rows = read(folder)
    assert [row["image"] for row in rows] == ["a.png", "b.jpg", "deeper/c.png"]
    assert all(row in rows for row in stopped)
    # Nothing is left to do: no model is needed to say so.
    monkeypatch.setattr(MiniGPT4, "load", must_not_load)
    assert cli.main(command) == 0


def test_errors_are_tried_again_when_the_picture_was_mended(
    folder: Path, command: list[str], second: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command) == 2
    shutil.copy(second, folder / "b.jpg")
    assert cli.main(command) == 2  # a row is a row
    capsys.readouterr()
    assert cli.main([*command, "--retry-errors"]) == 0
    assert "1 rows with errors were removed" in capsys.readouterr().err
    rows = read(folder)
    assert len(rows) == 3
    assert rows[1]["caption"] == rows[2]["caption"]  # the same picture


def test_a_list_asks_its_own_questions(
    folder: Path, command: list[str], chat: Chat, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"image": "a.png", "prompt": "Why?"}, {"image": "a.png"}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command[1] = str(folder / "list.jsonl")
    assert cli.main(command) == 0
    captions = {row.get("prompt"): row["caption"] for row in read(folder)}
    assert captions[None] == chat.ask("What is this?")
    assert captions["Why?"] != captions[None]


def test_other_settings_are_refused_before_anything_is_loaded(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command) == 2
    capsys.readouterr()
    monkeypatch.setattr(MiniGPT4, "load", must_not_load)
    said = "was begun with other settings: generation was {'max_new_tokens': 12"
    assert_one_message([*command, "--max-new-tokens", "5"], said, capsys)
    assert_one_message(
        [*command, "--prompt", "Why?"], "prompt was 'What is this?', is 'Why?'", capsys
    )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--out", "no/captions.jsonl"], "'no/captions.jsonl': No such file or directory"),
        (["--out", "."], "--out is ., a folder; expected a file to write"),
        (["--prompt", " "], "The prompt is empty"),
        (["--min-p", "0.1"], "--min-p would change nothing: the temperature is 0"),
        (["--min-new-tokens", "13"], "min_new_tokens is 13; expected a whole number from 0 to 12"),
        (["--presence-penalty", "3"], "presence_penalty is 3.0; expected a number from -2 to 2"),
        (["--slots", "0"], "--slots is 0; expected at least 1"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(
    changed: list[str], said: str, command: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(MiniGPT4, "load", must_not_load)
    assert_one_message([*command, *changed], said, capsys)
