"""The checkpoints of a training run: what it needs to continue bit for bit, every few hundred steps.

For: `TrainCheckpoints`. Not for: whole parameter trees (`checkpoint.py`), what is in the state (`state.py`), or when to
save (`loop.py`).

Every step carries checksums of its files, written before the step gets its name and compared before it is read: Orbax
by itself returns arrays with flipped bits. A damaged step is refused by name, with the newest good one and the way
back to it; nothing is continued from an older step unasked.
Differs from the original, which keeps one pickle per epoch and loads it with `strict=False`.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from minigpt4_jax.checkpoint import (
    CheckpointError,
    Tree,
    find_damage,
    listed,
    readable,
    require_room,
    require_same_trees,
    writable,
)
from minigpt4_jax.checksums import NewerFormat, damaged_files, write_checksums


class Restored(NamedTuple):
    """What `TrainCheckpoints.restore_latest` found."""

    step: int
    state: Tree
    data_state: dict[str, Any]
    meta: dict[str, Any]


class TrainCheckpoints:
    """The checkpoints of one run under `workdir/checkpoints`: the trained leaves, the optimizer, where the data is.

    Small on purpose: frozen weights are not in it. A step is visible only when it is written completely, checksums
    included, so a run that is killed while saving resumes from the step before. Use as a context manager, or call
    `close`.

    Args:
        workdir: the run's folder.
        max_to_keep: older steps are removed after each save.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, max_to_keep: int) -> None:
        self._folder = Path(workdir).absolute() / "checkpoints"
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=max_to_keep,
                create=True,
                cleanup_tmp_directories=True,
                # Called when all files are written and the step does not yet have its name.
                async_options=ocp.options.AsyncOptions(
                    post_finalization_callback=self._write_checksums
                ),
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
        self.wait_until_finished()  # one at a time: `_saving` is the one
        self._saving = step
        require_room(self._folder, state)
        with writable(self._folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    data_state=ocp.args.JsonSave(data_state),
                    meta=ocp.args.JsonSave(meta),
                ),
            )

    def _write_checksums(self) -> None:
        if jax.process_index() == 0:
            (folder,) = self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            write_checksums(folder)

    def restore_latest(self, abstract: Tree) -> Restored | None:
        """The newest complete step, or None in a fresh run.

        Args:
            abstract: tree of `jax.ShapeDtypeStruct` (with shardings, if any) like the saved `state`. Names, shapes and
                dtypes must agree: a resumed run continues exactly or not at all.

        Raises:
            CheckpointError: the step is damaged or of another run. No older one is taken in its place: the message
                names the newest good step and how to continue from it.
            NewerFormat: a later version of this project wrote it.
        """
        step = self._whole_latest_step()
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
        with readable(where):
            stored = self._manager.item_metadata(step)["state"]
            if stored is None:
                raise ValueError("its metadata cannot be read")
        require_same_trees(stored.tree, targets, what=f"The training checkpoint {where}")
        with readable(where):
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

    def latest_meta(self) -> dict[str, Any] | None:
        """The `meta` of the newest complete step, read without its arrays; None in a fresh run.

        Raises the errors of `restore_latest`.
        """
        step = self._whole_latest_step()
        if step is None:
            return None
        with readable(self._folder / str(step)):
            found = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )
        meta: dict[str, Any] = found["meta"]
        return meta

    def _whole_latest_step(self) -> int | None:
        """The newest complete step, its files compared with their checksums."""
        step = self.latest_step
        if step is None:
            return None
        where = self._folder / str(step)
        problems = find_damage(where)
        if problems:
            raise CheckpointError(
                f"The training checkpoint {where} is damaged: {listed(problems)}. {self._way_back(step)}"
            )
        return step

    def _way_back(self, damaged: int) -> str:
        """How to continue without the newest step: the newest older one whose files are as they were written."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            with contextlib.suppress(NewerFormat):
                if step < damaged and not damaged_files(self._folder / str(step)):
                    newer = sorted(s for s in self._manager.all_steps() if s > step)
                    folders = ", ".join(str(self._folder / str(s)) for s in newer)
                    return (
                        f"The newest good step is {step}. To continue from it, remove {folders} and run the command "
                        "again."
                    )
        return "There is no good older step. Start in a new workdir, or bring this folder back from a copy."

    def wait_until_finished(self) -> None:
        """Returns when every save that was started is on disk."""
        with writable(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the saves and frees the background threads."""
        with writable(self._folder):
            self._manager.wait_until_finished()
            self._manager.close()
