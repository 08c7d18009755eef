"""Captioned pictures by index: what a source is, and the `cc_sbu_align` folder.

For: the words that all sources share (`Example`, `Source`), the base of those whose words are in memory, and the
original's stage-2 format (`filter_cap.json` and `image/{image_id}.jpg`). Not for: other formats (`jsonl.py`,
`tar_shards.py`, `array_records.py`), choosing among them (`datasets.py`), decoding pictures (`pixels.py`).

Differs from the original: a missing picture is found before the first step, not in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from minigpt4_jax.config import UserError
from minigpt4_jax.data.faults import SampleFault

ANNOTATIONS = "filter_cap.json"
_SHOWN_PROBLEMS = 10

NO_CAPTION, UNREADABLE = "no caption", "unreadable"
"""Reasons for which a source refuses a sample when it is read."""


class Exchange(NamedTuple):
    """A question and its answer."""

    question: str | None
    """None (in the first exchange only): one of the run's prompts is drawn."""
    answer: str


@dataclass(frozen=True)
class Example:
    """One picture with its words."""

    name: str
    """For messages: where the sample stands in its source."""
    image_row: int
    """Which of the source's pictures it is about: `Source.read_image` takes it."""
    exchanges: tuple[Exchange, ...]
    image: bytes | None = None
    """The picture's file, where the source reads it together with the words."""


@runtime_checkable
class Source(Protocol):
    """Examples by index, in any order, from any thread. Sources pickle, for worker processes."""

    in_memory: bool
    """The words are in memory: all of them are checked before the first step."""
    num_images: int
    """Different pictures; `Example.image_row` is below it."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Example:
        """Raises `SampleFault` for an example that cannot be read."""
        ...

    def read_image(self, row: int) -> bytes:
        """The file of picture `row`, as it is stored. Raises `SampleFault` when it cannot be read."""
        ...


class InMemorySource:
    """A source whose words were read and checked at once; its pictures are files of their own, read when asked for.

    Args:
        examples: every sample; `Example.image_row` is a place in `image_paths`.
        image_paths: each picture once.
    """

    in_memory = True

    def __init__(self, examples: Sequence[Example], image_paths: Iterable[Path]) -> None:
        self._examples = examples
        self.image_paths = tuple(image_paths)
        self.num_images = len(self.image_paths)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def read_image(self, row: int) -> bytes:
        """The file of picture `row`. Raises `SampleFault` when it cannot be read."""
        return read_file(self.image_paths[row])


class CcSbuAlign(InMemorySource):
    """A folder in the original's stage-2 format, as a random-access source.

    `filter_cap.json` holds `{"annotations": [{"image_id", "caption"}, ...]}` or the bare list; an annotation may have
    its own `"prompt"` (not in the original). Pictures are `image/{image_id}.jpg`; several annotations may share one.
    Raises `UserError` listing every missing picture and broken annotation together.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        annotations = _read_annotations(self.folder / ANNOTATIONS)
        images = self.folder / "image"
        present = {entry.name for entry in images.iterdir()} if images.is_dir() else set()
        problems: list[str] = []
        examples: list[Example] = []
        rows: dict[str, int] = {}
        for number, annotation in enumerate(annotations):
            problem = _annotation_problem(annotation)
            if problem is not None:
                problems.append(f"annotation {number}: {problem}")
                continue
            image_id = str(annotation["image_id"])
            if image_id not in rows:
                rows[image_id] = len(rows)
                if f"{image_id}.jpg" not in present:
                    path = images / f"{image_id}.jpg"
                    problems.append(f"annotation {number}: there is no {path}")
            words = Exchange(annotation.get("prompt"), annotation["caption"])
            name = f"annotation {number} (picture {image_id})"
            examples.append(Example(name, rows[image_id], (words,)))
        raise_problems(problems, f"{self.folder / ANNOTATIONS} and its pictures do not agree")
        if not examples:
            raise UserError(
                f"{self.folder / ANNOTATIONS} has no annotation; expected at least one."
            )
        super().__init__(examples, (images / f"{image_id}.jpg" for image_id in rows))


def read_file(path: Path) -> bytes:
    """A picture's file. Raises `SampleFault` that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleFault(UNREADABLE, f"Cannot read {path} ({error.strerror or error}).") from error


def _read_annotations(file: Path) -> list[Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"Cannot read {file} ({error.strerror or error}). Expected a folder with {ANNOTATIONS} and image/."
        ) from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}).") from error
    annotations = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(annotations, list):
        raise UserError(
            f'{file} holds a {type(content).__name__}; expected {{"annotations": [...]}} or a list.'
        )
    return annotations


def _annotation_problem(annotation: Any) -> str | None:
    if not isinstance(annotation, dict):
        return f"is a {type(annotation).__name__}; expected an object with image_id and caption"
    image_id = annotation.get("image_id")
    if isinstance(image_id, bool) or not isinstance(image_id, str | int) or image_id == "":
        return f"image_id is {image_id!r}; expected a name or a number"
    if not set(str(image_id)).isdisjoint("/\\\0") or str(image_id) in (".", ".."):
        return f"image_id is {image_id!r}; expected the name of a file in image/, without a folder"
    caption = annotation.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        return f"caption is {caption!r}; expected text"
    prompt = annotation.get("prompt")
    if prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
        return f"prompt is {prompt!r}; expected text, or no prompt at all"
    return None


def raise_problems(problems: Sequence[str], heading: str) -> None:
    """Raises one `UserError` with the first problems and their number, if there are any."""
    if not problems:
        return
    shown = "\n  ".join(problems[:_SHOWN_PROBLEMS])
    more = len(problems) - _SHOWN_PROBLEMS
    raise UserError(
        f"{heading}: {len(problems)} problem(s).\n  {shown}"
        + (f"\n  ... and {more} more" if more > 0 else "")
    )
