from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import jsonschema_rs
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from minigpt4_jax.config import IMAGE_TOKEN_ID
from minigpt4_jax.conversation import Conversation
from minigpt4_jax.data.prompts import get_template
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.generation.requests import TokenLogprobs
from minigpt4_jax.presets import GenerationConfig
from minigpt4_jax.serve_config import ServeConfig
from minigpt4_jax.serving.errors import ApiError, internal
from minigpt4_jax.serving.jobs import Done, Ended, Event, Failed, Job, Piece, Started, Token
from minigpt4_jax.serving.protocol import parse_chat
from minigpt4_jax.serving.replies import ChatReply
from minigpt4_jax.serving.schemas import CHUNK_SCHEMA, COMPLETION_SCHEMA, ERROR_SCHEMA

TOKENIZER = byte_tokenizer()
PROMPT = (5, *[IMAGE_TOKEN_ID] * 4, 7)


def reply(*, n: int = 1, **fields: Any) -> ChatReply:
    """The reply to a request with these fields, and `n` answers."""
    asked = {"model": "smol", "messages": [{"role": "user", "content": "?"}], **fields}
    request = parse_chat(json.dumps(asked).encode(), ServeConfig())
    job = Job(
        id="7",
        conversation=Conversation(
            get_template("chatml"), TOKENIZER, num_image_tokens=4, context=99
        ),
        prompt=PROMPT,
        generation=GenerationConfig(),
        max_new_tokens=9,
        n=n,
        logprobs=bool(request.logprobs),
        deadline_s=0.0,
        emit=lambda event: None,
    )
    return ChatReply(
        request, job, model_name="smol", fingerprint="fp", created=123, tokenizer=TOKENIZER
    )


def token(character: bytes, logprob: float, *others: tuple[int, float]) -> Token:
    symbol = sorted_symbols()[character[0]]
    return Token(symbol, TokenLogprobs(chosen=logprob, top=((symbol, logprob), *others)))


def sorted_symbols() -> dict[int, int]:
    """Ids by the byte that they stand for."""
    found = ((TOKENIZER.token_bytes(i), i) for i in range(TOKENIZER.vocab_size))
    return {data[0]: i for data, i in found if data is not None}


ANSWER: Sequence[Event] = (
    Started(cached_tokens=3),
    Piece(0, "Hel", 3),
    Piece(0, "", 4),
    Piece(0, "lo", 5),
    Ended(0, "stop", 6),
    Done(),
)


def stream(found: ChatReply, events: Sequence[Event] = ANSWER) -> list[dict[str, Any]]:
    """All chunks, each checked against the openai client's types and our own schema."""
    chunks = [chunk for event in events for chunk in found.feed(event)]
    for chunk in chunks:
        assert json.loads(json.dumps(chunk, allow_nan=False)) == chunk
        ChatCompletionChunk.model_validate(chunk, strict=True, extra="forbid")
        jsonschema_rs.validate(CHUNK_SCHEMA, chunk)
    return chunks


def whole(found: ChatReply, events: Sequence[Event] = ANSWER) -> dict[str, Any]:
    """The body, checked as `stream` does."""
    for event in events:
        found.feed(event)
    body = found.result()
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    ChatCompletion.model_validate(body, strict=True, extra="forbid")
    jsonschema_rs.validate(COMPLETION_SCHEMA, body)
    return body


def test_a_whole_answer_is_a_chat_completion() -> None:
    assert whole(reply()) == {
        "id": "chatcmpl-7",
        "object": "chat.completion",
        "created": 123,
        "model": "smol",
        "system_fingerprint": "fp",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 6,
            "completion_tokens": 6,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 3, "image_tokens": 4},
        },
    }


def test_a_stream_begins_with_the_role_and_ends_with_the_reason() -> None:
    chunks = stream(reply(stream=True))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert {chunk["id"] for chunk in chunks} == {"chatcmpl-7"}
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_at_the_end_and_is_null_before() -> None:
    asked = reply(stream=True, stream_options={"include_usage": True})
    *chunks, last = stream(asked)
    assert len(chunks) == 4
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], last["usage"]) == ([], whole(reply())["usage"])
    declined = stream(reply(stream=True, stream_options={"include_usage": False}))
    assert all("usage" not in chunk for chunk in declined)


