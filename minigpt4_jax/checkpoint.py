"""Arrays to disk and back, with Orbax: whole parameter trees, and the small checkpoints of a training run.

For: `save_params` / `load_params` (one leaf per parameter in the dtype of its source; dtype and sharding are chosen
when reading), `TrainCheckpoints` (what a run needs to continue bit for bit) and `compare_trees`, the comparison that
everything uses before it binds arrays to a model: Flax accepts a leaf too many in silence, this does not.
Not for: other people's file formats (`convert/`), meshes and rules (`sharding.py`), what a model is made of.

The original pickles a state dict and loads it with `strict=False`; a wrong name there becomes a random weight.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from minigpt4_jax.config import UserError

Tree = Any
"""Nested dicts (or any pytree) whose leaves have `shape` and `dtype`: arrays, or `jax.ShapeDtypeStruct`."""

_MARKER = "_CHECKPOINT_METADATA"  # written by Orbax into every finished checkpoint folder


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
    if target.exists() and not (target / _MARKER).exists():
        raise CheckpointError(
            f"{target} exists and is not a checkpoint; choose another path or remove it."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    _sweep_partials(target)
    partial = target.with_name(_partial_name(target, os.getpid()))
    partial.mkdir()
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(partial / "new", args=ocp.args.PyTreeSave(params))
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
        CheckpointError: nothing there, unreadable, or not this model's; every difference is listed.
    """
    target = Path(path).absolute()
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
    with _checkpointer() as checkpointer, _readable(target):
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
    if not target.is_dir():
        raise CheckpointError(f"There is no checkpoint folder at {target}.")
    if not (target / _MARKER).exists():
        raise CheckpointError(
            f"{target} is not a checkpoint (no {_MARKER} in it); it was not written by "
            "minigpt4_jax, or its writing was cut short. Make it again."
        )
    with _checkpointer() as checkpointer, _readable(target):
        metadata = checkpointer.metadata(target).item_metadata
        if metadata is None:
            raise ValueError("its metadata cannot be read")
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype), metadata.tree
        )


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
def _readable(path: Path) -> Iterator[None]:
    """Whatever Orbax raises for a damaged file becomes one error that names the folder."""
    try:
        yield
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read; remove it and make it again. ({error})"
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


# --- training runs ------------------------------------------------------------------------------------------------


class Restored(NamedTuple):
    """What `TrainCheckpoints.restore_latest` found."""

    step: int
    state: Tree
    data_state: dict[str, Any]
    meta: dict[str, Any]


class TrainCheckpoints:
    """The checkpoints of one run under `workdir/checkpoints`: the trained leaves, the optimizer, where the data is.

    Small on purpose: frozen weights are not in it. A step is visible only when it is written completely, so a run
    that is killed while saving resumes from the step before. Use as a context manager, or call `close`.

    Args:
        workdir: the run's folder.
        max_to_keep: older steps are removed after each save.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, max_to_keep: int) -> None:
        self._folder = Path(workdir).absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=max_to_keep, create=True, cleanup_tmp_directories=True
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True),
                "data_state": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> TrainCheckpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        step: int | None = self._manager.latest_step()
        return step

    def save(
        self, step: int, state: Tree, *, data_state: dict[str, Any], meta: dict[str, Any]
    ) -> None:
        """Copies `state` to the host, then writes in the background; `state` may be donated right afterwards.

        Args:
            step: number of updates done.
            state: pytree of arrays (projection, optimizer state, PRNG key data).
            data_state: JSON-serialisable position of the data iterator.
            meta: JSON-serialisable facts that a resumed run compares, such as its config.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state),
                data_state=ocp.args.JsonSave(data_state),
                meta=ocp.args.JsonSave(meta),
            ),
        )

    def latest_meta(self) -> dict[str, Any] | None:
        """The `meta` of the newest complete step, read without its arrays; None in a fresh run."""
        step = self.latest_step
        if step is None:
            return None
        with _readable(self._folder / str(step)):
            found = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )
        meta: dict[str, Any] = found["meta"]
        return meta

    def restore_latest(self, abstract: Tree) -> Restored | None:
        """The newest complete step, or None in a fresh run.

        Args:
            abstract: tree of `jax.ShapeDtypeStruct` (with shardings, if any) like the saved `state`. Names, shapes and
                dtypes must agree: a resumed run continues exactly or not at all.
        """
        step = self.latest_step
        if step is None:
            return None
        where = self._folder / str(step)
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        targets = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device
            ),
            abstract,
        )
        with _readable(where):
            stored = self._manager.item_metadata(step)["state"]
        require_same_trees(stored.tree, targets, what=f"The training checkpoint {where}")
        with _readable(where):
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        item=targets,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(targets),
                    ),
                    data_state=ocp.args.JsonRestore(),
                    meta=ocp.args.JsonRestore(),
                ),
            )
        return Restored(step, found["state"], found["data_state"], found["meta"])

    def wait_until_finished(self) -> None:
        """Returns when every save that was started is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the saves and frees the background threads."""
        self._manager.wait_until_finished()
        self._manager.close()
