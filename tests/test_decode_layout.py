"""benchmarks/decode_layout.py: a scan over stacked blocks computes what the unrolled ones do, at tiny size."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.models.layout import DECODE
from tests.benchmark_scripts import load_script

measuring = load_script("measuring")
layout = load_script("decode_layout")
full_size = load_script("full_size")


@pytest.fixture(scope="module")
def params(tiny_config: ModelConfig) -> Any:
    abstract = full_size.abstract_params_in(tiny_config, DECODE, "float32")
    return full_size.random_params({"llama": abstract["llama"]})


@pytest.mark.parametrize("batch", [1, 3])
def test_a_row_runs_and_its_sides_agree(tiny_config: ModelConfig, params: Any, batch: int) -> None:
    row = layout.layout_row(tiny_config, params, batch, dtype="float32", places=32, steps=4)
    assert row.difference < 1e-5
    found = measuring.measure(row, 1)
    assert set(found["ms"]) == {"ours", "scan", "scan_slice"}
    assert json.loads(json.dumps(found)) == found


def test_both_forms_write_the_same_answers_over_many_steps(
    tiny_config: ModelConfig, params: Any
) -> None:
    # Through the cache: a token written to another layer or place would change what later steps read.
    sides = layout.make_sides(tiny_config, params, 2, dtype="float32", places=32)
    logits = {name: np.asarray(side.steps(8, place=0)) for name, side in sides.items()}
    for name in ("scan", "scan_slice"):
        np.testing.assert_allclose(logits[name], logits["ours"], atol=1e-4)
