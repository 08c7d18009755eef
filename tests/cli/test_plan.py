"""`minigpt4 plan` as it is typed: what it shows, its JSON, and one message for what cannot be planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigpt4_jax import cli, plan_compile
from minigpt4_jax.plan_compile import Compiled
from tests.cli.messages import assert_one_message

ROOT = Path(__file__).parents[2]
STAGE_1 = str(ROOT / "configs" / "train" / "minigpt4_stage1.yaml")


def test_a_plan_shows_whether_it_fits_and_how_long_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["plan", "--config", STAGE_1, "--gpu", "a100-80:4"]) == 0
    out = capsys.readouterr().out
    assert "vicuna-7b: 20,000 steps of 256 samples, 65 tokens each" in out
    assert "Mesh data=4 fsdp=1 tensor=1: the whole frozen weights fit" in out
    assert "hours" in out
    assert "It fits, by the estimate." in out


def test_a_plan_that_does_not_fit_says_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "vicuna-13b", "--tpu", "v5e:2x2"]) == 0
    out = capsys.readouterr().out
    assert "It does not fit. What to change" in out
    assert "remat=full" in out


def test_a_short_run_is_shown_in_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", "vicuna-7b", "--gpu", "h200:1", "optimizer.max_steps=400"]
    assert cli.main([*command, "optimizer.warmup_steps=0", "data.batch_size=12"]) == 0
    assert "minutes" in capsys.readouterr().out


def test_overrides_are_those_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--config", STAGE_1, "--tpu", "v5p:2x2x2", "--json"]
    assert cli.main([*command, "data.batch_size=512", "remat=full", "mesh.fsdp=8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run"]["batch_size"], found["run"]["remat"]) == (512, "full")
    assert found["mesh"]["fsdp"] == 8
    assert "compiled" not in found


def test_the_compilers_numbers_stand_beside_the_estimate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gib = 2**30
    programs = [
        Compiled(
            name="train step",
            seconds=61.2,
            argument_bytes=2 * gib,
            temp_bytes=3 * gib,
            output_bytes=gib,
            alias_bytes=gib // 2,
        ),
        Compiled(name="prefill", seconds=9.0, error="Used 17.0G of 15.75G hbm."),
    ]
    monkeypatch.setattr(plan_compile, "compile_plan", lambda *_: programs)
    command = ["plan", "--model", "vicuna-7b", "--tpu", "v5e:2x4", "--compile"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "5.50" in out
    assert "prefill: Used 17.0G of 15.75G hbm." in out
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["compiled"]
    assert [each["name"] for each in found] == ["train step", "prefill"]
    assert found[0]["total_bytes"] == 5.5 * gib


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "vicuna-7b", "--tpu", "v9:4x4"], "expected one of v4, v5e, v5p, v6e"),
        (["--model", "vicuna-7b", "--tpu", "v5e:4x3"], "There is no slice 'v5e:4x3'"),
        (["--model", "vicuna-7b", "--gpu", "h100"], "expected how many behind the colon"),
        (["--model", "vicuna-9b", "--tpu", "v5e:4x4"], "vicuna-9b"),
        (["--tpu", "v5e:4x4"], "Neither --config nor --model is given"),
        (["--model", "smol", "--gpu", "h100:1", "--compile"], "--compile is given without --tpu"),
        (["--model", "smol", "--gpu", "h100:1", "--length", "0"], "--length is 0"),
        (["--model", "smol", "--gpu", "h100:1", "--utilisation", "50"], "--utilisation is 50.0"),
        (["--model", "smol", "--gpu", "h100:1", "data.batchsize=3"], "Did you mean"),
        (
            ["--model", "smol", "--gpu", "h100:8", "mesh.data=3"],
            "expected sizes whose product is 8",
        ),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_message(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_one_message(["plan", *arguments], said, capsys)
