"""What makes two runs the same run: the settings and weights that decide its numbers.

For: what a checkpoint says about its run, and refusing to continue another one. Not for: the checkpoint itself
(`checkpoint.py`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from minigpt4_jax.config import UserError
from minigpt4_jax.data.prompts import load_prompts
from minigpt4_jax.train_config import DataConfig, TrainConfig
from minigpt4_jax.training.frozen import hash_tree
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
    config: TrainConfig, *, frozen: Mapping[str, str], start: Projection | None
) -> dict[str, Any]:
    """Every setting but the free ones, and the contents of what the settings only name; JSON-like.

    Args:
        frozen: fingerprints of the frozen weights: `FrozenWeights.fingerprints`.
        start: the projection read from the file that `config.init_projection` names, if it names one.
    """
    settings = dataclasses.asdict(config)
    identity = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
    for name in FREE_DATA_SETTINGS:
        del identity["data"][name]
    identity["data"]["prompts"] = run_prompts(config.data)
    identity["frozen_weights"] = dict(frozen)
    identity["start_projection"] = None if start is None else hash_tree(start)
    plain: dict[str, Any] = json.loads(json.dumps(identity))  # as it comes back from a checkpoint
    return plain


def require_same_run(workdir: str, before: dict[str, Any] | None, now: dict[str, Any]) -> None:
    """Raises `UserError` naming everything that differs from the run in `workdir`. None: there is no run yet."""
    if before is None:
        return
    if isinstance(before.get("frozen_weights"), str):
        raise UserError(
            f"{workdir} holds a run of an earlier version, which named the frozen weights by one hash of all their "
            "numbers; expected a fingerprint for each part. Finish it with that version, or start in another workdir."
        )
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
