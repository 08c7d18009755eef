"""training/profiling.py: the steps that were asked for are recorded, and a recording is closed whatever happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.train_config import ProfileConfig
from minigpt4_jax.training.metrics import Metrics
from minigpt4_jax.training.profiling import FOLDER, ProfileWindow


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the profiler is told, in order."""
    told: list[Any] = []

    class Annotation:
        def __init__(self, name: str, *, step_num: int) -> None:
            self.step = step_num

        def __enter__(self) -> None:
            told.append(self.step)

        def __exit__(self, *exc: object) -> None:
            pass

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: told.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("stop"))
    monkeypatch.setattr(jax.profiler, "StepTraceAnnotation", Annotation)
    return told


def go(config: ProfileConfig, workdir: Path, steps: range) -> None:
    with ProfileWindow(config, workdir) as window:
        for step in steps:
            with window.step(step):
                pass
            window.done(step, ())


@pytest.mark.parametrize(
    ("start_step", "num_steps", "steps", "expected"),
    [
        (3, 2, range(1, 8), ["start", 3, 4, "stop"]),
        (0, 2, range(1, 8), ["start", 1, 2, "stop"]),
        (3, 3, range(4, 8), ["start", 4, 5, "stop"]),  # resumed inside the window
        (3, 2, range(6, 8), []),  # and behind it
        (3, 9, range(1, 5), ["start", 3, 4, "stop"]),  # the run ends first
        (3, 0, range(1, 8), []),
    ],
)
def test_the_window_holds_the_steps_that_were_asked_for(
    tmp_path: Path, recorded: list[Any], start_step: int, num_steps: int, steps: range, expected: Any
) -> None:  # fmt: skip
    go(ProfileConfig(start_step=start_step, num_steps=num_steps), tmp_path, steps)
    assert recorded == expected


def test_a_recording_is_closed_when_a_step_fails(tmp_path: Path, recorded: list[Any]) -> None:
    with (
        pytest.raises(RuntimeError, match="device"),
        ProfileWindow(ProfileConfig(start_step=1, num_steps=5), tmp_path) as window,
        window.step(1),
    ):
        raise RuntimeError("device")
    assert recorded == ["start", 1, "stop"]


def test_another_process_than_the_first_records_nothing(
    tmp_path: Path, recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    go(ProfileConfig(start_step=1, num_steps=5), tmp_path, range(1, 9))
    assert recorded == []


def test_a_run_leaves_its_recording_in_the_workdir(tmp_path: Path, run: Any) -> None:
    run(tmp_path, "optimizer.max_steps=3", "profile.start_step=2", "profile.num_steps=1")
    assert list((tmp_path / FOLDER).rglob("*.xplane.pb"))


def test_an_error_in_the_loop_closes_the_recording(
    tmp_path: Path, run: Any, recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **numbers: Any) -> None:
        raise UserError("the loss is no number")

    monkeypatch.setattr(Metrics, "write", fail)
    with pytest.raises(UserError, match="no number"):
        run(tmp_path, "profile.start_step=1", "profile.num_steps=9")
    assert recorded == ["start", 1, 2, "stop"]  # numbers are read one step late
