"""A few damaged checkpoints; `python -m tools.flip_bits` tries more, and its result is on docs/reliability.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigpt4_jax.training import quarantine
from tools import flip_bits

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    real = flip_bits.trials
    monkeypatch.setattr(
        flip_bits, "trials", lambda step, **kw: [t for t in real(step, **kw) if "bit" in t]
    )


def test_single_bit_flips_anywhere_in_a_checkpoint_are_found_and_the_step_before_is_restored() -> (
    None
):
    rows = flip_bits.run_trials(flips=10, seed=3)
    assert len(rows) == 10
    assert len({row["file"] for row in rows}) > 1
    assert {row["outcome"] for row in rows} == {"set aside"}


def test_the_tool_sees_what_it_looks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "find_damage", lambda folder: [])
    rows = flip_bits.run_trials(flips=3, seed=3)
    assert {row["outcome"] for row in rows} <= {"MISSED: restored 3", "MISSED: not said"} | {
        # what Orbax itself stumbles over
        "set aside"
    }
    assert any(row["outcome"].startswith("MISSED") for row in rows)


def test_the_committed_result_is_a_hundred_of_a_hundred_and_the_page_says_what_it_says() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "flip_bits.json").read_text())
    assert flip_bits.count(result["trials"]) == result["counts"]
    assert sum(result["counts"]["bit flipped"].values()) == 100
    page = (ROOT / "docs" / "reliability.md").read_text()
    for kind, outcomes in result["counts"].items():
        assert set(outcomes) <= {"set aside", "refused"}
        tried = sum(outcomes.values())
        assert f"| {kind} | {tried} | {tried} | 0 |" in page
