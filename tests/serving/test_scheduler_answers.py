"""minigpt4_jax.serving.scheduler on the tiny model: what it tells is what `MiniGPT4.generate` gives."""

from __future__ import annotations

from typing import Any

import pytest

from minigpt4_jax import GenerationConfig, MiniGPT4
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.serve_config import CompileBeside
from minigpt4_jax.serving.jobs import Piece
from tests.serving.fakes import LIMIT_S, Bench, Listener, running, wait_until
from tests.tiny_model import load_tiny, write_tiny_projection

# The penalty keeps a random model from saying one letter over and over, whatever it sees.
SHORT = GenerationConfig(max_new_tokens=12, repetition_penalty=3.0)
DRAWN = GenerationConfig(max_new_tokens=12, temperature=5.0, top_k=20, seed=11)


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_config: ModelConfig,
    tiny_params: Any,
    tokenizer: Tokenizer,
) -> MiniGPT4:
    """Its core compiled, in the sizes of the other tests' servers: what one compiled, the next one finds."""
    path = tmp_path_factory.mktemp("projection") / "tiny.safetensors"
    write_tiny_projection(path, tiny_params, config=tiny_config)
    model = load_tiny(tiny_params, tokenizer, projection=path, context=128, num_slots=4)
    model.engine.compile_core()
    return model


@pytest.fixture
def bench(model: MiniGPT4) -> Bench:
    bench = Bench(model)
    bench.scheduler.prepare()
    return bench


@pytest.mark.parametrize("generation", [SHORT, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("stream", [True, False])
def test_the_pieces_are_the_answer_of_generate(
    stream: bool, generation: GenerationConfig, bench: Bench, model: MiniGPT4, pictures: Any
) -> None:
    ((expected,),) = model.generate([pictures[:2]], ["Compare."], generation=generation, n=1)
    _, heard = bench.submit("Compare.", pictures=pictures[:2], generation=generation, stream=stream)
    bench.finish()
    assert heard.text() == expected.text != ""
    assert (len(heard.pieces) > 1) == stream
    assert heard.done
    assert heard.mistakes == []
    assert heard.ends[0].num_tokens == len(expected.ids)
    assert heard.ends[0].finish_reason == expected.finish_reason == "length"


def test_many_jobs_at_once_get_the_answers_that_they_get_alone(
    bench: Bench, model: MiniGPT4, pictures: Any
) -> None:
    questions = [f"What is it, asked for the {i}th time{'?' * i}" for i in range(7)]
    shown = [pictures[i % 3 : i % 3 + i % 2] for i in range(7)]
    alone = []
    for picture, question in zip(shown, questions, strict=True):
        alone += model.generate([picture], [question], generation=DRAWN)
    heard: list[Listener] = []
    for picture, question in zip(shown, questions, strict=True):
        heard.append(bench.submit(question, pictures=picture, generation=DRAWN)[1])
        bench.turns(2)
    bench.finish()
    assert [one.text() for one in heard] == alone
    assert bench.scheduler.leaks == 0


def test_several_answers_and_their_logprobs_are_those_of_generate(
    bench: Bench, model: MiniGPT4, pictures: Any
) -> None:
    # More answers than slots: the last ones begin when others have ended.
    (expected,) = model.generate(pictures[:1], ["Why?"], generation=DRAWN, n=6, logprobs=True)
    _, heard = bench.submit("Why?", pictures=pictures[:1], generation=DRAWN, n=6, logprobs=True)
    bench.finish()
    for index, answer in enumerate(expected):
        assert heard.text(index) == answer.text
        assert tuple(token.id for token in heard.tokens(index)) == answer.ids
        assert tuple(token.logprobs for token in heard.tokens(index)) == answer.logprobs
    assert len({heard.text(index) for index in range(6)}) == 6


def test_a_stop_string_ends_an_answer_where_it_begins(
    bench: Bench, model: MiniGPT4, pictures: Any
) -> None:
    (whole,) = model.generate(pictures[:1], ["Why?"], generation=DRAWN)
    stop = whole[5:7]
    at = whole.index(stop)
    settings: Any = {"pictures": pictures[:1], "generation": DRAWN, "logprobs": True}
    _, heard = bench.submit("Why?", stop_strings=(stop,), **settings)
    bench.finish()
    assert heard.text() == whole[:at].rstrip()
    assert heard.ends[0].finish_reason == "stop"
    assert heard.ends[0].num_tokens == at + 2
    assert len(heard.tokens()) == at
    assert bench.engine.free_slots == 4


def test_beams_and_slots_give_the_answers_of_generate_side_by_side(
    bench: Bench, model: MiniGPT4, pictures: Any
) -> None:
    beams = GenerationConfig(max_new_tokens=12, repetition_penalty=3.0, num_beams=3)
    (expected,) = model.generate(pictures[:1], ["Why?"], generation=beams, n=2)
    alone = model.generate([None], ["What?"], generation=SHORT)
    _, plain = bench.submit("What?", generation=SHORT)
    bench.turns(2)
    _, heard = bench.submit("Why?", pictures=pictures[:1], generation=beams, n=2)
    bench.turns(3)
    assert heard.events == []
    assert not plain.done
    bench.finish()
    assert [heard.text(index) for index in range(2)] == [answer.text for answer in expected]
    assert all(isinstance(event, Piece) for event in heard.events[1:5:2])
    assert heard.done
    assert [plain.text()] == alone


@pytest.mark.parametrize("beside", ["none", "wanted", "all"])
def test_a_served_model_compiles_and_answers_in_threads_of_its_own(
    beside: CompileBeside, model: MiniGPT4, pictures: Any
) -> None:
    expected = model.generate([pictures[0], None, None], ["a", "b", "c"], generation=DRAWN)
    compiled = model.engine.compiled_programs
    bench = Bench(model, beside=beside, real_time=True)
    with running(bench) as scheduler:
        heard = [
            bench.submit(question, pictures=pictures[:shown], generation=DRAWN)[1]
            for question, shown in (("a", 1), ("b", 0), ("c", 0))
        ]
        assert all(one.over.wait(LIMIT_S) for one in heard)
        wait_until(lambda: scheduler.load().busy_slots == 0)
        # Other sizes are compiled beside it, until somebody closes.
        if beside != "none":
            wait_until(lambda: model.engine.compiled_programs > compiled)
    assert (model.engine.compiled_programs > compiled) == (beside != "none")
    assert [one.text() for one in heard] == expected
    assert scheduler.leaks == 0
    assert not bench.fatal
