"""docs/plan.md: its numbers are those of benchmarks/results/plan.json, and these are what the package says today.

That the page shows what the file holds is in test_speed_table.py, with the other pages.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigpt4_jax import cli
from minigpt4_jax.hardware import DEVICES
from minigpt4_jax.plan_compile import PROGRAMS
from tests.benchmark_scripts import load_script

script = load_script("plan_table")
ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "plan.md").read_text()
ROWS = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text())["rows"]
COMPILED = [key for key in ROWS if key.endswith(" cached") and ROWS[key]["target"] in script.TPUS]


def test_the_file_holds_what_the_arithmetic_gives_today() -> None:
    found = {
        key: {name: row[name] for name in row if name not in ("compiled", "versions")}
        for key, row in ROWS.items()
    }
    expected = json.loads(json.dumps(script.estimates()))
    assert found == expected, (
        "run python benchmarks/plan_table.py --out benchmarks/results/plan.json"
    )


@pytest.mark.parametrize("key", COMPILED)
def test_the_estimate_of_a_train_step_is_within_two_hundredths_of_the_compilers(key: str) -> None:
    compiled = ROWS[key]["compiled"]
    assert [each["name"] for each in compiled] == list(PROGRAMS[: len(compiled)])
    assert [each["error"] for each in compiled] == [""] * len(compiled)
    guess = ROWS[key]["bytes_per_device"]["total"]
    assert guess == pytest.approx(compiled[0]["total_bytes"], rel=0.02)
    assert ROWS[key]["fits"]


def test_the_page_names_every_device_and_the_commands_that_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert all(f"`{name}`" in PAGE for name in DEVICES)
    commands = [
        line.removeprefix("$ ").split("&& ")[-1].split()
        for line in PAGE.splitlines()
        if "minigpt4 plan --" in line
    ]
    assert len(commands) == 4
    for command in commands:
        words = [str(ROOT / word) if word.startswith("configs/") else word for word in command[1:]]
        assert cli.main([word for word in words if word != "--compile"]) == 0
        assert "hours" in capsys.readouterr().out
