"""training/loss.py against the definition in float64."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from minigpt4_jax.training.loss import cross_entropy, cross_entropy_per_sample

RNG = np.random.default_rng(20)
LOGITS = (RNG.normal(size=(3, 4, 11)) * 5).astype(np.float32)
TARGETS = RNG.integers(0, 11, (3, 4)).astype(np.int32)
MASK = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], bool)


def loss(logits: np.ndarray, targets: np.ndarray, mask: np.ndarray) -> float:
    return float(cross_entropy(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(mask)))


def test_the_loss_is_the_mean_over_all_counted_targets_of_the_batch() -> None:
    # Not the mean of the rows' means: a long answer weighs more, as in the original.
    wide = LOGITS.astype(np.float64)
    terms = [
        np.log(np.exp(wide[b, a]).sum()) - wide[b, a, TARGETS[b, a]]
        for b, a in zip(*np.nonzero(MASK), strict=True)
    ]
    assert len(terms) == 7
    np.testing.assert_allclose(loss(LOGITS, TARGETS, MASK), np.mean(terms), rtol=1e-5)


def test_padding_targets_count_nothing_whatever_they_are() -> None:
    before = loss(LOGITS, TARGETS, MASK)
    for garbage in (0, -100, 10**6):
        assert loss(LOGITS, np.where(MASK, TARGETS, garbage).astype(np.int32), MASK) == before
    changed = np.where(MASK[:, :, None], LOGITS, 1e4).astype(np.float32)
    assert loss(changed, TARGETS, MASK) == before


def test_a_batch_without_targets_has_no_loss_and_no_nan() -> None:
    assert loss(LOGITS, TARGETS, np.zeros_like(MASK)) == 0.0


def test_narrow_logits_are_reduced_in_float32() -> None:
    narrow = jnp.asarray(LOGITS, jnp.bfloat16)
    found = cross_entropy(narrow, jnp.asarray(TARGETS), jnp.asarray(MASK))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
        float(found), loss(np.asarray(narrow, np.float32), TARGETS, MASK), rtol=1e-6
    )


def test_per_sample_divides_by_all_places_of_the_padded_row() -> None:
    found = cross_entropy_per_sample(
        jnp.asarray(LOGITS), jnp.asarray(TARGETS), jnp.asarray(MASK), length=9
    )
    rows = [loss(LOGITS[b : b + 1], TARGETS[b : b + 1], MASK[b : b + 1]) for b in range(3)]
    np.testing.assert_allclose(
        found, [rows[0] * 4 / 8, rows[1] * 1 / 8, rows[2] * 2 / 8], rtol=1e-5
    )
