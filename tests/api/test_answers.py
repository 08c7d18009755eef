"""minigpt4_jax.answers: how questions pass through the slots, on an engine that writes what a script says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minigpt4_jax import GenerationConfig, UserError
from minigpt4_jax.answers import Answer, AnswerRun, Ask
from minigpt4_jax.conversation import ContextFull, Conversation
from minigpt4_jax.data.prompts import get_template
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.generation.requests import Request, TokenLogprobs
from minigpt4_jax.image_cache import ImageCache, ImageEncoder
from tests.api.scripted import ScriptedEngine

LENGTHS = {"a": 9, "b": 2, "c": 2, "d": 3, "e": 1, "f": 4, "g": 2}
"""Tokens of the answer to each question, its stop token included."""


class Setting:
    """A run over a scripted engine, in which a question "x" is answered with `answers["x"]`."""

    def __init__(self, tokenizer: Tokenizer, *, template: str = "chatml") -> None:
        self.tokenizer, self.template = tokenizer, template
        self.answers: dict[str, list[int]] = {}
        self.batches: list[int] = []
        self.engine = ScriptedEngine(self.script)
        self.encoder = ImageEncoder(
            self.encode, ImageCache(2**20), model="m", size=4, mean=(0.0,) * 3, std=(1.0,) * 3
        )
        end = tokenizer.special(get_template(template).stop_tokens[0])
        for name, length in LENGTHS.items():
            self.answers[name] = [*tokenizer.encode(name.upper() * (length - 1)), end]

    def script(self, request: Request) -> Sequence[int]:
        asked = self.tokenizer.decode([token for token in request.prompt if token >= 0])
        return self.answers[asked.split("user\n")[-1].split("Human: ")[-1].strip()[0]]

    def encode(self, images: np.ndarray) -> list[np.ndarray]:
        self.batches.append(len(images))
        return [image.mean(axis=(0, 1))[None].repeat(2, 0) for image in images]

    def start(self) -> Conversation[Any]:
        template = get_template(self.template)
        return Conversation(template, self.tokenizer, num_image_tokens=2, context=400)

    def run(self, **settings: Any) -> AnswerRun[str]:
        generation = settings.pop("generation", GenerationConfig(max_new_tokens=12))
        return AnswerRun(self.engine, self.encoder, self.start, generation=generation, **settings)


@pytest.fixture
def setting(tokenizer: Tokenizer) -> Setting:
    return Setting(tokenizer)


def asks(names: str, **more: Any) -> Iterator[Ask[str]]:
    for name in names:
        yield Ask(key=name, prompt=name, **more)


def text_of(outcome: Any) -> str:
    (answer,) = outcome
    assert isinstance(answer, Answer)
    return answer.text


def test_answers_come_as_they_are_finished(setting: Setting) -> None:
    found = [(key, text_of(outcome)) for key, outcome in setting.run().answer(asks("abcdefg"))]
    assert found == [(name, name.upper() * (LENGTHS[name] - 1)) for name in "bcdeagf"]


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_a_free_slot_is_taken_at_once(num_slots: int, setting: Setting) -> None:
    setting.engine.num_slots = num_slots
    assert len(list(setting.run().answer(asks("bcdefg" * 3)))) == 18
    rows = setting.engine.rows_per_step
    full = rows.count(num_slots)
    # All slots are busy until nothing is left to ask; then at most the longest answer is still written.
    assert rows[:full] == [num_slots] * full
    assert len(rows) - full < max(LENGTHS[name] for name in "bcdefg")


def test_questions_are_taken_only_as_they_are_needed(setting: Setting) -> None:
    taken = finished = most = 0

    def endless() -> Iterator[Ask[str]]:
        nonlocal taken, most
        while True:
            taken += 1
            most = max(most, taken - finished)
            yield Ask(key="b", prompt="b")

    answers = setting.run().answer(endless())
    for _ in range(20):
        next(answers)
        finished += 1
    answers.close()
    assert most == 2 * setting.engine.num_slots


def test_a_stop_string_ends_its_row_and_no_other(tokenizer: Tokenizer) -> None:
    setting = Setting(tokenizer, template="vicuna_v0")
    setting.answers["a"] = tokenizer.encode("Assistant: A cat.###Human: And a dog?")
    run = setting.run(generation=GenerationConfig(max_new_tokens=30))
    found = dict(run.answer(asks("af")))
    assert text_of(found["a"]) == "A cat."
    assert found["a"][0].finish_reason == "stop"
    assert text_of(found["f"]) == "FFF"
    first = setting.engine.handles[0]
    assert first.finish_reason == "cancelled"
    assert tokenizer.decode(first.ids) == "Assistant: A cat.###"


def test_an_answer_that_is_cut_says_so(setting: Setting) -> None:
    run = setting.run(generation=GenerationConfig(max_new_tokens=3))
    ((_, (answer,)),) = run.answer(asks("a"))
    assert (answer.text, answer.finish_reason, len(answer.ids)) == ("AAA", "length", 3)


def test_a_question_that_cannot_be_asked_is_an_outcome_and_the_others_go_on(
    setting: Setting, tmp_path: Path
) -> None:
    questions = [
        Ask(key="long", prompt="a" * 500),
        Ask(key="bad", images=[tmp_path / "no.png"], prompt="b"),
        *asks("b" * 20, images=[tmp_path / "no.png"]),  # more than are ever taken at once
        *asks("bc"),
    ]
    found = dict(setting.run().answer(questions))
    assert isinstance(found["long"], ContextFull)
    assert "no picture at" in str(found["bad"])
    assert {name: text_of(found[name]) for name in "bc"} == {"b": "B", "c": "C"}


def test_pictures_are_encoded_in_batches_and_none_twice(setting: Setting) -> None:
    red, blue = (Image.new("RGB", (5, 3), colour) for colour in ("red", "blue"))
    setting.engine.num_slots = 8
    questions = [
        Ask(key="b", images=[red, blue], prompt="b"),
        Ask(key="c", images=[blue.copy()], prompt="c"),
        *asks("d"),
        Ask(key="e", images=[blue, red], prompt="e"),
    ]
    assert len(list(setting.run().answer(questions))) == 4
    assert setting.batches == [2]
    colours = [[tuple(e[0]) for e in request.image_embeds] for request in setting.engine.requests]
    assert colours == [[(1, 0, 0), (0, 0, 1)], [(0, 0, 1)], [], [(0, 0, 1), (1, 0, 0)]]


def stop_by_closing(answers: Any) -> None:
    answers.close()


def stop_by_ctrl_c(answers: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        answers.throw(KeyboardInterrupt)


@pytest.mark.parametrize("stop", [stop_by_closing, stop_by_ctrl_c])
def test_what_nobody_waits_for_is_taken_back(stop: Callable[[Any], None], setting: Setting) -> None:
    answers = setting.run().answer(asks("abcdefg"))
    assert next(answers)[0] == "b"
    stop(answers)
    reasons = [handle.finish_reason for handle in setting.engine.handles]
    assert reasons == ["cancelled", "stop"]


def test_a_fault_of_the_engine_ends_what_it_held_and_nothing_else(setting: Setting) -> None:
    setting.engine.fault_at = 2
    found = dict(setting.run().answer(asks("abcd")))
    for name in "ab":
        assert "the device is gone" in str(found[name])
        assert isinstance(found[name].__cause__, RuntimeError)
    assert [text_of(found[name]) for name in "cd"] == ["C", "DD"]


def test_several_answers_share_their_question_and_tell_their_likelihoods(setting: Setting) -> None:
    generation = GenerationConfig(max_new_tokens=12, temperature=1.0, seed=4)
    run = setting.run(generation=generation, n=3, logprobs=True)
    answers = run.answer(asks("b"))
    told = TokenLogprobs(chosen=-1.0, top=())
    submit = setting.engine.submit

    def submit_with_logprobs(request: Request, *, count: int = 1) -> Any:
        handles = submit(request, count=count)
        for handle in handles:
            handle.logprobs = [told] * 12
        return handles

    setting.engine.submit = submit_with_logprobs  # type: ignore[method-assign]
    ((_, found),) = answers
    assert [answer.text for answer in found] == ["B"] * 3
    assert all(answer.logprobs == (told, told) for answer in found)
    (request,) = setting.engine.requests
    assert (request.logprobs, request.sampling.seed, setting.engine.counts) == (True, 4, [3])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n": 0}, "n is 0; expected at least 1"),
        ({"n": 2}, "n is 2 and temperature is 0, which gives 2 times the same answer"),
        ({"n": 3, "generation": GenerationConfig(num_beams=2)}, "n is 3 and num_beams is 2"),
        ({"logprobs": True, "generation": GenerationConfig(num_beams=2)}, "with 2 beams"),
    ],
)
def test_numbers_of_answers_without_sense_are_refused(
    settings: dict[str, Any], said: str, setting: Setting
) -> None:
    with pytest.raises(UserError, match=said):
        setting.run(**settings)
