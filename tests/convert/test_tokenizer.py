"""A tokenizer is found, fits its language model and is written whole; byte-level ones of GGUF files split as their own.

What is particular to LLaMA's vocabularies is tested in test_llama_tokenizer.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from convert.sources import GgufSource
from convert.tokenizer import convert_tokenizer, make_tokenizer, read_ids
from minigpt4_jax.config import UserError
from minigpt4_jax.data.tokenizer import load_tokenizer
from tests.tiny_tokenizer import tiny_pieces, write_model

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
    convert_tokenizer(tmp_path / "m.gguf", tmp_path)
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


# --- convert_tokenizer ------------------------------------------------------------------------------------------------

SIZE = len(tiny_pieces())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A language model's folder as people have it: a tokenizer.model, and what Hugging Face puts beside it."""
    folder = tmp_path / "llm"
    write_model(folder / "tokenizer.model")
    (folder / "model.safetensors").write_bytes(b"weights")
    marks = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(marks))
    (folder / "tokenizer_config.json").write_text(json.dumps({**marks, "pad_token": None}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_becomes_a_tokenizer_with_its_roles_and_a_copy_of_its_source(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = convert_tokenizer(folder, out, vocab_size=SIZE)
    assert result.source == folder / "tokenizer.model"
    assert result.notes == ()
    assert result.vocab_size == SIZE
    assert sorted(result.files) == sorted(path.name for path in out.iterdir())
    assert (out / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    words = load_tokenizer(out)
    assert (words.bos_id, words.eos_id) == (1, 2)
    assert words.decode([words.pad_id]) == "$$"
    assert read_ids(out) == (SIZE, {"bos_token_id": 1, "eos_token_id": 2})


def test_every_way_to_name_the_tokenizer_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    meta = tmp_path / "7B"  # Meta's layout: the tokenizer lies above the folder of each size
    meta.mkdir()
    (meta / "params.json").write_text("{}")
    write_model(tmp_path / "tokenizer.model")
    sources = [folder, folder / "tokenizer.model", folder / "model.safetensors", meta]
    outs = [tmp_path / f"out{i}" for i in range(len(sources))]
    for source, out in zip(sources, outs, strict=True):
        convert_tokenizer(source, out)
    assert all(contents(out) == contents(outs[0]) for out in outs)


def test_a_tokenizer_model_comes_before_a_tokenizer_json_and_it_is_said(
    folder: Path, tmp_path: Path
) -> None:
    (folder / "tokenizer.json").write_text("{}")
    result = convert_tokenizer(folder, tmp_path / "out")
    assert len(result.notes) == 1
    assert "the tokenizer.json beside it was not" in result.notes[0]


def test_a_folder_with_a_tokenizer_json_alone_gives_the_same_tokenizer(
    folder: Path, tmp_path: Path
) -> None:
    convert_tokenizer(folder, tmp_path / "first")
    (tmp_path / "first" / "tokenizer.model").unlink()
    result = convert_tokenizer(tmp_path / "first", tmp_path / "second", vocab_size=SIZE)
    assert "There is no tokenizer.model" in result.notes[0]
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


def test_one_row_more_than_pieces_is_the_padding_token_of_vicuna_v0(
    folder: Path, tmp_path: Path
) -> None:
    result = convert_tokenizer(folder, tmp_path / "guessed", vocab_size=SIZE + 1)
    assert "[PAD]" in " ".join(result.notes)
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": SIZE}))
    convert_tokenizer(folder, tmp_path / "stated", vocab_size=SIZE + 1)
    for out in ("guessed", "stated"):
        words = load_tokenizer(tmp_path / out)
        assert words.vocab_size == SIZE + 1
        assert words.special("[PAD]") == SIZE
        assert words.decode([SIZE]) == ""
        assert SIZE not in words.encode("[PAD]")
    assert contents(tmp_path / "guessed") == contents(tmp_path / "stated")


@pytest.mark.parametrize("rows", [SIZE - 1, SIZE + 2, 32_000])
def test_a_tokenizer_of_another_size_is_refused(folder: Path, tmp_path: Path, rows: int) -> None:
    with pytest.raises(UserError, match=f"has {SIZE} tokens, the language model has {rows} rows"):
        convert_tokenizer(folder, tmp_path / "out", vocab_size=rows)
    assert not (tmp_path / "out").exists()


def test_an_added_token_without_a_row_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": SIZE}))
    with pytest.raises(UserError, match=f"has {SIZE + 1} tokens, the language model has {SIZE}"):
        convert_tokenizer(folder, tmp_path / "out", vocab_size=SIZE)


@pytest.mark.parametrize("added", [{"[PAD]": SIZE + 1}, {"<s>": 5}, {"[PAD]": 7}])
def test_added_tokens_of_another_vocabulary_are_refused(
    folder: Path, tmp_path: Path, added: dict[str, int]
) -> None:
    (folder / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(UserError, match="does not go on from"):
        convert_tokenizer(folder, tmp_path / "out")


def test_control_tokens_of_another_model_beside_it_are_refused(
    folder: Path, tmp_path: Path
) -> None:
    empty = {"bos_token": "", "eos_token": "", "unk_token": ""}  # early folders of LLaMA
    (folder / "special_tokens_map.json").write_text(json.dumps(empty))
    convert_tokenizer(folder, tmp_path / "early")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    with pytest.raises(UserError, match=r"eos_token is said to be '<\|im_end\|>'; expected '</s>'"):
        convert_tokenizer(folder, tmp_path / "out")


def test_gguf_files_of_both_kinds_are_converted(
    tmp_path: Path, gguf_arrays: dict[str, np.ndarray], write_gguf: Callable[..., Path]
) -> None:
    file = write_gguf(tmp_path / "m.gguf", gguf_arrays)
    result = convert_tokenizer(file, tmp_path / "out", vocab_size=384)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(result.files)
    assert load_tokenizer(tmp_path / "out").special("<|im_end|>") == 2
    with pytest.raises(UserError, match="has 384 tokens"):
        convert_tokenizer(file, tmp_path / "other", vocab_size=385)


def test_a_byte_level_tokenizer_json_is_copied_as_it_is(
    tmp_path: Path, metadata: dict[str, Any]
) -> None:
    convert_tokenizer(tmp_path / "m.gguf", tmp_path / "smol")
    convert_tokenizer(tmp_path / "smol", tmp_path / "out", vocab_size=384)
    first, second = contents(tmp_path / "smol"), contents(tmp_path / "out")
    assert first["tokenizer.json"] == second["tokenizer.json"]
    assert load_tokenizer(tmp_path / "out").eos_id == 2


def test_a_missing_or_unknown_file_says_where_it_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "llm").mkdir()
    write_model(tmp_path / "tokenizer.model")  # above, but not of Meta's layout: another model's
    with pytest.raises(UserError, match=r"looked for .*llm/tokenizer\.model, .*tokenizer\.json\. "):
        convert_tokenizer(tmp_path / "llm", tmp_path / "out")
    (tmp_path / "llm" / "tokenizer.txt").write_text("")
    with pytest.raises(UserError, match=r"ends in '\.txt'"):
        convert_tokenizer(tmp_path / "llm" / "tokenizer.txt", tmp_path / "out")
    (tmp_path / "llm" / "tokenizer.json").write_text('{"model"')
    with pytest.raises(UserError, match="cannot be read"):
        convert_tokenizer(tmp_path / "llm", tmp_path / "out")


def test_ids_of_a_folder_without_roles_are_not_guessed(folder: Path, tmp_path: Path) -> None:
    convert_tokenizer(folder, tmp_path / "out")
    (tmp_path / "out" / "tokenizer_config.json").write_text('{"bos_token": "<s>"}')
    with pytest.raises(UserError, match="the eos_token is None"):
        read_ids(tmp_path / "out")
