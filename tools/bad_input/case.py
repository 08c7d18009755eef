"""What a case of the table is, and how its files are written. Not for: the cases."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PROGRAMS = ("minigpt4", "train.py", "python -m convert", "load_image")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table."""

    group: str
    what: str
    command: tuple[str, ...]
    """One of `PROGRAMS`, then arguments. `load_image FILE` is the function: the picture is good, no model is needed."""
    says: str
    """Must be in the output (a regular expression)."""
    code: int = 2
    prepare: Callable[[], None] = lambda: None
    """Makes the files, in the working folder."""
    environment: tuple[tuple[str, str], ...] = ()
    patch: Callable[[], None] = lambda: None
    """Changes the process that runs the command: the tiny model, a small disk, less rights."""
    interrupt_at: str = ""
    """Ctrl-C as soon as this file is there."""


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(name: str, data: bytes | str) -> Callable[[], None]:
    content = data.encode() if isinstance(data, str) else data

    def make() -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)

    return make


RED = (255, 0, 0)
PHOTO = Image.new("RGB", (4, 2), RED)
PICTURE = write("p.png", encoded(PHOTO, "PNG"))

YAML = (
    "model: tiny\nworkdir: run\ndata:\n  folder: set\n  batch_size: 2\n"
    "optimizer:\n  max_steps: 4\n  warmup_steps: 1\n"
)
