"""A run that is killed with SIGKILL and started again writes, bit for bit, the losses of the uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt4_jax.checkpoint import leaf_names
from minigpt4_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
DRIVER = Path(__file__).with_name("driver.py")


@pytest.fixture(scope="module")
def params_file(tmp_path_factory: pytest.TempPathFactory, frozen: dict[str, Any]) -> Path:
    file = tmp_path_factory.mktemp("params") / "frozen.npz"
    np.savez(file, **{name: np.asarray(leaf) for name, leaf in leaf_names(frozen).items()})
    return file


def drive(
    workdir: Path, params: Path, data_folder: Path, compile_cache: Path, *, kill_at: int | None
) -> subprocess.CompletedProcess[str]:
    spec = workdir.with_suffix(".json")
    overrides = [
        "model=tiny", f"workdir={workdir}", f"data.folder={data_folder}", "data.batch_size=5",
        "data.prompts=['What is this?', 'Say it.']", "optimizer.max_steps=16", "optimizer.warmup_steps=3",
        "save_every=4", "init_projection=ridge",
    ]  # fmt: skip
    spec.write_text(json.dumps({"overrides": overrides, "params": str(params), "kill_at": kill_at}))
    return subprocess.run(
        [sys.executable, str(DRIVER), str(spec)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": str(compile_cache),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, params_file: Path, data_folder: Path, compile_cache: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = drive(whole, params_file, data_folder, compile_cache, kill_at=None)
    assert done.returncode == 0, done.stderr
    # Once between two checkpoints, once while the newest may still be on its way to the disk.
    for kill_at in (7, 9):
        died = drive(killed, params_file, data_folder, compile_cache, kill_at=kill_at)
        assert died.returncode == -signal.SIGKILL, died.stderr
        assert read_metrics(killed)[-1]["step"] == kill_at
        assert not (killed / "projection.npz").exists()
    resumed = drive(killed, params_file, data_folder, compile_cache, kill_at=None)
    assert resumed.returncode == 0, resumed.stderr

    expected = [(row["step"], row["loss"]) for row in read_metrics(whole)]
    assert [step for step, _ in expected] == list(range(1, 17))
    assert len({loss for _, loss in expected}) == 16
    assert [(row["step"], row["loss"]) for row in read_metrics(killed)] == expected
    with np.load(whole / "projection.npz") as left, np.load(killed / "projection.npz") as right:
        assert sorted(left) == sorted(right) == ["bias", "kernel"]
        for name in left:
            assert left[name].tobytes() == right[name].tobytes()
