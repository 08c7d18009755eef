"""Pieces, scores and kinds become a tokenizer that merges and treats spaces as sentencepiece does.

The expected ids are worked out by hand here; tests/parity compares with sentencepiece itself, over real vocabularies.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from convert.llama_tokenizer import (
    fast_vocabulary,
    gguf_vocabulary,
    make_llama_tokenizer,
    make_merges,
    roles,
)
from convert.sentencepiece_model import Vocabulary, read_sentencepiece
from minigpt4_jax.config import UserError
from minigpt4_jax.data.tokenizer import Tokenizer
from tests.tiny_tokenizer import NORMAL, SPACE, UNUSED, USER_DEFINED, tiny_pieces, write_model


@pytest.fixture
def vocabulary(tmp_path: Path) -> Vocabulary:
    return read_sentencepiece(write_model(tmp_path / "tokenizer.model"))


def use(vocabulary: Vocabulary, **options: Any) -> Tokenizer:
    backend = make_llama_tokenizer(vocabulary, **options)
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>", pad_token="$$")


def with_pieces(vocabulary: Vocabulary, *more: tuple[str, int]) -> Vocabulary:
    """The vocabulary with further pieces, of low scores."""
    return dataclasses.replace(
        vocabulary,
        pieces=(*vocabulary.pieces, *(text for text, _ in more)),
        scores=(*vocabulary.scores, *(-1000.0 - i for i in range(len(more)))),
        kinds=(*vocabulary.kinds, *(kind for _, kind in more)),
    )


def split(vocabulary: Vocabulary, text: str) -> list[str]:
    return [vocabulary.pieces[i].replace(SPACE, "_") for i in use(vocabulary).encode(text)]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("a", ["_a"]),
        (" a", ["_", "_a"]),
        ("cat cat", ["_cat", "_cat"]),
        ("a  cat", ["_a", "_", "_cat"]),  # runs of spaces are merged last
        ("     a", ["____", "_", "_a"]),
        ("x\n", ["_", "x", "<0x0A>"]),
        ("é", ["_", "<0xC3>", "<0xA9>"]),
        ("###", ["_###"]),
        ("t###", ["_", "t", "##", "#"]),
        ("$$", ["_", "$$"]),
        ("<s>", ["_", "<s", ">"]),  # typed text never becomes a control token
    ],
)
def test_text_is_split_as_by_sentencepiece(
    vocabulary: Vocabulary, text: str, pieces: list[str]
) -> None:
    assert split(vocabulary, text) == pieces
    assert use(vocabulary).decode(use(vocabulary).encode(text)) == text


def test_runs_grow_from_the_left_where_scores_are_equal(vocabulary: Vocabulary) -> None:
    """Without a piece of four spaces, four are three and one, and not two and two."""
    pieces = tuple("cc" if piece == SPACE * 4 else piece for piece in vocabulary.pieces)
    assert split(dataclasses.replace(vocabulary, pieces=pieces), " " * 3) == ["___", "_"]
    assert split(vocabulary, " " * 6) == ["____", "___"]


def test_control_unknown_and_byte_pieces_are_never_merged_to(vocabulary: Vocabulary) -> None:
    joined = {left + right for left, right in make_merges(vocabulary)}
    assert joined
    assert not joined & {"<s>", "</s>", "<unk>"}
    assert "<s>x" not in joined  # its left half would be the control token
    assert not any(piece.startswith("<0x") for piece in joined)


def test_roles_are_llamas_and_the_pad_is_the_originals(vocabulary: Vocabulary) -> None:
    assert roles(vocabulary) == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "$$",
    }
    pieces = tuple("&&" if piece == "$$" else piece for piece in vocabulary.pieces)
    without = dataclasses.replace(vocabulary, pieces=pieces)
    assert roles(without)["pad_token"] == "<unk>"


def test_added_and_user_defined_markers_are_control_tokens(vocabulary: Vocabulary) -> None:
    last = len(vocabulary.pieces)
    marked = use(with_pieces(vocabulary, ("[INST]", USER_DEFINED)), added=["[PAD]"])
    assert (marked.special("[INST]"), marked.special("[PAD]")) == (last, last + 1)
    assert marked.vocab_size == last + 2
    assert not {last, last + 1} & set(marked.encode("[INST] [PAD]"))
    assert marked.decode([last, last + 1]) == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("  ", USER_DEFINED), "user-defined or unused pieces: '  '"),
        (("ca", UNUSED), "user-defined or unused pieces: 'ca'"),
        (("ca", 7), "user-defined or unused pieces: 'ca'"),
        (("cat", NORMAL), None),
        (("at", NORMAL), "1 pieces are there twice"),
        (("qa", NORMAL), "a character that is no piece: 'qa'"),
        (("<unk2>", 2), "2 unknown pieces"),
        (("<0x100>", 6), "257 byte pieces"),
    ],
)
def test_vocabulary_that_cannot_be_llamas_is_refused(
    vocabulary: Vocabulary, change: tuple[str, int], message: str | None
) -> None:
    changed = with_pieces(vocabulary, change)
    if message is None:
        assert make_llama_tokenizer(changed).get_vocab_size() == len(changed.pieces)
        return
    with pytest.raises(UserError, match=message):
        make_llama_tokenizer(changed)


# --- GGUF -------------------------------------------------------------------------------------------------------------


def gguf_metadata(**changes: Any) -> dict[str, Any]:
    pieces = tiny_pieces()
    keys = {
        "tokens": [text for text, _, _ in pieces],
        "scores": [score for _, score, _ in pieces],
        "token_type": [kind for _, _, kind in pieces],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 0,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (keys | changes).items() if v is not None}


def test_a_gguf_file_gives_the_tokenizer_of_the_tokenizer_model(vocabulary: Vocabulary) -> None:
    found = gguf_vocabulary(gguf_metadata(), where="it")
    assert dataclasses.replace(found, where=vocabulary.where) == vocabulary
    assert make_llama_tokenizer(found).to_str() == make_llama_tokenizer(vocabulary).to_str()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None, "bos_token_id": None}, r"does not say .*\.scores, .*\.bos_token_id"),
        ({"add_space_prefix": False}, "add_space_prefix is False, expected True"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is True"),
        ({"precompiled_charsmap": [1, 2]}, "precompiled_charsmap, bytes of is 2"),
        ({"scores": [0.0]}, "1 scores"),
    ],
)
def test_gguf_tokenizer_of_another_kind_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        gguf_vocabulary(gguf_metadata(**changes), where="it")


# --- tokenizer.json ---------------------------------------------------------------------------------------------------


def fast(vocabulary: Vocabulary, *, generation: int) -> dict[str, Any]:
    """As `transformers` 4 or 5 writes it: in 5 merges go by id alone, spaces first, and only the first part of a text
    gets a space in front."""
    described: dict[str, Any] = json.loads(make_llama_tokenizer(vocabulary).to_str())
    if generation == 5:
        ids = {piece: i for i, piece in enumerate(vocabulary.pieces)}
        described["model"]["merges"].sort(key=lambda pair: ids["".join(pair)])
        described["model"]["unk_token"] = None
        described["normalizer"] = None
        described["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": SPACE,
            "prepend_scheme": "first",
            "split": False,
        }
    else:
        described["model"]["merges"] = [" ".join(pair) for pair in described["model"]["merges"]]
    return described


@pytest.mark.parametrize("generation", [4, 5])
def test_both_forms_of_a_llamas_tokenizer_json_become_the_one_of_its_tokenizer_model(
    vocabulary: Vocabulary, generation: int
) -> None:
    described = fast(vocabulary, generation=generation)
    if generation == 5:  # what would be wrong without
        theirs = tokenizers.Tokenizer.from_str(json.dumps(described))
        wrong = theirs.encode("a  cat", add_special_tokens=False).ids
        assert wrong != use(vocabulary).encode("a  cat")
    found, added = fast_vocabulary(Path("tokenizer.json"), described)
    assert not added
    assert make_llama_tokenizer(found).to_str() == make_llama_tokenizer(vocabulary).to_str()


def test_added_tokens_of_a_tokenizer_json_are_control_tokens(vocabulary: Vocabulary) -> None:
    described = fast(vocabulary, generation=4)
    described["added_tokens"].append({"id": len(vocabulary.pieces), "content": "[PAD]"})
    assert fast_vocabulary(Path("tokenizer.json"), described)[1] == ["[PAD]"]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("model", "type"), "Unigram", "model.type is 'Unigram', expected 'BPE'"),
        (("model", "byte_fallback"), False, "model.byte_fallback is False"),
        (("model", "ignore_merges"), True, "model.ignore_merges is True"),
        (("model", "dropout"), 0.1, "model.dropout is 0.1"),
        (("model", "merges"), [["a", "t"]], "merges that are not those of its pieces is"),
        (("model", "vocab"), {"<s>": 1, "</s>": 2}, "ids without gaps is False"),
        (("normalizer",), None, "a space is put in front and all become ▁ is False"),
        (("pre_tokenizer",), {"type": "Whitespace"}, "a space is put in front"),
    ],
)
def test_tokenizer_json_of_another_kind_is_refused(
    vocabulary: Vocabulary, place: tuple[str, ...], value: Any, message: str
) -> None:
    described = fast(vocabulary, generation=4)
    inside = described
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    with pytest.raises(UserError, match=message):
        fast_vocabulary(Path("tokenizer.json"), described)
