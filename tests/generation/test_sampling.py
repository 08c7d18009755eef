"""generation/sampling.py: greedy choice and the repetition penalty, against plain loops."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.generation.sampling import GREEDY, Sampling, choose, penalize_repetition

LOGITS = np.array([[2.0, -1.0, 0.0, 3.0, -0.5], [1.0, 4.0, 3.9, -2.0, 0.5]], np.float32)
SEEN = np.array([[True, True, True, True, False], [False, True, False, False, True]])


def test_seen_tokens_become_less_likely_whatever_their_sign() -> None:
    expected = LOGITS.copy()
    for row, column in zip(*np.nonzero(SEEN), strict=True):
        value = LOGITS[row, column]
        expected[row, column] = value / 1.5 if value > 0 else value * 1.5
    found = penalize_repetition(jnp.asarray(LOGITS), jnp.asarray(SEEN), penalty=1.5)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (np.asarray(found) <= LOGITS).all()


@pytest.mark.parametrize(("penalty", "expected"), [(1.0, [3, 1]), (1.2, [3, 2]), (10.0, [3, 2])])
def test_the_choice_is_the_largest_penalized_logit(penalty: float, expected: list[int]) -> None:
    sampling = Sampling(repetition_penalty=penalty)
    seen = jnp.asarray(SEEN & (np.arange(5) != 3))
    found = choose(jnp.asarray(LOGITS), seen, sampling=sampling)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == jnp.int32


def test_greedy_ignores_what_was_seen() -> None:
    found = choose(jnp.asarray(LOGITS), jnp.asarray(SEEN), sampling=GREEDY)
    np.testing.assert_array_equal(found, [3, 1])


@pytest.mark.parametrize("penalty", [0.0, -1.0, float("nan")])
def test_a_penalty_that_is_no_factor_is_refused(penalty: float) -> None:
    with pytest.raises(UserError, match="expected a number above 0"):
        Sampling(repetition_penalty=penalty)
