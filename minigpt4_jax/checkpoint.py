"""Arrays to disk and back, with Orbax: whole parameter trees.

For: `save_params` / `load_params` (one leaf per parameter in the dtype of its source; dtype and sharding are chosen
when reading) and `compare_trees`, the comparison that everything uses before it binds arrays to a model: Flax accepts
a leaf too many in silence, this does not.
Not for: the steps of a training run (`training/checkpoints.py`), other people's file formats (`convert/`), meshes and
rules (`sharding.py`), what a model is made of.

A folder carries checksums of its files (`checksums.py`), compared before anything is read: Orbax by itself returns
arrays with flipped bits.

The original pickles a state dict and loads it with `strict=False`; a wrong name there becomes a random weight.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from minigpt4_jax.checksums import damaged_files, write_checksums
from minigpt4_jax.config import UserError

Tree = Any
"""Nested dicts (or any pytree) whose leaves have `shape` and `dtype`: arrays, or `jax.ShapeDtypeStruct`."""

_MARKER = "_CHECKPOINT_METADATA"  # written by Orbax into every finished checkpoint folder
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


# --- parameter trees ----------------------------------------------------------------------------------------------


def save_params(path: str | os.PathLike[str], params: Tree) -> None:
    """Writes a parameter tree to the folder `path`, every leaf in its own dtype.

    The folder appears whole or not at all: it is written beside its place and renamed. A checkpoint that is
    already there is replaced; anything else that is there is an error.

    Args:
        path: the folder to create. Missing parents are made.
        params: nested dict of NumPy or JAX arrays.
    """
    target = Path(path).absolute()
    with writable(target):
        _save_params(target, params)


def _save_params(target: Path, params: Tree) -> None:
    if target.exists() and not (target / _MARKER).exists():
        raise CheckpointError(
            f"{target} exists and is not a checkpoint; choose another path or remove it."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    require_room(target.parent, params)
    _sweep_partials(target)
    partial = target.with_name(_partial_name(target, os.getpid()))
    partial.mkdir()
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(partial / "new", args=ocp.args.PyTreeSave(params))
        write_checksums(partial / "new")
        if target.exists():
            target.rename(partial / "replaced")
        (partial / "new").rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_params(
    path: str | os.PathLike[str],
    abstract: Tree,
    *,
    shardings: Tree | jax.sharding.Sharding | None = None,
    dtype: Any = None,
) -> Tree:
    """Reads the tree that `save_params` wrote, onto devices.

    Args:
        path: the checkpoint folder.
        abstract: tree of `jax.ShapeDtypeStruct` that says which leaves the model has. Names and shapes must agree
            in both directions. Its dtypes are not compared: a file keeps the dtype of its source.
        shardings: one sharding for all leaves or a tree of them; default: everything on the first device. Each
            device reads only its part.
        dtype: read floating-point leaves as this dtype. Default: as stored.

    Returns:
        A tree like `abstract` of `jax.Array`.

    Raises:
        CheckpointError: nothing there, damaged, or not this model's; every difference is listed.
        NewerFormat: a later version of this project wrote it.
    """
    target = Path(path).absolute()
    _require_marker(target)
    problems = find_damage(target)
    if problems:
        raise CheckpointError(
            f"The checkpoint {target} is damaged: {listed(problems)}. Remove it and make it again."
        )
    stored = stored_tree(target)
    require_same_trees(stored, abstract, what=f"The checkpoint {target}", check_dtypes=False)
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        one = shardings
        shardings = jax.tree.map(lambda _: one, abstract)
    # `stored` may order its keys otherwise, so dtypes are looked up by name.
    stored_dtypes = {name: leaf.dtype for name, leaf in leaf_names(stored).items()}
    targets = jax.tree_util.tree_map_with_path(
        lambda keys, leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape,
            _read_dtype(stored_dtypes[path_name(keys)], dtype),
            sharding=sharding,
        ),
        abstract,
        shardings,
    )
    with _checkpointer() as checkpointer, readable(target):
        return checkpointer.restore(
            target,
            args=ocp.args.PyTreeRestore(
                item=targets,
                restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
            ),
        )


def stored_tree(path: str | os.PathLike[str]) -> Tree:
    """What a checkpoint holds, without reading it: a tree of `jax.ShapeDtypeStruct` with the stored dtypes."""
    target = Path(path).absolute()
    _require_marker(target)
    with _checkpointer() as checkpointer, readable(target):
        metadata = checkpointer.metadata(target).item_metadata
        if metadata is None:
            raise ValueError("its metadata cannot be read")
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype), metadata.tree
        )


def _require_marker(target: Path) -> None:
    if not target.is_dir():
        raise CheckpointError(
            f"There is no checkpoint folder at {target}; convert the weights first."
        )
    if not (target / _MARKER).exists():
        raise CheckpointError(
            f"{target} is not a checkpoint (no {_MARKER} in it); it was not written by "
            "minigpt4_jax, or its writing was cut short. Make it again."
        )


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
            "Permission denied|Read-only file system|Not a directory|File exists", str(error)
        )
        if found:
            raise CheckpointError(
                f"{path} cannot be written: {found.group()}. Expected a folder that you may write to; choose another "
                "one or mend its permissions."
            ) from error
        raise


def _read_dtype(stored: Any, wanted: Any) -> Any:
    if wanted is None or not jax.numpy.issubdtype(stored, jax.numpy.floating):
        return stored
    return wanted


def _checkpointer() -> contextlib.closing[ocp.Checkpointer]:
    # zarr3 inside OCDBT without compression: weights hardly compress (float32 by 8 %), and reading 620 MB takes
    # 0.6 s this way against 1.2 s to 3 s with Orbax's default (two CPU cores).
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, use_compression=False)
    return contextlib.closing(ocp.Checkpointer(handler))


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


def _partial_name(target: Path, pid: int) -> str:
    return f".{target.name}.{socket.gethostname()}-{pid}.partial"


def _sweep_partials(target: Path) -> None:
    """Removes what killed processes of this machine left beside `target`."""
    for left in target.parent.glob(_partial_name(target, 0).replace("-0.", "-*.")):
        pid = left.name.removesuffix(".partial").rsplit("-", 1)[-1]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
