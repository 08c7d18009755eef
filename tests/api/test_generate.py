"""minigpt4_jax.api: answers made together, pictures, the settings of generation, and what loading refuses."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from convert.projection import ProjectionInfo, write_projection
from minigpt4_jax import Ask, GenerationConfig, MiniGPT4, UserError, loading
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.conversation import ContextFull
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.generation.requests import Generation, Request
from minigpt4_jax.generation.sampling import Sampling
from minigpt4_jax.image_cache import ImageCache
from tests.api.tiny import CONTEXT, PRINTABLE, SHORT, Recorder, start
from tests.tiny_model import make_frozen, make_loader


def test_answers_made_together_are_the_answers_made_alone(model: MiniGPT4, pictures: Any) -> None:
    questions = ["What is this?", "Why?", "Is it a rather large or a small one, would you say?"]
    together = model.generate(pictures, questions, generation=SHORT)
    alone = [start(model, p).ask(q) for p, q in zip(pictures, questions, strict=True)]
    assert together == alone
    assert model.generate([], []) == []
    with pytest.raises(UserError, match="3 entries in images and 1 in prompts; expected two lists"):
        model.generate(pictures, ["What?"])
    with pytest.raises(UserError, match="one str in prompts"):
        model.generate(pictures, "Why")


def test_a_prompt_may_be_about_no_picture_one_or_several(model: MiniGPT4, pictures: Any) -> None:
    shown = [None, pictures[0], [], [pictures[1]], (pictures[2], pictures[0])]
    questions = ["What is this?", "Why?", "Why?", "What?", "Compare."]
    found = model.generate(shown, questions, generation=SHORT)
    alone = [start(model), start(model, pictures[0]), start(model), start(model, pictures[1])]
    alone.append(start(model, pictures[2], pictures[0]))
    assert found == [chat.ask(question) for chat, question in zip(alone, questions, strict=True)]


def test_a_picture_that_was_shown_is_not_encoded_again(
    model: MiniGPT4, pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []

    def encode(images: np.ndarray) -> list[np.ndarray]:
        encoded.append(len(images))
        config = model.preset.model
        return [np.zeros((config.num_image_tokens, config.llama.width), np.float32) for _ in images]

    monkeypatch.setattr(model.encoder, "cache", ImageCache(2**20))
    monkeypatch.setattr(model.encoder, "_encode", encode)
    model.generate([pictures[:2], pictures[1]], ["x", "x"], generation=SHORT)
    start(model, pictures[0], pictures[1]).ask("x")
    list(model.stream(pictures[0], "x", generation=SHORT))
    model.embed_images(pictures[:2])
    assert encoded == [2]


def test_a_stream_is_the_answer_of_a_chat(model: MiniGPT4, pictures: Any) -> None:
    pieces = list(model.stream(pictures[:2], "Compare.", generation=SHORT))
    assert len(pieces) > 1
    assert "".join(pieces) == start(model, *pictures[:2]).ask("Compare.")
    alone = "".join(model.stream(pictures[0], "Why?", generation=SHORT))
    assert alone == start(model, pictures[0]).ask("Why?")


def test_several_answers_to_one_prompt_are_those_of_seeds_in_a_row(
    model: MiniGPT4, pictures: Any
) -> None:
    settings = GenerationConfig(max_new_tokens=12, temperature=5.0, top_k=PRINTABLE, seed=11)
    found = model.generate(pictures[:2], ["Why?", "What?"], generation=settings, n=2, logprobs=True)
    for picture, question, answers in zip(pictures, ["Why?", "What?"], found, strict=False):
        for number, answer in enumerate(answers):
            chat = model.start_chat(dataclasses.replace(settings, seed=11 + number))
            chat.add_image(picture)
            assert answer.text == chat.ask(question)
            assert answer.finish_reason == "length"
            assert answer.logprobs is not None
            assert len(answer.logprobs) == len(answer.ids) == 12
            assert all(token.chosen <= token.top[0][1] <= 0 for token in answer.logprobs)
    with pytest.raises(UserError, match="logprobs is True without n"):
        model.generate([None], ["x"], logprobs=True)  # type: ignore[call-overload]


def test_questions_are_answered_as_they_come_and_a_bad_one_is_said(
    model: MiniGPT4, pictures: Any
) -> None:
    asks = [
        Ask(key="bad", images=["nowhere.png"], prompt="x"),
        Ask(key="long", prompt="long " * CONTEXT),
        Ask(key="good", images=pictures[:1], prompt="What?"),
    ]
    found = dict(model.answer_each(iter(asks), generation=SHORT))
    assert "no picture at 'nowhere.png'" in str(found["bad"])
    assert isinstance(found["long"], ContextFull)
    (answer,) = found["good"]
    assert answer.text == start(model, pictures[0]).ask("What?")
    with pytest.raises(ContextFull):
        model.generate([None, None], ["What?", "long " * CONTEXT], generation=SHORT)


def test_a_picture_may_be_a_path_its_bytes_or_an_open_picture(
    model: MiniGPT4, pictures: Any, tmp_path: Path
) -> None:
    file, buffer = tmp_path / "a picture.png", io.BytesIO()
    pictures[1].save(file)
    pictures[1].save(buffer, "PNG")
    found = model.embed_images([file, str(file), buffer.getvalue(), pictures[1]])
    config = model.preset.model
    assert found.shape == (4, config.num_image_tokens, config.llama.width)
    assert found.dtype == np.float32
    for row in found[1:]:
        np.testing.assert_array_equal(row, found[0])
    assert np.abs(model.embed_images([pictures[0]])[0] - found[0]).max() > 0.1


def test_generation_settings_reach_the_engine(model: MiniGPT4, engine: Recorder) -> None:
    settings = GenerationConfig(
        max_new_tokens=3, min_new_tokens=2, repetition_penalty=1.3, temperature=0.5, top_k=7, top_p=0.8,
        min_p=0.1, presence_penalty=0.2, frequency_penalty=-0.3, seed=9,
    )  # fmt: skip
    model.start_chat(settings).ask("What?")
    (request,) = engine.requests
    assert (request.max_new_tokens, request.min_new_tokens) == (3, 2)
    assert request.sampling == Sampling(
        temperature=0.5, top_k=7, top_p=0.8, min_p=0.1, repetition_penalty=1.3, presence_penalty=0.2,
        frequency_penalty=-0.3, seed=9,
    )  # fmt: skip


def test_drawn_answers_are_those_of_their_seed_alone_and_together(
    model: MiniGPT4, pictures: Any
) -> None:
    settings = GenerationConfig(max_new_tokens=12, temperature=5.0, top_k=PRINTABLE, seed=11)
    questions = ["What is this?", "Why?", "Is it large?"]
    alone = []
    for picture, question in zip(pictures, questions, strict=True):
        chat = model.start_chat(settings)
        chat.add_image(picture)
        assert chat.seed == 11
        alone.append(chat.ask(question))
    assert model.generate(pictures, questions, generation=settings) == alone
    assert alone != model.generate(pictures, questions, generation=SHORT)
    # The temperature is the only change: as it goes to nothing, the answer goes to the greedy one.
    cold = dataclasses.replace(settings, temperature=0.01)
    greedy = dataclasses.replace(settings, temperature=0.0)
    assert model.generate(pictures, questions, generation=cold) == model.generate(
        pictures, questions, generation=greedy
    )


def test_without_a_seed_every_conversation_and_row_has_its_own(
    model: MiniGPT4, pictures: Any
) -> None:
    settings = GenerationConfig(max_new_tokens=12, temperature=20.0, top_k=PRINTABLE)
    chats = [model.start_chat(settings) for _ in range(3)]
    assert len({chat.seed for chat in chats}) == 3
    assert len({chat.ask("What?") for chat in chats}) == 3
    rows = model.generate([pictures[0]] * 3, ["What?"] * 3, generation=settings)
    assert len(set(rows)) == 3
    again = model.start_chat(dataclasses.replace(settings, seed=chats[0].seed))
    assert again.ask("What?") == chats[0].last_answer


def test_asked_again_in_a_conversation_a_question_is_drawn_anew(model: MiniGPT4) -> None:
    chat = model.start_chat(
        GenerationConfig(max_new_tokens=12, temperature=20.0, top_k=PRINTABLE, seed=5)
    )
    assert chat.ask("What?") != chat.ask("What?")


def test_the_preset_says_how_answers_are_written_unless_the_caller_does(
    model: MiniGPT4, engine: Recorder, pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GenerationConfig(max_new_tokens=4, temperature=1.0, seed=3)
    monkeypatch.setattr(model, "preset", dataclasses.replace(model.preset, generation=settings))
    expected = model.start_chat(settings)
    expected.add_image(pictures[0])
    assert model.generate([pictures[0]], ["What?"]) == [expected.ask("What?")]
    chat = model.start_chat()
    chat.add_image(pictures[0])
    assert chat.ask("What?") == expected.last_answer
    assert engine.requests[-1].max_new_tokens == 4
    model.start_chat(SHORT).ask("What?")
    assert engine.requests[-1].max_new_tokens == 12
    assert engine.requests[-1].sampling.temperature == 0


def test_only_the_published_templates_have_a_bos_that_counts_as_written(
    model: MiniGPT4, pictures: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []
    submit = model.engine.submit

    def note(request: Request, *, count: int = 1) -> list[Generation]:
        written.append(request.written)
        return submit(dataclasses.replace(request, max_new_tokens=1), count=count)

    monkeypatch.setattr(model.engine, "submit", note)
    monkeypatch.setattr(model, "context", 1000)
    for template in ("chatml", "llama2"):
        monkeypatch.setattr(model, "preset", dataclasses.replace(model.preset, template=template))
        model.start_chat().ask("x")
        model.generate(pictures[:1], ["x"])
    bos = tokenizer.special("<s>")
    assert written == [(), (), (bos,), (bos,)]


def test_loading_says_what_is_wrong(
    tiny_params: Any, tokenizer: Tokenizer, projection_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError, match=r"no model 'huge': .*Expected one of llama2-7b, smol, tiny,"
    ):
        MiniGPT4.load("huge")
    with pytest.raises(UserError, match="no weights to fetch for the preset 'tiny'"):
        MiniGPT4.load("tiny", projection=projection_file)
    frozen = make_frozen(tiny_params, tokenizer)
    monkeypatch.setattr(loading, "load_decode_params", make_loader(frozen, tokenizer))
    with pytest.raises(UserError, match="ships no projection for 'tiny'"):
        MiniGPT4.load("tiny")
    with pytest.raises(UserError, match="context is 1024; expected at most 256"):
        MiniGPT4.load("tiny", projection=projection_file)
    settings: dict[str, Any] = {"projection": projection_file, "context": CONTEXT}
    with pytest.raises(
        UserError, match="weights is 'int4'; expected one of auto, float32, bfloat16, int8"
    ):
        MiniGPT4.load("tiny", weights="int4", **settings)
    with pytest.raises(UserError, match="cache is 'float32'; expected one of auto, int8"):
        MiniGPT4.load("tiny", cache="float32", **settings)
    with pytest.raises(UserError, match="num_slots is 0; expected at least 1"):
        MiniGPT4.load("tiny", num_slots=0, **settings)


def test_int8_weights_and_cache_answer_and_are_another_model(
    tiny_params: Any, tokenizer: Tokenizer, projection_file: Path, pictures: Any, model: MiniGPT4,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    loader = make_loader(make_frozen(tiny_params, tokenizer), tokenizer)
    monkeypatch.setattr(loading, "load_decode_params", loader)
    settings: dict[str, Any] = {"projection": projection_file, "context": CONTEXT, "num_slots": 2}
    small = MiniGPT4.load("tiny", weights="int8", cache="int8", **settings)
    kept = {leaf.dtype.name for leaf in jax.tree.leaves(small.engine._state)}
    assert "int8" in kept
    again = MiniGPT4.load("tiny", weights="int8", cache="int8", **settings)
    assert small.fingerprint == again.fingerprint != model.fingerprint
    (answer,) = small.generate(pictures[:1], ["What is this?"], generation=SHORT)
    assert len(answer) > 3


def test_a_projection_of_another_model_is_refused(
    tmp_path: Path, tiny_params: Any, tokenizer: Tokenizer, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    frozen = make_frozen(tiny_params, tokenizer)
    monkeypatch.setattr(loading, "load_decode_params", make_loader(frozen, tokenizer))
    other = dataclasses.replace(tiny_config, patches_per_token=2)
    path = tmp_path / "other.safetensors"
    shape = (other.projection_in, other.llama.width)
    projection = {"kernel": np.zeros(shape, np.float32), "bias": np.zeros(shape[1], np.float32)}
    info = ProjectionInfo(config=other, licence="x", attribution="y", frozen_parts={})
    write_projection(path, projection, info=info)
    with pytest.raises(UserError):
        MiniGPT4.load("tiny", projection=path, context=CONTEXT)
