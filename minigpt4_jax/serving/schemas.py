"""JSON schemas for `/openapi.json`: what requests may be and what answers are.

For: documentation that programs read; clients and fuzzers generate requests from it. Not for: checking requests
(`protocol.py` does, with the same models of `fields.py`).

The request schemas say every rule that JSON Schema can say, fields that depend on each other among them. Left to a 400
are: whether a URL is a picture, how many tokens a text has, the order of roles, the sum of all texts, and what depends
on the model (its own temperature, its template).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from minigpt4_jax.serve_config import ServeConfig
from minigpt4_jax.serving.fields import (
    UNSUPPORTED,
    UNSUPPORTED_TOKENIZE,
    ChatRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

Schema = dict[str, Any]
_OFF: Schema = {"enum": [False, None]}
_UNSET: Schema = {"type": "null"}


def chat_schema(config: ServeConfig) -> Schema:
    """Of the body of `/v1/chat/completions` on a server with this configuration. Holds no `$ref`."""
    schema = _request_schema(ChatRequest, UNSUPPORTED, config)
    properties = schema["properties"]
    properties["model"] = {**properties["model"], "const": config.name}
    _bound(properties["n"], config.limits.max_n)
    _bound(properties["num_beams"], config.limits.max_beams)
    properties["logit_bias"]["anyOf"][0]["additionalProperties"] = False
    schema["allOf"] = [
        _only_with({"stream_options": _UNSET}, {"stream": {"const": True}}),
        _only_with({"top_logprobs": _UNSET}, {"logprobs": {"const": True}}),
        # Both are taken where they say the same, which a schema cannot say.
        {"anyOf": [_has(max_tokens=_UNSET), _has(max_completion_tokens=_UNSET)]},
        {"anyOf": [_drawn(), _searched()]},
    ]
    return schema


def _has(**properties: Schema) -> Schema:
    return {"properties": properties}


def _drawn() -> Schema:
    """What a request without beams has to be."""
    return _has(num_beams={"enum": [1, None]}, length_penalty={"enum": [1, None]})


def _searched() -> Schema:
    """What a request with beams has to be. `n` may also be anything up to `num_beams`, which a schema cannot say."""
    off = ("min_tokens", "min_p", "frequency_penalty", "presence_penalty", "temperature")
    return {
        "required": ["num_beams"],
        **_has(
            num_beams={"type": "integer", "minimum": 2},
            n={"enum": [1, 2, None]},
            logit_bias=_UNSET,
            stream=_OFF,
            logprobs=_OFF,
            ignore_eos=_OFF,
            **{name: {"enum": [0, None]} for name in off},
        ),
    }


def tokenize_schema(config: ServeConfig) -> Schema:
    """Of the body of `/tokenize`."""
    schema = _request_schema(TokenizeRequest, UNSUPPORTED_TOKENIZE, config)
    schema["properties"]["model"] = {"enum": [config.name, None]}
    schema["anyOf"] = [
        {"required": ["prompt"], "properties": {"prompt": {"type": "string"}, "messages": _UNSET}},
        {
            "required": ["messages"],
            "properties": {
                "messages": {"type": "array"},
                "prompt": _UNSET,
                "add_special_tokens": _OFF,
            },
        },
    ]
    return schema


def detokenize_schema(config: ServeConfig, *, vocab_size: int) -> Schema:
    """Of the body of `/detokenize`."""
    schema = _request_schema(DetokenizeRequest, {}, config)
    schema["properties"]["model"] = {"enum": [config.name, None]}
    schema["properties"]["tokens"]["items"] = {
        "type": "integer",
        "minimum": 0,
        "maximum": vocab_size - 1,
    }
    return schema


def _request_schema(
    model: type[BaseModel], unsupported: Mapping[str, Sequence[Any]], config: ServeConfig
) -> Schema:
    schema = model.model_json_schema()
    for name, harmless in unsupported.items():
        schema["properties"][name] = {
            "enum": [None, *harmless],
            "description": "Not supported; these values change nothing.",
        }
    schema = dict(_inlined(schema, schema.pop("$defs", {})))
    messages = schema["properties"].get("messages")
    if messages is not None:
        for part in [messages, *messages.get("anyOf", ())]:
            if part.get("type") == "array":
                part["maxItems"] = config.limits.max_messages
                part["contains"] = {"required": ["role"], **_has(role={"const": "user"})}
    _bound_strings(schema["properties"], config.limits.max_text_chars)
    return schema


def _inlined(node: Any, definitions: Mapping[str, Any]) -> Any:
    """Every `$ref` replaced by what it names, so that a schema can stand anywhere in a document."""
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        found = copy.deepcopy(definitions[node["$ref"].rpartition("/")[2]])
        return _inlined({**found, **{k: v for k, v in node.items() if k != "$ref"}}, definitions)
    # `discriminator` points into the definitions; `oneOf` with a constant in each branch says the same.
    kept = {key: value for key, value in node.items() if key not in ("discriminator", "title")}
    if "title" in node and isinstance(node["title"], dict):  # a property of that name
        kept["title"] = node["title"]
    return {key: _inlined(value, definitions) for key, value in kept.items()}


def _bound(schema: Schema, most: int) -> None:
    """Adds a maximum to the whole number that `schema` allows beside null."""
    for option in schema["anyOf"]:
        if option.get("type") == "integer":
            option["maximum"] = most


def _bound_strings(node: Any, most: int) -> None:
    """Adds a greatest length to every string that has none."""
    if isinstance(node, dict):
        if node.get("type") == "string" and not {"const", "enum", "maxLength"} & set(node):
            node["maxLength"] = most
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            _bound_strings(item, most)


def _only_with(field: Schema, condition: Schema) -> Schema:
    """`field` unset, or the condition's field there."""
    return {
        "anyOf": [{"properties": field}, {"required": list(condition), "properties": condition}]
    }


