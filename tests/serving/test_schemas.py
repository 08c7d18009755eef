from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt4_jax.serve_config import LimitsConfig, ServeConfig
from minigpt4_jax.serving.errors import ApiError, invalid, overloaded
from minigpt4_jax.serving.fields import (
    UNSUPPORTED,
    UNSUPPORTED_TOKENIZE,
    ChatRequest,
    TokenizeRequest,
)
from minigpt4_jax.serving.protocol import parse_chat, parse_detokenize, parse_tokenize
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
from tests.serving.test_protocol import CLIENTS, CONFIG, HELLO, WRONG

CHAT = chat_schema(CONFIG)
TOKENIZE = tokenize_schema(CONFIG)
DETOKENIZE = detokenize_schema(CONFIG, vocab_size=262)

NO_SCHEMA_SAYS = ("before all", "user", "no text and no picture", "9 pictures")
"""Of the refusals in `WRONG`: the order of roles, and sums over all messages."""
ONLY_HERE = ("messages before all others", "expected one of the user", "have no text and no", "pic")


def test_schemas_are_json_schemas_without_references() -> None:
    answers = (COMPLETION_SCHEMA, CHUNK_SCHEMA, ERROR_SCHEMA, MODEL_SCHEMA, MODELS_SCHEMA)
    for schema in (CHAT, TOKENIZE, DETOKENIZE, *answers, TOKENIZED_SCHEMA, DETOKENIZED_SCHEMA):
        jsonschema_rs.meta.validate(schema)
        assert "$ref" not in json.dumps(schema)
        assert schema["additionalProperties"] is False


def test_every_field_is_in_the_schema() -> None:
    assert set(CHAT["properties"]) == {*ChatRequest.model_fields, *UNSUPPORTED}
    assert set(TOKENIZE["properties"]) == {*TokenizeRequest.model_fields, *UNSUPPORTED_TOKENIZE}


@pytest.mark.parametrize("client", CLIENTS)
def test_what_known_clients_send_is_in_the_schema(client: str) -> None:
    jsonschema_rs.validate(CHAT, {"model": "smol", "messages": HELLO, **CLIENTS[client]})


@pytest.mark.parametrize(("fields", "param", "said"), WRONG)
def test_the_schema_refuses_what_the_server_refuses(fields: Any, param: str, said: str) -> None:
    valid = jsonschema_rs.is_valid(CHAT, {"model": "smol", "messages": HELLO, **fields})
    assert valid == (said in NO_SCHEMA_SAYS)


def test_the_schema_has_the_configurations_limits() -> None:
    limits = LimitsConfig(max_n=2, max_beams=3, max_messages=4, max_text_chars=5)
    schema = chat_schema(ServeConfig(served_name="mine", limits=limits))
    body: dict[str, Any] = {"model": "mine", "messages": HELLO}
    assert jsonschema_rs.is_valid(schema, {**body, "n": 2, "temperature": 1})
    for wrong in (
        {"model": "smol"},
        {"n": 3},
        {"num_beams": 4},
        {"messages": HELLO * 5},
        {"messages": [{"role": "user", "content": "123456"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "123456"}]}]},
    ):
        assert not jsonschema_rs.is_valid(schema, {**body, **wrong})


def bodies(schema: Any) -> st.SearchStrategy[Any]:
    """Requests as schemathesis makes them from the schema."""
    content = {"application/json": {"schema": schema}}
    operation = {
        "requestBody": {"required": True, "content": content},
        "responses": {"200": {"description": "An answer"}},
    }
    document = {
        "openapi": "3.1.0",
        "info": {"title": "x", "version": "1"},
        "paths": {"/x": {"post": operation}},
    }
    strategy: st.SearchStrategy[Any] = schemathesis.openapi.from_dict(document)["/x"]["POST"].as_strategy()  # fmt: skip
    return strategy.map(lambda case: case.body)


@pytest.mark.parametrize(
    ("schema", "parse"),
    [(CHAT, parse_chat), (TOKENIZE, parse_tokenize), (DETOKENIZE, parse_detokenize)],
)
def test_what_the_schema_allows_is_taken(
    schema: Any, parse: Callable[[bytes, ServeConfig], Any]
) -> None:
    taken = []

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(bodies(schema))
    def run(body: Any) -> None:
        try:
            taken.append(parse(json.dumps(body).encode(), CONFIG))
        except ApiError as error:
            if not any(said in error.message for said in ONLY_HERE):
                raise

    run()
    assert taken  # one in five is; the others break a rule that a schema cannot say


def test_refusals_are_in_the_schema() -> None:
    for error in (invalid("x", param="n", code="c"), overloaded("x", retry_after_s=1)):
        jsonschema_rs.validate(ERROR_SCHEMA, error.body())
