"""Damages the newest checkpoint of a tiny run, one place at a time, and looks what a resumed run does.

    python -m tools.flip_bits [--flips 100] [--seed 0] [--out benchmarks/results/flip_bits.json]

A run of three saved steps (a projection and its AdamW, as the step loop saves them) is copied for every trial, one
thing in the copy's newest step is changed, and `TrainCheckpoints` restores. The changes: single bits at random places,
every bit of every file being as likely; each file cut at a random place; each file removed; each item's folder removed.
Good is: the damage is said, the step is set aside with all its files, and the step before is restored bit for bit.

Not for: faults of the disk while a step is written (`tests/training/test_saving.py`, `tools/full_disk.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

from minigpt4_jax.config import UserError
from minigpt4_jax.train_config import OptimizerConfig
from minigpt4_jax.training.checkpoints import TrainCheckpoints
from minigpt4_jax.training.optimizer import make_optimizer
from minigpt4_jax.training.state import TrainState, init_state

STEPS = 3
SHAPE = (
    64,
    48,
)  # of the kernel: every file is a few kB, so that lists and array bytes are both hit


def make_run(workdir: Path, *, seed: int) -> list[TrainState]:
    """Saves `STEPS` steps under `workdir`; returns their states."""
    tx = make_optimizer(OptimizerConfig(warmup_steps=0, max_steps=STEPS))
    keys = jax.random.split(jax.random.key(seed), STEPS + 1)
    projection = {"kernel": jax.random.normal(keys[0], SHAPE), "bias": jnp.zeros(SHAPE[1])}
    state, states = init_state(projection, tx), []
    with TrainCheckpoints(workdir, max_to_keep=STEPS) as checkpoints:
        for step in range(1, STEPS + 1):
            noise = jax.random.normal(keys[step], SHAPE)
            grads = {"kernel": noise, "bias": noise[0]}
            updates, opt_state = tx.update(
                grads, state.opt_state, state.projection, num_targets=jnp.int32(1)
            )
            moved = optax.apply_updates(state.projection, updates)
            state = TrainState(step=jnp.int32(step), projection=moved, opt_state=opt_state)
            states.append(jax.tree.map(np.asarray, state))
            checkpoints.save(
                step, state, data_state={"next_index": step}, meta={"run": {"seed": seed}}
            )
    return states


def flip_bit(file: Path, bit: int) -> None:
    """Turns bit `bit` of a file, counted from its start."""
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def trials(step: Path, *, flips: int, seed: int) -> Iterator[dict[str, Any]]:
    """What is done to `step`, one after the other: `kind`, `file` below it, and where."""
    rng = random.Random(seed)
    sizes = {
        f.relative_to(step).as_posix(): f.stat().st_size for f in step.rglob("*") if f.is_file()
    }
    names = sorted(sizes)
    for name in rng.choices(names, [sizes[name] for name in names], k=flips):
        yield {"kind": "bit flipped", "file": name, "bit": rng.randrange(8 * sizes[name])}
    for name in names:
        if sizes[name]:
            yield {"kind": "file cut", "file": name, "bytes": rng.randrange(sizes[name])}
        yield {"kind": "file removed", "file": name}
    for item in sorted(f.name for f in step.iterdir() if f.is_dir()):
        yield {"kind": "item removed", "file": item}


def damage(step: Path, trial: dict[str, Any]) -> None:
    """Does what a trial says."""
    path = step / trial["file"]
    match trial["kind"]:
        case "bit flipped":
            flip_bit(path, trial["bit"])
        case "file cut":
            path.write_bytes(path.read_bytes()[: trial["bytes"]])
        case "file removed":
            path.unlink()
        case _:
            shutil.rmtree(path)


def outcome(workdir: Path, states: list[TrainState]) -> str:
    """What a resumed run does: `set aside`, `refused` (an error, nothing restored), or what went wrong."""
    before = sorted(f.name for f in (workdir / "checkpoints" / str(STEPS)).rglob("*"))
    said = io.StringIO()
    try:
        with (
            contextlib.redirect_stdout(said),
            TrainCheckpoints(workdir, max_to_keep=STEPS) as found,
        ):
            restored = found.restore_latest(
                jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), states[0])
            )
    except UserError:
        return "refused"
    if restored is None or restored.step != STEPS - 1:
        return f"MISSED: restored {restored and restored.step}"
    kept = workdir / "checkpoints" / f"{STEPS}.corrupt"
    if f"{STEPS} is damaged: " not in said.getvalue():
        return "MISSED: not said"
    if not kept.is_dir() or sorted(f.name for f in kept.rglob("*")) != before:
        return "MISSED: files of the damaged step are gone"
    for one, other in zip(
        jax.tree.leaves(restored.state), jax.tree.leaves(states[STEPS - 2]), strict=True
    ):
        if np.asarray(one).tobytes() != other.tobytes():
            return "MISSED: the step before came back changed"
    return "set aside"


def run_trials(*, flips: int, seed: int) -> list[dict[str, Any]]:
    """Every trial with its `outcome`."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        states = make_run(whole, seed=seed)
        step = whole / "checkpoints" / str(STEPS)
        for trial in track(list(trials(step, flips=flips, seed=seed)), transient=True):
            copy = Path(folder) / "copy"
            shutil.copytree(whole, copy)
            damage(copy / "checkpoints" / str(STEPS), trial)
            rows.append({**trial, "outcome": outcome(copy, states)})
            shutil.rmtree(copy)
    return rows


def count(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """By kind of damage, how often each outcome came."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        by_outcome = counts.setdefault(row["kind"], {})
        by_outcome[row["outcome"]] = by_outcome.get(row["outcome"], 0) + 1
    return counts


def main() -> None:
    """Prints the counts and, if asked, writes every trial."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--flips", type=int, default=100, help="single bits to flip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write all trials there, as JSON")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    rows = run_trials(flips=arguments.flips, seed=arguments.seed)
    counts = count(rows)
    for kind, by_outcome in counts.items():
        print(f"{kind}: " + ", ".join(f"{number} {name}" for name, number in by_outcome.items()))
    if arguments.out:
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        head = json.dumps({"seed": arguments.seed, "counts": counts}, indent=1)
        arguments.out.write_text(f'{head[:-2]},\n "trials": [\n{lines}\n ]\n}}\n')


if __name__ == "__main__":
    main()