# --- answers ---


class _Answer(BaseModel):
    """Says all of its fields, and no others."""

    model_config = ConfigDict(extra="forbid")


class _TopLogprob(_Answer):
    token: str
    logprob: float
    bytes: list[int] | None


class _TokenLogprob(_TopLogprob):
    top_logprobs: list[_TopLogprob]


class _Logprobs(_Answer):
    content: list[_TokenLogprob]
    refusal: None


class _PromptDetails(_Answer):
    cached_tokens: int
    image_tokens: int


class _Usage(_Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: _PromptDetails


class _ReplyMessage(_Answer):
    role: Literal["assistant"]
    content: str
    refusal: None


class _ReplyChoice(_Answer):
    index: int
    message: _ReplyMessage
    logprobs: _Logprobs | None
    finish_reason: Literal["stop", "length"]


class _Delta(_Answer):
    role: Literal["assistant"] = "assistant"
    content: str = ""


class _ChunkChoice(_Answer):
    index: int
    delta: _Delta
    logprobs: _Logprobs | None
    finish_reason: Literal["stop", "length"] | None


class _Head(_Answer):
    id: str
    created: int
    model: str
    system_fingerprint: str


class _ChatCompletion(_Head):
    object: Literal["chat.completion"]
    choices: list[_ReplyChoice]
    usage: _Usage


class _ChatCompletionChunk(_Head):
    object: Literal["chat.completion.chunk"]
    choices: list[_ChunkChoice]
    usage: _Usage | None = None


class _ErrorDetails(_Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class _Error(_Answer):
    error: _ErrorDetails


class _ModelCard(_Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    """What `vllm bench serve` reads."""
    max_model_len: int


class _ModelList(_Answer):
    object: Literal["list"]
    data: list[_ModelCard]


class _Tokenized(_Answer):
    count: int
    max_model_len: int
    tokens: list[int]


class _Detokenized(_Answer):
    prompt: str


def _answer_schema(model: type[BaseModel]) -> Schema:
    schema = model.model_json_schema()
    found: Schema = _inlined(schema, schema.pop("$defs", {}))
    return found


COMPLETION_SCHEMA = _answer_schema(_ChatCompletion)
CHUNK_SCHEMA = _answer_schema(_ChatCompletionChunk)
ERROR_SCHEMA = _answer_schema(_Error)
MODEL_SCHEMA = _answer_schema(_ModelCard)
MODELS_SCHEMA = _answer_schema(_ModelList)
TOKENIZED_SCHEMA = _answer_schema(_Tokenized)
DETOKENIZED_SCHEMA = _answer_schema(_Detokenized)
