"""GGUF metadata -> `tokenizer.json` (Hugging Face `tokenizers`) and `tokenizer_config.json` beside it.

For: byte-level BPE vocabularies whose pre-tokenizer is known here. Not for: sentencepiece vocabularies, and not for
using a tokenizer (`minigpt4_jax.data.tokenizer`).

Differs from `transformers`, which does the same only with torch installed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from minigpt4_jax.config import UserError

CONTROL = 3
"""`tokenizer.ggml.token_type` of control tokens; 1 is an ordinary token."""
NORMAL = 1


def _smollm() -> pre_tokenizers.PreTokenizer:
    """Every digit alone, then the byte-level pattern of GPT-2."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {"smollm": _smollm}
"""By the name in `tokenizer.ggml.pre`. Each splits text in its own way, so an unknown name is an error."""


def make_tokenizer(metadata: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """Builds the tokenizer that a GGUF file describes.

    Args:
        metadata: of a `GgufSource`.

    Raises:
        UserError: no tokenizer in the file, or one of a kind that is not known here.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRE_TOKENIZERS:
        raise UserError(
            f"The GGUF file has the tokenizer {kind!r} with the pre-tokenizer {pre!r}; expected 'gpt2' (byte-level "
            f"BPE) with one of {', '.join(map(repr, PRE_TOKENIZERS))}. Take a tokenizer.json of the model instead."
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata["tokenizer.ggml.token_type"]
    odd = sorted(set(types) - {NORMAL, CONTROL})
    if odd or len(types) != len(tokens):
        raise UserError(
            f"The GGUF file has {len(tokens)} tokens and {len(types)} token types, among them {odd}; expected one type "
            f"per token, {NORMAL} (ordinary) or {CONTROL} (control)."
        )
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[_pair(merge) for merge in metadata["tokenizer.ggml.merges"]],
        )
    )
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL
        ]
    )
    if tokenizer.get_vocab_size() != len(tokens):
        raise UserError(
            f"The GGUF file lists {len(tokens)} tokens but only {tokenizer.get_vocab_size()} different ones; "
            "expected every token once. Fetch the file again."
        )
    return tokenizer


def save_tokenizer(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Writes `tokenizer.json`, and `tokenizer_config.json` with the roles that the first has no place for."""
    make_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    tokens = metadata["tokenizer.ggml.tokens"]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role, key in {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        if token_id is not None:
            config[role] = tokens[token_id]
    if "tokenizer.chat_template" in metadata:
        config["chat_template"] = metadata["tokenizer.chat_template"]
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right
