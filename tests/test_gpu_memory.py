"""gpu_memory.py: JAX takes the share of a GPU that plan counts with, unless the environment says another."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import jax
import pytest
from jaxlib import xla_client

from minigpt4_jax.cli_options import set_up_jax
from minigpt4_jax.config_file import load
from minigpt4_jax.estimate import USABLE
from minigpt4_jax.gpu_memory import NAMES, take_gpu_memory
from minigpt4_jax.hardware import GPU_SHARE, parse_gpu
from minigpt4_jax.plan import STAGE_1, make_plan, read_work
from minigpt4_jax.train_config import TrainConfig
from tests.benchmark_scripts import load_script


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # jaxlib takes an empty one as none; put back behind the test


def given() -> float:
    """What jaxlib would start a GPU with; raises where both names are set."""
    fraction: float = xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"]
    return fraction


def test_jax_gets_the_share_that_plan_counts_with() -> None:
    take_gpu_memory()
    take_gpu_memory()
    assert given() == GPU_SHARE
    target = parse_gpu("h200:1")
    work = read_work(load(TrainConfig, None, [*STAGE_1, "model=vicuna-13b"]))
    plan = make_plan(work, target)
    assert plan.limit_bytes == int(USABLE * int(given() * target.device.hbm_bytes))
    assert plan.fits  # 13B on one H200, which three quarters of it would not hold


@pytest.mark.parametrize("name", NAMES)
def test_who_says_another_share_gets_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "0.5")
    take_gpu_memory()
    assert given() == 0.5


def test_commands_say_it_before_the_first_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    set_up_jax()
    assert given() == GPU_SHARE


@pytest.mark.parametrize("name", ["train_gpu", "inference_gpu"])
def test_gpu_benchmarks_say_it_before_they_measure(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, found = load_script(name), []
    args = argparse.Namespace(rows=[], sizes="tiny", budget_s=0.0)
    monkeypatch.setattr(script.parts, "read_part_arguments", lambda *_, **__: args)
    monkeypatch.setattr(script.parts, "measure_rows", lambda *_, **__: found.append(given()) or [])
    if name == "inference_gpu":
        host = SimpleNamespace(ceilings={})
        monkeypatch.setattr(script, "Host", lambda _: found.append(given()) or host)
    script.main()
    assert set(found) == {GPU_SHARE}
