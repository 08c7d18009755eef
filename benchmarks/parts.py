"""How `inference.py` and `train.py` go through their rows: on a CPU in this process, on a GPU in parts.

Not for: what is measured. Imports no JAX: the process that starts the others must not touch the device.

A part is a process of its own: it has the card's memory for itself and may have XLA flags of its own; it prints a line
`ROW NAME {json}` as soon as a row is measured, so that nothing is lost when it is ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import measuring
from measuring import Results, Row

HERE = Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A row before it is measured."""

    part: str
    """Rows of one part that follow each other share a process."""
    seconds: float
    """With so much time left, or more, the row is begun."""
    script: str
    """Of benchmarks/: what measures it."""
    measure: Callable[[Any], dict[str, Any]] | None
    """Called with the process's host; None where the script has its own way."""
    xla_flags: str = ""


def main(
    description: str,
    *,
    rounds: int,
    on_cpu: Callable[[argparse.Namespace], list[str]],
    on_gpu: Callable[[argparse.Namespace], list[str]],
    arguments: Sequence[str] | None,
) -> None:
    """Reads the arguments and runs the rows that are missing; both calls return those that are missing still."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), help="default: gpu where nvidia-smi finds one"
    )
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names, or beginnings of names")
    parser.add_argument("--rounds", type=int, default=rounds, help="on a CPU")
    parser.add_argument("--sizes", choices=("full", "tiny"), default="full", help="on a GPU")
    parser.add_argument("--budget-s", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    device = args.device or ("gpu" if measuring.gpu_name() else "cpu")
    failed = on_gpu(args) if device == "gpu" else on_cpu(args)
    if failed:
        raise SystemExit(f"Not measured, see above: {', '.join(failed)}.")


def pick(rows: Sequence[str], only: Sequence[str] | None) -> list[str]:
    """The rows that were asked for, in their order. Ends the program where a name fits none."""
    strange = [name for name in only or () if not any(row.startswith(name) for row in rows)]
    if strange:
        raise SystemExit(
            f"There are no rows {', '.join(strange)}; expected some of {', '.join(rows)}."
        )
    return [row for row in rows if only is None or row.startswith(tuple(only))]


def run_in_turns(
    rows: Mapping[str, Callable[[Any], Row]],
    load: Callable[[], Any],
    *,
    versions: Mapping[str, str],
    args: argparse.Namespace,
) -> list[str]:
    """Both sides in this process, on `measuring.THREADS` threads. Returns the rows that no time was left for.

    Args:
        load: called once if any row is missing; what the rows are made from.
        versions: of the other side's libraries.
    """
    hardware = {**measuring.hardware(), "threads": measuring.THREADS, **versions}
    results = Results(args.out, {"hardware": hardware, "rounds": args.rounds})
    names = [name for name in pick(list(rows), args.only) if results.missing(name)]
    shared = load() if names else None
    end = time.monotonic() + args.budget_s
    for name in names:
        if time.monotonic() > end:
            break
        row = measuring.measure(rows[name](shared), args.rounds)
        print(measuring.one_line(name, row), flush=True)
        results.add(name, row, order=list(rows))
    return [name for name in names if results.missing(name)]


def run_parts(rows: Mapping[str, Spec], args: argparse.Namespace) -> list[str]:
    """Parts one after the other, each in a process of its own. Returns the rows that failed or were left out."""
    results = Results(args.out, {"hardware": measuring.hardware(), "sizes": args.sizes})
    names = [name for name in pick(list(rows), args.only) if results.missing(name)]
    end = time.monotonic() + args.budget_s
    for _, group in itertools.groupby(names, key=lambda name: rows[name].part):
        part = list(group)
        left = end - time.monotonic()
        if left < min(rows[name].seconds for name in part):
            continue
        script = HERE / rows[part[0]].script
        command = [sys.executable, str(script), "--rows", *part, "--sizes", args.sizes]
        if left < float("inf"):
            command += ["--budget-s", f"{left:.0f}"]
        flags = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), rows[part[0]].xla_flags]))
        for name, row in child_rows(command, {**os.environ, "XLA_FLAGS": flags}, limit_s=left):
            print(f"{name:24} {json.dumps(row)[:300]}", flush=True)
            results.add(name, row, order=list(rows))
    return [name for name in names if results.missing(name)]


def child_rows(
    command: Sequence[str], environment: dict[str, str], *, limit_s: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows that a process prints, as they come; what else it prints is passed on. Ended after `limit_s`."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    ending = threading.Timer(min(limit_s, threading.TIMEOUT_MAX), process.kill)
    ending.start()
    with process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("ROW "):
                    _, name, row = line.split(" ", 2)
                    yield name, json.loads(row)
                else:
                    print(line, end="", flush=True)
            if process.wait():
                print(f"{' '.join(command)} ended with code {process.returncode}.", flush=True)
        finally:
            ending.cancel()
            process.kill()


def measure_rows(
    rows: Mapping[str, Spec], names: Sequence[str], host: Any, *, budget_s: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows as they are measured. One that fails has an `error`; one for which no time is left is not there."""
    end = time.monotonic() + budget_s
    for name in names:
        spec = rows[name]
        if end - time.monotonic() < spec.seconds or spec.measure is None:
            print(f"{name}: left out, {end - time.monotonic():.0f} s are left.", flush=True)
            continue
        start = time.monotonic()
        try:
            row = spec.measure(host)
        except (
            Exception
        ) as error:  # out of memory, say: the rows behind it are measured all the same
            row = {"what": name, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        yield name, row | {"took_s": round(time.monotonic() - start, 1)}


def read_part_arguments(
    description: str, *, rows: Sequence[str] | None, sizes: Sequence[str]
) -> argparse.Namespace:
    """What `run_parts` starts a script with: `rows`, `sizes`, `budget_s`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", nargs="+", choices=rows, required=True, metavar="ROW")
    parser.add_argument("--sizes", choices=sizes, default="full")
    parser.add_argument("--budget-s", type=float, default=600)
    return parser.parse_args()


def print_row(name: str, row: Mapping[str, Any]) -> None:
    """As `child_rows` reads it."""
    print(f"ROW {name} {json.dumps(row)}", flush=True)
