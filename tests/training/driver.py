"""One tiny training run in a process of its own, which dies where it is told to: `driver.py SPEC.json`.

The spec holds `overrides` (of `TrainConfig`), `params` (an `.npz` of the frozen leaves by path) and `kill_at`, the step
after whose line in the metrics the process kills itself with SIGKILL (null: never).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from minigpt4_jax.config_file import load
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.train_config import TrainConfig
from minigpt4_jax.training import loop, steps
from minigpt4_jax.training.frozen import FrozenArrays


def unflatten(leaves: Any) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path in leaves:
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaves[path]
    return tree


def main(spec: dict[str, Any]) -> None:
    real_write = steps.Metrics.write

    def write(self: Any, step: int, **numbers: Any) -> None:
        real_write(self, step, **numbers)
        if step == spec["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)

    steps.Metrics.write = write
    loop.train(
        load(TrainConfig, None, spec["overrides"]),
        frozen=FrozenArrays(unflatten(np.load(spec["params"])), llama=PRESETS["tiny"].model.llama),
        tokenizer=byte_tokenizer(),
        start=None,
        save_projection=lambda path, projection: np.savez(path.with_suffix(".npz"), **projection),
    )


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
