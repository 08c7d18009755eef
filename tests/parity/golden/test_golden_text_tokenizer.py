"""Encoding and decoding through `Tokenizer` over the sets' small LLaMA vocabulary, against the original's.

Under test is the conversion of a `tokenizer.model`, and what this project does around a vocabulary: segments, control
tokens, what typed text may become. `test_golden_true_tokenizer.py` does the same with LLaMA's real 32,000 pieces.
"""

from __future__ import annotations

import re
from typing import Any

import pytest

from minigpt4_jax.data.prompts import Piece, Special, encode_pieces
from minigpt4_jax.data.tokenizer import Tokenizer

CONTROL = re.compile("(<unk>|<s>|</s>)")


@pytest.fixture(scope="module")
def record(golden: Any, tokenizer_file: str) -> dict[str, Any]:
    record: dict[str, Any] = golden.report(f"text/{tokenizer_file}")
    return record


@pytest.fixture(scope="module")
def tokenizer(golden: Any, record: dict[str, Any]) -> Tokenizer:
    tokenizer: Tokenizer = golden.tokenizer(record["tokenizer"].split("/")[0])
    return tokenizer


def test_golden_tokenizer_special_ids(tokenizer: Tokenizer, record: dict[str, Any]) -> None:
    assert tokenizer.vocab_size == record["vocab_size"]
    ids = record["special_ids"]
    found = (tokenizer.special("<unk>"), tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    assert found == (ids["unk"], ids["bos"], ids["eos"], ids["pad"])


def test_golden_tokenizer_ids_with_control_tokens_where_a_template_names_them(
    tokenizer: Tokenizer, record: dict[str, Any]
) -> None:
    """What lies between control tokens is tokenised on its own, each with its dummy space, as in the original."""
    assert record["encode"]
    for case in record["encode"]:
        pieces: list[Piece] = [
            Special(part) if CONTROL.fullmatch(part) else part
            for part in CONTROL.split(case["text"])
        ]
        ids = encode_pieces(pieces, tokenizer, num_image_tokens=1)
        assert ids == case["ids_without_bos"], case["text"]
        assert [tokenizer.bos_id, *ids] == case["ids_with_bos"], case["text"]


def test_golden_tokenizer_typed_control_tokens_stay_text_unlike_the_originals(
    tokenizer: Tokenizer, record: dict[str, Any]
) -> None:
    control = {tokenizer.special(name) for name in ("<unk>", "<s>", "</s>")}
    typed = 0
    for case in record["encode"]:
        ids = tokenizer.encode(case["text"])
        assert not control & set(ids), case["text"]
        assert (ids == case["ids_without_bos"]) == (CONTROL.search(case["text"]) is None)
        typed += CONTROL.search(case["text"]) is not None
    assert typed, "no text of the set has a control token in it"


def test_golden_tokenizer_answers_are_decoded_but_a_pad_piece_stays_unlike_in_the_original(
    tokenizer: Tokenizer, record: dict[str, Any]
) -> None:
    """The original's padding is the ordinary piece `$$`, and what it decodes loses every `$$` that was meant."""
    padded = 0
    assert record["decode"]
    for case in record["decode"]:
        written = [token for token in case["ids"] if token != tokenizer.pad_id]
        assert tokenizer.decode(written) == case["decoded_skip_special"], case["ids"]
        if len(written) < len(case["ids"]):
            assert "$$" in tokenizer.decode(case["ids"])
            padded += 1
    assert padded, "no case of the set has a padding piece in it"


def test_golden_tokenizer_texts_are_cut_behind_their_first_tokens(
    tokenizer: Tokenizer, record: dict[str, Any]
) -> None:
    held = record["padded_truncated"]
    for text, ids, mask in zip(
        held["texts"], held["input_ids"], held["attention_mask"], strict=True
    ):
        kept = [token for token, counts in zip(ids, mask, strict=True) if counts]
        assert tokenizer.encode(text)[: held["max_length"]] == kept
