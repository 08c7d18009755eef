"""The tokenizer built from GGUF metadata splits, joins and returns text as the model's own does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from convert.sources import GgufSource
from convert.tokenizer import make_tokenizer, save_tokenizer
from minigpt4_jax.config import UserError
from minigpt4_jax.data.tokenizer import load_tokenizer

TEXTS = [
    "",
    "a cat",
    "The cat sat.\n\n  Twice.\t\r\n",
    "def f(x):\n    return x ** 2  # squared",
    "In 2024: 12,345.67 or 1 2  3",
    "don't we'll I'M it's",
    "naïve café, e\u0301, ß",
    "你好，世界 こんにちは 안녕하세요 مرحبا",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈",
    "a\u00a0b\u200bc\ufeff\x00\x7f",
    "½ ² Ⅷ ١٢٣",
]


@pytest.fixture
def metadata(
    tmp_path: Path, gguf_arrays: dict[str, np.ndarray], write_gguf: Callable[..., Path]
) -> dict[str, Any]:
    return dict(GgufSource(write_gguf(tmp_path / "m.gguf", gguf_arrays)).metadata)


@pytest.fixture
def tokenizer(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    return make_tokenizer(metadata)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_as_it_was(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_merges_are_applied(tokenizer: tokenizers.Tokenizer) -> None:
    assert tokenizer.encode("a cat").tokens == ["a", "Ġcat"]


def test_every_digit_is_a_token_of_its_own(tokenizer: tokenizers.Tokenizer) -> None:
    """The vocabulary can join "1 2" and " 1"; the `smollm` pre-tokenizer keeps them apart."""
    assert tokenizer.encode("12 1").tokens == ["1", "2", "Ġ", "1"]


def test_control_tokens_are_recognised_and_marked(tokenizer: tokenizers.Tokenizer) -> None:
    encoded = tokenizer.encode("<|im_start|>a<|im_end|>")
    assert [encoded.ids[0], encoded.ids[-1]] == [1, 2]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "a"


def test_ids_are_those_of_the_gguf_file(
    tokenizer: tokenizers.Tokenizer, metadata: dict[str, Any]
) -> None:
    tokens = metadata["tokenizer.ggml.tokens"]
    assert [tokenizer.token_to_id(token) for token in tokens] == list(range(len(tokens)))


def test_saved_tokenizer_has_its_roles_and_keeps_typed_markers_as_text(
    tmp_path: Path, metadata: dict[str, Any]
) -> None:
    save_tokenizer(tmp_path, metadata)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (1, 2, 2)
    assert loaded.vocab_size == len(metadata["tokenizer.ggml.tokens"])
    assert 2 not in loaded.encode("<|im_end|>")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["unk_token"] == "<|endoftext|>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tokenizer.ggml.pre": "llama-bpe"},
            "pre-tokenizer 'llama-bpe'; expected 'llama', or 'gpt2'",
        ),
        ({"tokenizer.ggml.model": "t5"}, "the tokenizer 't5'"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "384 tokens and 2 token types"),
        ({"tokenizer.ggml.token_type": [6] * 384}, r"among them \[6\]"),
        ({"tokenizer.ggml.tokens": ["a"] * 384}, "lists 384 tokens but only"),
    ],
)
def test_tokenizer_of_another_kind_is_refused(
    metadata: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    if "tokenizer.ggml.tokens" in changes:
        changes = changes | {"tokenizer.ggml.merges": []}
    with pytest.raises(UserError, match=message):
        make_tokenizer(metadata | changes)
