"""Requests as other people's programs write them, kept here word for word: each is answered.

From the sources, read in November 2026, of lmms-eval (`models/simple/openai.py`), VLMEvalKit (`api/gpt.py`,
`api/lmdeploy.py`), vLLM (`benchmarks/lib/endpoint_request_func.py`) and Open WebUI; only lengths and names are ours.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
from PIL import Image

from tests.serving.running import CHAT, Running


def data_url(kind: str, form: str) -> str:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), "orange").save(file, form)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def picture(url: str, **more: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, **more}}


LMMS_EVAL = {
    "model": "tiny",
    "messages": [
        {"role": "user", "content": [text("A? Yes or no."), picture(data_url("png", "PNG"))]}
    ],
    "max_tokens": 16,
    "temperature": 0,
}
# VLMEvalKit calls every picture a JPEG, whatever it sends.
VLMEVALKIT = {
    "model": "tiny",
    "messages": [
        {
            "role": "user",
            "content": [picture(data_url("jpeg", "PNG"), detail="low"), text("A or B?")],
        }
    ],
    "n": 1,
    "temperature": 0,
    "max_tokens": 16,
}
VLLM_BENCH = {
    "model": "tiny",
    "messages": [
        {"role": "user", "content": [text("Describe."), picture(data_url("jpeg", "JPEG"))]}
    ],
    "max_completion_tokens": 8,
    "stream": True,
    "stream_options": {"include_usage": True},
    "ignore_eos": True,
    "temperature": 0.0,
}
OPEN_WEBUI = {
    "stream": True,
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [text("What?"), picture(data_url("png", "PNG"))]},
        {"role": "assistant", "content": "A cup."},
        {"role": "user", "content": "Sure?"},
    ],
    "stream_options": {"include_usage": True},
    "max_tokens": 8,
}


@pytest.mark.parametrize("request_", [LMMS_EVAL, VLMEVALKIT], ids=["lmms-eval", "VLMEvalKit"])
def test_harnesses_are_answered(tiny_server: Running, request_: dict[str, Any]) -> None:
    status, _, body = tiny_server.ask("POST", CHAT, request_)
    assert status == 200, body
    assert body["choices"][0]["message"]["content"].strip()
    assert body["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("request_", [VLLM_BENCH, OPEN_WEBUI], ids=["vllm bench", "Open WebUI"])
def test_streams_are_answered_with_their_usage(
    tiny_server: Running, request_: dict[str, Any]
) -> None:
    status, headers, body = tiny_server.ask("POST", CHAT, request_)
    assert status == 200, body
    assert headers["content-type"].startswith("text/event-stream")
    assert b'"completion_tokens":8' in body
    assert body.rstrip().endswith(b"data: [DONE]")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/tiny"])
def test_who_looks_for_models_finds_ours(tiny_server: Running, path: str) -> None:
    status, _, body = tiny_server.ask("GET", path)
    assert status == 200
    (one,) = body.get("data", [body])
    assert (one["id"], one["root"], one["object"]) == ("tiny", "tiny", "model")
