"""generation/beam_search.py: its programs are compiled beside whoever drives the search, and not kept without bound."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.generation import beam_search
from minigpt4_jax.generation.beam_search import BeamSteps, Hypothesis
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.programs import compile_program
from tests.engines import counted_compiles, make_engine, make_request

LIMIT_S = 60.0


@pytest.fixture(scope="module")
def engine(tiny_params: Any, tiny_config: ModelConfig) -> Engine:
    return make_engine(tiny_params, tiny_config, context=32, num_slots=1)


def find(engine: Engine, *, num_beams: int) -> list[list[int]]:
    request = make_request(([5, 6, 7], None), steps=4)
    (found,) = engine.beam_search([request], num_beams=num_beams)
    return [hypothesis.ids for hypothesis in found]


def rest_of(search: BeamSteps) -> list[list[Hypothesis]]:
    found: list[list[Hypothesis]]
    while True:
        try:
            next(search)
        except StopIteration as end:
            found = end.value
            return found


def test_answers_under_way_go_on_while_a_search_waits_for_the_compiler(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = find(engine, num_beams=2)
    gate = threading.Event()

    def compile_late(*args: Any, **settings: Any) -> Any:
        assert gate.wait(LIMIT_S)
        return compile_program(*args, **settings)

    monkeypatch.setattr(beam_search, "compile_program", compile_late)
    engine._beams._compiled.clear()
    (answer,) = engine.submit(make_request(([8, 9], None), steps=20))
    search = engine.beam_steps([make_request(([5, 6, 7], None), steps=4)], num_beams=2)
    while not answer.finished:
        next(search)
        engine.step()
    gate.set()
    (found,) = rest_of(search)
    assert [hypothesis.ids for hypothesis in found] == expected


def test_what_could_not_be_compiled_is_tried_again(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = find(engine, num_beams=2)
    engine._beams._compiled.clear()

    def fail(*args: Any, **settings: Any) -> Any:
        raise MemoryError("no room for it")

    with monkeypatch.context() as patch:
        patch.setattr(beam_search, "compile_program", fail)
        with pytest.raises(MemoryError):
            find(engine, num_beams=2)
    assert find(engine, num_beams=2) == expected


def test_programs_of_the_searches_of_long_ago_are_dropped(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beam_search, "MOST_KEPT", 3)  # start, step and rank of one search
    for num_beams in (2, 3):
        find(engine, num_beams=num_beams)
        with counted_compiles() as compiles:
            find(engine, num_beams=num_beams)
            assert compiles == []
    assert len(engine._beams._compiled) == 3
