"""training/identity.py: what must agree before a run is continued."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.train_config import (
    DataConfig,
    DistributedConfig,
    HeldOutConfig,
    MeshConfig,
    OptimizerConfig,
    ProfileConfig,
    SourceConfig,
    TrainConfig,
)
from minigpt4_jax.training.frozen import hash_tree
from minigpt4_jax.training.identity import (
    FREE_SETTINGS,
    require_same_run,
    run_identity,
)

SUMS = {"vit": "ab" * 32, "llama": "cd" * 32}
TREE = {"a": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}, "b": np.ones(2)}


def test_the_identity_of_a_run_has_every_setting_but_the_free_ones_and_the_weights() -> None:
    # A new setting belongs to the identity unless it is put among the free ones on purpose.
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    identity = run_identity(TrainConfig(), frozen=SUMS, start=None)
    weights = {"frozen_weights", "start_projection"}
    assert set(identity) == fields - set(FREE_SETTINGS) | weights
    assert set(FREE_SETTINGS) <= fields
    assert json.loads(json.dumps(identity)) == identity


OTHER: dict[str, dict[str, Any]] = {
    "": {
        "model": "tiny", "workdir": "w", "init_projection": "random", "dtype": "bfloat16", "feature_cache": "f",
        "licence": "x", "attribution": "y", "tensorboard": False, "save_every": 7, "log_every": 7, "max_to_keep": 7,
        "seed": 7, "mesh": MeshConfig(data=7), "remat": "full", "held_out": HeldOutConfig(max_samples=7),
        "distributed": DistributedConfig(timeout_s=7), "profile": ProfileConfig(num_steps=7), "save_every_minutes": 7.0,
        "max_failed_saves": 7, "watchdog_s": 7.0,
    },
    "data": {
        "folder": "f", "sources": {"a": SourceConfig(kind="jsonl", path="p")}, "max_corrupt_share": 0.5,
        "num_threads": 7, "prompts": ("Other?",), "template": "llama2", "end_sym": "!", "batch_size": 7,
        "length_multiple": 7, "max_text_len": 7, "max_context_len": 7, "truncate": True, "mask_pad_token": True,
        "seed": 7, "length_buckets": (7,),
    },
    "optimizer": {
        "name": "muon", "lr_sched": "warmup_step", "init_lr": 0.7, "min_lr": 0.7, "warmup_lr": 0.7, "warmup_steps": 7,
        "max_steps": 700, "iters_per_epoch": 7, "lr_decay_rate": 0.7, "accum_grad_iters": 10, "accum_grads": "sum",
        "weight_decay": 0.7, "beta1": 0.7, "beta2": 0.7, "eps": 0.7,
    },
}  # fmt: skip
"""Another value for each setting."""
NEEDS_ANOTHER: dict[str, set[str]] = {
    "": {"cache_features", "data", "optimizer"}, "optimizer": set(),
    "data": {"random_resized_crop", "prompt_path", "bucket_window"},
}  # fmt: skip
"""Settings that cannot be changed alone."""
FREE = {
    "workdir", "feature_cache", "licence", "attribution", "save_every", "log_every", "max_to_keep", "tensorboard",
    "data.max_corrupt_share", "data.num_threads", "mesh", "remat", "held_out", "distributed", "profile",
    "save_every_minutes", "max_failed_saves", "watchdog_s",
}  # fmt: skip
"""Written here once more: whoever frees a setting says so in two places."""


@pytest.mark.parametrize(
    ("section", "schema"), [("", TrainConfig), ("data", DataConfig), ("optimizer", OptimizerConfig)]
)
def test_every_setting_on_which_a_number_depends_belongs_to_the_run(
    section: str, schema: Any
) -> None:
    fields = {field.name for field in dataclasses.fields(schema)}
    assert set(OTHER[section]) | NEEDS_ANOTHER[section] == fields
    plain = run_identity(TrainConfig(), frozen=SUMS, start=None)
    for name, value in OTHER[section].items():
        config = TrainConfig()
        if section:
            part = dataclasses.replace(getattr(config, section), **{name: value})
            config = dataclasses.replace(config, **{section: part})
        else:
            config = dataclasses.replace(config, **{name: value})
        changed = run_identity(config, frozen=SUMS, start=None) != plain
        assert changed == (".".join(filter(None, (section, name))) not in FREE), name


def test_the_crop_and_the_cache_belong_to_the_run() -> None:
    config = TrainConfig(init_projection="random")
    uncached = dataclasses.replace(config, cache_features=False)
    data = dataclasses.replace(config.data, random_resized_crop=True)
    cropped = dataclasses.replace(uncached, data=data)
    runs = [run_identity(each, frozen=SUMS, start=None) for each in (config, uncached, cropped)]
    assert runs[0] != runs[1] != runs[2]


def test_a_hash_changes_with_names_shapes_dtypes_and_values_and_not_with_order_or_library() -> None:
    key = hash_tree(TREE)
    kernel, b = TREE["a"]["kernel"], TREE["b"]
    assert hash_tree({"b": b, "a": {"kernel": jnp.asarray(kernel)}}) == key
    for other in (
        {"a": {"bias": kernel}, "b": b},
        {"a": {"kernel": kernel.reshape(3, 2)}, "b": b},
        {"a": {"kernel": kernel.astype(np.float64)}, "b": b},
        {"a": {"kernel": kernel + np.float32(1e-6)}, "b": b},
        {"a": {"kernel": kernel}},
    ):
        assert hash_tree(other) != key


def test_the_words_of_a_prompt_file_belong_to_the_run(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Describe it.\n")
    data = dataclasses.replace(TrainConfig().data, prompt_path=str(file))
    config = dataclasses.replace(TrainConfig(), data=data)
    before = run_identity(config, frozen=SUMS, start=None)
    file.write_text("Name it.\n")
    with pytest.raises(UserError, match=r"RUN holds .*\(data.prompts\)"):
        require_same_run("RUN", before, run_identity(config, frozen=SUMS, start=None))


@pytest.mark.parametrize(
    ("before", "now"), [({"a": {"b": 1}}, {}), ({}, {"a": {"b": None, "c": 1}})]
)
def test_a_setting_that_only_one_of_two_runs_has_is_a_difference(before: Any, now: Any) -> None:
    with pytest.raises(UserError, match=r"\(a\.[bc]\)"):
        require_same_run("RUN", before, now)


def test_a_run_that_an_earlier_version_began_is_refused_with_the_reason() -> None:
    now = run_identity(TrainConfig(), frozen=SUMS, start=None)
    with pytest.raises(UserError, match="earlier version, which named the frozen weights by one"):
        require_same_run("RUN", {**now, "frozen_weights": "ab" * 32}, now)


def test_a_fresh_workdir_is_nobodys() -> None:
    require_same_run("RUN", None, {"a": 1})
