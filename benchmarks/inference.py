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
from collections.abc import Sequence

import measuring
import parts


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the rows that are missing."""
    parts.main(
        __doc__.split("\n\n")[0],
        rounds=measuring.ROUNDS,
        on_cpu=run_cpu,
        on_gpu=run_gpu,
        arguments=arguments,
    )


def run_cpu(args: argparse.Namespace) -> list[str]:
    """Returns the rows that no time was left for."""
    measuring.use_two_threads()
    smol_torch = measuring.import_torch_side("smol_torch")
    import jax

    jax.config.update("jax_platforms", "cpu")
    smol_torch.use_threads(measuring.THREADS)
    import inference_cpu
    from smol_work import load_work

    return parts.run_in_turns(
        inference_cpu.ROWS,
        lambda: inference_cpu.Bench(load_work()),
        versions=smol_torch.VERSIONS,
        args=args,
    )


def run_gpu(args: argparse.Namespace) -> list[str]:
    """Returns the rows that failed or were left out."""
    from inference_gpu import ROWS

    return parts.run_parts(ROWS, args)


if __name__ == "__main__":
    main()
