"""The projection in whitened coordinates: the same linear layer, better conditioned for Adam.

The 6144 numbers that enter the smol projection are strongly correlated: a gradient step in raw coordinates moves what
all pictures share and hardly what tells them apart. With `z = (x - mean) A`, where `A A^T` is the inverse of the
features' second moments, every direction counts alike; `W = A V` is the projection again, so nothing of this remains
in the finished file. (The same as preconditioning the gradient with the inverse input covariance, the input factor of
K-FAC: Martens & Grosse, arXiv 1503.05671.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.training.features import Features
from minigpt4_jax.training.init import Moments
from minigpt4_jax.training.state import Projection

CHUNK = 64


@dataclass(frozen=True)
class Whitening:
    """`z = (x - mean) @ basis` with `basis = factor^-T`, `factor` lower triangular."""

    mean: Float[np.ndarray, " F"]
    factor: Float[np.ndarray, "F F"]
    basis: Float[np.ndarray, "F F"]

    def unfold(self, projection: Projection) -> Projection:
        """A projection of raw features -> the same one for whitened features."""
        kernel = np.asarray(projection["kernel"], np.float64)
        return {
            "kernel": (self.factor.T @ kernel).astype(np.float32),
            "bias": (projection["bias"] + self.mean @ kernel).astype(np.float32),
        }

    def fold(self, projection: Projection) -> Projection:
        """The inverse of `unfold`."""
        kernel = self.basis @ np.asarray(projection["kernel"], np.float64)
        return {
            "kernel": kernel.astype(np.float32),
            "bias": (projection["bias"] - self.mean @ kernel).astype(np.float32),
        }


def make_whitening(mean: Float[np.ndarray, " F"], factor: Float[np.ndarray, "F F"]) -> Whitening:
    """Whitening by a Cholesky factor (float64)."""
    return Whitening(mean=mean, factor=factor, basis=np.linalg.inv(factor).T)


def load_or_make_whitening(path: Path, moments: Callable[[], Moments]) -> Whitening:
    """The whitening in `path`, or one made from the mean second moments of a picture and kept there."""
    if not path.exists():
        found = moments()
        factor = np.linalg.cholesky(found.gram / len(found.means))
        beside = path.with_suffix(".partial.npz")
        np.savez(beside, mean=found.mean.astype(np.float64), factor=factor)
        os.replace(beside, path)
    with np.load(path) as stored:
        return make_whitening(stored["mean"], stored["factor"])


def whitened_features(
    features: Features,
    whitening: Whitening,
    *,
    config: ModelConfig,
    path: Path,
    advance: Callable[[int], None],
) -> Features:
    """Whitened features in the shape of the raw ones, float16, from `path` if they are there.

    The file has another name until its last row is written.
    """
    if not path.exists():
        partial = path.with_suffix(".partial.npy")
        store = np.lib.format.open_memmap(
            partial, mode="w+", dtype=np.float16, shape=features.shape
        )
        basis, mean = whitening.basis.astype(np.float32), whitening.mean.astype(np.float32)
        for first in range(0, len(features), CHUNK):
            rows = np.asarray(features[first : first + CHUNK], np.float32)
            groups = rows.reshape(-1, config.projection_in) - mean
            store[first : first + CHUNK] = (groups @ basis).reshape(rows.shape)
            advance(len(rows))
        store.flush()
        os.replace(partial, path)
    whole: Features = np.load(path, mmap_mode="r")
    return whole
