"""training/metrics.py: one line per step, each step once, whatever happened before."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigpt4_jax.training.metrics import FILE, Metrics, read_metrics


def write(workdir: Path, steps: range, *, start_step: int) -> None:
    with Metrics(workdir, start_step=start_step, max_steps=10, log_every=3) as metrics:
        for step in steps:
            metrics.write(step, loss=1 / step, learning_rate=0.5, samples=4)


def test_every_step_is_a_json_line_with_its_exact_loss(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), start_step=0)
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(i, 1 / i) for i in range(1, 6)]
    assert all(row["learning_rate"] == 0.5 and row["samples_per_s"] >= 0 for row in rows)


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8), start_step=0)
    write(tmp_path, range(5, 10), start_step=4)
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, 10))


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_cut_off_by_a_crash_is_left_out(tmp_path: Path, cut: int) -> None:
    write(tmp_path, range(1, 4), start_step=0)
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-cut])
    assert [row["step"] for row in read_metrics(tmp_path)] == ([1, 2, 3] if cut == 1 else [1, 2])
    write(tmp_path, range(3, 5), start_step=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_new_run_has_no_lines(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_away_from_a_terminal_a_line_now_and_then_says_how_it_goes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, range(1, 8), start_step=0)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["3/10", "6/10"]
    assert all("loss" in line and "samples/s" in line and "min left" in line for line in lines)
