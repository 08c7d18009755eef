"""Beams: what a search finds, alone and in a batch, and which settings reach it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from minigpt4_jax import MiniGPT4, UserError
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.generation.beam_search import Hypothesis
from minigpt4_jax.generation.requests import Request
from tests.api.tiny import SHORT, Recorder, start

BEAMS = dataclasses.replace(SHORT, num_beams=3)


def test_beams_find_an_answer_that_is_likelier_than_the_greedy_one(
    model: MiniGPT4, pictures: Any
) -> None:
    greedy, searched = start(model, pictures[0]), model.start_chat(BEAMS)
    searched.add_image(pictures[0])
    assert searched.ask("What is this?") != greedy.ask("What is this?")
    assert searched.finish_reason == "length"
    # It stays in view for the next question, as every answer does.
    assert searched.last_answer in searched._conversation.text()
    assert searched.ask("Why?") != ""


def test_answers_searched_together_are_the_answers_searched_alone(
    model: MiniGPT4, pictures: Any
) -> None:
    questions = ["What is this?", "Why?", "Is it a rather large or a small one, would you say?"]
    alone = []
    for picture, question in zip(pictures, questions, strict=True):
        chat = model.start_chat(BEAMS)
        chat.add_image(picture)
        (whole,) = chat.stream(question)  # one piece
        assert whole == chat.last_answer
        alone.append(whole)
    assert model.generate(pictures, questions, generation=BEAMS) == alone


def test_one_beam_is_greedy(model: MiniGPT4, pictures: Any) -> None:
    one = dataclasses.replace(SHORT, num_beams=1, length_penalty=5.0)
    chat = start(model, pictures[0])
    assert model.generate(pictures[:1], ["What?"], generation=one) == [chat.ask("What?")]


@pytest.mark.parametrize("batch", [False, True])
def test_the_best_answer_of_a_search_is_given_and_settings_reach_it(
    batch: bool, model: MiniGPT4, pictures: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    asked: list[Any] = []
    end = tokenizer.special("<|im_end|>")

    def note(requests: Sequence[Request], **settings: Any) -> Any:
        asked.append((requests[0], settings))
        found = [([*tokenizer.encode(" A cat."), end], -0.1), (tokenizer.encode("A dog"), -0.2)]
        return [[Hypothesis(*one) for one in found] for _ in requests]

    monkeypatch.setattr(model.engine, "beam_search", note)
    settings = dataclasses.replace(BEAMS, length_penalty=0.5)
    chat = model.start_chat(settings)
    if batch:
        assert model.generate(pictures[:1], ["What?"], generation=settings) == ["A cat."]
    else:
        assert list(chat.stream("What?")) == ["A cat."]
        assert chat.finish_reason == "stop"
    ((request, named),) = asked
    assert named == {"num_beams": 3, "length_penalty": 0.5}
    assert request.sampling.repetition_penalty == 3.0
    assert request.max_new_tokens == 12
    assert request.stop_tokens == (end, tokenizer.special("<|endoftext|>"))
    assert request.written == ()


def test_several_of_the_answers_that_beams_found_are_given_best_first(
    model: MiniGPT4, pictures: Any
) -> None:
    (found,) = model.generate(pictures[:1], ["What?"], generation=BEAMS, n=2)
    assert found[0].text == model.generate(pictures[:1], ["What?"], generation=BEAMS)[0]
    assert found[1].text != found[0].text
    with pytest.raises(UserError, match="n is 4 and num_beams is 3; expected at most as many"):
        model.generate(pictures[:1], ["What?"], generation=BEAMS, n=4)


def test_a_vicuna_answer_ends_at_its_stop_string_though_no_stop_token_comes(
    model: MiniGPT4, engine: Recorder, pictures: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(model, "context", 1000)
    preset = dataclasses.replace(model.preset, template="vicuna_v0")
    monkeypatch.setattr(model, "preset", preset)
    written = "Assistant: A cat.###Human: And a ###dog? Assistant: Yes."
    ids = tokenizer.encode(written)
    assert tokenizer.special("</s>") not in ids
    chat = start(model)
    rest = iter(ids)
    engine.script = [rest]
    assert chat.ask("What?") == "A cat."
    assert chat.finish_reason == "stop"
    assert tokenizer.decode(list(rest)) == "Human: And a ###dog? Assistant: Yes."
    # Beams go on to their last token; what follows the stop is cut off.
    found = [[Hypothesis(ids, -1.0)]]
    monkeypatch.setattr(model.engine, "beam_search", lambda *a, **k: found)
    assert model.generate(pictures[:1], ["What?"], generation=BEAMS) == ["A cat."]
