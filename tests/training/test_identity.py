"""training/identity.py: what must agree before a run is continued."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import TrainConfig, UserError
from minigpt4_jax.training.identity import (
    FREE_SETTINGS,
    hash_tree,
    require_same_run,
    run_identity,
)

TREE = {"a": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3)}, "b": np.ones(2)}


def test_the_identity_of_a_run_has_every_setting_but_the_free_ones_and_the_weights() -> None:
    # A new setting belongs to the identity unless it is put among the free ones on purpose.
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    identity = run_identity(TrainConfig(), frozen=TREE, start=None)
    weights = {"frozen_weights", "start_projection"}
    assert set(identity) == fields - set(FREE_SETTINGS) | weights
    assert set(FREE_SETTINGS) <= fields
    assert json.loads(json.dumps(identity)) == identity


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
    before = run_identity(config, frozen=TREE, start=None)
    file.write_text("Name it.\n")
    with pytest.raises(UserError, match=r"RUN holds .*\(data.prompts\)"):
        require_same_run("RUN", before, run_identity(config, frozen=TREE, start=None))


@pytest.mark.parametrize(
    ("before", "now"), [({"a": {"b": 1}}, {}), ({}, {"a": {"b": None, "c": 1}})]
)
def test_a_setting_that_only_one_of_two_runs_has_is_a_difference(before: Any, now: Any) -> None:
    with pytest.raises(UserError, match=r"\(a\.[bc]\)"):
        require_same_run("RUN", before, now)


def test_a_fresh_workdir_is_nobodys() -> None:
    require_same_run("RUN", None, {"a": 1})
