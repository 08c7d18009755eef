"""Captions of many pictures, as rows of a JSONL file: `minigpt4 caption`.

For: which pictures a folder or list names, and the loop over them. A row is

    {"image": path, "caption": text, "finish_reason": "stop" | "length", "tokens": N}
    {"image": path, "error": text}           a picture that cannot be captioned is a row, and not the end of the run

and "prompt" beside "image" where the list gave the picture its own. Rows come in the order in which they are finished.
Not for: the file and how a run goes on (`caption_file.py`), arguments, progress bars and exit codes (`cli.py`),
answering (`answers.py`).

Not in the original, whose users write their own loops around its web page's chat.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from minigpt4_jax.caption_file import CaptionFile, Name
from minigpt4_jax.config import UserError
from minigpt4_jax.data.images import FORMATS
from minigpt4_jax.data.sources import raise_problems
from minigpt4_jax.presets import GenerationConfig

if TYPE_CHECKING:
    from minigpt4_jax.api import MiniGPT4

PROMPT = "Describe this picture."


class Item(NamedTuple):
    """A picture to caption."""

    image: str
    """As it stands in the row: relative to the folder, or as the list has it."""
    path: Path
    prompt: str | None
    """Its own, where the list has one."""

    @property
    def name(self) -> Name:
        """By which its row is found again."""
        return self.image, self.prompt


class Listing(NamedTuple):
    """What there is to do."""

    items: list[Item]
    left_out: Counter[str]
    """What else is there, by kind: `.txt`, `hidden`, `listed again`."""


# --- which pictures ---


def list_pictures(source: Path, *, ignore: Collection[Path] = ()) -> Listing:
    """The pictures of a folder (all below it, sorted), a list, or one picture.

    A list is a text file with a path on each line, or `.jsonl` with objects that have `image` and may have `prompt`;
    paths are relative to the list's folder. Whether a picture can be opened is seen later, and is then its row.

    Args:
        ignore: files that are not counted as left out: the run's own.

    Raises:
        UserError: there is no such file or folder, it names no picture, or the list cannot be read; all its wrong
            lines together.
    """
    suffixes = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
    left_out: Counter[str] = Counter()
    if source.is_dir():
        found = _walk(source, suffixes, left_out, {path.absolute() for path in ignore})
    elif source.suffix.lower() in suffixes:
        found = iter([Item(source.name, source, None)])
    else:
        found = _read_list(source)
    items = {}
    for item in found:
        left_out["listed again"] += item.name in items
        items[item.name] = item
    left_out = +left_out  # without what was counted 0 times
    if not items:
        raise UserError(
            f"There is no picture in {source} (found: {describe(left_out) or 'nothing'}). Expected files that end in "
            f"{', '.join(sorted(suffixes))}, or a list that names some."
        )
    return Listing(list(items.values()), left_out)


def describe(counts: Mapping[str, int]) -> str:
    """`3 .txt, 1 hidden`."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


def _walk(
    folder: Path, suffixes: Collection[str], left_out: Counter[str], ignore: Collection[Path]
) -> Iterator[Item]:
    def stop(error: OSError) -> None:
        raise error

    items = []
    for place, folders, files in os.walk(folder, onerror=stop):
        here = Path(place)
        left_out["hidden"] += sum(name.startswith(".") for name in folders)
        left_out["linked folders"] += sum((here / name).is_symlink() for name in folders)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = here / name
            if name.startswith("."):
                left_out["hidden"] += 1
            elif path.suffix.lower() in suffixes:
                items.append(Item(path.relative_to(folder).as_posix(), path, None))
            elif path.absolute() not in ignore:
                left_out[path.suffix.lower() or "without a suffix"] += 1
    yield from sorted(items, key=lambda item: item.image)


def _read_list(file: Path) -> Iterator[Item]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(
            f"Cannot read {file} ({error.strerror or error}). Expected a folder, a picture, or a list of pictures."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is neither a picture by its name nor UTF-8 text ({error}). Expected a folder, a picture, or a "
            "text file with a path on each line."
        ) from error
    problems = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            image, prompt = _parse_line(line.strip(), is_json=file.suffix.lower() == ".jsonl")
            yield Item(image, file.parent / image, prompt)
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    raise_problems(problems, f"{file} cannot be used")


def _parse_line(line: str, *, is_json: bool) -> tuple[str, str | None]:
    """Path and prompt. Raises `ValueError` that says what is wrong."""
    entry: Any = {"image": line}
    if is_json:
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"is not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise ValueError(f"is a {type(entry).__name__}; expected an object with image")
    image, prompt = entry.get("image"), entry.get("prompt")
    if not isinstance(image, str) or not image or "\0" in image:
        raise ValueError(f"image is {image!r}; expected the path of a picture")
    if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
        raise ValueError(f"prompt is {prompt!r}; expected text, or no prompt at all")
    return image, prompt


# --- the loop ---


def run_settings(
    source: Path, *, model: str, prompt: str, context: int, generation: GenerationConfig
) -> dict[str, Any]:
    """What the rows of a run depend on, for `CaptionFile`. `model` is its name or path."""
    return {
        "source": str(source.absolute()),
        "model": model,
        "prompt": prompt,
        "context": context,
        "generation": dataclasses.asdict(generation),
    }


def caption_pictures(
    model: MiniGPT4,
    items: Sequence[Item],
    *,
    file: CaptionFile,
    prompt: str,
    generation: GenerationConfig,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Captions every picture that has no row yet; `progress` is called after each row.

    Raises `OSError` when a row cannot be written (the file ends with the one before).
    """
    from minigpt4_jax.answers import Ask  # jax: listing pictures shall not wait for it

    asks = (
        Ask(key=item, images=(item.path,), prompt=item.prompt or prompt)
        for item in items
        if item.name not in file.rows
    )
    with contextlib.closing(model.answer_each(asks, generation=generation)) as outcomes:
        for item, outcome in outcomes:
            if isinstance(outcome, UserError):
                file.write(item.name, {"error": str(outcome)})
            else:
                (answer,) = outcome
                reason, tokens = answer.finish_reason, len(answer.ids)
                file.write(
                    item.name, {"caption": answer.text, "finish_reason": reason, "tokens": tokens}
                )
            progress()
