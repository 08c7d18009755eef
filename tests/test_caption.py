"""minigpt4_jax.caption: which pictures a folder or list names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax.caption import Item, list_pictures
from minigpt4_jax.config import UserError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_a_folder_gives_all_pictures_below_it_in_order_and_counts_the_rest(tmp_path: Path) -> None:
    names = ["b.JPG", "a/z.png", "a/b/c.webp", "ü.gif", *(f"{n}.png" for n in range(20))]
    others = [
        "notes.txt",
        "a/notes.txt",
        "README",
        "clip.mp4",
        ".DS_Store",
        ".git/x.png",
        "o.jsonl",
    ]
    touch(*(tmp_path / name for name in (*names, *others)))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    found, left_out = list_pictures(tmp_path, ignore=[tmp_path / "o.jsonl"])
    assert [item.image for item in found] == sorted(names)
    assert Item("a/b/c.webp", tmp_path / "a/b/c.webp", None) in found
    expected = {".txt": 2, "without a suffix": 1, ".mp4": 1, "hidden": 2, "linked folders": 1}
    assert left_out == expected


def test_a_list_names_pictures_relative_to_itself(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("\ufeffa/b c.png\r\n\n/far/d.jpg\na/b c.png\n", encoding="utf-8")
    found, left_out = list_pictures(file)
    assert found == [
        Item("a/b c.png", tmp_path / "a/b c.png", None), Item("/far/d.jpg", Path("/far/d.jpg"), None)
    ]  # fmt: skip
    assert left_out == {"listed again": 1}


def test_a_jsonl_list_may_ask_its_own_questions_several_of_one_picture(tmp_path: Path) -> None:
    file = tmp_path / "list.jsonl"
    file.write_text('{"image": "a.png", "id": 3}\n{"image": "a.png", "prompt": "Why?"}\n')
    found, left_out = list_pictures(file)
    assert [item.name for item in found] == [("a.png", None), ("a.png", "Why?")]
    assert not left_out


def test_a_single_picture_is_a_list_of_one(tmp_path: Path) -> None:
    assert list_pictures(tmp_path / "p.png").items == [Item("p.png", tmp_path / "p.png", None)]


def test_all_wrong_lines_of_a_list_are_said_together(tmp_path: Path) -> None:
    file = tmp_path / "list.jsonl"
    file.write_text('{"image": 3}\nx\n[]\n{"image": "a.png", "prompt": " "}\n{"image": "a.png"}\n')
    with pytest.raises(UserError) as raised:
        list_pictures(file)
    said = str(raised.value)
    assert "4 problem(s)" in said
    for part in (
        "line 1: image is 3",
        "line 2: is not JSON",
        "line 3: is a list",
        "line 4: prompt is ' '",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("folder/notes.txt", b"", r"no picture in .*found: 1 .txt"),
        ("folder/deeper/.x.png", b"", r"found: 1 hidden"),
        ("list.txt", b"\n\n", "found: nothing"),
        ("list.txt", b"\xff\xd8\xff\xe0", "neither a picture by its name nor UTF-8 text"),
        (None, b"", "Cannot read .*No such file"),
    ],
)
def test_what_names_no_picture_is_refused(
    name: str | None, content: bytes, said: str, tmp_path: Path
) -> None:
    source = tmp_path / "list.txt"
    if name is not None:
        touch(tmp_path / name)
        (tmp_path / name).write_bytes(content)
        source = tmp_path / Path(name).parts[0]
    with pytest.raises(UserError, match=said):
        list_pictures(source)


def test_a_folder_that_cannot_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "a.png", tmp_path / "closed" / "b.png")
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError):
        list_pictures(tmp_path)
