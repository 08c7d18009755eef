"""Compares a converted model with its sources: every tensor made again, every bit compared.

For: `verify_model`. Not for: comparing what models answer (`against_torch.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from convert.parts import OpenedModel
from convert.problems import ConversionError
from convert.rules import Array
from minigpt4_jax.checkpoint import CheckpointError
from minigpt4_jax.model_folder import ModelFolder

_SHOWN = 8


def verify_model(
    folder: ModelFolder, model: OpenedModel, progress: Callable[[str, int, int], None]
) -> tuple[int, int]:
    """Makes every parameter from the sources again and compares it with the folder's, one at a time.

    Returns:
        How many parameters were compared, and their bytes.

    Raises:
        CheckpointError: files that are damaged, parameters that are missing, too many or different.
        ConversionError: the sources have problems of their own.
    """
    folder.require_whole()
    problems = [problem for plan in model.plans.values() for problem in plan.problems]
    steps = [(plan, step) for plan in model.plans.values() for step in plan.steps]
    held = set(folder.names())
    expected = {step.path for _, step in steps}
    different = [] if folder.preset == model.preset else ["its manifest has other sizes"]
    different += [f"{name} is missing" for name in sorted(expected - held)]
    different += [f"{name} comes from no source" for name in sorted(held - expected)]
    size = 0
    for done, (plan, step) in enumerate(steps, start=1):
        value, found = plan.make(step)
        problems += found
        if value is not None and step.path in held:
            stored = folder.get(step.path)
            size += stored.nbytes
            if not _same_bits(stored, value):
                different.append(f"{step.path} differs from {', '.join(step.sources)}")
        progress("Comparing", done, len(steps))
    if problems:
        raise ConversionError("What the folder was made from", problems)
    if different:
        more = f" and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise CheckpointError(
            f"{folder.path} is not what its sources give: {'; '.join(different[:_SHOWN])}{more}. Convert it again."
        )
    return len(steps), size


def _same_bits(a: Array, b: Array) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = np.dtype(f"u{a.dtype.itemsize}")
    return bool(np.array_equal(a.view(bits), b.view(bits)))
