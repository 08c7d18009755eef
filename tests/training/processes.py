"""Runs of `train.py` in real processes on this machine, the Q-Former model at tiny size: start, watch, kill, compare.

For: `test_processes.py`, and its long form `tools/kill_runs.py`. Each process has two simulated CPU devices; they speak
to each other over gloo.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from minigpt4_jax.checksums import write_checksums
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.training.metrics import read_metrics
from tests.drawn import draw
from tests.tiny_folder import write_folder

ROOT = Path(__file__).parents[2]
DEVICES = 2
"""Of each process."""
HEARTBEAT_S = 10
STUCK_S = 600.0
"""A run that takes longer hangs."""


def write_inputs(folder: Path) -> list[str]:
    """A model folder and a set of 23 pictures in `folder`; the overrides of a run of 4 samples a step over them."""
    preset = PRESETS["tiny-qformer"]
    params = draw(abstract_params(preset.model))
    del params["llama_proj"]
    model = write_folder(folder / "model", params, preset=preset)
    tokenizer = byte_tokenizer()
    tokenizer._backend.save(str(model / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(names))
    write_checksums(model)
    (folder / "set" / "image").mkdir(parents=True)
    captions, rng = [], np.random.default_rng(5)
    for number in range(
        23
    ):  # no multiple of the batch: passes over the set begin in the middle of one
        pixels = rng.integers(0, 256, (28, 28, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "set" / "image" / f"{number}.jpg")
        captions.append(
            {"image_id": number, "caption": f"{number} {'x' * int(rng.integers(1, 9))}"}
        )
    (folder / "set" / "filter_cap.json").write_text(json.dumps({"annotations": captions}))
    return [
        f"model={model}", f"data.folder={folder / 'set'}", f"feature_cache={folder / 'features'}",
        "init_projection=random", "data.batch_size=4", "data.length_multiple=128", "optimizer.warmup_steps=2",
        "optimizer.init_lr=0.01", "save_every=10", "save_every_minutes=0", "max_to_keep=3",
    ]  # fmt: skip


@dataclasses.dataclass
class Run:
    """The processes of one run. A context manager: what still runs at its end is killed."""

    processes: list[subprocess.Popen[bytes]]
    logs: list[Path]
    workdir: Path
    port: socket.socket = dataclasses.field(default_factory=lambda: hold_port())

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.port.close()

    def said(self, number: int) -> str:
        """Everything that a process printed so far."""
        return self.logs[number].read_text()

    def wait_for_step(self, step: int) -> None:
        """Returns when the metrics have a line for `step`. Fails when the run ends before."""
        self.wait_until(lambda: last_step(self.workdir) >= step, what=f"step {step}")

    def wait_until(self, reached: Any, *, what: str) -> None:
        """Returns when `reached()`. Fails when the run ends before."""
        end = time.monotonic() + STUCK_S
        while not reached():
            codes = [process.poll() for process in self.processes]
            assert None in codes, f"ended with {codes} before {what}:\n{self.everything()}"
            assert time.monotonic() < end, f"no {what} in {STUCK_S} s:\n{self.everything()}"
            time.sleep(0.002)

    def signal(self, number: int, which: signal.Signals) -> None:
        """Sends a signal to one process."""
        self.processes[number].send_signal(which)

    def codes(self) -> list[int]:
        """Waits for all processes; what they exited with."""
        end = time.monotonic() + STUCK_S
        try:
            return [
                process.wait(timeout=max(0, end - time.monotonic())) for process in self.processes
            ]
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"hangs:\n{self.everything()}") from error

    def everything(self) -> str:
        """What all processes printed, for a failed test."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs)


def start(
    workdir: Path,
    overrides: list[str],
    *,
    count: int,
    programs: Path,
    only: int | None = None,
    besides: dict[int, list[str]] | None = None,
) -> Run:
    """Starts `count` processes of one run, or of these `only` one.

    Args:
        programs: a folder for compiled programs; shared, every run after the first compiles nothing.
        besides: overrides for a process alone, by its number.
    """
    workdir.parent.mkdir(parents=True, exist_ok=True)
    attempt = len(list(workdir.parent.glob(f"{workdir.name}.*.0.log")))
    run = Run([], [], workdir)
    for number in range(count) if only is None else [only]:
        together = [
            f"distributed.coordinator=127.0.0.1:{run.port.getsockname()[1]}", f"distributed.num_processes={count}",
            f"distributed.process_id={number}", f"distributed.heartbeat_s={HEARTBEAT_S}",
        ]  # fmt: skip
        run.logs.append(workdir.parent / f"{workdir.name}.{attempt}.{number}.log")
        config = workdir.parent / "empty.yaml"
        config.write_text("{}\n")
        with run.logs[-1].open("wb") as log:
            run.processes.append(
                subprocess.Popen(
                    [
                        sys.executable, "train.py", "--config", str(config), f"workdir={workdir}",
                        *overrides, *(together if count > 1 else []), *(besides or {}).get(number, []),
                    ],
                    cwd=ROOT,
                    env=environment(programs),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    return run


def environment(programs: Path) -> dict[str, str]:
    """One thread of XLA's would do; what a scheduler of this machine set is taken away."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "JAX_", "KUBERNETES_", "TPU_"))
    }
    return {
        **kept,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(DEVICES),
        "MINIGPT4_CACHE": str(programs),
    }


def hold_port() -> socket.socket:
    """A port for the coordinator: bound and not listening it is nobody else's, and gRPC may bind it beside us."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("127.0.0.1", 0))
    return held


def last_step(workdir: Path) -> int:
    """The newest step in the metrics; 0 without any."""
    rows = read_metrics(workdir)
    return rows[-1]["step"] if rows else 0


def losses(workdir: Path) -> dict[int, str]:
    """By step, in hex: what does not differ there does not differ in a bit."""
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return {row["step"]: float(row["loss"]).hex() for row in rows}


def saved_steps(workdir: Path) -> list[int]:
    """Complete checkpoints, oldest first."""
    return sorted(
        int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()
    )


def projections(*workdirs: Path) -> Iterator[dict[str, bytes]]:
    """The finished projections, to the bit."""
    for workdir in workdirs:
        arrays = load_file(workdir / "projection.safetensors")
        yield {name: array.tobytes() for name, array in arrays.items()}
