"""training/account.py: every second belongs to one phase, also over restarts."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax.data.pipeline import Pipeline
from minigpt4_jax.training.account import FILE, Account, read_account
from minigpt4_jax.training.metrics import Metrics, StepSize, read_metrics
from tests.training.clock import Clock

SIZE = StepSize(samples=4, tokens=60, length=20, targets=8)


def test_phases_add_up_to_all_the_time(tmp_path: Path) -> None:
    clock = Clock()
    with Account(tmp_path, clock=clock) as account:
        clock.pass_s(3)
        account.begin("step")
        clock.pass_s(5)
        with account.spend("eval"):
            clock.pass_s(7)
            with account.spend("checkpoint"):
                clock.pass_s(11)
            clock.pass_s(1)
        clock.pass_s(2)
        assert account.goodput() == 7 / 29
    found = read_account(tmp_path)
    assert {name: s for name, s in found.items() if s} == {
        "init": 3,
        "step": 7,
        "eval": 8,
        "checkpoint": 11,
    }
    said = "Time: 0.5 min with all restarts; preparing 10.3%, steps 24.1%, held-out samples 27.6%"
    assert account.summary().startswith(said)
    assert account.summary().endswith("Goodput 24.1%.")


def test_the_account_goes_on_after_a_restart_and_steps_done_twice_count_once(
    tmp_path: Path,
) -> None:
    def live(*, start_step: int, last: int) -> Account:
        clock = Clock()
        with Account(tmp_path, clock=clock) as account:
            clock.pass_s(10)
            metrics = Metrics(
                tmp_path, account=account, start_step=start_step, max_steps=9, log_every=3,
                tensorboard=False,
            )  # fmt: skip
            with metrics:
                account.begin("step")
                for step in range(start_step + 1, last + 1):
                    with account.spend("data_wait"):
                        clock.pass_s(1)
                    clock.pass_s(4)
                    metrics.write(
                        step, loss=1.0, learning_rate=0.5, grad_norm=1.0, image_token_std=1.0, size=SIZE
                    )  # fmt: skip
        return account

    live(start_step=0, last=5)
    account = live(start_step=3, last=9)  # steps 4 and 5 are done again
    expected = {"init": 20.0, "step": 36.0, "lost": 8.0, "data_wait": 11.0}
    assert {name: s for name, s in read_account(tmp_path).items() if s} == expected
    assert account.goodput() == 36 / 75


def test_a_killed_process_leaves_its_account_up_to_a_second_ago(tmp_path: Path) -> None:
    clock = Clock()
    account = Account(tmp_path, clock=clock)
    account.begin("step")
    for _ in range(40):
        clock.pass_s(0.25)
        account.begin("step")
    assert 9 <= read_account(tmp_path)["step"] <= 10


def test_a_full_disk_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **settings: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    clock = Clock()
    with monkeypatch.context() as patch, Account(tmp_path, clock=clock) as account:
        patch.setattr(Path, "write_text", full)
        clock.pass_s(5)
        account.begin("step")
    assert not (tmp_path / FILE).exists()


def test_a_run_accounts_for_waiting_compiling_saving_and_what_it_did_twice(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_next, real_write = Pipeline.__next__, Metrics.write

    def slow(self: Any) -> Any:
        time.sleep(0.05)
        return real_next(self)

    def stop(self: Any, step: int, **numbers: Any) -> None:
        if step == 7:
            raise KeyboardInterrupt
        real_write(self, step, **numbers)

    monkeypatch.setattr(Pipeline, "__next__", slow)
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    before = read_account(tmp_path)
    done_twice = sum(r["step_s"] - r["data_wait_s"] for r in read_metrics(tmp_path)[4:])
    run(tmp_path)
    found, rows = read_account(tmp_path), read_metrics(tmp_path)
    assert before["lost"] == 0 < done_twice
    assert found["lost"] == pytest.approx(done_twice, abs=2e-3)
    assert found["data_wait"] >= 0.05 * (8 + 6)
    for phase in ("init", "compile", "step", "checkpoint"):
        assert found[phase] > before[phase] * 0.5 > 0, phase
    # Numbers are read one step late: a line has the wait for the batch behind it, and the last one has none.
    assert all(row["data_wait_s"] >= 0.05 for row in rows[:3])
    assert all(0 < row["data_wait"] < 1 for row in rows)
    assert 0 < rows[-1]["goodput"] < 1
