"""generation/programs.py: which compiled size something runs with, and what is wanted instead."""

from __future__ import annotations

from typing import Any

import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.generation.programs import Key, NotCompiled, Program, Programs
from tests.engines import make_engine


def compiled(name: str, *keys: Key) -> Programs:
    """Closed, with programs of these sizes."""
    programs = Programs()
    for key in keys:
        programs.get(name, key, lambda: Program(compiled=None, in_tree=None, out_tree=None))
    programs.closed = True
    return programs


def wanted(programs: Programs) -> list[Any]:
    found = []
    while programs.left:
        with programs.next_wanted(timeout_s=1.0) as size:
            found.append(size)
    return found


def test_the_cheapest_size_that_is_large_enough_is_chosen() -> None:
    programs = compiled("insert", (1, 2048), (2, 192), (4, 128))
    assert programs.choose("insert", (1, 150)) == (2, 192)
    assert programs.choose("insert", (1, 100)) == (2, 192)
    assert programs.choose("insert", (3, 100)) == (4, 128)
    assert programs.choose("insert", (1, 300)) == (1, 2048)
    with pytest.raises(NotCompiled, match="4, 300"):
        programs.choose("insert", (4, 300))


def test_a_size_without_sampling_counts_no_less_than_one_with_it() -> None:
    programs = compiled("decode", (8, 2048, 0), (1, 128, 1))
    assert programs.choose("decode", (1, 100, 0)) == (1, 128, 1)


def test_what_was_not_there_is_wanted_once() -> None:
    programs = compiled("insert", (4, 2048))
    for _ in range(2):
        for key in [(1, 64), (4, 2048), (2, 64)]:
            programs.choose("insert", key)
    assert programs.left == 2
    assert wanted(programs) == [("insert", (1, 64)), ("insert", (2, 64))]
    programs.choose("insert", (1, 64))
    assert programs.left == 0


def test_prompts_are_read_with_the_fewest_tokens_for_each(
    tiny_params: Any, tiny_config: ModelConfig
) -> None:
    runner = make_engine(tiny_params, tiny_config, context=200, num_slots=4)._runner
    runner.programs = compiled("insert", (1, 200), (2, 128), (4, 48), (1, 96))
    assert runner.prompt_key(4, 40) == (4, 48)
    assert runner.prompt_key(2, 40) == (4, 48)  # two of 40 cost 96 each that way, 128 the other
    assert runner.prompt_key(2, 90) == (1, 96)
    assert runner.prompt_key(2, 100) == (2, 128)
    assert runner.prompt_key(4, 190) == (1, 200)
    # Of each group what it would have run with, and none of the sizes that it fell back to.
    assert wanted(runner.programs) == [
        ("insert", (4, 40)),
        ("insert", (2, 40)),
        ("insert", (2, 96)),
        ("insert", (4, 192)),
    ]
