"""plan.py: a configuration and a slice become memory, time and a mesh; where it does not fit, a change that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.config_file import load
from minigpt4_jax.estimate import USABLE
from minigpt4_jax.hardware import parse_gpu, parse_tpu
from minigpt4_jax.plan import STAGE_1, Plan, make_plan, read_work, to_json, what_to_change
from minigpt4_jax.train_config import TrainConfig
from minigpt4_jax.training import placement

CONFIGS = Path(__file__).parents[1] / "configs" / "train"


def stage_1(*overrides: str, target: str = "v5p:2x2x2") -> Plan:
    config = load(TrainConfig, None, [*STAGE_1, "model=vicuna-7b", *overrides])
    parse = parse_tpu if target.startswith("v") else parse_gpu
    return make_plan(read_work(config), parse(target))


def test_the_published_first_stage_is_65_tokens_of_which_32_are_learnt() -> None:
    work = stage_1().work
    assert (work.length, work.targets, work.batch_size, work.steps) == (65, 32, 256, 20_000)
    assert work.notes == ()


def test_a_published_configuration_is_planned_before_its_model_is_converted() -> None:
    work = read_work(load(TrainConfig, CONFIGS / "minigpt4_stage1.yaml"))
    assert (work.name, work.length, work.batch_size, work.steps) == ("vicuna-7b", 65, 256, 20_000)
    assert work.vision
    assert "there is no folder 'models/vicuna-7b'" in work.notes[0]


def test_the_length_of_a_prompt_is_guessed_and_said() -> None:
    config = load(TrainConfig, CONFIGS / "minigpt4_stage2.yaml", ["data.length_buckets=[]"])
    work = read_work(config)
    assert work.length == 64 + 32 + 160  # 231 with the published tokenizer
    assert "--length says better" in work.notes[-1]
    said = read_work(config, length=231, targets=100)
    assert (said.length, said.targets, len(said.notes)) == (231, 100, 1)


@pytest.mark.parametrize("name", ["minigpt4_stage1", "minigpt4_stage2", "smol_stage1"])
@pytest.mark.parametrize("overrides", [(), ("data.length_buckets=[48,96,512]",)])
def test_training_takes_a_sample_to_be_as_long_as_plan_does(
    name: str, overrides: tuple[str, ...]
) -> None:
    config = load(TrainConfig, CONFIGS / f"{name}.yaml", overrides)
    work = read_work(config)
    assert placement._longest(config, work.model) == (work.length, work.targets)


def test_the_last_bucket_is_the_longest_sample() -> None:
    assert stage_1("data.length_buckets=[44,48,52,64]").work.length == 64


def test_a_model_that_is_nowhere_is_refused() -> None:
    with pytest.raises(UserError, match="no-such-model"):
        stage_1("model=models/no-such-model")


def test_the_hours_are_those_of_all_steps() -> None:
    plan = stage_1()
    assert plan.hours_floor == pytest.approx(20_000 * plan.time.floor / 3600)
    # 5.12 million samples of 1.704 TFLOP on 8 chips of 459 TFLOP/s.
    by_hand = 5.12e6 * 1.7043e12 / (8 * 459e12) / 3600
    assert plan.hours_at(1.0) == pytest.approx(by_hand, rel=0.01)
    assert plan.hours_at(0.5) == pytest.approx(2 * by_hand, rel=0.01)


def test_no_utilisation_makes_a_run_shorter_than_its_exchange() -> None:
    plan = stage_1("data.batch_size=16", "mesh.fsdp=8", target="v5e:2x4")
    assert plan.time.floor == plan.time.exchange
    assert plan.hours_at(0.5) == plan.hours_floor


def test_facts_about_one_h200_come_out() -> None:
    # 60 % of 790 TFLOP/s were counted to give 212 samples/s (7B) and 123 (13B) at 65 tokens with pictures.
    for model, rate in (("vicuna-7b", 212), ("vicuna-13b", 123)):
        plan = stage_1(f"model={model}", "cache_features=false", target="h200:1")
        assert plan.fits
        hours = plan.hours_at(0.6 * 790 / 989)
        assert 5.12e6 / hours / 3600 == pytest.approx(rate, rel=0.015)


def test_what_fits_needs_no_change() -> None:
    plan = stage_1()
    assert plan.fits
    assert what_to_change(plan) == []


def tried(plan: Plan) -> list[tuple[str, bool]]:
    return [(change.what, change.plan.fits) for change in what_to_change(plan)]


def test_the_first_change_that_fits_ends_the_list() -> None:
    plan = stage_1("model=vicuna-13b", target="v5e:2x2")
    assert not plan.fits
    found = tried(plan)
    assert found[-1] == ("remat=full", True)
    assert [fits for _, fits in found[:-1]] == [False] * (len(found) - 1)


def test_a_smaller_batch_keeps_the_samples_of_an_update_and_of_the_run() -> None:
    plan = stage_1(
        "model=vicuna-13b",
        "data.batch_size=4096",
        "optimizer.iters_per_epoch=500",
        target="v5e:2x4",
    )
    changes = what_to_change(plan)
    last = changes[-1].plan
    assert last.fits
    assert "optimizer.accum_grad_iters" in changes[-1].what
    assert last.work.batch_size * last.work.accumulate == 4096
    assert last.work.batch_size * last.work.steps == 4096 * 20_000
    # Whatever counts batches counts more of them: the learning rate goes as before.
    parts = last.work.accumulate
    assert last.work.schedule == {name: parts * n for name, n in plan.work.schedule.items()}
    # What the command is told is what was planned.
    settings = [word for word in changes[-1].what.split() if "=" in word]
    again = stage_1(
        "model=vicuna-13b",
        "data.batch_size=4096",
        "optimizer.iters_per_epoch=500",
        *settings,
        target="v5e:2x4",
    )
    assert again.memory == last.memory
    assert again.work.schedule == last.work.schedule


def test_more_chips_are_the_last_resort() -> None:
    plan = stage_1("model=vicuna-13b", target="v5e:1x1")
    changes = what_to_change(plan)
    assert changes[-1].plan.fits
    assert changes[-1].what == "--tpu v5e:2x2" or changes[-1].what.startswith("--tpu v5e:")
    assert changes[-1].plan.target.chips > 1
    assert all(
        change.plan.target.chips == 1 for change in changes[:-1] if "--tpu" not in change.what
    )


def test_a_mesh_that_was_configured_too_small_is_left_to_the_run_first() -> None:
    plan = stage_1("mesh.data=8", "mesh.fsdp=1", "mesh.tensor=1", target="v5e:2x4")
    assert not plan.fits
    assert tried(plan) == [("mesh.data=0 mesh.fsdp=0 mesh.tensor=0", True)]


def test_a_sentence_about_the_mesh_has_its_numbers() -> None:
    plan = stage_1(target="v6e:2x4")
    assert plan.mesh.reason.startswith("data=8 fsdp=1 tensor=1: the whole frozen weights fit, and ")
    assert f"of {USABLE * 32:.1f} GiB on each of 8 v6e" in plan.mesh.reason


def test_the_json_has_every_number_and_nothing_but_plain_values() -> None:
    found: dict[str, Any] = json.loads(json.dumps(to_json(stage_1(target="a100-80:4"))))
    assert (found["target"], found["chips"], found["hosts"]) == ("a100-80:4", 4, 1)
    assert found["mesh"]["data"] == 4
    need = found["bytes_per_device"]
    parts = ("weights", "activations", "layer", "optimizer", "logits", "vision")
    assert need["total"] == sum(need[part] for part in parts) - min(need["layer"], need["logits"])
    assert found["fits"] == (need["total"] <= need["limit"])
    flops = found["flops_per_step"]
    assert flops["hardware"] == pytest.approx(flops["model"] + flops["again"])
    seconds = found["seconds_per_step"]
    assert seconds["floor"] == max(seconds[name] for name in ("compute", "memory", "exchange"))
    assert found["hours"]["utilisation"] == 0.5
    assert found["changes"] == []
