"""The cases about `minigpt4 caption`: what it is asked to look at, and the file that it writes. All are refused before
any weights are loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from case import PICTURE, Case, write

OUT = ("--out", "captions.jsonl")
ROW = '{"image": "p.png", "caption": "A cup."}\n'


def caption(
    what: str,
    says: str,
    *arguments: str,
    prepare: Callable[[], None] = PICTURE,
    **more: Any,
) -> Case:
    return Case(
        group="Captions",
        what=what,
        command=("minigpt4", "caption", *arguments),
        says=says,
        prepare=prepare,
        **more,
    )


def both(*steps: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for step in steps:
            step()

    return run


CAPTIONS = (
    caption("no such folder", "Cannot read pictures .No such file", "pictures", *OUT),
    caption(
        "a folder without pictures",
        r"no picture in notes .found: 1 \.txt",
        "notes",
        *OUT,
        prepare=write("notes/a.txt", "hello"),
    ),
    caption(
        "an empty list",
        "no picture in list.txt .found: nothing",
        "list.txt",
        *OUT,
        prepare=write("list.txt", ""),
    ),
    caption(
        "a list that is no text",
        "neither a picture by its name nor UTF-8 text",
        "list.bin",
        *OUT,
        prepare=write("list.bin", bytes(range(256))),
    ),
    caption(
        "a JSONL list with a broken line",
        "line 2",
        "list.jsonl",
        *OUT,
        prepare=write("list.jsonl", '{"image": "p.png"}\n{"image": \n'),
    ),
    caption("an empty prompt", "The prompt is empty", ".", *OUT, "--prompt", " "),
    caption("no slots", "--slots is 0; expected at least 1", ".", *OUT, "--slots", "0"),
    caption(
        "a file in a folder that is not there", "captions.jsonl", ".", "--out", "no/captions.jsonl"
    ),
    caption("a folder as the file", "--out is ., a folder; expected a file", ".", "--out", "."),
    caption(
        "a file with rows and nothing that says how they were made",
        "which says how they were made, cannot be read",
        ".",
        *OUT,
        prepare=both(PICTURE, write("captions.jsonl", ROW)),
    ),
    caption(
        "a file that was begun with other settings",
        "begun with other settings",
        ".",
        *OUT,
        prepare=both(
            PICTURE,
            write("captions.jsonl", ROW),
            write("captions.jsonl.meta.json", '{"model": "other"}'),
        ),
    ),
)
