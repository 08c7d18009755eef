"""The official client against the smol model: what people's programs will do, on the real engine behind a real uvicorn.

Needs the smol parts, which are fetched on first use. What the fields of requests mean is tested beside `protocol.py`
and `dialogue.py`; here is that answers arrive, and that they are the very answers of `MiniGPT4.generate`.
"""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from minigpt4_jax import Answer, GenerationConfig, MiniGPT4
from minigpt4_jax.serve_config import LimitsConfig, ServeConfig
from tests.serving.running import LIMIT_S, Running, run_server

EXAMPLES = Path(__file__).parents[2] / "examples"
COFFEE, FLOWER = EXAMPLES / "coffee.jpg", EXAMPLES / "flower.jpg"
WHAT = "What is this?"
THEN = "Is it hot?"
DRAWN = {"temperature": 0.8, "seed": 7, "max_tokens": 10}
KEY = "a-key-0123456789ab"


@dataclass
class Smol:
    """The server, a client of it, and what the same model said before it was given to the server."""

    running: Running
    client: openai.OpenAI
    model: MiniGPT4
    greedy: list[Answer]
    drawn: list[Answer]
    two_pictures: list[Answer]
    text_only: list[Answer]
    chat: list[str]


@pytest.fixture(scope="module")
def smol() -> Iterator[Smol]:
    model = MiniGPT4.load("smol", context=128, num_slots=4)
    model.engine.compile_core()  # the same programs for both ways

    def answers(images: Any, generation: GenerationConfig, n: int = 1) -> list[Answer]:
        (found,) = model.generate([images], [WHAT], generation=generation, n=n, logprobs=True)
        return found

    short = GenerationConfig(max_new_tokens=10)
    said = {
        "greedy": answers(COFFEE, GenerationConfig(max_new_tokens=40)),
        "drawn": answers(COFFEE, GenerationConfig(temperature=0.8, seed=7, max_new_tokens=10), n=2),
        "two_pictures": answers([COFFEE, FLOWER], short),
        "text_only": answers(None, short),
    }
    chat = model.start_chat(short)
    chat.add_image(COFFEE)
    turns = ["".join(chat.stream(question)) for question in (WHAT, THEN)]
    config = ServeConfig(
        port=0, context=128, num_slots=4, limits=LimitsConfig(request_timeout_s=LIMIT_S)
    )
    with (
        run_server(model, config, keys=(KEY,)) as running,
        openai.OpenAI(base_url=running.base_url, api_key=KEY, max_retries=0) as client,
    ):
        yield Smol(running, client, model, chat=turns, **said)


def picture(path: Path) -> dict[str, Any]:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}}


def ask(*pictures: Path, text: str = WHAT) -> list[Any]:
    content = [*map(picture, pictures), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def text_of(stream: Any) -> str:
    return "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)


# --- the same answers ---


def test_a_picture_is_answered_as_generate_does_it_token_for_token(smol: Smol) -> None:
    (answer,) = smol.greedy
    found = smol.client.chat.completions.create(model="smol", messages=ask(COFFEE), logprobs=True)
    (choice,) = found.choices
    assert choice.message.content == answer.text == "This is a cup of coffee."
    assert choice.finish_reason == answer.finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.completion_tokens == len(answer.ids)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    told = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content)
    assert told.decode() == answer.text
    assert answer.logprobs is not None
    expected = [one.chosen for one in answer.logprobs[: len(choice.logprobs.content)]]
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(expected, abs=1e-4)


def test_drawn_answers_are_generates_at_the_same_seed_streamed_or_not(smol: Smol) -> None:
    for _ in range(2):
        found = smol.client.chat.completions.create(
            model="smol", messages=ask(COFFEE), n=2, **DRAWN
        )
        texts = [choice.message.content for choice in found.choices]
        assert texts == [answer.text for answer in smol.drawn]
    assert len(set(texts)) == 2
    stream = smol.client.chat.completions.create(
        model="smol", messages=ask(COFFEE), stream=True, **DRAWN
    )
    assert text_of(stream) == smol.drawn[0].text


def test_several_pictures_and_none(smol: Smol) -> None:
    create = smol.client.chat.completions.create
    found = create(model="smol", messages=ask(COFFEE, FLOWER), max_tokens=10)
    assert found.choices[0].message.content == smol.two_pictures[0].text
    assert found.usage is not None
    found = create(model="smol", messages=[{"role": "user", "content": WHAT}], max_tokens=10)
    assert found.choices[0].message.content == smol.text_only[0].text


# --- streams ---


