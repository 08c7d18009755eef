"""Kills a training run again and again, and looks whether it ends as if nothing had happened.

    python -m tools.kill_runs [--kills 10] [--seed 0] [--out FOLDER]

`train.py` runs in two processes on this machine (the Q-Former model at tiny size, gloo, two simulated devices each),
once to its end without interruption and once with kills: `kill -9` of one process of the two at a random moment, some
of them while a checkpoint is being written, and the run is started again. After each kill the newest checkpoint may not
be older than the one before it, nor may the run begin before the newest whole one; in the end every loss and every byte
of the projection must be those of the uninterrupted run.

Not for: what a stop, a full disk or a flipped bit does (`tests/training`), nor speed.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from tests.training.processes import (
    Run,
    last_step,
    losses,
    projections,
    saved_steps,
    start,
    write_inputs,
)

STEPS, SAVE_EVERY = 400, 10
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "kill_runs.json"


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when nothing was lost."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        result = kill_runs(Path(scratch), kills=args.kills, seed=args.seed)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "kills"}, indent=1))
    return 0 if result["bit_identical"] and not result["checkpoints_lost"] else 1


def kill_runs(folder: Path, *, kills: int, seed: int) -> dict[str, Any]:
    """What happened, JSON-like."""
    rng = random.Random(seed)
    overrides = [*write_inputs(folder), f"optimizer.max_steps={STEPS}", f"save_every={SAVE_EVERY}"]
    whole, killed = folder / "whole" / "run", folder / "killed" / "run"
    programs = folder / "programs"
    with start(whole, overrides, count=2, programs=programs) as run:
        require(run, [0, 0])
    rows, lost, before = [], 0, 0
    for number in range(kills):
        with start(killed, overrides, count=2, programs=programs) as run:
            row = kill(run, rng, after=before + rng.randrange(1, STEPS // (kills + 2)))
        newest = max(saved_steps(killed), default=0)
        lost += newest < before or row["resumed_at"] != before
        rows.append({"number": number + 1, **row, "checkpoint_after": newest})
        print(rows[-1], flush=True)
        before = newest
    with start(killed, overrides, count=2, programs=programs) as run:
        require(run, [0, 0])
    one, other = projections(whole, killed)
    return {
        "jax": jax.__version__,
        "steps": STEPS,
        "save_every": SAVE_EVERY,
        "seed": seed,
        "kills_in_a_row": len(rows),
        "during_a_save": sum(row["during_a_save"] for row in rows),
        "checkpoints_lost": lost,
        "most_steps_repeated": max(row["killed_at"] - row["checkpoint_after"] for row in rows),
        "bit_identical": losses(whole) == losses(killed) and one == other,
        "kills": rows,
    }


def kill(run: Run, rng: random.Random, *, after: int) -> dict[str, Any]:
    """Kills a process of the run when step `after` is done or, every third time, in the middle of the next save."""
    during = rng.random() < 1 / 3
    metrics = run.workdir / "metrics.jsonl"
    old = inode(metrics)
    run.wait_until(lambda: inode(metrics) != old, what="a beginning")  # rows of lost steps are gone
    resumed_at = last_step(run.workdir)
    run.wait_for_step(after)
    if during:
        folder = run.workdir / "checkpoints"
        run.wait_until(lambda: any(folder.glob("*.orbax-checkpoint-tmp*")), what="a save")
    else:
        time.sleep(rng.random() * 0.2)
    victim = rng.randrange(2)
    run.signal(victim, signal.SIGKILL)
    at = last_step(run.workdir)
    codes = run.codes()
    return {
        "process": victim,
        "killed_at": max(at, last_step(run.workdir)),
        "during_a_save": during,
        "resumed_at": resumed_at,
        "codes": codes,
    }


def inode(file: Path) -> int | None:
    """Another one when the file was replaced; None where there is none."""
    return file.stat().st_ino if file.exists() else None


def require(run: Run, codes: list[int]) -> None:
    """Fails with what the processes said, unless they end with these codes."""
    found = run.codes()
    if found != codes:
        raise SystemExit(f"ended with {found}; expected {codes}\n{run.everything()}")


if __name__ == "__main__":
    sys.exit(main())
