"""The image path against transformers' BLIP-2 and InstructBLIP, small, through the tables for Hugging Face's names.

`benchmarks/blip2_parity.py` is the same comparison at full size.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax.presets import PRESETS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "blip2_parity.py"
spec = importlib.util.spec_from_file_location("blip2_parity", SCRIPT)
assert spec is not None
assert spec.loader is not None
blip2: Any = importlib.util.module_from_spec(spec)
sys.modules["blip2_parity"] = blip2
spec.loader.exec_module(blip2)

TOLERANCE = 5e-6
"""Of the largest value of a stage: float32 over a few layers. Measured: below 1e-6."""


@pytest.mark.parametrize("kind", ["blip_2", "instructblip"])
def test_every_stage_equals_transformers(kind: str) -> None:
    found = blip2.compare(PRESETS["tiny-qformer"].model, kind=kind)
    print(kind, {name: f"{value:.1e}" for name, value in found.items()})
    assert set(found) == {"vit.blocks", "ln_vision", "qformer.layer", "features"}
    assert max(found.values()) < TOLERANCE


def test_a_difference_is_that_of_the_worst_layer() -> None:
    import numpy as np

    theirs = {"x": np.ones((2, 1, 3, 4)), "y": np.ones((1, 3, 4))}
    ours = {"x": theirs["x"].copy(), "y": theirs["y"]}
    theirs["x"][1] *= 10
    ours["x"] = theirs["x"].copy()
    ours["x"][0, 0, 2, 1] += 0.5
    assert blip2.differences(ours, theirs) == {"x": 0.5, "y": 0.0}
