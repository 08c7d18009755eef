"""The routes with what `/openapi.json` says about each: its body, its answers, and every refusal that can happen.

For: `add_routes`. Not for: what the routes do (`app.py`), nor the schemas of bodies (`schemas.py`). schemathesis holds
the server to every word of it (`tests/serving/test_schemathesis.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from minigpt4_jax.serve_config import ServeConfig
from minigpt4_jax.serving.schemas import (
    CHUNK_SCHEMA,
    COMPLETION_SCHEMA,
    DETOKENIZED_SCHEMA,
    ERROR_SCHEMA,
    MODEL_SCHEMA,
    MODELS_SCHEMA,
    TOKENIZED_SCHEMA,
    chat_schema,
    detokenize_schema,
    tokenize_schema,
)

Answer = Callable[[Request], Awaitable[Response]]
Schema = dict[str, Any]

REFUSALS = {
    400: "The request can never be answered as it is.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The request took longer than it may.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    421: "The Host header names another server.",
    429: "Too many requests wait, or are under way for this key.",
    500: "The server failed; its log says why, under the x-request-id.",
    503: "The server is starting, draining or broken.",
}
ANY = (401, 421, 500)
"""What every route but the probes may refuse with."""
WITH_BODY = (400, *ANY, 404, 408, 413, 415, 429)
EVENT_SCHEMA: Schema = {
    "type": "object",
    "description": "One server-sent event: a chunk, or `[DONE]` as the last. A failure after the first event is an "
    "error object, and ends the stream. Comments (`: queued 3`, `: ping`) say that it is alive.",
    "required": ["data"],
    "properties": {
        "data": {
            "anyOf": [
                {"const": "[DONE]"},
                {
                    "type": "string",
                    "contentMediaType": "application/json",
                    "contentSchema": {"anyOf": [CHUNK_SCHEMA, ERROR_SCHEMA]},
                },
            ]
        }
    },
}
"""Of `itemSchema`, the word of OpenAPI 3.2 for the parts of a stream; readers of 3.1 leave it out."""


def add_routes(
    app: FastAPI,
    config: ServeConfig,
    answers: Mapping[str, Answer],
    *,
    vocab_size: int,
    keyed: bool,
) -> None:
    """Adds every route of the API.

    Args:
        answers: what answers, by path. Raises `KeyError` for a path without one.
        keyed: whether a key is asked for.
    """
    bodies = {
        "/v1/chat/completions": chat_schema(config),
        "/tokenize": tokenize_schema(config),
        "/detokenize": detokenize_schema(config, vocab_size=vocab_size),
    }
    for path, summary, statuses, content in _table():
        extra: Schema = {}
        if path in bodies:
            json_body = {"application/json": {"schema": bodies[path]}}
            extra["requestBody"] = {"required": True, "content": json_body}
        if "{model_id" in path:
            extra["parameters"] = [
                {
                    "name": "model_id",
                    "in": "path",
                    "required": True,
                    "schema": {"enum": [config.name]},
                }
            ]
        if keyed and 401 in statuses:
            extra["security"] = [{"bearer": []}, {"key": []}]
        app.add_api_route(
            path,
            answers[path],
            methods=["POST" if path in bodies else "GET"],
            summary=summary,
            response_model=None,
            response_class=Response,
            responses={
                200: {"description": "The answer.", "content": content},
                **{status: _refusal(status) for status in statuses},
            },
            openapi_extra=extra,
        )
    if keyed:
        _describe_keys(app)


def _table() -> list[tuple[str, str, tuple[int, ...], Schema]]:
    """Path, what it does, the refusals, and the content of an answer."""

    def as_json(schema: Schema) -> Schema:
        return {"application/json": {"schema": schema}}

    def plain(**properties: Schema) -> Schema:
        return as_json({"type": "object", "required": list(properties), "properties": properties})

    text: Schema = {"type": "string"}
    chat = as_json(COMPLETION_SCHEMA) | {"text/event-stream": {"itemSchema": EVENT_SCHEMA}}
    return [
        ("/v1/chat/completions", "Answer a conversation", (*WITH_BODY, 503), chat),
        ("/v1/models", "The one model", ANY, as_json(MODELS_SCHEMA)),
        # A name may have slashes in it, as those of Hugging Face do.
        (
            "/v1/models/{model_id:path}",
            "The one model by its name",
            (*ANY, 404),
            as_json(MODEL_SCHEMA),
        ),
        ("/tokenize", "Text to token ids", WITH_BODY, as_json(TOKENIZED_SCHEMA)),
        ("/detokenize", "Token ids to text", WITH_BODY, as_json(DETOKENIZED_SCHEMA)),
        ("/health", "Whether the process is alive", (500,), plain(status={"const": "alive"})),
        ("/ready", "Whether it takes requests", (500, 503), plain(status={"const": "ready"})),
        ("/metrics", "Figures for Prometheus", ANY, {"text/plain": {"schema": text}}),
    ]


def _refusal(status: int) -> Schema:
    found: Schema = {
        "description": REFUSALS[status],
        "content": {"application/json": {"schema": ERROR_SCHEMA}},
    }
    if status in (429, 503):
        found["headers"] = {
            "Retry-After": {
                "description": "Seconds after which it is worth trying again.",
                "schema": {"type": "integer", "minimum": 0},
            }
        }
    return found


def _describe_keys(app: FastAPI) -> None:
    """Says how a key is given; which routes want one stands at the routes."""
    made = app.openapi

    def openapi() -> Schema:
        document = made()
        document.setdefault("components", {})["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend it
