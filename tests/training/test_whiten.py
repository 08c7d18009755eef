"""training/whiten.py: another basis for the same projection, and inputs that count alike in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.training.init import Moments, random_projection, second_moments
from minigpt4_jax.training.whiten import load_or_make_whitening, whitened_features

PICTURES = 300


@pytest.fixture
def features(tiny_config: ModelConfig) -> np.ndarray:
    """Correlated features with a mean far from zero."""
    rng = np.random.default_rng(3)
    width = tiny_config.vit.width
    mixed = rng.normal(size=(PICTURES, tiny_config.vit.num_patches, width)) @ rng.normal(
        size=(width, width)
    )
    return (mixed + 2).astype(np.float16)


@pytest.fixture
def moments(tiny_config: ModelConfig, features: np.ndarray) -> Moments:
    return second_moments(tiny_config, features, np.arange(PICTURES), within=0.1, penalty=0.01)


def _raw_and_white(config, features, moments, tmp_path):
    whitening = load_or_make_whitening(tmp_path / "whitening.npz", lambda: moments)
    white = whitened_features(
        features, whitening, config=config, path=tmp_path / "z.npy", advance=lambda count: None
    )
    groups = (-1, config.projection_in)
    return whitening, features.reshape(groups).astype(np.float32), white.reshape(groups)


def test_a_projection_says_the_same_in_both_bases(
    tiny_config: ModelConfig, features: np.ndarray, moments: Moments, tmp_path: Path
) -> None:
    import jax

    whitening, raw, white = _raw_and_white(tiny_config, features, moments, tmp_path)
    projection = jax.tree.map(
        np.asarray, random_projection(tiny_config, jax.random.key(1), embed_std=0.1)
    )
    projection["bias"] = projection["bias"] + 0.3
    there = whitening.unfold(projection)
    expected = raw @ projection["kernel"] + projection["bias"]
    found = white.astype(np.float32) @ there["kernel"] + there["bias"]
    # float16 features: 3 decimal digits of values around 3, summed over 128 of them.
    np.testing.assert_allclose(found, expected, atol=5e-3)
    back = whitening.fold(there)
    np.testing.assert_allclose(back["kernel"], projection["kernel"], atol=1e-6)
    np.testing.assert_allclose(back["bias"], projection["bias"], atol=1e-5)


def test_the_moments_become_the_identity(moments: Moments, tmp_path: Path) -> None:
    whitening = load_or_make_whitening(tmp_path / "whitening.npz", lambda: moments)
    mean_gram = moments.gram / PICTURES
    np.testing.assert_allclose(
        whitening.basis.T @ mean_gram @ whitening.basis, np.eye(len(mean_gram)), atol=1e-6
    )


def test_a_second_call_reads_the_files_and_asks_for_no_moments(
    tiny_config: ModelConfig, features: np.ndarray, moments: Moments, tmp_path: Path
) -> None:
    _, _, first = _raw_and_white(tiny_config, features, moments, tmp_path)

    def refuse() -> Moments:
        raise AssertionError("the moments were computed again")

    whitening = load_or_make_whitening(tmp_path / "whitening.npz", refuse)
    again = whitened_features(
        np.zeros_like(features), whitening, config=tiny_config, path=tmp_path / "z.npy",
        advance=lambda count: None,
    )  # fmt: skip
    np.testing.assert_array_equal(again.reshape(first.shape), first)
