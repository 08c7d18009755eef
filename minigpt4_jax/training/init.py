"""Where the projection starts: a closed-form answer, or random numbers of the right size.

Token embeddings of a small LLM have a standard deviation of about 0.1, normalised vision features of about 1: a default
linear layer makes image tokens ten times too large, and training spends its first ten thousand samples shrinking them.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.training.features import Features
from minigpt4_jax.training.state import Projection


def random_projection(config: ModelConfig, key: jax.Array, *, embed_std: float) -> Projection:
    """Normal kernel that maps unit-variance features to image tokens of standard deviation `embed_std`."""
    shape = (config.projection_in, config.llama.width)
    kernel = jax.random.normal(key, shape, jnp.float32) * embed_std / shape[0] ** 0.5
    return {"kernel": kernel, "bias": jnp.zeros(shape[1])}


def caption_targets(
    captions: list[list[int]], embedding: Float[np.ndarray, "V D"]
) -> Float[np.ndarray, "N D"]:
    """One vector per caption: the mean of its token embeddings, each weighted by how rare the token is.

    The weight is `log(N / number of captions with the token)`, so words that every caption has ("This is a") vanish.
    """
    counts = np.zeros(embedding.shape[0])
    for ids in captions:
        counts[np.unique(ids)] += 1
    idf = np.log(len(captions) / np.maximum(counts, 1))
    targets = np.zeros((len(captions), embedding.shape[1]), np.float32)
    for row, ids in enumerate(captions):
        weights = idf[ids][:, None]
        targets[row] = (embedding[ids] * weights).sum(0) / max(weights.sum(), 1e-6)
    return targets


def ridge_projection(
    config: ModelConfig,
    features: Features,
    image_index: Float[np.ndarray, " N"],
    targets: Float[np.ndarray, "N D"],
    *,
    penalty: float,
    chunk: int = 256,
) -> Projection:
    """Ridge regression from every image token's patches to the picture's target vector.

    Minimises `sum ||x W + b - t||^2 + penalty * n * var(x) ||W||^2` over all `n` image tokens of all pictures, with `x`
    centred. Solved by the normal equations in float64, accumulated in chunks, so the features never sit in memory.

    Args:
        image_index: row of `features` for each target.
        penalty: relative to the mean variance of an input; 0.01 to 1 is the useful range.
    """
    width_in, width_out = config.projection_in, config.llama.width

    def chunks() -> Iterator[tuple[Float[np.ndarray, "n F"], Float[np.ndarray, "n D"]]]:
        for first in range(0, len(image_index), chunk):
            rows = image_index[first : first + chunk]
            x = np.asarray(features[rows], np.float32).reshape(-1, width_in)
            yield x, np.repeat(targets[first : first + chunk], config.num_image_tokens, axis=0)

    count = len(image_index) * config.num_image_tokens
    mean_x, mean_t = np.zeros(width_in), np.zeros(width_out)
    for x, t in chunks():
        mean_x += x.sum(0) / count
        mean_t += t.sum(0) / count
    gram, cross = np.zeros((width_in, width_in)), np.zeros((width_in, width_out))
    for x, t in chunks():
        centred = x - mean_x.astype(np.float32)
        gram += centred.T @ centred
        cross += centred.T @ (t - mean_t.astype(np.float32))
    gram[np.diag_indices(width_in)] += penalty * np.trace(gram) / width_in
    kernel = np.linalg.solve(gram, cross)
    return {
        "kernel": jnp.asarray(kernel, jnp.float32),
        "bias": jnp.asarray(mean_t - mean_x @ kernel, jnp.float32),
    }
