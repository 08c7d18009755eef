"""What makes two runs the same run: the settings and weights that decide its numbers.

For: what a checkpoint says about its run, and refusing to continue another one. Not for: the checkpoint itself
(`checkpoint.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from minigpt4_jax.checkpoint import leaf_names
from minigpt4_jax.config import UserError
from minigpt4_jax.data.prompts import load_prompts
from minigpt4_jax.train_config import DataConfig, TrainConfig
from minigpt4_jax.training.state import Projection

FREE_SETTINGS = (
    "workdir", "feature_cache", "licence", "attribution", "tensorboard", "mesh", "distributed", "remat", "held_out",
    "profile", "save_every", "save_every_minutes", "max_failed_saves", "log_every", "max_to_keep", "watchdog_s",
)  # fmt: skip
"""Settings that may change when a run is resumed: no number depends on them."""
FREE_DATA_SETTINGS = ("max_corrupt_share", "num_threads")
"""Likewise, inside `data`."""


def run_prompts(config: DataConfig) -> tuple[str, ...]:
    """The run's prompts, from its list or its file. Raises `UserError` for a file that cannot be used."""
    return load_prompts(config.prompt_path) if config.prompt_path else config.prompts


def run_identity(
    config: TrainConfig, *, frozen: dict[str, Any], start: Projection | None
) -> dict[str, Any]:
    """Every setting but the free ones, and the contents of what the settings only name; JSON-like.

    Args:
        frozen: the frozen parameters as they were loaded.
        start: the projection read from the file that `config.init_projection` names, if it names one.
    """
    settings = dataclasses.asdict(config)
    identity = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
    for name in FREE_DATA_SETTINGS:
        del identity["data"][name]
    identity["data"]["prompts"] = run_prompts(config.data)
    identity["frozen_weights"] = hash_tree(frozen)
    identity["start_projection"] = None if start is None else hash_tree(start)
    plain: dict[str, Any] = json.loads(json.dumps(identity))  # as it comes back from a checkpoint
    return plain


def hash_tree(tree: Any) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of all leaves."""
    digest = hashlib.sha256()
    for name, leaf in sorted(leaf_names(tree).items()):
        values = np.asarray(leaf)
        digest.update(f"{name} {values.dtype} {values.shape};".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def require_same_run(workdir: str, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Raises `UserError` naming everything that differs from the run in `workdir`. None: there is no run yet."""
    if before is None:
        return
    old, new = dict(_dotted(before)), dict(_dotted(now))
    changed = sorted(name for name in old | new if old.get(name) != new.get(name))
    if changed:
        raise UserError(
            f"{workdir} holds a run with other settings ({', '.join(changed)}). Use another workdir, or set "
            "them back to continue that run."
        )


def _dotted(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
