"""What the benchmarks share: taking turns, medians, ratios, the hardware, and a file that keeps every finished row.

For: `inference.py`, `train.py`, `decode_layout.py`. Not for: what is measured, and nothing of the package: this file
imports NumPy and the standard library only, so that every script can use it on every machine.

Timings are only ever compared within one run: two sides take turns, round after round, on the same machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
THREADS = 2
TOLERANCE = 1e-3
"""Largest difference between the sides, over the largest value, with which a row is timed: float32, 30 layers deep."""
ROUNDS = 7
"""Rounds of a row; never fewer than five are called a median."""

Timed = Callable[[], float]
"""Runs a side once; returns the seconds of its timed part."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison."""

    what: str
    units: int
    """Pictures, tokens or steps in one call; times are reported for one of them."""
    difference: float
    """Largest difference between the sides over the largest value, as found before timing."""
    ours: Timed
    theirs: dict[str, Timed]
    """By variant; the fastest one counts."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What else belongs into the row: sizes, settings, answers."""
    round_s: float = 1.0
    """How long a side is called in its turn, in seconds; once at least."""
    untimed: int = 1
    """Calls before a side's turn: the other side has emptied the caches."""


def whole_call(call: Callable[[], Any]) -> Timed:
    """Times all of `call`."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timed


def require_agreement(
    what: str, found: Any, expected: Any, *, tolerance: float = TOLERANCE
) -> float:
    """The largest difference over the largest expected value. Ends the program where it is more than the tolerance."""
    wide = np.asarray(expected, np.float64)
    difference = float(np.abs(np.asarray(found) - wide).max() / np.abs(wide).max())
    if not difference <= tolerance:
        raise SystemExit(
            f"{what}: the sides differ by {difference:.2e} of the largest value; expected at most {tolerance}. Nothing "
            "was timed: first find out which side is wrong."
        )
    return difference


def until_stop(ids: Sequence[int], stop_tokens: Collection[int]) -> list[int]:
    """An answer without the stop token and what stands behind it."""
    return list(itertools.takewhile(lambda token: token not in stop_tokens, ids))


def measure(row: Row, rounds: int) -> dict[str, Any]:
    """Runs the sides in turns; the order changes every round. Returns the row of the JSON (see `summary`)."""
    sides = {"ours": row.ours, **row.theirs}
    medians: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in names:
            for _ in range(row.untimed):
                sides[name]()
            samples: list[float] = []
            end = time.perf_counter() + row.round_s
            while not samples or time.perf_counter() < end:
                samples.append(sides[name]())
            medians[name].append(1000 * statistics.median(samples) / row.units)
    return summary(medians) | {
        "what": row.what,
        "rounds": rounds,
        "difference": float(f"{row.difference:.1e}"),
        "load_after": round(os.getloadavg()[0], 2),
        **row.facts,
    }


def summary(medians: Mapping[str, list[float]]) -> dict[str, Any]:
    """The row of the table from each side's milliseconds, one per round: `ours`, and the variants of the other side.

    `ratio` is the time of the other side's fastest variant over ours: above 1 we are faster.
    """
    middle = {name: statistics.median(values) for name, values in medians.items()}
    best = min((name for name in middle if name != "ours"), key=middle.__getitem__)
    ratios = [t / o for o, t in zip(medians["ours"], medians[best], strict=True)]
    return {
        "ratio": round(middle[best] / middle["ours"], 3),
        "ratio_of_rounds": [round(min(ratios), 3), round(max(ratios), 3)],
        "best_variant": best,
        "ms": {name: round(value, 3) for name, value in middle.items()},
        "ms_of_rounds": {
            name: [round(min(values), 3), round(max(values), 3)] for name, values in medians.items()
        },
    }


def hardware() -> dict[str, Any]:
    """What the numbers are measured on. The load is of the moment; all else stays the same from run to run."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        **({"gpu": gpu} if (gpu := gpu_name()) else {}),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }


def gpu_name() -> str:
    """Name, memory and driver of the first GPU, as nvidia-smi says them; empty without one. Starts no JAX."""
    if not shutil.which("nvidia-smi"):
        return ""
    asked = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True)
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else ""


def use_two_threads() -> None:
    """Pins the process to two cores, before JAX sizes its pool by them, so that both sides have the same ones."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    os.environ["NPROC"] = str(THREADS)


def import_torch_side(name: str) -> Any:
    """A neighbour that needs torch and transformers. Ends the program where they are not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise SystemExit(
            f'{error.name} is not installed; expected torch and transformers. Run pip install -e ".[parity]".'
        ) from error


def code_fingerprint() -> str:
    """The first 12 hex digits of the SHA-256 over the package and the benchmarks: what a kept row was measured with."""
    digest = hashlib.sha256()
    folders = (ROOT / "minigpt4_jax", ROOT / "benchmarks")
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


class Results:
    """The rows of one run, written as they come: an interrupted run keeps what it has.

    A file that is there already, of the same code, hardware and settings, is continued: its finished rows are not
    measured again. Any other file is replaced, which is said. Rows with an `error` are tried again.

    Args:
        path: of the JSON; None keeps the rows in memory only.
        head: what holds for all rows. `load_before` under `hardware` may differ between two runs that continue.
    """

    def __init__(self, path: Path | None, head: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self.head = {**head, "code": code_fingerprint()}
        if path is None or not path.exists():
            return
        before = json.loads(path.read_text())
        if _settled(before) == _settled(self.head):
            self.head, self.rows = {k: v for k, v in before.items() if k != "rows"}, before["rows"]
            print(f"{path}: continued, {len(self.rows)} rows are there.", flush=True)
        else:
            print(f"{path}: replaced; it is of other code, hardware or settings.", flush=True)

    def missing(self, name: str) -> bool:
        """Whether the row is still to be measured."""
        return "error" in self.rows.get(name, {"error": ""})

    def add(self, name: str, row: dict[str, Any], *, order: list[str]) -> None:
        """Keeps a row and writes the file, its rows in `order` (the most valuable first)."""
        rows = self.rows | {name: row}
        self.rows = {key: rows[key] for key in sorted(rows, key=order.index)}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps({**self.head, "rows": self.rows}, indent=1) + "\n")
        os.replace(beside, self.path)


def _settled(head: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs must share so that one continues the other."""
    settled = {key: value for key, value in head.items() if key != "rows"}
    settled["hardware"] = {k: v for k, v in head["hardware"].items() if k != "load_before"}
    return json.loads(json.dumps(settled))


def one_line(name: str, row: Mapping[str, Any]) -> str:
    """A comparison as a line for the terminal."""
    times = ", ".join(f"{side} {value:.2f}" for side, value in row["ms"].items())
    low, high = row["ratio_of_rounds"]
    return f"{name:17} {row['ratio']:5.2f} ({low:.2f} to {high:.2f})  {times}  [{row['what']}]"
