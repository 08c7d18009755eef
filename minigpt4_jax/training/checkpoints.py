"""The checkpoints of a training run: what it needs to continue bit for bit, every few hundred steps.

For: `TrainCheckpoints`. Not for: whole parameter trees (`checkpoint.py`), what is in the state (`state.py`), when to
save and what to do when that fails (`saving.py`), which step is whole (`quarantine.py`).

Every step carries the SHA-256 of its files, written before the step gets its name and compared before it is read:
Orbax by itself returns arrays with flipped bits. A damaged step is set aside and the newest good one is restored.
Differs from the original, which keeps one pickle per epoch and loads it with `strict=False`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import jax
import orbax.checkpoint as ocp

from minigpt4_jax.checkpoint import (
    CheckpointError,
    Tree,
    readable,
    require_room,
    require_same_trees,
    writable,
)
from minigpt4_jax.checksums import add_late_checksums, write_checksums
from minigpt4_jax.config import UserError
from minigpt4_jax.exits import Stopped
from minigpt4_jax.training.quarantine import Damage, newest_whole_step, set_aside
from minigpt4_jax.training.together import from_first

_log = logging.getLogger(__name__)
_NO_STEP, _REFUSED = -1, -2
SAVE_S = 120
"""That a save may take in the background. When it fails in one of several processes, the others wait for that one until
then, and nothing else can be saved: so it is shorter than the grace after SIGTERM (180 s in deploy/). Orbax's own is 20
minutes; a checkpoint is a few tens of MB."""
LAST_SAVE_S = 10.0
"""That a save on its way gets when an error ends one of several processes: without the lost one it cannot end."""
LEFTOVERS_S = 5.0
"""That removing what a failed save left may take; whatever refuses longer is tried again before the next save."""
QUIET_LOOKS = 10
"""Looks, 0.05 s apart, at which what a failed save left must be gone: its threads may hear of the failure late."""
_T = TypeVar("_T")


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
        self._max_to_keep = max_to_keep
        self._saving: int | None = None
        self._damage: Damage = {}
        self._manager = self._make_manager()

    def _make_manager(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._max_to_keep,
                create=True,
                cleanup_tmp_directories=True,
                async_options=ocp.options.AsyncOptions(
                    timeout_secs=SAVE_S,
                    barrier_sync_fn=_meet_after_failures(),
                    # Called when all files are written and the step does not yet have its name.
                    post_finalization_callback=self._write_checksums,
                    # In the background, a folder that a full disk refuses is waited for, for five minutes.
                    create_directories_asynchronously=False,
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
        if error is not None and jax.process_count() > 1 and not isinstance(error, Stopped):
            # Closing waits for all processes, and the others need not be on their way here.
            self._let_finish(LAST_SAVE_S)
            return
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            _log.warning(
                "%s", failed
            )  # beside the error that ends the run, which must not be hidden

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
        if jax.process_index() == 0 and any(self._folder.glob("*.orbax-checkpoint-tmp*")):
            self._remove_leftovers()
        self._require_room(state)
        self._saving = step
        with writable(self._folder):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state),
                    data_state=ocp.args.JsonSave(data_state),
                    meta=ocp.args.JsonSave(meta),
                ),
            )

    def _require_room(self, state: Tree) -> None:
        """Process 0 looks for all: alone with an error it would leave the others waiting in the save."""
        problem: CheckpointError | None = None
        if jax.process_index() == 0:
            try:
                require_room(self._folder, state)
            except CheckpointError as error:
                problem = error
        if from_first(problem is not None):
            raise problem or CheckpointError(
                f"Process 0 found no room for a checkpoint in {self._folder}; its message says more."
            )

    def _write_checksums(self) -> None:
        if jax.process_index() == 0:
            (folder,) = self._folder.glob(f"{self._saving}.orbax-checkpoint-tmp*")
            write_checksums(folder, kind="sha256")

    def restore_latest(self, abstract: Tree) -> Restored | None:
        """The newest step that is whole, or None in a fresh run. Newer ones are set aside, and that is said.

        Args:
            abstract: tree of `jax.ShapeDtypeStruct` (with shardings, if any) like the saved `state`. Names, shapes and
                dtypes must agree: a resumed run continues exactly or not at all.

        Raises:
            CheckpointError: there are steps and none of them is whole, or the newest whole one is of another run.
                Nothing is set aside then.
            NewerFormat: a later version of this project wrote it.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        targets = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or device
            ),
            abstract,
        )
        restored = self._from_newest_whole(lambda step: self._restore(step, targets))
        if restored is not None:
            if jax.process_index() == 0:
                set_aside(self._folder, self._damage, good=restored.step)
            from_first(0)  # nobody looks before process 0 has renamed
            self._manager.reload()
        return restored

    def latest_meta(self) -> dict[str, Any] | None:
        """The `meta` of the newest step that is whole, read without its arrays; None in a fresh run.

        Raises the errors of `restore_latest`. Nothing is set aside: it may be another run's.
        """
        return self._from_newest_whole(self._meta)

    def _from_newest_whole(self, read: Callable[[int], _T]) -> _T | None:
        """What `read` makes of the newest step that it can read."""
        while (step := self._newest_whole_step()) is not None:
            try:
                return read(step)
            except _Unreadable as error:
                if jax.process_count() > 1:
                    raise  # the others may have read it
                self._damage[step] = [str(error)]
        return None

    def _newest_whole_step(self) -> int | None:
        """As process 0 finds it."""
        found, refused = _NO_STEP, None
        if jax.process_index() == 0:
            try:
                step = newest_whole_step(self._folder, self._damage)
                found = _NO_STEP if step is None else step
            except UserError as error:
                found, refused = _REFUSED, error
        found = from_first(found)
        if found == _REFUSED:
            raise refused or CheckpointError(
                f"Process 0 refuses the checkpoints in {self._folder}; its message says why."
            )
        return None if found == _NO_STEP else found

    def _restore(self, step: int, targets: Tree) -> Restored:
        where = self._folder / str(step)
        with _unreadable(where):
            stored = self._manager.item_metadata(step)["state"]
            if stored is None:
                raise ValueError("its metadata cannot be read")
        require_same_trees(stored.tree, targets, what=f"The training checkpoint {where}")
        with _unreadable(where):
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

    def _meta(self, step: int) -> dict[str, Any]:
        with _unreadable(self._folder / str(step)):
            found = self._manager.restore(
                step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
            )
        meta: dict[str, Any] = found["meta"]
        return meta

    def _let_finish(self, limit_s: float) -> None:
        """Gives a save that is on its way some time."""
        end_s = time.monotonic() + limit_s
        while self.busy and time.monotonic() < end_s:
            time.sleep(0.05)

    @property
    def busy(self) -> bool:
        """A save is on its way to the disk."""
        return bool(self._manager.is_saving_in_progress())

    def wait_until_finished(self) -> None:
        """Returns when every save that was started is on disk.

        Raises:
            CheckpointError: the disk is full or refuses. `discard_unfinished` before the next save.
            OSError: anything else that the system can say.
        """
        with writable(self._folder):
            self._manager.wait_until_finished()
        step, self._saving = self._saving, None
        if step is not None and jax.process_index() == 0:
            try:
                # Orbax wrote these behind the callback; a run killed before this line leaves them uncompared.
                add_late_checksums(self._folder / str(step))
            except OSError as error:  # the step is whole without them
                _log.warning(
                    "The checksums of step %d are without Orbax's own two: %s", step, error
                )

    def discard_unfinished(self) -> None:
        """After a failed save: removes what it left, and forgets that it was begun. Whole steps stay."""
        self._saving = None
        with contextlib.suppress(ValueError, OSError):  # what failed, once more
            self._manager.close()
        if jax.process_index() == 0:
            self._remove_leftovers()
        self._manager = self._make_manager()  # reads the folder anew

    def _remove_leftovers(self) -> None:
        """Removes what failed saves left. For when no save is on its way.

        Orbax reports the first file that failed while others of the same save are still being written, which fills a
        folder again that is being removed. So it is looked at until it was gone `QUIET_LOOKS` times in a row; what
        comes later still goes before the next save.
        """
        gone, end_s = 0, time.monotonic() + LEFTOVERS_S
        while gone < QUIET_LOOKS and time.monotonic() < end_s:
            left = list(self._folder.glob("*.orbax-checkpoint-tmp*"))
            for folder in left:
                shutil.rmtree(folder, ignore_errors=True)
            gone = 0 if left else gone + 1
            time.sleep(0.05)

    def close(self) -> None:
        """Waits for the saves and frees the background threads."""
        self.wait_until_finished()
        with writable(self._folder):
            self._manager.close()


def _meet_after_failures() -> Callable[..., None]:
    """Orbax's barrier, with more time where its processes meet behind a save.

    A process whose save failed is there at once, the others when their own time is over; with the same time for both,
    they miss each other by milliseconds, and the error of that hides the first one.
    """
    wait = ocp.multihost.get_barrier_sync_fn()

    def wait_longer(*, key: str, timeout_ms: int) -> None:
        wait(key=key, timeout_ms=2 * timeout_ms if "set_value" in key else timeout_ms)

    return wait_longer


class _Unreadable(CheckpointError):
    """Orbax cannot read the files, although no checksum speaks against them."""


@contextlib.contextmanager
def _unreadable(where: Path) -> Iterator[None]:
    try:
        with readable(where):
            yield
    except CheckpointError as error:
        raise _Unreadable(str(error)) from error