def test_a_stream_tells_role_text_reason_and_usage_in_this_order(smol: Smol) -> None:
    chunks = list(
        smol.client.chat.completions.create(
            model="smol",
            messages=ask(COFFEE),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].finish_reason is None for chunk in [first, *middle])
    assert text_of(chunks) == smol.greedy[0].text
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == ("stop", None)
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == len(smol.greedy[0].ids)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stop_string_ends_the_answer_and_is_not_in_it(smol: Smol) -> None:
    create = smol.client.chat.completions.create
    whole = create(model="smol", messages=ask(COFFEE), stop=[" of"])
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (
        "This is a cup",
        "stop",
    )
    stream = create(model="smol", messages=ask(COFFEE), stop=" of", stream=True)
    assert text_of(stream) == "This is a cup"


def test_turns_are_remembered_as_in_a_chat(smol: Smol) -> None:
    create = smol.client.chat.completions.create
    messages = ask(COFFEE)
    first = create(model="smol", messages=messages, max_tokens=10)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": THEN},
    ]
    second = create(model="smol", messages=messages, max_tokens=10)
    texts = [found.choices[0].message.content for found in (first, second)]
    assert texts == smol.chat
    forgetful = create(model="smol", messages=messages[2:], max_tokens=10)
    assert forgetful.choices[0].message.content != texts[1]


# --- errors ---


def test_errors_are_the_clients_own_classes(smol: Smol) -> None:
    create = smol.client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="gpt-4", messages=ask(COFFEE))
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as full:
        create(model="smol", messages=ask(COFFEE, text="long " * 200))
    assert full.value.code == "context_length_exceeded"
    part: Any = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    with pytest.raises(openai.BadRequestError) as damaged:
        create(model="smol", messages=[{"role": "user", "content": [part]}])
    assert damaged.value.param == "messages[0].content[0].image_url.url"
    stranger = smol.client.with_options(api_key="another-key-0123")
    with pytest.raises(openai.AuthenticationError) as refused:
        stranger.models.list()
    assert refused.value.code == "invalid_api_key"
    assert refused.value.request_id
    assert [model.id for model in smol.client.models.list()] == ["smol"]


def test_a_client_whose_time_is_over_frees_its_slot(smol: Smol) -> None:
    """Its time is over while the engine is held, so that no machine is too fast for it."""
    engine, step = smol.model.engine, smol.model.engine.step
    hold = threading.Event()

    def held() -> Any:
        hold.wait(LIMIT_S)
        return step()

    engine.step = held  # type: ignore[method-assign]
    try:
        with pytest.raises(openai.APITimeoutError):
            smol.client.with_options(timeout=0.2).chat.completions.create(
                model="smol", messages=ask(COFFEE), max_tokens=90, extra_body={"ignore_eos": True}
            )
    finally:
        engine.step = step  # type: ignore[method-assign]
        hold.set()
    smol.running.wait(lambda: smol.running.idle)


def test_a_stream_that_is_closed_frees_its_slot_as_the_metrics_say(smol: Smol) -> None:
    stream = smol.client.chat.completions.create(
        model="smol",
        messages=ask(COFFEE),
        max_tokens=90,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    stream.close()

    def running() -> float:
        headers = {"x-api-key": KEY}
        text = smol.running.ask("GET", "/metrics", headers=headers)[2].decode()
        lines = [line for line in text.splitlines() if line.startswith("minigpt4:slots_used{")]
        return float(lines[0].split()[-1])

    smol.running.wait(lambda: running() == 0)


def test_many_at_once_each_get_their_own_answer(smol: Smol) -> None:
    async def scenario() -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=smol.running.base_url, api_key=KEY, max_retries=0
        ) as client:
            create = client.chat.completions.create
            asked = [
                create(model="smol", messages=ask(COFFEE)),
                create(model="smol", messages=ask(COFFEE, FLOWER), max_tokens=10),
                create(model="smol", messages=[{"role": "user", "content": WHAT}], max_tokens=10),
                create(model="smol", messages=ask(COFFEE), **DRAWN),
            ]
            return await asyncio.gather(*asked, create(model="smol", messages=ask(COFFEE)))

    texts = [found.choices[0].message.content for found in asyncio.run(scenario())]
    alone = [smol.greedy, smol.two_pictures, smol.text_only, smol.drawn, smol.greedy]
    assert texts == [answers[0].text for answers in alone]


def test_text_goes_there_and_back_through_the_tokenizer(smol: Smol) -> None:
    headers = {"x-api-key": KEY}
    text = "A cup of coffee – ☕"
    _, _, found = smol.running.ask("POST", "/tokenize", {"prompt": text}, headers)
    assert found["tokens"] == smol.model.tokenizer.encode(text)
    _, _, back = smol.running.ask("POST", "/detokenize", {"tokens": found["tokens"]}, headers)
    assert back == {"prompt": text}
