"""minigpt4_jax.api: answers made together, pictures, the settings of generation, and what loading refuses."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.projection import ProjectionInfo, write_projection
from minigpt4_jax import GenerationConfig, MiniGPT4, UserError, loading
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.tokenizer import Tokenizer
from tests.api.tiny import CONTEXT, PRINTABLE, SHORT, Recorder, make_frozen, start


def test_answers_made_together_are_the_answers_made_alone(model: MiniGPT4, pictures: Any) -> None:
    questions = ["What is this?", "Why?", "Is it a rather large or a small one, would you say?"]
    together = model.generate(pictures, questions, generation=SHORT)
    alone = [start(model, p).ask(q) for p, q in zip(pictures, questions, strict=True)]
    assert together == alone
    assert model.generate([], []) == []
    with pytest.raises(UserError, match="3 pictures and 1 questions"):
        model.generate(pictures, ["What?"])


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
    settings = GenerationConfig(max_new_tokens=3, repetition_penalty=1.3)
    model.start_chat(settings).ask("What?")
    assert engine.settings[0]["max_new_tokens"] == 3
    sampling = engine.settings[0]["sampling"]
    assert sampling.repetition_penalty == np.float32(1.3)
    assert sampling.draw is None
    settings = dataclasses.replace(settings, temperature=0.5, top_k=7, top_p=0.8, seed=9)
    model.start_chat(settings).ask("What?")
    draw = engine.settings[1]["sampling"].draw
    assert (draw.temperature, draw.top_k, draw.top_p) == (0.5, 7, np.float32(0.8))
    assert draw.seeds.tolist() == [9]


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
    assert engine.settings[-1]["max_new_tokens"] == 4
    model.start_chat(SHORT).ask("What?")
    assert engine.settings[-1]["max_new_tokens"] == 12
    assert engine.settings[-1]["sampling"].draw is None


def test_only_the_published_templates_have_a_bos_that_counts_as_written(
    model: MiniGPT4, pictures: Any, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []

    def note(*prompts: Any, **settings: Any) -> list[list[int]]:
        written.append(settings["written"])
        return [[]]

    monkeypatch.setattr(model._engine, "stream", lambda *a, **k: iter(note(*a, **k)[0]))
    monkeypatch.setattr(model._engine, "generate", note)
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
    monkeypatch.setattr(loading, "load_frozen", lambda name, **_: (dict(frozen), tokenizer))
    with pytest.raises(UserError, match="ships no projection for 'tiny'"):
        MiniGPT4.load("tiny")
    with pytest.raises(UserError, match="context is 1024; expected at most 256"):
        MiniGPT4.load("tiny", projection=projection_file)
    with pytest.raises(UserError, match="dtype is 'float8'; expected one of auto, float32"):
        MiniGPT4.load("tiny", projection=projection_file, context=CONTEXT, dtype="float8")


def test_a_projection_of_another_model_is_refused(
    tmp_path: Path, tiny_params: Any, tokenizer: Tokenizer, tiny_config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    frozen = make_frozen(tiny_params, tokenizer)
    monkeypatch.setattr(loading, "load_frozen", lambda name, **_: (dict(frozen), tokenizer))
    other = dataclasses.replace(tiny_config, patches_per_token=2)
    path = tmp_path / "other.safetensors"
    shape = (other.projection_in, other.llama.width)
    projection = {"kernel": np.zeros(shape, np.float32), "bias": np.zeros(shape[1], np.float32)}
    info = ProjectionInfo(config=other, licence="x", attribution="y", frozen_parts={})
    write_projection(path, projection, info=info)
    with pytest.raises(UserError):
        MiniGPT4.load("tiny", projection=path, context=CONTEXT)
