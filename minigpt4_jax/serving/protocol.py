"""From the bytes of a chat or tokenise request to a checked one, or to a refusal in OpenAI's words.

For: `parse_chat`, `parse_tokenize`, `parse_detokenize`: what the fields (`fields.py`) must be together, and within the
server's limits. Not for: reading JSON (`json_body.py`), what a request does to an answer (`dialogue.py`), JSON schemas
(`schemas.py`).

Differs from OpenAI in what it refuses: whatever would not change the answer as it says. Silent acceptance is the
commonest way in which such servers are incompatible.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from minigpt4_jax.serve_config import ServeConfig
from minigpt4_jax.serving.errors import ApiError, invalid
from minigpt4_jax.serving.fields import (
    UNSUPPORTED,
    UNSUPPORTED_TOKENIZE,
    ChatRequest,
    DetokenizeRequest,
    ImagePart,
    ImageUrl,
    Message,
    StreamOptions,
    TextPart,
    TokenizeRequest,
    UserMessage,
    pictures_of,
    text_of,
)
from minigpt4_jax.serving.json_body import check_model, check_off, read_object, show

ROOM_FOR_KEYS = 100_000
"""Commas and brackets of a body beside those in its texts."""


def parse_chat(body: bytes, config: ServeConfig) -> ChatRequest:
    """A checked chat request. Takes some milliseconds per MiB: not for the event loop.

    Raises:
        ApiError: 400 with the path of the first wrong field; 404 for a model of another name.
    """
    plain = _read(body, config)
    check_off(plain, UNSUPPORTED, why="this server does not support that")
    _check_count(plain, config)
    request = check_model(ChatRequest, plain, known=_known(ChatRequest))
    _check_name(request.model, config)
    _check_messages(request.messages, config)
    _check_together(request, config)
    return request


def parse_tokenize(body: bytes, config: ServeConfig) -> TokenizeRequest:
    """A checked tokenise request; raises as `parse_chat`."""
    plain = _read(body, config)
    check_off(plain, UNSUPPORTED_TOKENIZE, why="this server does not support that")
    _check_count(plain, config)
    request = check_model(TokenizeRequest, plain, known=_known(TokenizeRequest))
    _check_name(request.model, config)
    if (request.prompt is None) == (request.messages is None):
        said = "neither" if request.prompt is None else "both"
        raise invalid(f"The request has {said} of prompt and messages; expected one of them.")
    if request.messages is not None:
        _check_messages(request.messages, config)
        if request.add_special_tokens:
            raise invalid(
                "add_special_tokens is true; expected false with messages: the template has what is needed.",
                param="add_special_tokens",
            )
    _check_chars(len(request.prompt or ""), config, param="prompt")
    return request


def parse_detokenize(body: bytes, config: ServeConfig) -> DetokenizeRequest:
    """A checked detokenise request; raises as `parse_chat`. Whether the ids exist is for the model to say."""
    plain = _read(body, config)
    request = check_model(DetokenizeRequest, plain, known=_known(DetokenizeRequest))
    _check_name(request.model, config)
    return request


def _read(body: bytes, config: ServeConfig) -> dict[str, Any]:
    return read_object(body, most_values=config.limits.max_text_chars + ROOM_FOR_KEYS)


@functools.cache
def _known(model: type[BaseModel]) -> tuple[str, ...]:
    """Names that an unknown field may have meant."""
    inner = (ImageUrl, TextPart, ImagePart, UserMessage, StreamOptions)
    return tuple({name: None for one in (model, *inner) for name in one.model_fields})


def _check_count(plain: dict[str, Any], config: ServeConfig) -> None:
    """Before the messages are looked at one by one."""
    messages, most = plain.get("messages"), config.limits.max_messages
    if isinstance(messages, list) and len(messages) > most:
        raise invalid(
            f"messages has {len(messages)} entries; expected at most {most} on this server. Leave the oldest out.",
            param="messages",
        )


def _check_name(name: str | None, config: ServeConfig) -> None:
    if name is not None and name != config.name:
        raise ApiError(
            404,
            f"There is no model {show(name)} here; this server has {config.name!r}.",
            param="model",
            code="model_not_found",
        )


def _check_messages(messages: Sequence[Message], config: ServeConfig) -> None:
    """What the kinds of all messages together, their pictures and their texts have to be."""
    roles = [message.role for message in messages]
    for place, role in enumerate(roles):
        if role in ("system", "developer") and {"user", "assistant"} & set(roles[:place]):
            raise invalid(
                f"messages[{place}].role is {role!r}; expected system messages before all others: the model's "
                "template has no place for them later.",
                param=f"messages[{place}].role",
            )
    if roles[-1] != "user":
        raise invalid(
            f"The last message is of the {roles[-1]}; expected one of the user, which is to be answered.",
            param=f"messages[{len(roles) - 1}].role",
        )
    pictures = sum(len(pictures_of(message)) for message in messages)
    if pictures > config.pictures.max_count:
        raise invalid(
            f"There are {pictures} pictures in the messages; expected at most {config.pictures.max_count} on this "
            "server, those of earlier turns too.",
            param="messages",
            code="too_many_images",
        )
    _check_chars(sum(len(text_of(message)) for message in messages), config, param="messages")
    asked = [message for message in messages if message.role == "user"]
    if not any(pictures_of(message) or text_of(message).strip() for message in asked):
        raise invalid(
            "The user's messages have no text and no picture; expected something to answer.",
            param="messages",
        )


def _check_chars(count: int, config: ServeConfig, *, param: str) -> None:
    most = config.limits.max_text_chars
    if count > most:
        raise invalid(
            f"The text has {count} characters; expected at most {most} on this server.",
            param=param,
            code="context_length_exceeded",
        )


def _check_together(request: ChatRequest, config: ServeConfig) -> None:
    """Fields that contradict each other or the server's limits."""
    limits, one, other = config.limits, request.max_tokens, request.max_completion_tokens
    beams = request.num_beams or 1
    refusals = (
        ("n", request.num_answers > limits.max_n, f"at most {limits.max_n} on this server"),
        ("num_beams", beams > limits.max_beams, f"at most {limits.max_beams} on this server"),
        (
            "stream_options",
            request.stream_options is not None and not request.streams,
            "it only with stream true",
        ),
        (
            "top_logprobs",
            request.top_logprobs is not None and not request.logprobs,
            "it only with logprobs true",
        ),
        (
            "max_tokens",
            None not in (one, other) and one != other,
            f"the same as max_completion_tokens, which is {other}, or only one of them",
        ),
        ("stream", beams > 1 and request.streams, "false with beams: their answer comes whole"),
        ("logprobs", beams > 1 and bool(request.logprobs), "false with beams: they keep none"),
        ("logit_bias", beams > 1 and bool(request.logit_bias), "it empty with beams"),
        ("ignore_eos", beams > 1 and bool(request.ignore_eos), "false with beams"),
        ("n", request.num_answers > beams > 1, f"at most {beams}, which is num_beams"),
        (
            "length_penalty",
            request.length_penalty not in (None, 1) and beams == 1,
            "it only with num_beams above 1",
        ),
    )
    for name, wrong, expected in refusals:
        if wrong:
            value = getattr(request, name)
            given = "given" if isinstance(value, BaseModel) else show(value)
            raise invalid(f"{name} is {given}; expected {expected}.", param=name)
