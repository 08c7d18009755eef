"""benchmarks/quantised.py: its numbers mean what they say, and the whole of it runs on a tiny model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "quantised.py"
spec = importlib.util.spec_from_file_location("quantised_benchmark", SCRIPT)
assert spec is not None
assert spec.loader is not None
quantised = importlib.util.module_from_spec(spec)
sys.modules["quantised_benchmark"] = quantised  # its dataclasses look their module up
spec.loader.exec_module(quantised)


def test_agreement_counts_what_is_equal_and_what_comes_before_the_first_difference() -> None:
    expected = np.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])
    found = np.asarray([[1, 0, 3, 4], [5, 6, 7, 8]])
    assert quantised.agreement(found, expected) == (7 / 8, 5 / 8)
    assert quantised.agreement(expected, expected) == (1, 1)


def test_a_model_that_knows_nothing_has_the_vocabulary_for_its_perplexity() -> None:
    ids = np.asarray([[3, 1, 4, 1]])
    losses = quantised.negative_log_likelihoods(np.full((1, 4, 50), 7.0, np.float32), ids)
    np.testing.assert_allclose(np.exp(losses), np.full((1, 3), 50.0))
    sure = np.full((1, 4, 50), -1e3, np.float32)
    sure[0, [0, 1, 2], [1, 4, 1]] = 1e3  # each row of logits is about the next token
    np.testing.assert_allclose(quantised.negative_log_likelihoods(sure, ids), 0)


def test_the_whole_of_it_runs_on_a_tiny_model_and_every_rounding_shows(
    tiny_params: Any, tiny_config: ModelConfig
) -> None:
    ids = np.random.default_rng(3).integers(0, tiny_config.llama.vocab_size, 70).tolist()
    sizes = quantised.Sizes(window=32, prompts=8, prompt_length=8, new_tokens=6)
    rows = list(quantised.measure({"llama": tiny_params["llama"]}, tiny_config, ids, sizes=sizes))
    assert [row["form"] for row in rows] == [form.name for form in quantised.FORMS]
    first, *others = rows
    # Against itself, at once instead of token by token: the ids are those that it wrote.
    assert (first["top_1"], first["until_first_difference"]) == (1, 1)
    assert first["logit_error_max"] == first["logit_error_mean"] == 0
    for row in others:
        # Logits of a random model are about 5 at most; a form that reads wrong places is off by as much.
        assert 0 < row["logit_error_mean"] < row["logit_error_max"] < 1.5, row
        assert row["perplexity"] == pytest.approx(first["perplexity"], rel=0.1)
        assert 0 <= row["until_first_difference"] <= row["top_1"] <= 1
    weights = {row["form"]: row["weights_mb"] for row in rows}
    assert weights["int8 weights"] < 0.5 * weights["float32"] == 0.5 * weights["int8 KV"]
    assert quantised.table(rows).count("\n") == len(rows) + 1