def test_several_answers_are_kept_apart_and_counted_together() -> None:
    events: list[Event] = [
        Started(cached_tokens=0),
        Piece(1, "b", 1),
        Piece(0, "a", 1),
        Ended(1, "length", 2),
        Piece(0, "A", 2),
        Ended(0, "stop", 3),
        Done(),
    ]
    chunks = stream(reply(n=2, stream=True), events)
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1, 1, 0, 1, 0, 0]
    roles = ["role" in chunk["choices"][0]["delta"] for chunk in chunks]
    assert roles == [True, True, *[False] * 5]
    body = whole(reply(n=2), events)
    told = [(one["message"]["content"], one["finish_reason"]) for one in body["choices"]]
    assert told == [("aA", "stop"), ("b", "length")]
    assert body["usage"]["completion_tokens"] == 5


def test_the_bytes_of_tokens_join_to_characters_that_no_token_holds_alone() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    end = TOKENIZER.special("<|im_end|>")
    events: list[Event] = [
        Started(cached_tokens=0),
        Piece(0, "", 1, (token(first, -0.5, (end, -1.5)),)),
        Piece(0, "é!", 3, (token(second, -0.25), token(b"!", -math.inf, (300, -2.0)))),
        Ended(0, "length", 3),
        Done(),
    ]
    told = whole(reply(logprobs=True, top_logprobs=2), events)["choices"][0]["logprobs"]
    assert told["refusal"] is None
    content = told["content"]
    assert bytes(byte for one in content for byte in one["bytes"]).decode() == "é!"
    assert [one["token"] for one in content] == ["\ufffd", "\ufffd", "!"]
    assert [one["logprob"] for one in content] == [-0.5, -0.25, -9999.0]
    assert content[0]["top_logprobs"] == [
        {"token": "\ufffd", "logprob": -0.5, "bytes": [0xC3]},
        {"token": "<|im_end|>", "logprob": -1.5, "bytes": None},
    ]
    # The model has more rows than the tokenizer has tokens: such a row has no text.
    assert content[2]["top_logprobs"][1] == {"token": "", "logprob": -2.0, "bytes": None}

    chunks = stream(reply(logprobs=True, stream=True), events)
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [one and len(one["content"]) for one in streamed] == [None, 1, 2, None]
    assert all(one["top_logprobs"] == [] for part in streamed[1:3] for one in part["content"])


def test_so_many_alternatives_are_told_as_were_asked_for() -> None:
    likely = token(b"a", -0.1, *((i, -1.0 - i) for i in range(19)))
    events = [Started(0), Piece(0, "a", 1, (likely,)), Ended(0, "length", 1), Done()]
    for asked in (0, 1, 20):
        body = whole(reply(logprobs=True, top_logprobs=asked), events)
        (one,) = body["choices"][0]["logprobs"]["content"]
        assert len(one["top_logprobs"]) == asked


def test_an_answer_without_tokens_has_an_empty_list_of_logprobs() -> None:
    body = whole(reply(logprobs=True), [Started(0), Ended(0, "stop", 1), Done()])
    assert body["choices"][0]["logprobs"] == {"content": [], "refusal": None}
    assert body["choices"][0]["message"]["content"] == ""


def test_a_failure_is_an_error_in_the_stream_and_raised_otherwise() -> None:
    found = reply(stream=True)
    (error,) = [*found.feed(Failed(internal()))]
    jsonschema_rs.validate(ERROR_SCHEMA, error)
    assert error == internal().body()
    with pytest.raises(ApiError) as caught:
        found.result()
    assert caught.value.status == 500


def test_an_answer_that_is_not_over_is_not_given() -> None:
    found = reply()
    for event in ANSWER[:-1]:
        found.feed(event)
    with pytest.raises(ValueError, match="not over"):
        found.result()
