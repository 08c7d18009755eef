"""LLaMA's real 32,000 pieces, converted as a user's are, against the ids that the sets recorded for them.

The `tokenizer.model` is fetched (tests/parity/conftest.py); what lies between control tokens is a text of its own.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from minigpt4_jax.data.prompts import Piece, Special, encode_pieces
from minigpt4_jax.data.tokenizer import Tokenizer

CONTROL = re.compile("(<unk>|<s>|</s>)")


@pytest.fixture(scope="module")
def record(golden: Any, true_ids_file: str) -> dict[str, Any]:
    record: dict[str, Any] = golden.report(f"text/{true_ids_file}")
    return record


def test_golden_true_tokenizer_gives_the_true_ids_of_every_string(
    true_llama: Tokenizer, record: dict[str, Any]
) -> None:
    assert true_llama.vocab_size == record["vocab_size"]
    assert record["strings"]
    for case in record["strings"]:
        ids = true_llama.encode(case["text"])
        assert ids == case["ids"], case["text"]
        if case["text"]:  # of no text, the package that made these tells no bos either
            assert [true_llama.bos_id, *ids] == case["ids_bos"], case["text"]


def test_golden_true_tokenizer_gives_every_text_its_space_behind_control_tokens_too(
    true_llama: Tokenizer, record: dict[str, Any]
) -> None:
    special = record["with_special_tokens"]
    assert true_llama.pad_id == special["pad_token_id"]
    behind = 0
    for case in special["cases"]:
        pieces: list[Piece] = [
            Special(part) if CONTROL.fullmatch(part) else part
            for part in CONTROL.split(case["text"])
        ]
        ids = encode_pieces(pieces, true_llama, num_image_tokens=1)
        assert ids == case["ids_without_bos"], case["text"]
        assert [true_llama.bos_id, *ids] == case["ids_with_bos"], case["text"]
        behind += re.search("(<unk>|<s>|</s>)[^<]", case["text"]) is not None
    assert behind, "no text of the set goes on behind a control token"


def test_golden_true_tokenizer_gives_texts_back(
    true_llama: Tokenizer, record: dict[str, Any]
) -> None:
    for case in record["strings"]:
        assert true_llama.decode(case["ids"]) == case["text"]
