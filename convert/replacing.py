"""Files that appear whole or not at all.

For: whatever this project writes beside and then renames.
Not for: folders.

Differs from the original, whose `torch.save` writes in place: a full disk leaves half a file under the final name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from minigpt4_jax.config import UserError


@contextlib.contextmanager
def replacing(path: Path, *, failures: tuple[type[Exception], ...] = (OSError,)) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place at the end; its folder is made.

    Args:
        failures: how the writer says "disk full".

    Raises:
        UserError: the file cannot be written; nothing is left behind.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except failures as error:
        raise UserError(
            f"{path} cannot be written ({error}). Expected a folder that you may write to, with room; choose another "
            "place, or free some space."
        ) from error
    finally:
        with contextlib.suppress(OSError):  # on a read-only disk there is nothing to remove
            partial.unlink()
