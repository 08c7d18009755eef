"""training/watchdog.py: all stacks when no step finishes, less and less often, and nothing else."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from minigpt4_jax.training import watchdog as module
from minigpt4_jax.training.watchdog import Watchdog

SILENCE = r"(?:No step has|Since step \d+ none has) finished for (\d+) s"
LONGEST_S = 60.0


@pytest.fixture(autouse=True)
def one_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 1.0)


def wait_for(path: Path, count: int) -> str:
    """The file, once so many reports are in it."""
    end = time.monotonic() + LONGEST_S
    while len(re.findall(SILENCE, text := path.read_text())) < count:
        assert time.monotonic() < end, f"no {count} reports in {LONGEST_S} s:\n{text}"
        time.sleep(0.01)
    return text


def stuck_here(release: threading.Event) -> None:
    release.wait()


HERE = "test_a_step_that_does_not_finish_prints_every_thread_with_the_step"


def test_a_step_that_does_not_finish_prints_every_thread_with_the_step(tmp_path: Path) -> None:
    release = threading.Event()
    other = threading.Thread(target=stuck_here, args=(release,))
    other.start()
    path = tmp_path / "log"
    with path.open("w") as file, Watchdog(0.05, file=file) as watchdog:
        watchdog.beat(7)
        text, count = "", 0
        # The first report may be read before its last line is written.
        while "in stuck_here" not in text or f"in {HERE}" not in text:
            count += 1
            text = wait_for(path, count)
    release.set()
    other.join()
    assert "Since step 7 none has finished for" in text
    assert "(watchdog_s=0.05)" in text


def test_reports_come_at_doubled_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times: list[float] = []
    real = Watchdog._print

    def note(self: Watchdog) -> None:
        times.append(time.monotonic() - self._since_s)
        real(self)

    monkeypatch.setattr(Watchdog, "_print", note)
    path = tmp_path / "log"
    with path.open("w") as file, Watchdog(0.05, file=file):
        wait_for(path, 3)
    for at, least in zip(times, (0.05, 0.15, 0.35), strict=False):
        assert at >= least
    assert "No step has finished" in path.read_text()


def test_steps_that_finish_keep_it_quiet_and_it_ends_with_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    path = tmp_path / "log"
    with path.open("w") as file, Watchdog(10.0, file=file) as watchdog:
        for step in range(10):
            now += 9.0  # never 10 s without a step, 90 s in all
            watchdog.beat(step)
            time.sleep(0.005)  # time to look, for the other thread
    assert path.read_text() == ""
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_zero_means_never(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as file, Watchdog(0.0, file=file):
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_the_first_step_and_what_is_announced_get_more_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 1e6)
    path = tmp_path / "log"
    with path.open("w") as file, Watchdog(0.01, file=file) as watchdog:
        time.sleep(0.1)
        with watchdog.patient():
            watchdog.beat(1)  # a beat inside: the next step has the plain limit
            wait_for(path, 1)
        watchdog.beat(2)
        with watchdog.patient():
            seen = len(re.findall(SILENCE, path.read_text()))
            time.sleep(0.1)
            assert len(re.findall(SILENCE, path.read_text())) == seen
        wait_for(path, seen + 1)
    assert path.read_text().startswith("Since step 1 none has finished")
