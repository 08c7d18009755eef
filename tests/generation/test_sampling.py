"""generation/sampling.py: the penalty, top-k, top-p and the draw, against plain loops over one row at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.generation.sampling import (
    GREEDY,
    choose,
    keep_likely,
    make_sampling,
    penalize_repetition,
)

LOGITS = np.array([[2.0, -1.0, 0.0, 3.0, -0.5], [1.0, 4.0, 3.9, -2.0, 0.5]], np.float32)
SEEN = np.array([[True, True, True, True, False], [False, True, False, False, True]])
NOTHING = np.zeros_like(SEEN)
PLACES = np.array([10, 20], np.int32)


def likely_tokens(row: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Top-k and then top-p of one row, one token after the other from the likeliest on. Without ties."""
    order = [int(token) for token in np.argsort(-row)][: top_k or None]
    weights = np.exp(row[order].astype(np.float64) - row.max())
    kept: set[int] = set()
    reached = 0.0
    for token, share in zip(order, weights / weights.sum(), strict=True):
        if reached >= top_p < 1:
            break
        kept.add(token)
        reached += share
    return kept


# --- the repetition penalty and the greedy choice ---


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
    sampling = make_sampling(repetition_penalty=penalty)
    seen = jnp.asarray(SEEN & (np.arange(5) != 3))
    found = choose(jnp.asarray(LOGITS), seen, jnp.asarray(PLACES), sampling=sampling)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == jnp.int32


def test_greedy_ignores_what_was_seen_and_a_penalty_of_one_changes_no_bit() -> None:
    found = choose(jnp.asarray(LOGITS), jnp.asarray(SEEN), jnp.asarray(PLACES), sampling=GREEDY)
    np.testing.assert_array_equal(found, [3, 1])
    same = penalize_repetition(jnp.asarray(LOGITS), jnp.asarray(SEEN), penalty=np.float32(1))
    np.testing.assert_array_equal(same, LOGITS)


# --- top-k and top-p ---


@pytest.mark.parametrize("top_k", [0, 1, 5, 50, 61, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.9, 0.5, 0.05])
def test_likely_tokens_are_those_of_a_plain_loop(top_k: int, top_p: float) -> None:
    rows = np.random.default_rng(20).normal(scale=2, size=(4, 61)).astype(np.float32)
    found = np.asarray(keep_likely(jnp.asarray(rows), top_k=top_k, top_p=top_p))
    for row, kept in zip(rows, found, strict=True):
        expected = likely_tokens(row, top_k, top_p)
        assert set(np.flatnonzero(kept > -np.inf).tolist()) == expected
        np.testing.assert_array_equal(kept[sorted(expected)], row[sorted(expected)])


def test_top_p_counts_only_what_top_k_left() -> None:
    row = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    # Of all four, 0.6 is reached with the second token; of the best two alone, the first has 0.57.
    assert np.isfinite(keep_likely(jnp.asarray(row), top_k=0, top_p=0.6)).sum() == 2
    assert np.isfinite(keep_likely(jnp.asarray(row), top_k=2, top_p=0.56)).sum() == 1
    assert np.isfinite(keep_likely(jnp.asarray(row), top_k=0, top_p=0.56)).sum() == 2


def test_ties_with_the_last_likely_token_are_kept() -> None:
    row = jnp.asarray([[1.0, 3.0, 1.0, 0.0]])
    assert np.isfinite(keep_likely(row, top_k=2, top_p=1.0)).tolist() == [[True, True, True, False]]
    assert np.isfinite(keep_likely(row, top_k=0, top_p=0.8)).tolist() == [[True, True, True, False]]


def test_a_token_far_below_the_others_is_kept_where_nothing_is_cut() -> None:
    row = jnp.asarray([[0.0, -200.0]])
    np.testing.assert_array_equal(keep_likely(row, top_k=0, top_p=1.0), row)


# --- the draw ---


def draws(sampling: dict[str, Any], *, count: int, seen: np.ndarray = NOTHING[:1]) -> np.ndarray:
    """How often each token of the first row of `LOGITS` is drawn, over `count` seeds."""
    rows = jnp.broadcast_to(jnp.asarray(LOGITS[0]), (count, 5))
    found = choose(
        rows,
        jnp.broadcast_to(jnp.asarray(seen), (count, 5)),
        jnp.full(count, 7, jnp.int32),
        sampling=make_sampling(**sampling, seeds=range(count)),
    )
    assert found.dtype == jnp.int32
    return np.bincount(np.asarray(found), minlength=5)


def test_tokens_are_drawn_as_often_as_the_knobs_say() -> None:
    count, knobs = 20000, {"temperature": 2.0, "top_k": 4, "top_p": 0.9}
    penalized = np.where(
        SEEN[0], np.where(LOGITS[0] < 0, LOGITS[0] * 1.3, LOGITS[0] / 1.3), LOGITS[0]
    )
    kept = likely_tokens(penalized / 2, 4, 0.9)
    assert 1 < len(kept) < 5
    weights = np.where(np.isin(np.arange(5), list(kept)), np.exp(penalized / 2), 0)
    expected = weights / weights.sum()
    found = draws({**knobs, "repetition_penalty": 1.3}, count=count, seen=SEEN[:1]) / count
    # Five standard deviations of a binomial share, and never a token that was cut.
    np.testing.assert_allclose(found, expected, rtol=0, atol=5 * 0.5 / count**0.5)
    assert (found[expected == 0] == 0).all()


def test_places_and_seeds_make_different_draws() -> None:
    flat = jnp.zeros((1, 1000))

    def draw(seed: int, place: int) -> int:
        sampling = make_sampling(temperature=1.0, seeds=[seed])
        seen, places = jnp.zeros((1, 1000), bool), jnp.asarray([place], jnp.int32)
        return int(choose(flat, seen, places, sampling=sampling)[0])

    found = [draw(seed, place) for seed in (0, 1, 2**32 - 1) for place in (1, 2, 3)]
    assert len(set(found)) == 9
    assert found == [draw(seed, place) for seed in (0, 1, 2**32 - 1) for place in (1, 2, 3)]


def test_a_greedy_step_never_sorts_the_vocabulary() -> None:
    def program(**knobs: Any) -> str:
        sampling = make_sampling(**knobs, seeds=[1, 2])
        step = jax.make_jaxpr(lambda x, s: choose(x, x > 9, jnp.asarray(PLACES), sampling=s))
        return str(step(jnp.asarray(LOGITS), sampling))

    assert " sort[" in program(temperature=1.0)
    assert " sort[" not in program(repetition_penalty=1.5)
