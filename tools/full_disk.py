"""A step loop on a disk of a few MB that fills up and is freed again: what happens to its checkpoints.

    python -m tools.full_disk [--out benchmarks/results/full_disk.json]

Mounts a tmpfs of its own in a user namespace (`unshare`, util-linux; no root needed where the system allows it), runs a
loop that saves every fifth step, and has something else fill the disk: while a save is under way, behind the check that
there is room (TensorStore meets ENOSPC in the background), and before a save. Then the disk is freed, the loop goes
on, and at last it is filled for good.

Not for: the decisions one by one (`tests/training/test_saving.py`), other errors than a full disk.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from minigpt4_jax.config import UserError
from minigpt4_jax.training import checkpoints as checkpoints_module
from minigpt4_jax.training import saving
from minigpt4_jax.training.checkpoints import TrainCheckpoints
from minigpt4_jax.training.saving import Saver
from minigpt4_jax.training.state import TrainState, init_state

DISK_MB = 6
INSIDE = "MINIGPT4_FULL_DISK"
"""Set in the process that has the disk; holds its folder."""


def make_state(step: int) -> TrainState:
    """0.7 MB of noise, which Orbax cannot compress: kernel and two moments."""
    noise = np.random.default_rng(step).normal(size=(300, 200)).astype(np.float32)
    state = init_state({"kernel": jnp.asarray(noise), "bias": jnp.zeros(200)}, optax.adamw(1e-3))
    noisy = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(noise) if leaf.shape == noise.shape else leaf, state
    )
    return noisy._replace(step=jnp.int32(step))


class Loop:
    """Saves every fifth step; keeps what happened."""

    def __init__(self, disk: Path) -> None:
        self.disk, self.step = disk, 0
        self.checkpoints = TrainCheckpoints(disk, max_to_keep=2)
        self.saver = Saver(
            self.checkpoints,
            save_every=5,
            save_every_minutes=0.0,
            max_failed_saves=3,
            clock=lambda: self.step * 60.0,  # a minute a step
        )
        self.rows: list[dict[str, Any]] = []

    def take(self, steps: int) -> None:
        """Steps; each waits for the save that it started, so that the rows are the same every time."""
        for _ in range(steps):
            self.step += 1
            if self.saver.due(self.step):
                self.saver.save(self.step, make_state(self.step), data_state={}, meta={})
                while self.checkpoints.busy:
                    time.sleep(0.01)

    def note(self, what: str, said: str = "") -> None:
        names = sorted(f.name for f in (self.disk / "checkpoints").iterdir())
        free = os.statvfs(self.disk)
        self.rows.append(
            {
                "what": what,
                "step": self.step,
                "checkpoints": names,
                "free_mb": round(free.f_bavail * free.f_frsize / 1e6, 1),
                "said": said.replace(str(self.disk), "DISK"),
            }
        )

    def fill(self, *, leave: int = 0) -> None:
        """Another program takes all the room there is, but for so many bytes."""
        try:
            with (self.disk / "other").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        except OSError:
            os.truncate(self.disk / "other", max(0, (self.disk / "other").stat().st_size - leave))

    def free(self) -> None:
        (self.disk / "other").unlink()


def run(disk: Path) -> list[dict[str, Any]]:
    """The story; a row for each of its turns. Raises `AssertionError` where it ends otherwise."""
    said: list[str] = []
    saving._log.addFilter(lambda record: said.append(record.getMessage()) or False)  # type: ignore[func-returns-value]  # append says nothing
    real_room = checkpoints_module.require_room
    loop = Loop(disk)
    loop.take(11)
    loop.note("two saves")
    assert loop.rows[-1]["checkpoints"] == ["10", "5"]

    # Filled behind the check: what TensorStore meets is the disk itself.
    checkpoints_module.require_room = lambda folder, tree: loop.fill(leave=200_000)
    loop.take(5)
    assert "is full" in said[-1]
    loop.note("full behind the check, noticed one step later", said[-1])
    assert loop.rows[-1]["checkpoints"] == ["10", "5"], loop.rows[-1]
    checkpoints_module.require_room = real_room
    loop.take(1)
    loop.note("full before the next try", said[-1])
    assert "MB free" in said[-1]

    loop.free()
    loop.take(2)
    loop.note("freed")
    assert loop.rows[-1]["checkpoints"] == ["10", "19"], loop.rows[-1]
    loop.fill()
    try:
        loop.take(50)
        raise AssertionError("the run went on for ever")
    except UserError as error:
        loop.note("full for good: stopped", str(error))
    assert loop.rows[-1]["checkpoints"] == ["10", "19"]
    loop.checkpoints.close()
    with TrainCheckpoints(disk, max_to_keep=2) as checkpoints:
        found = checkpoints.restore_latest(jax.eval_shape(lambda: make_state(0)))
    assert found is not None
    assert found.step == 19
    for one, other in zip(
        jax.tree.leaves(found.state), jax.tree.leaves(make_state(19)), strict=True
    ):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    loop.note("started again on the full disk: the newest good step, bit for bit")
    return loop.rows


def main() -> None:
    """Mounts, runs and prints; with `--out` writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON")
    arguments = parser.parse_args()
    if INSIDE not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            mounted = f'mount -t tmpfs -o size={DISK_MB}m tmpfs "$0" && exec "$@"'
            command = [
                "unshare",
                "-rm",
                "sh",
                "-c",
                mounted,
                folder,
                sys.executable,
                "-m",
                "tools.full_disk",
            ]
            extra = ["--out", str(arguments.out)] if arguments.out else []
            sys.exit(
                subprocess.run([*command, *extra], env={**os.environ, INSIDE: folder}).returncode
            )
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    rows = run(Path(os.environ[INSIDE]))
    for row in rows:
        print(json.dumps(row))
    if arguments.out:
        arguments.out.write_text(json.dumps({"disk_mb": DISK_MB, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
