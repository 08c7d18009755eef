"""training/init.py: the closed-form start solves the problem it states; both starts have the size of embeddings."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.training.init import caption_targets, random_projection, ridge_projection

RNG = np.random.default_rng(25)


def test_a_random_start_gives_image_tokens_of_the_size_of_token_embeddings(
    tiny_config: ModelConfig,
) -> None:
    projection = random_projection(tiny_config, jax.random.key(0), embed_std=0.13)
    features = RNG.normal(size=(500, tiny_config.projection_in))
    out = features @ np.asarray(projection["kernel"]) + np.asarray(projection["bias"])
    assert out.std() == pytest.approx(0.13, rel=0.05)


def test_a_caption_is_the_mean_of_its_rare_tokens() -> None:
    embedding = RNG.normal(size=(6, 4)).astype(np.float32)
    # Token 0 is in every caption and must vanish; 1 is in two of three; 2, 3, 4 in one each.
    captions = [[0, 1, 2], [0, 1, 3, 3], [0, 4]]
    often, once = np.log(3 / 2), np.log(3)
    expected = [
        (often * embedding[1] + once * embedding[2]) / (often + once),
        (often * embedding[1] + 2 * once * embedding[3]) / (often + 2 * once),
        embedding[4],
    ]
    np.testing.assert_allclose(caption_targets(captions, embedding), expected, rtol=1e-5)


def test_captions_that_are_all_alike_have_no_target_and_no_nan() -> None:
    found = caption_targets([[1, 2], [1, 2]], np.ones((3, 4), np.float32))
    np.testing.assert_array_equal(found, np.zeros((2, 4)))


@pytest.mark.parametrize("count", [3, 150])
def test_the_closed_form_is_the_least_squares_answer(count: int, tiny_config: ModelConfig) -> None:
    tokens, width_in = tiny_config.num_image_tokens, tiny_config.projection_in
    patches = tiny_config.vit.num_patches
    # A mean far from zero: an answer that forgot to centre would be far off.
    features = (RNG.normal(size=(7, patches, tiny_config.vit.width)) + 1.5).astype(np.float16)
    image_index = RNG.integers(0, 7, count)
    targets = RNG.normal(size=(count, tiny_config.llama.width)).astype(np.float32) + 0.3
    within, penalty = 0.1, 0.05
    projection = ridge_projection(
        tiny_config, features, image_index, targets, within=within, penalty=penalty
    )

    groups = features[image_index].astype(np.float64).reshape(count, tokens, width_in)
    means = groups.mean(1)
    centred = means - means.mean(0)
    scatter = (groups - means[:, None]).reshape(-1, width_in)
    variance = (centred**2).sum() / width_in
    rows = [
        centred,
        (within / tokens) ** 0.5 * scatter,
        (penalty * variance) ** 0.5 * np.eye(width_in),
    ]
    wanted = np.zeros((sum(map(len, rows)), targets.shape[1]))
    wanted[:count] = targets - targets.mean(0)
    kernel, *_ = np.linalg.lstsq(np.concatenate(rows), wanted, rcond=None)
    np.testing.assert_allclose(projection["kernel"], kernel, rtol=0, atol=2e-4)
    bias = targets.mean(0) - means.mean(0) @ kernel
    np.testing.assert_allclose(projection["bias"], bias, rtol=0, atol=5e-3)


def test_less_penalty_fits_the_pictures_better(tiny_config: ModelConfig) -> None:
    features: Any = RNG.normal(size=(20, tiny_config.vit.num_patches, tiny_config.vit.width))
    features = features.astype(np.float16)
    targets = RNG.normal(size=(20, tiny_config.llama.width)).astype(np.float32)

    def residual(penalty: float) -> float:
        projection = ridge_projection(
            tiny_config, features, np.arange(20), targets, within=0.0, penalty=penalty
        )
        shape = (20, tiny_config.num_image_tokens, tiny_config.projection_in)
        means = features.astype(np.float32).reshape(shape).mean(1)
        out = means @ np.asarray(projection["kernel"]) + np.asarray(projection["bias"])
        return float(((out - targets) ** 2).mean())

    found = [residual(penalty) for penalty in (10.0, 0.1, 1e-4)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 1e-3 * float(targets.var())
