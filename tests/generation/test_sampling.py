"""generation/sampling.py: the penalty, top-k, top-p and the draw, against plain loops over one row at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.generation.sampling import (
    FEW,
    GREEDY,
    TOP_LOGPROBS,
    Sampling,
    SamplingRows,
    change_logits,
    choose,
    make_rows,
    measure_logprobs,
    penalize_repetition,
)
from minigpt4_jax.generation.sampling import keep_likely as keep_likely_by_rows

LOGITS = np.array([[2.0, -1.0, 0.0, 3.0, -0.5], [1.0, 4.0, 3.9, -2.0, 0.5]], np.float32)
SEEN = np.array([[True, True, True, True, False], [False, True, False, False, True]])
NOTHING = np.zeros_like(SEEN)
PLACES = np.array([10, 20], np.int32)


KEEP_LIKELY = jax.jit(keep_likely_by_rows)


def keep_likely(rows: Any, *, top_k: int, top_p: float) -> Any:
    """With one setting for all rows."""
    count = len(rows)
    return KEEP_LIKELY(
        jnp.asarray(rows),
        top_k=jnp.full(count, top_k, jnp.int32),
        top_p=jnp.full(count, top_p, jnp.float32),
    )


@jax.jit
def choose_changed(logits: Any, seen: Any, counts: Any, places: Any, rows: SamplingRows) -> Any:
    return choose(change_logits(logits, seen, counts, rows=rows), places, rows=rows)


def choose_by(
    settings: list[Sampling],
    logits: Any = LOGITS,
    *,
    seen: Any = NOTHING,
    counts: Any = None,
    places: Any = PLACES,
) -> Any:
    """What a step does: logits are changed, then a token is chosen."""
    rows = make_rows(settings, vocab_size=logits.shape[-1])
    counts = np.zeros(logits.shape, np.int32) if counts is None else counts
    given = (jnp.asarray(array) for array in (logits, seen, counts, places))
    return choose_changed(*given, rows)


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
    seen = SEEN & (np.arange(5) != 3)
    found = choose_by([Sampling(repetition_penalty=penalty)] * 2, seen=seen)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == jnp.int32


def test_greedy_ignores_what_was_seen_and_a_penalty_of_one_changes_no_bit() -> None:
    found = choose_by([GREEDY, GREEDY], seen=SEEN)
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
    found = choose_by(
        [Sampling(**sampling, seed=seed) for seed in range(count)],
        np.broadcast_to(LOGITS[0], (count, 5)),
        seen=np.broadcast_to(seen, (count, 5)),
        places=np.full(count, 7, np.int32),
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
    flat, nothing = np.zeros((1, 1000), np.float32), np.zeros((1, 1000), bool)

    def draw(seed: int, place: int) -> int:
        sampling = Sampling(temperature=1.0, seed=seed)
        places = np.asarray([place], np.int32)
        return int(choose_by([sampling], flat, seen=nothing, places=places)[0])

    found = [draw(seed, place) for seed in (0, 1, 2**32 - 1) for place in (1, 2, 3)]
    assert len(set(found)) == 9
    assert found == [draw(seed, place) for seed in (0, 1, 2**32 - 1) for place in (1, 2, 3)]


# --- rows side by side ---


def random_rows(count: int, vocab: int, *, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(21).normal(scale=scale, size=(count, vocab)).astype(np.float32)


@pytest.mark.parametrize("top_k", [0, 1, 50, FEW - 1, FEW, FEW + 1, 900])
@pytest.mark.parametrize("top_p", [1.0, 0.99, 0.9, 0.05])
def test_a_cut_is_the_same_whether_few_tokens_are_looked_at_or_all(
    top_k: int, top_p: float
) -> None:
    # Flat rows need all tokens, steep ones few: both kinds side by side, so that the way by all of them runs.
    rows = np.concatenate([random_rows(3, 1000, scale=0.1), random_rows(3, 1000, scale=5.0)])
    found = np.asarray(keep_likely(rows, top_k=top_k, top_p=top_p))
    for row, kept in zip(rows, found, strict=True):
        assert set(np.flatnonzero(kept > -np.inf).tolist()) == likely_tokens(row, top_k, top_p)


def test_ties_behind_the_few_are_kept_too() -> None:
    row = np.zeros((1, FEW + 50), np.float32)
    row[0, 3] = 5.0
    assert np.isfinite(keep_likely(row, top_k=2, top_p=1.0)).all()


def test_what_a_row_keeps_does_not_depend_on_its_neighbours() -> None:
    steep, flat = random_rows(1, 1000, scale=5.0), random_rows(1, 1000, scale=0.1)
    alone = np.asarray(keep_likely(steep, top_k=0, top_p=0.9))
    beside = np.asarray(keep_likely(np.concatenate([steep, flat]), top_k=0, top_p=0.9))
    np.testing.assert_array_equal(beside[0], alone[0])


def test_every_row_goes_by_its_own_settings() -> None:
    logits = np.tile(LOGITS[1], (6, 1))
    settings = [
        GREEDY,
        Sampling(temperature=100.0, top_k=1, seed=3),
        Sampling(repetition_penalty=10.0),
        Sampling(logit_bias=((4, 50.0),)),
        Sampling(presence_penalty=2.0),
        Sampling(frequency_penalty=0.06),
    ]
    seen = np.zeros(logits.shape, bool)
    seen[2, 1] = True
    counts = np.zeros(logits.shape, np.int32)
    counts[:, 1] = 2  # everybody has written it twice; only the last two mind
    found = choose_by(
        settings, logits, seen=seen, counts=counts, places=np.arange(6, dtype=np.int32)
    )
    assert found.tolist() == [1, 1, 2, 4, 2, 2]


def test_presence_counts_once_and_frequency_every_time() -> None:
    counts = np.asarray([[0, 1, 3, 0, 0]], np.int32)
    logits, nothing = LOGITS[:1], NOTHING[:1]

    def change(**penalty: float) -> np.ndarray:
        rows = make_rows([Sampling(**penalty)], vocab_size=5)
        changed = change_logits(
            jnp.asarray(logits), jnp.asarray(nothing), jnp.asarray(counts), rows=rows
        )
        return np.asarray(changed) - logits

    np.testing.assert_allclose(change(presence_penalty=0.5), [[0, -0.5, -0.5, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(change(frequency_penalty=0.5), [[0, -0.5, -1.5, 0, 0]], atol=1e-6)


def test_min_p_cuts_what_is_far_less_likely_than_the_likeliest() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]], np.float32))
    found = {
        int(choose_by([Sampling(temperature=1.0, min_p=0.25, seed=seed)], logits,
                      seen=np.zeros((1, 4), bool), places=PLACES[:1])[0])
        for seed in range(200)
    }  # fmt: skip
    assert found == {0, 1, 2}


def test_no_step_sorts_the_vocabulary_unless_a_cut_lies_far_down() -> None:
    def sorts(*settings: Sampling) -> bool:
        rows = make_rows(list(settings), vocab_size=1000)
        logits = jnp.asarray(random_rows(len(settings), 1000))
        places = jnp.arange(len(settings), dtype=jnp.int32)
        program = jax.jit(lambda x: choose(x, places, rows=rows)).lower(logits).as_text()
        head, _, _ = program.partition("stablehlo.case")
        assert "stablehlo.sort" in program
        return "stablehlo.sort" in head

    assert not sorts(Sampling(temperature=1.0, top_k=50))
    assert not sorts(GREEDY, Sampling(temperature=1.0, top_p=0.9))


# --- log-probabilities ---


def test_logprobs_are_those_of_the_models_own_logits() -> None:
    logits = random_rows(3, 50)
    tokens = np.asarray([4, 0, 49], np.int32)
    found = measure_logprobs(jnp.asarray(logits), jnp.asarray(tokens))
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.chosen, expected[np.arange(3), tokens], rtol=0, atol=1e-5)
    order = np.argsort(-expected, axis=-1)[:, :TOP_LOGPROBS]
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(
        found.top, np.take_along_axis(expected, order, axis=1), rtol=0, atol=1e-5
    )
