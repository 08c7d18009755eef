"""How fast the projection trains, measured on this machine: rows ordered by value, each kept as soon as it is there.

    python benchmarks/train.py --out benchmarks/results/train_cpu.json               # pip install -e ".[parity]"
    python benchmarks/train.py --device gpu --out benchmarks/results/train_gpu.json
    python benchmarks/page_tables.py                                                 # the tables of the pages

On a CPU: the smol model's step beside `transformers` in float32, in turns in one process, as ratios (`train_cpu.py`).
On a GPU: both stages at 7B and 13B shapes with random weights, as samples per second and as shares of what the card can
do (`train_gpu.py`), and `transformers` where it is installed (`train_torch.py`), each row in a process of its own; this
process then touches no device.

The same command again continues a file of the same code and hardware: rows that are there are not measured again. With
`--budget-s` (a GPU host may be lent by the minute) no row is begun that will not end in time. Not for: reading data
(`data_readers.py`, `input_pipeline.py`).
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
        rounds=9,
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
    import train_cpu

    return parts.run_in_turns(
        train_cpu.ROWS,
        train_cpu.load_params,
        versions=smol_torch.VERSIONS,
        args=args,
    )


def run_gpu(args: argparse.Namespace) -> list[str]:
    """Returns the rows that failed or were left out."""
    from train_gpu import ROWS

    return parts.run_parts(ROWS, args)


if __name__ == "__main__":
    main()
