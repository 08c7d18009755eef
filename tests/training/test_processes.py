"""`train.py` in two real processes on this machine: what they compute, and what is left when one of them is killed.

The long form, ten random kills in a row, is `tools/kill_runs.py`.
"""

from __future__ import annotations

import re
import signal
from pathlib import Path

import numpy as np
import pytest

from minigpt4_jax.exits import PEER_LOST, PREEMPTED, PROBLEM
from minigpt4_jax.training.metrics import read_metrics
from tests.planted import END, samples
from tests.training.processes import Run, losses, projections, saved_steps, start, write_inputs

STEPS = 70
SAME = 1e-5
"""Relative difference of losses on another number of devices: the sums over a batch are taken in another order."""


class Inputs:
    """What all runs of this file share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.overrides = [*write_inputs(folder), f"optimizer.max_steps={STEPS}"]

    def start(
        self,
        workdir: Path,
        *overrides: str,
        count: int = 2,
        only: int | None = None,
        besides: dict[int, list[str]] | None = None,
    ) -> Run:
        return start(
            workdir,
            [*self.overrides, *overrides],
            count=count,
            programs=self.folder / "programs",
            only=only,
            besides=besides,
        )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a run in two processes that nothing interrupted; it looks at held-out samples at its end."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    shard = workdir.parent / "held_out" / "0.tar"
    shard.parent.mkdir()
    shard.write_bytes(samples(range(5)) + END)
    held_out = f"held_out.sources={{seen: {{kind: tar, path: {shard}}}}}"
    with inputs.start(workdir, held_out, "held_out.captions=0") as run:
        assert run.codes() == [0, 0], run.everything()
        for number in (0, 1):
            assert f"Process {number} of 2, with 2 of 4 devices; found by" in run.said(number)
        # One of a kind is printed and written by process 0.
        assert run.said(0).splitlines()[-1] == f"Done: {workdir / 'projection.safetensors'}"
        assert "Done" not in run.said(1)
        assert "over 5 samples" in run.said(0)
    # What was made for all processes has its name, and nothing is half-made.
    assert [file.suffix for file in shard.parent.glob("minigpt4_index*")] == [".bin"]
    assert len(list((inputs.folder / "features").glob("*.npy"))) == 2
    assert not list((inputs.folder / "features").glob("*.partial*"))
    assert len(losses(workdir)) == STEPS
    return workdir


def values(workdir: Path) -> np.ndarray:
    return np.array([row["loss"] for row in read_metrics(workdir)])


def test_two_processes_give_the_losses_of_one(inputs: Inputs, whole: Path, tmp_path: Path) -> None:
    with inputs.start(tmp_path / "run", count=1) as run:
        assert run.codes() == [0], run.everything()
    ours, theirs = values(whole), values(tmp_path / "run")
    assert len(set(ours)) == STEPS  # every step has samples of its own
    np.testing.assert_allclose(ours, theirs, rtol=SAME, atol=0)


def test_after_kill_9_of_one_the_other_ends_and_the_restarted_run_is_the_same_bit_for_bit(
    inputs: Inputs, whole: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    with inputs.start(workdir, "save_every=5") as run:
        run.wait_until(lambda: bool(saved_steps(workdir)), what="a checkpoint")
        run.signal(1, signal.SIGKILL)
        survivor, killed = run.codes()
        assert killed == -signal.SIGKILL
        # By an error of the exchange, or by JAX, to which a heartbeat is missing.
        assert survivor in (PEER_LOST, -signal.SIGABRT), run.everything()
        assert re.search("Another process of the run died|another task died", run.said(0))
    assert max(losses(workdir)) < STEPS
    assert saved_steps(workdir)[-1] >= 5
    with inputs.start(workdir) as run:
        assert run.codes() == [0, 0], run.everything()
    assert losses(workdir) == losses(whole)
    ours, theirs = projections(workdir, whole)
    assert ours == theirs


def test_a_signal_to_one_stops_both_after_one_step_and_any_number_of_processes_goes_on_in_the_same_order(
    inputs: Inputs, whole: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    with inputs.start(workdir) as run:
        run.wait_for_step(4)
        run.signal(1, signal.SIGTERM)
        assert run.codes() == [PREEMPTED, PREEMPTED], run.everything()
        stopped = {
            re.findall(r"Stopped after step (\d+);", run.said(number))[0] for number in (0, 1)
        }
        assert len(stopped) == 1, run.everything()
    (step,) = map(int, stopped)
    assert saved_steps(workdir)[-1] == step == max(losses(workdir)) < STEPS
    assert losses(workdir).items() <= losses(whole).items()

    with inputs.start(workdir, count=1) as run:  # one process, and half as many devices
        run.wait_for_step(step + 1)
        run.signal(0, signal.SIGTERM)
        assert run.codes() == [PREEMPTED], run.everything()
    assert step < saved_steps(workdir)[-1] < STEPS
    with inputs.start(workdir) as run:
        assert run.codes() == [0, 0], run.everything()
    assert [row["step"] for row in read_metrics(workdir)] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(values(workdir), values(whole), rtol=SAME, atol=0)


def test_a_process_with_a_problem_of_its_own_does_not_leave_the_other_waiting(
    inputs: Inputs, tmp_path: Path
) -> None:
    wrong = ["data.folder=nowhere"]
    with (
        inputs.start(tmp_path / "a", besides={0: wrong}) as first,
        inputs.start(tmp_path / "b", besides={1: wrong}) as second,
    ):
        for number, run in enumerate((first, second)):
            codes, other = run.codes(), 1 - number
            assert (codes[number], codes[other]) == (PROBLEM, PEER_LOST), run.everything()
            assert f"minigpt4 (process {number} of 2): Cannot read nowhere" in run.said(number)
            assert (
                f"minigpt4 (process {other} of 2): process {number} of 2 ended with 2: Cannot read"
                in run.said(other)
            )


def test_a_process_alone_says_for_whom_it_waits_and_gives_up(
    inputs: Inputs, tmp_path: Path
) -> None:
    with (
        inputs.start(tmp_path / "a", "distributed.timeout_s=5", only=0) as first,
        inputs.start(tmp_path / "b", "distributed.timeout_s=5", only=1) as second,
    ):
        for number, run in enumerate((first, second)):
            assert run.codes() == [PEER_LOST], (
                run.everything()
            )  # to be started again: it may come later
            said = run.said(0)
            assert f"Process {number} of 2 waits for the others at 127.0.0.1:" in said
            assert "gives up after 5 s" in said
            assert f"minigpt4: This is process {number} of 2" in said
            assert "distributed.timeout_s=5" in said
            assert "Traceback" not in said
