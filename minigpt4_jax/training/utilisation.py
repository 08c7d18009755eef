"""Model-FLOP utilisation: what a step had to compute, over what the devices could have computed meanwhile.

For: the numbers of `metrics.jsonl`. Not for: counting (`flops.py`), peaks (`hardware.py`).

Counted are the operations of the model itself, activations only: frozen weights have no gradient, and what a remat
policy computes again counts nothing. So the number compares settings, and runs of other code that count alike.
"""

from __future__ import annotations

import functools

import jax

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.flops import step_flops
from minigpt4_jax.hardware import find_device
from minigpt4_jax.training.metrics import Speed


def make_speed(model: ModelConfig, *, batch_size: int, vision: bool, devices: int) -> Speed:
    """What a step of (length, targets, seconds) says of this process's kind of device.

    Args:
        batch_size: rows over all processes.
        vision: the image tower runs in the step (no feature cache).
        devices: of the mesh, which may be fewer than there are.

    Returns:
        A function to `tflops_per_device` (1e12 operations a second) and, where the table of `hardware.py` has the
        device, `utilisation`: its share of the bfloat16 peak, 0 to 1.
    """
    device = find_device(jax.devices()[0].device_kind)
    peak = None if device is None else device.flops_per_s

    @functools.cache
    def flops(length: int, targets: int) -> float:
        return step_flops(
            model,
            batch_size=batch_size,
            length=length,
            targets=targets,
            vision=vision,
            remat="none",
        ).model

    def speed(length: int, targets: int, step_s: float) -> dict[str, float]:
        per_device = flops(length, targets) / step_s / devices
        found = {"tflops_per_device": round(per_device / 1e12, 6)}
        if peak is not None:
            found["utilisation"] = round(per_device / peak, 4)
        return found

    return speed
