"""A `tokenizer.model` is read as it was written, and every setting that is not LLaMA's is refused by name.

The files come from `tests/tiny_tokenizer.py`; tests/parity compares real ones with the sentencepiece library.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from convert.sentencepiece_model import Vocabulary, read_sentencepiece
from minigpt4_jax.config import UserError
from tests.tiny_tokenizer import CONTROL, NORMAL, UNKNOWN, tiny_pieces, write_model


def test_pieces_come_in_the_order_of_their_ids_with_score_and_kind(tmp_path: Path) -> None:
    found = read_sentencepiece(write_model(tmp_path / "tokenizer.model"))
    assert list(zip(found.pieces, found.scores, found.kinds, strict=True)) == tiny_pieces()
    assert (found.bos_id, found.eos_id) == (1, 2)


@pytest.mark.parametrize(
    ("trainer", "normalizer", "message"),
    [
        ({3: 1}, {}, r"model_type \(1 unigram, 2 BPE\) is 1, expected 2"),
        ({35: 0}, {}, "byte_fallback is 0, expected 1"),
        ({24: 1}, {}, "treat_whitespace_as_suffix is 1"),
        ({}, {2: b"rules"}, "normalisation rules, bytes of is 5, expected 0"),
        ({}, {3: 0}, "add_dummy_prefix is 0, expected 1"),
        ({}, {4: 1}, "remove_extra_whitespaces is 1, expected 0"),
        ({}, {5: 0}, "escape_whitespaces is 0, expected 1"),
        ({35: 0}, {3: 0}, "byte_fallback is 0, expected 1; add_dummy_prefix is 0"),
        ({41: -1}, {}, "the bos id -1, which is no control piece"),
        ({42: 300}, {}, "the eos id 300, which is no control piece"),
    ],
)
def test_settings_that_are_not_llamas_are_refused(
    tmp_path: Path, trainer: dict[int, int], normalizer: dict[int, int | bytes], message: str
) -> None:
    path = write_model(tmp_path / "tokenizer.model", trainer=trainer, normalizer=normalizer)
    with pytest.raises(UserError, match=message):
        read_sentencepiece(path)


def test_settings_that_a_file_leaves_out_have_the_defaults_of_the_format(tmp_path: Path) -> None:
    """Unigram, with extra spaces removed: a file without its settings is not LLaMA's."""
    path = write_model(tmp_path / "tokenizer.model")
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"\x18\x02\x98\x02") - 2])
    with pytest.raises(UserError, match=r"model_type.* is 1.*remove_extra_whitespaces is 1"):
        read_sentencepiece(path)


def test_what_is_no_model_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    with pytest.raises(UserError, match="cannot be read"):
        read_sentencepiece(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="holds no pieces"):
        read_sentencepiece(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="git lfs pull"):
        read_sentencepiece(path)
    path.write_bytes(b"<!DOCTYPE html><html>")
    with pytest.raises(UserError, match="no whole sentencepiece model"):
        read_sentencepiece(path)
    with path.open("wb") as file:
        file.truncate(1 << 27)
    with pytest.raises(UserError, match="has 134 MB"):
        read_sentencepiece(path)


def test_damaged_files_are_refused_or_read_but_never_crash(tmp_path: Path) -> None:
    path = write_model(tmp_path / "tokenizer.model")
    whole, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for i in range(300):
        data = bytearray(whole)
        if i % 2:
            del data[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.randrange(1, 8)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            read_sentencepiece(path)
        except UserError:
            refused += 1
    assert refused > 100


def test_a_vocabulary_has_one_score_and_kind_per_piece() -> None:
    with pytest.raises(UserError, match="3 pieces, 2 scores and 3 kinds"):
        Vocabulary(
            where="it",
            pieces=("<unk>", "<s>", "</s>"),
            scores=(0.0, 0.0),
            kinds=(UNKNOWN, CONTROL, NORMAL),
            bos_id=1,
            eos_id=2,
        )
