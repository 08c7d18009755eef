"""training/metrics.py: one line per step, each step once, whatever happened before; and what its numbers say."""

from __future__ import annotations

import errno
import json
import struct
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.training.account import Account
from minigpt4_jax.training.events import EVENTS, Events
from minigpt4_jax.training.metrics import (
    FILE,
    Metrics,
    StepSize,
    read_held_out,
    read_metrics,
    read_rows,
)
from tests.training.clock import Clock

SIZE = StepSize(samples=4, tokens=60, length=20, targets=8)


def open_metrics(
    workdir: Path, account: Account, *, start_step: int = 0, tensorboard: bool = False, speed: Any = None
) -> Metrics:  # fmt: skip
    return Metrics(
        workdir, account=account, start_step=start_step, max_steps=10, log_every=3,
        tensorboard=tensorboard, speed=speed,
    )  # fmt: skip


def write_step(metrics: Metrics, step: int, *, size: StepSize = SIZE) -> None:
    metrics.write(
        step, loss=1 / step, learning_rate=0.5, grad_norm=0.25, image_token_std=0.125, size=size
    )


def write(workdir: Path, steps: range, *, start_step: int, tensorboard: bool = False) -> None:
    with (
        Account(workdir) as account,
        open_metrics(workdir, account, start_step=start_step, tensorboard=tensorboard) as metrics,
    ):
        for step in steps:
            write_step(metrics, step)


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
    for file in sorted(
        (workdir / EVENTS).iterdir(), key=lambda file: (file.stat().st_mtime_ns, file.name)
    ):
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
    with pytest.raises(UserError, match=r"pip install 'minigpt4_jax\[train\]'"):
        write(tmp_path, range(1, 2), start_step=0, tensorboard=True)
    write(tmp_path, range(1, 2), start_step=0)
    assert not (tmp_path / EVENTS).exists()


def test_a_disk_without_room_ends_the_events_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboardX.event_file_writer import EventsWriter

    events = Events(tmp_path, start_step=0)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(EventsWriter, "write_event", full)
        for step in range(1, 30):
            events.scalar("train/loss", 1.0, step)
    events.close()
    assert capsys.readouterr().out.count("TensorBoard events end here (No space left") == 1


# --- what the numbers say ---


def test_rates_shares_and_time_left_follow_the_clock(tmp_path: Path) -> None:
    clock = Clock()
    with (
        Account(tmp_path, clock=clock) as account,
        open_metrics(tmp_path, account) as metrics,
    ):
        account.begin("step")
        for step in (1, 2):
            with account.spend("data_wait"):
                clock.pass_s(0.5)
            clock.pass_s(1.5)
            write_step(metrics, step, size=SIZE._replace(tokens=60 if step == 1 else 40))
            with account.spend("checkpoint"):  # not the step's time
                clock.pass_s(100)
    first, second = read_metrics(tmp_path)
    for row in (first, second):
        assert (row["step_s"], row["data_wait_s"], row["data_wait"]) == (2.0, 0.5, 0.25)
        assert row["samples_per_s"] == 2.0
    assert (first["tokens_per_s"], second["tokens_per_s"]) == (30.0, 25.0)
    assert (first["padding_efficiency"], second["padding_efficiency"]) == (60 / 80, 100 / 160)
    assert (first["time_left_s"], second["time_left_s"]) == (18.0, 16.0)
    assert (first["goodput"], second["goodput"]) == (0.75, round(3 / 104, 4))


def test_a_step_says_what_the_devices_did_in_its_time(tmp_path: Path) -> None:
    clock = Clock()

    def speed(length: int, targets: int, step_s: float) -> dict[str, float]:
        return {"utilisation": length * targets / step_s / 1000}

    with (
        Account(tmp_path, clock=clock) as account,
        open_metrics(tmp_path, account, speed=speed) as metrics,
    ):
        account.begin("step")
        clock.pass_s(2)
        write_step(metrics, 1)
    (row,) = read_metrics(tmp_path)
    assert row["utilisation"] == pytest.approx(20 * 8 / 2 / 1000)


def test_lines_of_looks_are_apart_and_counted_once(tmp_path: Path) -> None:
    with Account(tmp_path) as account:
        with open_metrics(tmp_path, account) as metrics:
            for step in (1, 2, 3):
                write_step(metrics, step)
                metrics.write_held_out(step, loss=step / 2, samples=5, tokens=9)
        with open_metrics(tmp_path, account, start_step=2) as metrics:
            assert metrics.looks == {1, 2}
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    looks = [{"step": s, "held_out_loss": s / 2, "samples": 5, "targets": 9} for s in (1, 2)]
    assert read_held_out(tmp_path) == looks
    assert len(read_rows(tmp_path)) == 4


def test_another_process_than_the_first_writes_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with (
        Account(tmp_path) as account,
        open_metrics(tmp_path, account, tensorboard=True) as metrics,
    ):
        for step in range(1, 7):
            write_step(metrics, step)
        metrics.write_held_out(6, loss=1.0, samples=5, tokens=9)
        assert metrics.looks == {6}
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_lines_wait_while_the_disk_is_full_and_none_is_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full:
        """A disk with room for `room` bytes."""

        def __init__(self, file: Any) -> None:
            self.file, self.room = file, 10

        def write(self, data: bytes) -> int:
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written: int = self.file.write(data[: self.room])
            self.room -= written
            return written

        def close(self) -> None:
            self.file.close()

    with Account(tmp_path) as account, open_metrics(tmp_path, account) as metrics:
        disk = metrics._file = Full(metrics._file)
        write_step(metrics, 1)
        write_step(metrics, 2)
        assert (tmp_path / FILE).stat().st_size == 10
        disk.room = 10_000
        write_step(metrics, 3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert capsys.readouterr().out.count("The disk is full") == 1
