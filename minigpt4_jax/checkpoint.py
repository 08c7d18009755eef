"""What everything that reads or writes arrays shares: comparing trees, finding damage, and what disks do.

For: `compare_trees`, the comparison before arrays are bound to a model (Flax accepts a leaf too many in silence, this
does not), and errors that name the folder.
Not for: a model on disk (`model_folder.py`), the steps of a training run (`training/checkpoints.py`), other people's
file formats (`convert/`), meshes and rules (`sharding.py`).

The original pickles a state dict and loads it with `strict=False`; a wrong name there becomes a random weight.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from minigpt4_jax.checksums import damaged_files
from minigpt4_jax.config import UserError

Tree = Any
"""Nested dicts (or any pytree) whose leaves have `shape` and `dtype`: arrays, or `jax.ShapeDtypeStruct`."""

_SHOWN_PROBLEMS = 4
_ROOM = 1 << 20  # bytes that a checkpoint takes beside its arrays
_FULL = "Free some space, or choose another folder, and run the command again."
_log = logging.getLogger(__name__)


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or made for another model. The message lists every difference."""


# --- comparing ----------------------------------------------------------------------------------------------------


def leaf_names(tree: Tree) -> dict[str, Any]:
    """Every leaf under its path, joined with `/`: `llama/layers/0/mlp/up_proj/kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as one text: `llama/layers/0/mlp/up_proj/kernel`."""
    return "/".join(_key_name(key) for key in path)


def compare_trees(actual: Tree, expected: Tree, *, check_dtypes: bool = True) -> list[str]:
    """Every difference in names, shapes and dtypes between two trees, in both directions, one line each.

    Leaves need only `shape` and `dtype`, so an abstract tree will do on either side. An empty list means that
    `actual` can be bound to `expected`.
    """
    got, want = leaf_names(actual), leaf_names(expected)
    problems = [f"missing: {name} {_describe(want[name])}" for name in want if name not in got]
    problems += [f"unexpected: {name} {_describe(got[name])}" for name in got if name not in want]
    for name in want:
        if name not in got:
            continue
        if tuple(got[name].shape) != tuple(want[name].shape):
            problems.append(
                f"shape of {name}: is {_shape(got[name])}, expected {_shape(want[name])}"
            )
        if check_dtypes and np.dtype(got[name].dtype) != np.dtype(want[name].dtype):
            problems.append(
                f"dtype of {name}: is {got[name].dtype}, expected {np.dtype(want[name].dtype)}"
            )
    return problems


def require_same_trees(
    actual: Tree, expected: Tree, *, what: str, check_dtypes: bool = True
) -> None:
    """Raises `CheckpointError` with the whole list of `compare_trees`; `what` names the arrays in the message."""
    problems = compare_trees(actual, expected, check_dtypes=check_dtypes)
    if problems:
        lines = "\n  ".join(problems)
        raise CheckpointError(
            f"{what} does not fit the model ({len(problems)} differences):\n  {lines}"
        )


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _shape(leaf: Any) -> str:
    return f"[{', '.join(str(size) for size in leaf.shape)}]"


def _describe(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype)}{_shape(leaf)}"


# --- folders and disks ----------------------------------------------------------------------------------------------


def find_damage(folder: Path) -> list[str]:
    """What `damaged_files` finds. A folder without checksums is read unchecked, and the log says so."""
    problems = damaged_files(folder)
    if problems is None:
        _log.warning(
            "%s has no checksums: an earlier version wrote it. It is read unchecked.", folder
        )
    return problems or []


def listed(problems: list[str]) -> str:
    """The first problems in one line, and how many more there are."""
    more = len(problems) - _SHOWN_PROBLEMS
    return "; ".join(problems[:_SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")


def require_room(folder: Path, tree: Tree) -> None:
    """Raises `CheckpointError` before anything is written to a disk that has no room for the arrays of `tree`."""
    needed = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(tree)) + _ROOM
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"The disk of {folder} has {free / 1e6:.1f} MB free; a checkpoint needs {needed / 1e6:.1f} MB. {_FULL}"
        )


@contextlib.contextmanager
def writable(path: Path) -> Iterator[None]:
    """What a disk can do to a save (full, read-only, no permission) becomes one error that names the folder.

    TensorStore has no type for these: it raises `ValueError` with the words of the operating system.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if re.search("No space left|quota exceeded", str(error), re.I):
            raise CheckpointError(f"The disk of {path} is full. {_FULL}") from error
        found = re.search(
            "Permission denied|Read-only file system|Not a directory|File exists|File too large|Input/output error"
            "|Stale file handle",
            str(error),
        )
        if found:
            raise CheckpointError(
                f"{path} cannot be written: {found.group()}. Expected a folder that you may write to; choose another "
                "one or mend its permissions."
            ) from error
        raise


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Whatever Orbax raises for a damaged file becomes one error that names the folder.

    With checksums this is the second net; without them Orbax meets the damage, and raises anything (`Exception` itself,
    `NotImplementedError`, `AttributeError`).
    """
    try:
        yield
    except (
        Exception
    ) as error:  # see above: TensorStore and Orbax have no type of their own for damage
        reason = str(error).strip().partition("\n")[0] or repr(error)
        raise CheckpointError(
            f"The checkpoint {path} cannot be read; remove it and make it again. ({reason})"
        ) from error
