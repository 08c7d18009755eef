"""generation/beam.py through `Engine.beam_search`: against every sequence of a tiny vocabulary, and against the rules
of transformers 4.30 written down a second time, as plain loops over lists."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.generation.beam import BeamRules, beam_step, rank, start_beams
from minigpt4_jax.generation.beam_search import Hypothesis
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.sampling import Sampling
from minigpt4_jax.models.attention import make_causal_mask
from minigpt4_jax.models.kv_cache import init_cache
from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.minigpt4 import abstract_params, make_model
from tests.engines import answer, counted_compiles, make_engine, make_request

VOCAB, STEPS, STOP = 5, 5, 1
CONTEXT = 100
ATOL = 2e-5  # sums of up to ten log-probabilities that other shapes of matmul computed

Answer = tuple[tuple[int, ...], float]
LogProbs = Callable[[tuple[int, ...]], np.ndarray]


@pytest.fixture(scope="module")
def small_config(tiny_config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(
        tiny_config, llama=dataclasses.replace(tiny_config.llama, vocab_size=VOCAB)
    )


@pytest.fixture(scope="module")
def small_params(small_config: ModelConfig, draw_params: Any) -> Any:
    """Random, and less decided than usual: the token that stops has a chance everywhere."""
    params = draw_params(abstract_params(small_config))
    params["llama"]["norm"]["scale"] *= 0.6
    return params


@pytest.fixture(scope="module")
def small(small_params: Any, small_config: ModelConfig) -> Engine:
    return make_engine(small_params, small_config, context=32)


@pytest.fixture(scope="module")
def small_prompts() -> list[list[int]]:
    rng = np.random.default_rng(21)
    return [rng.integers(0, VOCAB, length).tolist() for length in (1, 3, 6, 6, 9, 11)]


@pytest.fixture(scope="module")
def log_probs(
    small_params: Any, small_config: ModelConfig, small_prompts: list[list[int]]
) -> list[LogProbs]:
    """For each prompt a function from what was written so far to the log-probabilities of the next token, all of them
    computed beforehand by the whole model over every sequence, without a cache."""
    model = make_model(small_config, layout=DISK, dtype=jnp.float32)

    @jax.jit
    def run(token_ids: jax.Array) -> jax.Array:
        variables = {"params": small_params}
        embeds = model.apply(variables, token_ids, None, method="embed_prompt")
        hidden, _, _ = model.apply(
            variables,
            embeds,
            positions=jnp.broadcast_to(jnp.arange(token_ids.shape[1])[None], token_ids.shape),
            mask=make_causal_mask(jnp.ones(token_ids.shape, bool)),
            caches=None,
            method="decode",
        )
        return jax.nn.log_softmax(model.apply(variables, hidden, method="head"))

    every = list(itertools.product(range(VOCAB), repeat=STEPS - 1))

    def make(prompt: list[int]) -> LogProbs:
        found = np.asarray(run(jnp.asarray([[*prompt, *written] for written in every])))
        table = {
            written[:length]: found[row, len(prompt) - 1 + length]
            for row, written in enumerate(every)
            for length in range(STEPS)
        }
        return table.__getitem__

    return [make(prompt) for prompt in small_prompts]


def penalized(log_probs: LogProbs, written: tuple[int, ...], penalty: float) -> np.ndarray:
    scores = log_probs(written).copy()
    scores[list(set(written))] *= penalty
    return scores


def every_answer(log_probs: LogProbs, *, length_penalty: float, penalty: float) -> list[Answer]:
    """All answers there are, best first: those that end with the stop, and those cut off at `STEPS` tokens."""
    answers = []
    for length in range(1, STEPS + 1):
        for ids in itertools.product(range(VOCAB), repeat=length):
            if STOP in ids[:-1] or (ids[-1] != STOP and length < STEPS):
                continue
            total = sum(penalized(log_probs, ids[:at], penalty)[ids[at]] for at in range(length))
            counted = 1 + length - (ids[-1] == STOP)
            answers.append((ids, total / counted**length_penalty))
    return sorted(answers, key=lambda answer: -answer[1])


def search(
    log_probs: LogProbs, *, num_beams: int, length_penalty: float, penalty: float
) -> tuple[list[Answer], int]:
    """The rules, and how many steps they took."""
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    finished: list[Answer] = []

    def add(ids: tuple[int, ...], score: float) -> None:
        finished.append((ids, score))
        finished.sort(key=lambda answer: -answer[1])
        del finished[num_beams:]

    for step in range(STEPS):
        length = 1 + step
        candidates = sorted(
            (
                (total + penalized(log_probs, ids, penalty)[token], (*ids, token))
                for total, ids in beams
                for token in range(VOCAB)
            ),
            reverse=True,
        )[: 2 * num_beams]
        beams = []
        for place, (total, ids) in enumerate(candidates):
            if ids[-1] != STOP:
                beams.append((total, ids))
            elif place < num_beams:
                add(ids, total / length**length_penalty)
            if len(beams) == num_beams:
                break
        hope = candidates[0][0] / (length + 1) ** length_penalty
        if len(finished) == num_beams and finished[-1][1] >= hope:
            return finished, step + 1
    for total, ids in beams:
        add(ids, total / (1 + STEPS) ** length_penalty)
    return finished, STEPS


def assert_same(found: Sequence[Hypothesis], expected: Sequence[Answer]) -> None:
    assert [tuple(ids) for ids, _ in found] == [ids for ids, _ in expected]
    np.testing.assert_allclose(
        [score for _, score in found], [score for _, score in expected], rtol=0, atol=ATOL
    )


def run(engine: Engine, prompts: Sequence[Any], **changes: Any) -> list[list[Hypothesis]]:
    settings = {"max_new_tokens": STEPS, "stop_tokens": {STOP}, **changes}
    return search_with(engine, [(ids, None) for ids in prompts], **settings)


def search_with(
    engine: Engine,
    prompts: Sequence[Any],
    *,
    num_beams: int = 3,
    length_penalty: float = 1.0,
    repetition_penalty: float = 1.0,
    max_new_tokens: int,
    **changes: Any,
) -> list[list[Hypothesis]]:
    sampling = Sampling(repetition_penalty=repetition_penalty)
    requests = [
        make_request(prompt, steps=max_new_tokens, sampling=sampling, **changes)
        for prompt in prompts
    ]
    return engine.beam_search(requests, num_beams=num_beams, length_penalty=length_penalty)


PENALTIES = [(1.0, 1.0), (0.6, 1.0), (0.0, 1.0), (2.0, 1.0), (-1.0, 1.0), (1.0, 1.3), (0.6, 0.8)]


@pytest.mark.parametrize(("length_penalty", "penalty"), PENALTIES)
def test_enough_beams_find_the_best_of_all_answers(
    length_penalty: float,
    penalty: float,
    small: Engine,
    small_prompts: list[list[int]],
    log_probs: list[LogProbs],
) -> None:
    # As many beams as there are answers of `STEPS` tokens without a stop.
    found = run(
        small,
        small_prompts[:3],
        num_beams=(VOCAB - 1) ** STEPS,
        length_penalty=length_penalty,
        repetition_penalty=penalty,
    )
    ended = 0
    for hypotheses, of_prompt in zip(found, log_probs[:3], strict=True):
        expected = every_answer(of_prompt, length_penalty=length_penalty, penalty=penalty)
        assert_same(hypotheses[:30], expected[:30])
        ended += sum(STOP in ids for ids, _ in expected[:30])
    assert ended, "no answer that ends by itself is compared; the test shows little"


@pytest.mark.parametrize("num_beams", [1, 2, 3, 6])
@pytest.mark.parametrize(("length_penalty", "penalty"), PENALTIES)
def test_few_beams_find_what_the_rules_say(
    num_beams: int,
    length_penalty: float,
    penalty: float,
    small: Engine,
    small_prompts: list[list[int]],
    log_probs: list[LogProbs],
) -> None:
    settings: dict[str, Any] = {"num_beams": num_beams, "length_penalty": length_penalty}
    found = run(small, small_prompts, repetition_penalty=penalty, **settings)
    for hypotheses, of_prompt in zip(found, log_probs, strict=True):
        assert_same(hypotheses, search(of_prompt, penalty=penalty, **settings)[0])


def test_the_rules_leave_rows_that_end_early_and_answers_that_are_not_the_best(
    log_probs: list[LogProbs],
) -> None:
    """Otherwise the comparison above shows little."""
    steps, missed = set(), 0
    for of_prompt in log_probs:
        for length_penalty, penalty in PENALTIES:
            settings = {"length_penalty": length_penalty, "penalty": penalty}
            best, taken = search(of_prompt, num_beams=2, **settings)
            steps.add(taken)
            missed += [ids for ids, _ in best] != [
                ids for ids, _ in every_answer(of_prompt, **settings)[:2]
            ]
    assert len(steps) > 2
    assert missed


def test_a_search_ends_when_all_rows_are_settled(
    small: Engine,
    small_prompts: list[list[int]],
    log_probs: list[LogProbs],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: dict[str, Any] = {"num_beams": 2, "length_penalty": 0.0}
    taken = [search(of_prompt, penalty=1.0, **settings)[1] for of_prompt in log_probs]
    assert min(taken) < STEPS
    steps: list[int] = []
    real = small._beams._step

    def count(*args: Any) -> Any:
        steps.append(1)
        return real(*args)

    monkeypatch.setattr(small._beams, "_step", count)
    for prompt, expected in zip(small_prompts, taken, strict=True):
        steps.clear()
        run(small, [prompt], **settings)
        assert len(steps) == expected - 1  # the first token comes with the prompt


def test_a_row_that_is_settled_takes_no_further_answers(small: Engine) -> None:
    config = small.config.llama
    rules = BeamRules(
        stops=np.arange(VOCAB) == STOP,
        length_penalty=np.float32(1.0),
        repetition_penalty=np.float32(1.0),
        length_before=np.int32(1),
    )
    state = start_beams(
        jnp.zeros((2, VOCAB)),
        init_cache(config, 2, capacity=8, dtype=jnp.float32),
        jnp.ones(2, jnp.int32),
        jnp.zeros((2, VOCAB), bool),
        rules,
        num_beams=VOCAB - 1,
        places=8,
    )
    state = dataclasses.replace(state, done=jnp.asarray([True, False]))
    before = np.asarray(state.finished.scores)
    likely = dataclasses.replace(
        rules, stops=np.ones(VOCAB, bool)
    )  # whatever comes next ends an answer
    after = beam_step(small._runner.params, state, likely, model=small._runner.model)
    np.testing.assert_array_equal(after.finished.scores[0], before[0])
    assert (np.asarray(after.finished.scores[1]) > before[1]).any()
    np.testing.assert_array_equal(rank(after, likely).scores[0], before[0])


def test_there_are_no_more_answers_than_a_tiny_vocabulary_has(
    small: Engine, small_prompts: list[list[int]]
) -> None:
    (found,) = run(small, small_prompts[:1], num_beams=9, max_new_tokens=1)
    assert sorted(ids for ids, _ in found) == [[token] for token in range(VOCAB)]
    assert all(math.isfinite(score) for _, score in found)


def test_every_stop_token_ends_an_answer(small: Engine, small_prompts: list[list[int]]) -> None:
    stops, ends = {0, 1, 3}, set()
    for hypotheses in run(small, small_prompts, num_beams=4, stop_tokens=stops):
        assert len(hypotheses) == 4
        for ids, _ in hypotheses:
            assert not stops & set(ids[:-1])
            assert ids[-1] in stops or len(ids) == STEPS
            ends.add(ids[-1])
    assert len(ends & stops) > 1


def test_what_counts_as_written_is_penalized_from_the_first_token(
    small: Engine, small_prompts: list[list[int]], log_probs: list[LogProbs]
) -> None:
    first = log_probs[0](())
    (found,) = run(
        small,
        small_prompts[:1],
        num_beams=VOCAB,
        max_new_tokens=1,
        stop_tokens=(),
        length_penalty=0.0,
        repetition_penalty=1.7,
        written=[1, 4],
    )
    expected = {(t,): first[t] * (1.7 if t in (1, 4) else 1.0) for t in range(VOCAB)}
    for ids, score in found:
        assert score == pytest.approx(expected[tuple(ids)], abs=ATOL)


# --- with pictures, in batches ---


@pytest.fixture(scope="module")
def engine(tiny_params: Any, tiny_config: ModelConfig) -> Engine:
    return make_engine(tiny_params, tiny_config, context=CONTEXT)


def find(engine: Engine, prompts: Sequence[Any], **changes: Any) -> list[list[Hypothesis]]:
    return search_with(engine, prompts, **{"max_new_tokens": 10, "stop_tokens": {3}, **changes})


def test_one_beam_that_no_token_stops_is_greedy(engine: Engine, prompts: Any) -> None:
    found = find(engine, prompts, num_beams=1, stop_tokens=())
    for ((ids, _),), (prompt, embeds) in zip(found, prompts, strict=True):
        assert ids == answer(engine, (prompt, embeds))


def test_scores_are_those_of_the_full_model(engine: Engine, prompts: Any, full_logits: Any) -> None:
    found = find(engine, prompts, length_penalty=0.7)
    assert len({tuple(ids) for row in found for ids, _ in row}) == 3 * len(prompts)
    for hypotheses, (prompt, embeds) in zip(found, prompts, strict=True):
        assert [score for _, score in hypotheses] == sorted(
            (score for _, score in hypotheses), reverse=True
        )
        for ids, score in hypotheses:
            whole = jax.nn.log_softmax(full_logits([*prompt, *ids], embeds))[len(prompt) - 1 : -1]
            total = sum(float(row[token]) for row, token in zip(whole, ids, strict=True))
            length = 1 + len(ids) - (ids[-1] == 3)
            assert score == pytest.approx(total / length**0.7, abs=5e-5)


def test_rows_of_a_batch_are_searched_as_if_alone(engine: Engine, prompts: Any) -> None:
    alone = [find(engine, [prompt])[0] for prompt in prompts]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0]):
        together = find(engine, [prompts[row] for row in order])
        for found, row in zip(together, order, strict=True):
            assert [ids for ids, _ in found] == [ids for ids, _ in alone[row]]
            np.testing.assert_allclose(
                [score for _, score in found], [score for _, score in alone[row]], rtol=0, atol=ATOL
            )


def test_a_prompt_is_read_once_however_many_beams(engine: Engine, prompts: Any) -> None:
    before = engine.counters.prefills
    find(engine, prompts, num_beams=5)
    assert engine.counters.prefills == before + 1


def test_nothing_compiles_again_for_another_prompt_or_setting(
    tiny_params: Any, tiny_config: ModelConfig, prompts: Any
) -> None:
    fresh = make_engine(tiny_params, tiny_config, context=CONTEXT)
    with counted_compiles() as compiles:
        find(fresh, prompts[:1])
        assert compiles, "the listener hears nothing; the test shows nothing"
        compiles.clear()
        find(fresh, prompts[2:3], max_new_tokens=17)
        find(fresh, prompts[:1], length_penalty=0.2, repetition_penalty=1.4, written=[1, 2])
        find(fresh, prompts[:1], stop_tokens={5, 6, 7}, max_new_tokens=1)
        assert compiles == []
        find(fresh, prompts[:1], num_beams=4)
        assert compiles, "another number of beams is another program"


def test_ctrl_c_inside_a_step_leaves_an_engine_that_answers(
    engine: Engine, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = find(engine, prompts)
    real = engine._beams._step

    def interrupted(*args: Any) -> Any:
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine._beams, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            find(engine, prompts)
    assert find(engine, prompts) == expected


def test_answers_and_a_search_go_on_side_by_side_and_change_nothing_of_each_other(
    engine: Engine, prompts: Any
) -> None:
    (expected,) = find(engine, prompts[:1])
    request = make_request(prompts[1], steps=30, sampling=Sampling(temperature=1.5, seed=3))
    alone = list(engine.stream(request))
    (generation,) = engine.submit(request)
    pieces, found = 0, []

    def search() -> Iterator[None]:
        request = make_request(prompts[0], steps=10, stop_tokens={3})
        found.extend((yield from engine.beam_steps([request], num_beams=3)))

    for _ in search():
        pieces += 1
        engine.step()
    assert found == [expected]
    # Its prompt, its first token, and each of the others.
    assert pieces == 11
    assert len(generation.ids) >= 10
    while not generation.finished:
        engine.step()
    assert generation.ids == alone
    given_up = engine.beam_steps([make_request(prompts[0], steps=12)], num_beams=3)
    next(given_up)
    given_up.close()
    assert find(engine, prompts[:1]) == [expected]


def test_placeholders_and_the_context_are_checked_as_for_other_answers(engine: Engine) -> None:
    with pytest.raises(ValueError, match="prompt has 1 image slots and 0 image embeddings"):
        run(engine, [[1, IMAGE_TOKEN_ID]])
    with pytest.raises(ValueError, match=f"98 tokens and 5 new.*at most {CONTEXT}"):
        run(engine, [[1] * 98])
