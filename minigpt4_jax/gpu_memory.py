"""How much of a GPU's memory JAX takes for arrays and programs.

For: commands and benchmarks, before their first array. Not for: asking how much there is (`training/placement.py`), and
not for libraries: the process belongs to whoever started it. Imports no JAX; changes nothing on CPUs and TPUs.

Differs from the original: PyTorch takes memory as it goes, JAX at the start, three quarters of it unless told.
"""

from __future__ import annotations

import os

from minigpt4_jax.hardware import GPU_SHARE

NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""What jaxlib reads, newer name first; it refuses to have both (`jaxlib/xla_client.py`)."""


def take_gpu_memory() -> None:
    """Has JAX take `GPU_SHARE` of each GPU, as `minigpt4 plan` counts, unless the environment says how much."""
    if not any(os.environ.get(name) for name in NAMES):
        os.environ[NAMES[0]] = str(GPU_SHARE)
