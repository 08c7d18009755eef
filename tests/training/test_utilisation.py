"""training/utilisation.py: FLOPs over seconds over the peak, and no share of a peak that nobody knows."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.training.utilisation import make_speed


def test_utilisation_is_flops_over_seconds_over_the_peaks_of_all_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stage 1 of 7B on four H200: 989 TFLOP/s each."""
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H200")] * 4)
    speed = make_speed(PRESETS["vicuna-7b"].model, batch_size=256, vision=False, devices=4)
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    attention = (
        2 * 32 * 65 * 4096 * 1.5
    )  # scores and values, half of the square; backward has twice as many
    per_token = 4 * layers + 2 * attention
    rest = 4 * 32 * 32001 * 4096 + 4 * 32 * 768 * 4096  # 32 targets, 32 image tokens
    flops = 256 * (65 * per_token + rest)
    said = speed(65, 32, 0.5)
    assert said["tflops_per_device"] == pytest.approx(flops / 0.5 / 4 / 1e12, rel=1e-3)
    assert said["utilisation"] == pytest.approx(flops / 0.5 / 4 / 989e12, abs=1e-3)
    assert speed(65, 32, 1.0)["utilisation"] == pytest.approx(said["utilisation"] / 2, abs=1e-3)


def test_a_device_without_a_known_peak_has_no_utilisation(tiny_config: ModelConfig) -> None:
    said = make_speed(tiny_config, batch_size=4, vision=False, devices=1)(32, 8, 1.0)
    assert set(said) == {"tflops_per_device"}
    assert said["tflops_per_device"] > 0


def test_devices_that_the_mesh_leaves_out_count_nothing(tiny_config: ModelConfig) -> None:
    assert jax.device_count() > 2
    two, one = (
        make_speed(tiny_config, batch_size=400, vision=False, devices=n)(32, 8, 0.001)
        for n in (2, 1)
    )
    assert one["tflops_per_device"] == pytest.approx(2 * two["tflops_per_device"], rel=1e-2)


def test_the_image_tower_counts_where_it_runs(tiny_config: ModelConfig) -> None:
    cached, whole = (
        make_speed(tiny_config, batch_size=400, vision=v, devices=1)(32, 8, 0.001)[
            "tflops_per_device"
        ]
        for v in (False, True)
    )
    assert whole > cached * 1.1
