"""benchmarks/train.py where it needs torch, at tiny size: `transformers` as on a GPU host."""

from __future__ import annotations

import json

import pytest
import torch

from tests.benchmark_scripts import load_script

load_script("full_size_torch")
train_torch = load_script("train_torch")
gpu = load_script("train_gpu")


@pytest.mark.parametrize("name", ["torch_stage1_7b_64", "torch_stage2_13b_12"])
def test_transformers_is_timed_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(train_torch, "REPEATS", 1)
    row = json.loads(json.dumps(train_torch.train_row(name, train_torch.SIZES["tiny"], steps=1)))
    rows = train_torch.SIZES["tiny"][name.split("_")[3]]
    assert row["samples_per_s"] == pytest.approx(1000 * rows / row["ms"], rel=1e-2)


def test_its_step_trains_the_projection() -> None:
    torch.manual_seed(0)
    step = train_torch.make_step(
        "tiny-qformer", dtype=torch.float32, device="cpu", rows=2, length=12, targets=4
    )
    losses = [float(step()) for _ in range(20)]
    assert losses[-1] < losses[0]


def test_both_sides_of_a_gpu_host_have_the_same_sizes() -> None:
    for name, sizes in train_torch.SIZES.items():
        ours = gpu.SIZES[name]
        assert {model: sizes[model] for model in ours.models} == ours.models
        assert {stage: sizes[stage] for stage in ours.stages} == ours.stages
        assert {batch: sizes[batch] for batch in ("64", "12")} == {
            batch: ours.batches[batch] for batch in ("64", "12")
        }
        assert str(sizes["dtype"]) == f"torch.{ours.dtype}"
        assert train_torch.STEPS[name] == ours.steps
