"""A loss or gradient that is no number: the run stops, and says which samples were in the batch.

For: `require_finite`. Not for: keeping the update from being made (`step.py` does that on the device).
Differs from the original, which goes on with a projection of NaN until somebody looks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from minigpt4_jax.config import UserError
from minigpt4_jax.data.batches import Batch
from minigpt4_jax.data.datasets import Part
from minigpt4_jax.data.faults import SampleFault

_SHOWN = 8  # samples in the message; the file has all


def require_finite(
    step: int,
    *,
    loss: float,
    grad_norm: float,
    batch: Batch,
    parts: Sequence[Part],
    workdir: Path,
) -> None:
    """Raises `UserError` that names the step and its samples, unless both numbers are finite.

    Writes `<workdir>/nonfinite_step_<step>_process_<i>.json` with every sample of this process's part of the batch.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    samples = name_samples(batch, parts)
    file = workdir / f"nonfinite_step_{step}_process_{jax.process_index()}.json"
    record = {
        "step": step,
        "loss": str(loss),
        "grad_norm": str(grad_norm),
        "samples": samples,
    }
    try:
        file.write_text(json.dumps(record, indent=1) + "\n")
        written = f"all {len(samples)} are in {file}"
    except OSError as error:
        written = f"{file} with all {len(samples)} could not be written: {error.strerror}"
    shown = ", ".join(
        f"{s['source']}[{s['index']}]" + (f" ({s['name']})" if s["name"] else "")
        for s in samples[:_SHOWN]
    )
    raise UserError(
        f"The loss of step {step} is {loss} and the length of its gradient {grad_norm}; expected numbers. The update "
        "was not made, and the last checkpoint is from before it. The samples of the batch: "
        f"{shown}{', ...' if len(samples) > _SHOWN else ''}; {written}. Mend these, or, where many steps end so: "
        "Lower optimizer.init_lr and start in a new workdir."
    )


def name_samples(batch: Batch, parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Source, index in the source and name (None where it cannot be read any more) of every row."""
    rows = []
    for number, index in zip(batch["source"], batch["sample_index"], strict=True):
        part = parts[int(number)]
        try:
            name = part.source[int(index)].name
        except SampleFault:
            name = None
        rows.append({"source": part.name, "index": int(index), "name": name})
    return rows
