"""data/jsonl.py: the three ways to write a line, and every wrong line said at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data.jsonl import Jsonl
from minigpt4_jax.data.sources import Exchange, Source


def write(folder: Path, *lines: Any, pictures: tuple[str, ...] = ("a.jpg",)) -> Path:
    for name in pictures:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    path = folder / "set.jsonl"
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n"
    )
    return path


def test_text_turns_and_llava_conversations_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        {"image": "p/a.jpg", "text": "A bicycle."},
        {"image": "p/a.jpg", "text": "Red.", "prompt": "Which colour?"},
        "",
        {"image": "b.png", "turns": [
            {"role": "user", "text": "What?"}, {"role": "assistant", "text": "A cat."},
            {"role": "user", "text": "Sure?"}, {"role": "assistant", "text": "Yes."},
        ]},
        {"id": 7, "image": "b.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."},
        ]},
        {"image": "b.png", "conversations": [
            {"from": "human", "value": "What?\n<image>"}, {"from": "gpt", "value": "A cow."},
        ]},
        pictures=("p/a.jpg", "b.png"),
    )  # fmt: skip
    source = Jsonl(path)
    assert isinstance(source, Source)
    assert [source[i].exchanges for i in range(len(source))] == [
        (Exchange(None, "A bicycle."),),
        (Exchange("Which colour?", "Red."),),
        (Exchange("What?", "A cat."), Exchange("Sure?", "Yes.")),
        (Exchange("What?", "A dog."),),
        (Exchange("What?", "A cow."),),
    ]
    assert [source[i].image_row for i in range(5)] == [0, 0, 1, 1, 1]
    assert source.num_images == 2
    assert source.read_image(1) == b"b.png"
    assert source[2].name == "line 4 (b.png)"


USER, ASSISTANT = {"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{broken", "is not JSON"),
        ("[1]", "is a list; expected an object"),
        ({"text": "x"}, "image is None; expected the path"),
        ({"image": 3, "text": "x"}, "image is 3"),
        ({"image": "none.jpg", "text": "x"}, "there is no picture"),
        ({"image": "a.jpg", "txt": "x"}, "has only image, txt; expected one of text, turns"),
        ({"image": "a.jpg", "text": "x", "turns": []}, "has text and turns; expected one of"),
        ({"image": "a.jpg", "text": " "}, "text is ' '; expected some text"),
        ({"image": "a.jpg", "text": "x", "prompt": 1}, "prompt is 1"),
        ({"image": "a.jpg", "turns": []}, "turns is a list of 0; expected questions and answers"),
        ({"image": "a.jpg", "turns": [USER]}, "turns is a list of 1"),
        ({"image": "a.jpg", "turns": "x"}, "turns is a str"),
        ({"image": "a.jpg", "turns": [ASSISTANT, USER]}, r"turns\[0\] is by 'assistant'; expected user"),
        ({"image": "a.jpg", "turns": [USER, USER]}, r"turns\[1\] is by 'user'; expected assistant"),
        ({"image": "a.jpg", "turns": [USER, "x"]}, r"turns\[1\] is a str"),
        ({"image": "a.jpg", "turns": [USER, {"role": "assistant"}]}, r"the text of turns\[1\] is None"),
        ({"image": "a.jpg", "turns": [USER, ASSISTANT], "prompt": "p"}, "as its first turn"),
        (
            {"image": "a.jpg", "turns": [{"role": "user", "text": "a <image> b"}, ASSISTANT]},
            "only at the start or end",
        ),
        ({"image": "a.jpg", "turns": [{"role": "user", "text": "<image>"}, ASSISTANT]}, "expected words"),
        ({"image": "a.jpg", "turns": [{"role": "system", "text": "s"}, ASSISTANT]}, "is by 'system'"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_told_by_its_number(line: Any, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path, {"image": "a.jpg", "text": "fine"}, line)
    with pytest.raises(UserError, match=rf"(?s)1 problem.*line 2: .*{problem}") as raised:
        Jsonl(path)
    assert str(path) in str(raised.value)


def test_all_wrong_lines_are_told_together(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)12 problem.*line 1: .*line 10: .*and 2 more"):
        Jsonl(write(tmp_path, *["{"] * 12))


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot read"):
        Jsonl(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="has no line"):
        Jsonl(write(tmp_path))
    (tmp_path / "latin.jsonl").write_bytes('{"image": "a.jpg", "text": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        Jsonl(tmp_path / "latin.jsonl")


def test_a_byte_order_mark_and_windows_lines_are_no_problem(tmp_path: Path) -> None:
    path = write(tmp_path)
    path.write_bytes(b'\xef\xbb\xbf{"image": "a.jpg", "text": "x"}\r\n\r\n')
    assert Jsonl(path)[0].exchanges == (Exchange(None, "x"),)
