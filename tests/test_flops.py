"""flops.py gives the counts that the published models are known by, per picture and in TFLOP."""

from __future__ import annotations

import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.flops import StepFlops, step_flops, vision_flops
from minigpt4_jax.presets import PRESETS

TERA = 1e12


def flops_of(name: str, *, vision: bool, targets: int, remat: str = "names") -> StepFlops:
    model = PRESETS[name].model
    return step_flops(model, batch_size=1, length=65, targets=targets, vision=vision, remat=remat)


@pytest.mark.parametrize(
    ("name", "with_pictures", "cached"), [("vicuna-7b", 2.25, 1.70), ("vicuna-13b", 3.88, 3.32)]
)
def test_a_sample_of_stage_1_costs_what_counting_by_hand_gives(
    name: str, with_pictures: float, cached: float
) -> None:
    # 2 FLOPs a parameter and token forward and 2 for the gradient of the input, and none for a weight's.
    assert flops_of(name, vision=True, targets=65).model / TERA == pytest.approx(
        with_pictures, abs=0.01
    )
    assert flops_of(name, vision=False, targets=15).model / TERA == pytest.approx(cached, abs=0.01)


def test_a_picture_costs_what_the_tower_and_the_qformer_are_known_to_cost() -> None:
    assert vision_flops(PRESETS["llama2-7b"].model) / TERA == pytest.approx(0.521, abs=5e-4)
    with_qformer = vision_flops(PRESETS["vicuna-7b"].model)
    assert with_qformer / TERA == pytest.approx(0.521 + 0.013, abs=1e-3)
    assert flops_of("vicuna-7b", vision=True, targets=65).vision == with_qformer


def test_full_recomputation_makes_the_layers_1_39_times_as_dear() -> None:
    # All of a layer again but its down projection, whose output no gradient asks for.
    names = flops_of("vicuna-7b", vision=False, targets=0, remat="names")
    full = flops_of("vicuna-7b", vision=False, targets=0, remat="full")
    assert full.model == names.model
    assert full.hardware / names.hardware == pytest.approx(1.39, abs=0.005)


def test_what_a_policy_keeps_is_not_computed_again() -> None:
    none, names = (
        flops_of("vicuna-7b", vision=False, targets=15, remat=remat) for remat in ("none", "names")
    )
    assert none.again < names.again < 0.01 * names.model


def test_a_step_costs_its_samples() -> None:
    model: ModelConfig = PRESETS["tiny-qformer"].model
    sizes = {"length": 9, "targets": 4, "vision": True, "remat": "full"}
    one = step_flops(model, batch_size=1, **sizes)  # type: ignore[arg-type] # mixed values
    many = step_flops(model, batch_size=7, **sizes)  # type: ignore[arg-type] # mixed values
    assert many.hardware == pytest.approx(7 * one.hardware)
