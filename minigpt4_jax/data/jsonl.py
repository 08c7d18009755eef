"""Pictures and words of one's own: a JSONL file, one sample a line.

For: `docs/own_data.md`. A line is an object with

    "image"          path of the picture, relative to the file
    "text"           what to say about it, and optionally "prompt", the question it answers
    or "turns"       a list of {"role": "user" | "assistant", "text": ...}, question and answer in turn
    or "conversations"  the same as LLaVA writes it: {"from": "human" | "gpt", "value": ...}

Other keys (LLaVA's "id") are left alone. Not in the original, which has one loader per data set.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from minigpt4_jax.config import UserError
from minigpt4_jax.data.sources import Example, Exchange, InMemorySource, raise_problems

LLAVA_IMAGE = "<image>"
"""LLaVA's mark for the picture, at the start or end of the first question; the template puts the picture there."""
_WORDS = ("text", "turns", "conversations")
_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


class Jsonl(InMemorySource):
    """A JSONL file as a random-access source; lines may share a picture.

    Raises `UserError` listing every line that is wrong and every picture that is missing, all at once.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        problems: list[str] = []
        examples: list[Example] = []
        rows: dict[Path, int] = {}
        for number, line in enumerate(self._lines(), start=1):
            if not line.strip():
                continue
            try:
                image, exchanges = parse_line(line)
            except ValueError as error:
                problems.append(f"line {number}: {error}")
                continue
            file = self.path.parent / image
            if file not in rows:
                rows[file] = len(rows)
                if not file.is_file():
                    problems.append(f"line {number}: there is no picture {file}")
            name = f"line {number} ({image})"
            examples.append(Example(name, rows[file], exchanges))
        raise_problems(problems, f"{self.path} cannot be used")
        if not examples:
            raise UserError(f"{self.path} has no line; expected one sample a line.")
        super().__init__(examples, rows)

    def _lines(self) -> list[str]:
        try:
            return self.path.read_text(encoding="utf-8-sig").split("\n")
        except OSError as error:
            raise UserError(
                f"Cannot read {self.path} ({error.strerror or error}). Expected a JSONL file."
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8 text ({error}).") from error


def parse_line(line: str) -> tuple[str, tuple[Exchange, ...]]:
    """Picture and words of one line. Raises `ValueError` that says what is wrong."""
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise ValueError(f"is {_kind(entry)}; expected an object such as {{'image', 'text'}}")
    image = entry.get("image")
    if not isinstance(image, str) or not image or "\0" in image:
        raise ValueError(f"image is {image!r}; expected the path of a picture")
    given = [key for key in _WORDS if key in entry]
    if len(given) != 1:
        found = " and ".join(given) or f"only {', '.join(entry)}"
        raise ValueError(f"has {found}; expected one of {', '.join(_WORDS)} beside image")
    if given == ["text"]:
        prompt = entry.get("prompt")
        question = None if prompt is None else _text(prompt, "prompt")
        return image, (Exchange(question, _text(entry["text"], "text")),)
    if "prompt" in entry:
        raise ValueError(f"has a prompt beside {given[0]}; expected the question as its first turn")
    return image, _exchanges(entry[given[0]], given[0])


def _exchanges(turns: Any, key: str) -> tuple[Exchange, ...]:
    if not isinstance(turns, list) or not turns or len(turns) % 2:
        count = f"a list of {len(turns)}" if isinstance(turns, list) else _kind(turns)
        raise ValueError(f"{key} is {count}; expected questions and answers in turn")
    texts = []
    for place, turn in enumerate(turns):
        where = f"{key}[{place}]"
        if not isinstance(turn, dict):
            raise ValueError(f"{where} is {_kind(turn)}; expected an object with role and text")
        role, expected = turn.get("role", turn.get("from")), ("user", "assistant")[place % 2]
        if not isinstance(role, str) or _ROLES.get(role) != expected:
            raise ValueError(f"{where} is by {role!r}; expected {expected}: they take turns")
        text = _text(turn.get("text", turn.get("value")), f"the text of {where}")
        if place == 0:
            text = text.removeprefix(LLAVA_IMAGE).removesuffix(LLAVA_IMAGE).strip()
        if LLAVA_IMAGE in text or not text:
            raise ValueError(
                f"the text of {where} is {turn.get('text', turn.get('value'))!r}; expected words, with "
                f"{LLAVA_IMAGE} only at the start or end of the first question, once"
            )
        texts.append(text)
    return tuple(Exchange(*pair) for pair in zip(texts[::2], texts[1::2], strict=True))


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what} is {value!r}; expected some text")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
