"""training/metrics.py: one line per step, each step once, whatever happened before."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.training.metrics import EVENTS, FILE, Metrics, read_metrics


def write(workdir: Path, steps: range, *, start_step: int, tensorboard: bool = False) -> None:
    with Metrics(
        workdir, start_step=start_step, max_steps=10, log_every=3, tensorboard=tensorboard
    ) as metrics:
        for step in steps:
            metrics.write(
                step,
                loss=1 / step,
                learning_rate=0.5,
                grad_norm=0.25,
                image_token_std=0.125,
                samples=4,
            )


def test_every_step_is_a_json_line_with_its_exact_loss(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), start_step=0)
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(i, 1 / i) for i in range(1, 6)]
    assert all(row["learning_rate"] == 0.5 and row["samples_per_s"] >= 0 for row in rows)
    assert all(row["grad_norm"] == 0.25 and row["image_token_std"] == 0.125 for row in rows)


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
    said = ("loss", "gradient 0.25", "image tokens 0.12", "samples/s", "min left")
    assert all(words in line for line in lines for words in said)


# --- TensorBoard ---


def read_events(workdir: Path) -> list[Any]:
    """All events in order: a file is a row of records, each with its length, two checksums and a protocol buffer."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for file in sorted((workdir / EVENTS).iterdir(), key=lambda file: file.stat().st_mtime_ns):
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            events.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return events


def test_events_hold_the_numbers_of_the_lines_and_a_resumed_run_hides_what_it_does_again(
    tmp_path: Path,
) -> None:
    write(tmp_path, range(1, 4), start_step=0, tensorboard=True)
    write(tmp_path, range(3, 5), start_step=2, tensorboard=True)
    events = read_events(tmp_path)
    losses = [
        (event.step, value.simple_value)
        for event in events
        for value in event.summary.value
        if value.tag == "train/loss"
    ]
    assert [step for step, _ in losses] == [1, 2, 3, 3, 4]
    assert [loss for _, loss in losses] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 3, 1 / 4])
    tags = {value.tag for event in events for value in event.summary.value}
    (row, *_) = read_metrics(tmp_path)
    assert tags == {f"train/{name}" for name in row if name != "step"}
    # TensorBoard drops what came before a START with this step or a later one.
    starts = [event.step for event in events if event.HasField("session_log")]
    assert starts == [1, 3]


def test_tensorboard_without_its_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'minigpt4_jax\[tensorboard\]'"):
        write(tmp_path, range(1, 2), start_step=0, tensorboard=True)
    write(tmp_path, range(1, 2), start_step=0)
    assert not (tmp_path / EVENTS).exists()
