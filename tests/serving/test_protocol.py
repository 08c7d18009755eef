from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.serve_config import LimitsConfig, PicturesConfig, ServeConfig
from minigpt4_jax.serving.errors import ApiError
from minigpt4_jax.serving.fields import UNSUPPORTED, ChatRequest
from minigpt4_jax.serving.protocol import parse_chat, parse_detokenize, parse_tokenize

CONFIG = ServeConfig()
HELLO = [{"role": "user", "content": "Hello"}]
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "smol", "messages": HELLO, **fields}).encode()


def parse(**fields: Any) -> ChatRequest:
    return parse_chat(body(**fields), CONFIG)


def refused(raw: bytes | None = None, *, config: ServeConfig = CONFIG, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_chat(body(**fields) if raw is None else raw, config)
    return caught.value


def parts(*found: Any) -> list[Any]:
    return [{"role": "user", "content": list(found)}]


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


# --- what clients send ---

CLIENTS = {
    "openai": {"stream": False, "temperature": 1, "top_p": 1, "n": 1, "stop": None, "seed": 5},
    "vllm bench serve": {
        "messages": parts(text("Describe"), PICTURE),
        "max_completion_tokens": 64,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
    },
    "lmms-eval": {"messages": parts(PICTURE, text("?")), "max_tokens": 1024, "temperature": 0},
    "VLMEvalKit": {
        "messages": [
            {"role": "system", "content": [text("Be short.")]},
            *parts(
                {
                    "type": "image_url",
                    "image_url": {"url": "data:image/jpeg;base64,AAAA", "detail": "low"},
                },
                text("What is it?"),
            ),
        ],
        "n": 1,
        "temperature": 0,
        "max_tokens": 2048,
    },
    "Open WebUI": {"stream": True, "max_tokens": 100, "user": "ann", "metadata": {"chat": "1"}},
    "LangChain": {
        "messages": [
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello!", "refusal": None, "tool_calls": None},
            {"role": "user", "content": "Again"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
        "parallel_tool_calls": False,
        "tools": None,
        "response_format": {"type": "text"},
    },
}


@pytest.mark.parametrize("client", CLIENTS)
def test_what_known_clients_send_is_taken(client: str) -> None:
    parse(**CLIENTS[client])


def test_null_is_the_same_as_not_given_for_every_field() -> None:
    names = [*ChatRequest.model_fields, *UNSUPPORTED]
    names = [name for name in names if name not in ("model", "messages")]
    assert parse(**dict.fromkeys(names)) == parse()


def test_a_request_reads_as_it_was_written() -> None:
    request = parse(
        stop="\n",
        n=2.0,
        top_k=-1,
        max_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert request.stop_strings == ("\n",)
    assert (request.num_answers, request.top_k, request.most_tokens) == (2, 0, 7)
    assert request.streams
    assert request.usage_chunk
    assert parse(stop=["a", "b"]).stop_strings == ("a", "b")
    assert parse().stop_strings == ()
    assert parse(max_tokens=7, max_completion_tokens=7).most_tokens == 7


# --- refusals ---

WRONG = [
    ({"temperature": 2.1}, "temperature", "at most 2"),
    ({"temperature": -0.1}, "temperature", "at least 0"),
    ({"temperature": 0.001}, "temperature", "0 (always the likeliest token) or"),
    ({"temperature": "1"}, "temperature", "is '1'; expected a number"),
    ({"temperature": True}, "temperature", "is true; expected a number"),
    ({"top_p": 0}, "top_p", "a number above 0"),
    ({"top_k": -2}, "top_k", "at least -1"),
    ({"min_p": 1.5}, "min_p", "at most 1"),
    ({"n": 0}, "n", "at least 1"),
    ({"n": 9}, "n", "is 9; expected at most 8 on this server"),
    ({"n": 10**30}, "n", "a whole number of more than 20 digits; expected at most 8"),
    ({"n": 1.5}, "n", "is 1.5; expected a whole number"),
    ({"seed": -1}, "seed", "at least 0"),
    ({"seed": 2**32}, "seed", "at most 4294967295"),
    ({"max_tokens": 0}, "max_tokens", "at least 1"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "which is 2"),
    ({"frequency_penalty": 3}, "frequency_penalty", "at most 2"),
    ({"presence_penalty": -3}, "presence_penalty", "at least -2"),
    ({"repetition_penalty": 0}, "repetition_penalty", "at least 0.01"),
    ({"stop": ""}, "stop", "at least 1 character"),
    ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
    ({"stop": "x" * 65}, "stop", "at most 64 characters"),
    ({"stop": ["a"] * 5}, "stop", "at most 4 items"),
    ({"stop": 3}, "stop", "is 3; expected a string or a list of up to 4 strings"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x", "a string of the form"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1", "a string of the form"),
    ({"logit_bias": {"01": 1}}, "logit_bias.01", "a string of the form"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1", "at most 100"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "at most 1024 items"),
    ({"top_logprobs": 5}, "top_logprobs", "only with logprobs true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "at most 20"),
    ({"stream_options": {}}, "stream_options", "only with stream true"),
    ({"stream": 1}, "stream", "is 1; expected true or false"),
    ({"num_beams": 11}, "num_beams", "at most 10 on this server"),
    ({"num_beams": 2, "stream": True}, "stream", "false with beams"),
    ({"num_beams": 2, "logprobs": True}, "logprobs", "false with beams"),
    ({"num_beams": 2, "logit_bias": {"1": 1}}, "logit_bias", "empty with beams"),
    ({"num_beams": 2, "n": 3}, "n", "at most 2, which is num_beams"),
    ({"length_penalty": 2}, "length_penalty", "only with num_beams"),
    ({"user": "x" * 513}, "user", "a string of 513 characters; expected at most 512"),
    ({"metadata": {"a": 1}}, "metadata.a", "is 1; expected a string"),
    ({"messages": []}, "messages", "at least 1 item(s)"),
    ({"messages": "Hello"}, "messages", "is 'Hello'; expected a list"),
    ({"messages": [3]}, "messages[0]", "is 3; expected an object"),
    ({"messages": [{"content": "x"}]}, "messages[0].role", "is missing"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "is 'tool'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "a string or a"),
    ({"messages": parts()}, "messages[0].content", "at least 1 item(s)"),
    ({"messages": parts("x")}, "messages[0].content[0]", "is 'x'; expected an object"),
    ({"messages": parts({"type": "input_audio"})}, "messages[0].content[0].type", "'image_url'"),
    (
        {"messages": parts({"type": "image_url", "image_url": "data:x"})},
        "messages[0].content[0].image_url",
        "a string of 6 characters; expected an object",
    ),
    (
        {"messages": parts(text("a"), {"type": "image_url", "image_url": {"url": ""}})},
        "messages[0].content[1].image_url.url",
        "at least 1 character",
    ),
    (
        {"messages": [{"role": "system", "content": [PICTURE]}, *HELLO]},
        "messages[0].content[0].type",
        "is 'image_url'; expected 'text'",
    ),
    ({"messages": [{**HELLO[0], "name": "Ann"}]}, "messages[0].name", "expected null"),
    ({"messages": [*HELLO, {"role": "system", "content": "x"}]}, "messages[1].role", "before all"),
    ({"messages": [*HELLO, {"role": "assistant", "content": "x"}]}, "messages[1].role", "user"),
    ({"messages": [{"role": "user", "content": " "}]}, "messages", "no text and no picture"),
    ({"messages": parts(*[PICTURE] * 9)}, "messages", "9 pictures"),
    ({"messages": HELLO * 257}, "messages", "257 entries; expected at most 256"),
    ({"messages": [{"role": "user", "content": "x" * 200_001}]}, "messages", "at most 200000"),
]


@pytest.mark.parametrize(("fields", "param", "said"), WRONG)
def test_a_wrong_field_is_named_with_its_value_and_what_was_expected(
    fields: Any, param: str, said: str
) -> None:
    error = refused(**fields)
    assert (error.status, error.kind, error.param) == (400, "invalid_request_error", param)
    assert said in error.message


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_field_is_refused_unless_it_says_off(name: str) -> None:
    error = refused(**{name: {"something": 1}})
    assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
    for harmless in UNSUPPORTED[name]:
        assert parse(**{name: harmless}) == parse()


def test_refusals_have_openais_codes() -> None:
    for fields, code in (
        ({"messages": [{"role": "user"}]}, "missing_required_parameter"),
        ({"messages": [{"content": ""}]}, "missing_required_parameter"),
        ({"messages": [1]}, "invalid_type"),
        ({"seed": "1"}, "invalid_type"),
        ({"stop": 1}, "invalid_type"),
        ({"seed": -1}, "invalid_value"),
        ({"temperature": 0.001}, "invalid_value"),
        ({"messages": [{"role": "tool"}]}, "invalid_value"),
    ):
        assert refused(**fields).code == code


def test_true_is_not_taken_for_one() -> None:
    assert refused(best_of=True).param == "best_of"
    assert refused(store=0).param == "store"


def test_an_unknown_field_is_refused_with_the_closest_name() -> None:
    error = refused(max_token=5)
    assert (error.param, error.code) == ("max_token", "unknown_parameter")
    assert "Did you mean 'max_tokens'?" in error.message
    inside = refused(messages=parts({**PICTURE, "image_url": {"url": "data:x", "detial": "low"}}))
    assert inside.param == "messages[0].content[0].image_url.detial"
    assert "Did you mean 'detail'?" in inside.message


def test_another_model_is_a_404_and_none_a_400() -> None:
    error = refused(model="gpt-4o")
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    missing = refused(b'{"messages": [{"role": "user", "content": "x"}]}')
    assert (missing.status, missing.param) == (400, "model")
    named = ServeConfig(served_name="mine")
    assert parse_chat(body(model="mine"), named).model == "mine"
    assert refused(config=named).status == 404


def test_limits_are_those_of_the_configuration() -> None:
    config = ServeConfig(
        limits=LimitsConfig(max_n=2, max_beams=3, max_messages=2, max_text_chars=5),
        pictures=PicturesConfig(max_count=1),
    )
    assert refused(config=config, n=3).param == "n"
    assert refused(config=config, num_beams=4).param == "num_beams"
    assert refused(config=config, messages=HELLO * 3).param == "messages"
    assert "6 characters" in refused(config=config, messages=parts(text("123"), text("45"))).message
    assert "2 pictures" in refused(config=config, messages=parts(PICTURE, PICTURE)).message


def test_a_picture_is_never_repeated_in_a_refusal() -> None:
    short = "data:image/png;base64,SECRET"
    for wrong in (
        refused(messages=parts({"type": "image_url", "image_url": short})),
        refused(messages=short),
        refused(temperature=short),
        refused(user=short * 100),
    ):
        assert "SECRET" not in wrong.message


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON at line 1 column 1"),
        (b'{"model": "smol", "messages": []} x', "not JSON"),
        (b'{"model": "\xff"}', "not JSON"),
        (b'{"model": "\\ud800"}', "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        ('{"model": "smol"}'.encode("utf-16"), "not JSON"),
        (b'{"temperature": NaN}', "not JSON"),
        (b'{"temperature": -Infinity}', "not JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000, "nested at most 200 deep"),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "nested at most 200 deep"),
        (b"[]", "is a list of 0; expected a JSON object"),
        (b'"x"', "expected a JSON object"),
        (b"null", "is null; expected a JSON object"),
        (b'{"model": "smol", "model": "smol"}', "'model' stands twice"),
        (
            b'{"model": "smol", "messages": [{"role": "user", "role": "system", "content": ""}]}',
            "'role' stands twice",
        ),
        (json.dumps({str(i): 1 for i in range(4097)}).encode(), "4097 keys; expected at most 4096"),
        (b'{"a": [' + b"{}," * 400_000 + b"{}]}", "commas and brackets"),
    ],
)
def test_what_is_no_json_object_is_a_400(raw: bytes, said: str) -> None:
    error = refused(raw)
    assert (error.status, error.param) == (400, None)
    assert said in error.message


def test_an_overflowing_number_is_a_400() -> None:
    error = refused(body(temperature=1).replace(b": 1}", b": 1e999}"))
    assert error.param == "temperature"
    assert "is inf; expected a finite number" in error.message


ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["user", "smol", "text", "image_url", "assistant", "data:image/png,"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text()
            | st.sampled_from(["role", "content", "type", "text", "image_url", "url", "detail"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
FIELDS = st.sampled_from([*ChatRequest.model_fields, *UNSUPPORTED, "nonsense"])


@settings(max_examples=250, deadline=None)
@given(
    st.binary(max_size=60)
    | ANY_JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(FIELDS, ANY_JSON, max_size=4).map(lambda found: body(**found))
    | ANY_JSON.map(lambda value: body(messages=[{"role": "user", "content": value}]))
)
def test_whatever_comes_is_a_request_or_a_refusal(raw: bytes) -> None:
    for parser in (parse_chat, parse_tokenize, parse_detokenize):
        error = None
        try:
            parser(raw, CONFIG)
        except ApiError as caught:
            error = caught
        assert error is None or error.status in (400, 404)
        assert error is None or json.dumps(error.body(), ensure_ascii=False).encode()


def tokenize_refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse_tokenize(json.dumps(fields).encode(), CONFIG)
    return caught.value


def test_a_tokenise_request_has_a_prompt_or_messages() -> None:
    assert parse_tokenize(b'{"prompt": "a"}', CONFIG).prompt == "a"
    assert parse_tokenize(body(add_generation_prompt=True), CONFIG).messages is not None
    assert "neither" in tokenize_refused().message
    assert "both" in tokenize_refused(prompt="a", messages=HELLO).message
    assert tokenize_refused(prompt="a", model="x").status == 404
    assert tokenize_refused(prompt="a", return_token_strs=True).param == "return_token_strs"
    assert tokenize_refused(prompt="x" * 200_001).param == "prompt"
    assert tokenize_refused(messages=HELLO, add_special_tokens=True).param == "add_special_tokens"


def test_a_detokenise_request_has_ids() -> None:
    assert parse_detokenize(b'{"tokens": [1, 2]}', CONFIG).tokens == [1, 2]
    with pytest.raises(ApiError) as caught:
        parse_detokenize(b'{"tokens": [1, -2]}', CONFIG)
    assert caught.value.param == "tokens[1]"
