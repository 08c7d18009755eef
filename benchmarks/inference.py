"""How fast answers come, measured on this machine: rows ordered by value, each kept as soon as it is there.

    python benchmarks/inference.py --out benchmarks/results/inference_cpu.json      # pip install -e ".[parity]"
    python benchmarks/inference.py --device gpu --out benchmarks/results/inference_gpu.json
    python benchmarks/page_tables.py                                                     # the tables of the pages

On a CPU: the smol model beside `transformers` in float32, in turns in one process, as ratios (`inference_cpu.py`). On a
GPU: 7B and 13B shapes with random weights as shares of what the card can do, and `transformers` where it is installed
(`inference_gpu.py`, `full_size_torch.py`), each part in a process of its own; this process then touches no device.

The same command again continues a file of the same code and hardware: rows that are there are not measured again. With
`--budget-s` (a GPU host may be lent by the minute) no row is begun that will not end in time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import measuring
from measuring import THREADS, Results

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the rows that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), help="default: gpu where nvidia-smi finds one"
    )
    parser.add_argument("--only", nargs="+", metavar="ROW", help="names, or beginnings of names")
    parser.add_argument("--rounds", type=int, default=measuring.ROUNDS, help="on a CPU")
    parser.add_argument("--sizes", choices=("full", "tiny"), default="full", help="on a GPU")
    parser.add_argument("--budget-s", type=float, default=float("inf"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    device = args.device or ("gpu" if measuring.gpu_name() else "cpu")
    failed = run_gpu(args) if device == "gpu" else run_cpu(args)
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


def run_cpu(args: argparse.Namespace) -> list[str]:
    """Both sides in this process. Returns the rows that no time was left for."""
    measuring.use_two_threads()
    smol_torch = measuring.import_torch_side("smol_torch")
    import jax

    jax.config.update("jax_platforms", "cpu")
    smol_torch.use_threads(THREADS)
    import inference_cpu
    from smol_work import load_work

    hardware = {**measuring.hardware(), "threads": THREADS, **smol_torch.VERSIONS}
    results = Results(args.out, {"hardware": hardware, "rounds": args.rounds})
    names = [name for name in pick(list(inference_cpu.ROWS), args.only) if results.missing(name)]
    bench = inference_cpu.Bench(load_work()) if names else None
    end = time.monotonic() + args.budget_s
    for name in names:
        if time.monotonic() > end:
            break
        row = measuring.measure(inference_cpu.ROWS[name](bench), args.rounds)
        print(measuring.one_line(name, row), flush=True)
        results.add(name, row, order=list(inference_cpu.ROWS))
    return [name for name in names if results.missing(name)]


def run_gpu(args: argparse.Namespace) -> list[str]:
    """Parts one after the other, each in a process of its own. Returns the rows that failed or were left out."""
    from inference_gpu import ROWS

    results = Results(args.out, {"hardware": measuring.hardware(), "sizes": args.sizes})
    names = [name for name in pick(list(ROWS), args.only) if results.missing(name)]
    end = time.monotonic() + args.budget_s
    for _, group in itertools.groupby(names, key=lambda name: ROWS[name].part):
        part = list(group)
        left = end - time.monotonic()
        if left < min(ROWS[name].seconds for name in part):
            continue
        script = "inference_gpu.py" if ROWS[part[0]].measure else "full_size_torch.py"
        command = [sys.executable, str(HERE / script), "--rows", *part, "--sizes", args.sizes]
        if left < float("inf"):
            command += ["--budget-s", f"{left:.0f}"]
        flags = " ".join(filter(None, [os.environ.get("XLA_FLAGS"), ROWS[part[0]].xla_flags]))
        for name, row in child_rows(command, {**os.environ, "XLA_FLAGS": flags}, limit_s=left):
            print(f"{name:24} {json.dumps(row)[:300]}", flush=True)
            results.add(name, row, order=list(ROWS))
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


if __name__ == "__main__":
    main()
