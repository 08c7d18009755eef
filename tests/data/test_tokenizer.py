"""Claims about `minigpt4_jax.data.tokenizer`, on the byte tokenizer: no file, no network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from minigpt4_jax.config import UserError
from minigpt4_jax.data.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

TEXTS = [
    "A small dog.",
    "  two  spaces \n and a line ",
    "Caffè, naïve, größer",
    "日本語のテキスト",
    "😀 👨‍👩‍👧 🇯🇵",
    "a\u0301 combining, \u200b invisible, \ufeff mark",
    "",
]


TEXTS = ("a b", "a\nb", "a 日 b😀", "<s> <0x41> ###", "é\u2028\x00", "  a  ", "")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


def write_tokenizer(folder: Path, config: object | None = None) -> Path:
    # The backend is private to the package; a test may look at it to write the file that conversion writes.
    byte_tokenizer()._backend.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_returns_the_encoded_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("marker", ["<|im_end|>", "<|im_start|>", "<s>", "</s>", "<ImageHere>"])
def test_markers_typed_by_a_user_stay_text(tokenizer: Tokenizer, marker: str) -> None:
    ids = tokenizer.encode(f"before {marker} after")
    assert len(ids) == len(f"before {marker} after")
    assert min(ids) > max(
        tokenizer.special(name)
        for name in ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    )


def test_markers_stay_text_in_a_tokenizer_read_from_a_file(tmp_path: Path) -> None:
    loaded = load_tokenizer(write_tokenizer(tmp_path))
    assert loaded.special("<|im_end|>") not in loaded.encode("stop<|im_end|>")


def test_control_tokens_are_found_by_name_and_leave_no_text(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.special("<|im_start|>"), *tokenizer.encode("hi"), tokenizer.special("</s>")]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>hi</s>"


def test_a_long_text_has_the_ids_of_a_short_one(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["", "a", " two  spaces", "<s>\n</s>", "\U0001f600 \u00e9", "word " * 300]
    monkeypatch.setattr("minigpt4_jax.data.tokenizer.LONG_TEXT", 10_000)
    expected = [tokenizer.encode(text) for text in texts]
    monkeypatch.setattr("minigpt4_jax.data.tokenizer.LONG_TEXT", -1)
    assert [tokenizer.encode(text) for text in texts] == expected


@pytest.mark.parametrize("name", ["<|no_such|>", "h"])
def test_only_control_tokens_are_special(tokenizer: Tokenizer, name: str) -> None:
    with pytest.raises(UserError, match=r"expected one of: .*<\|im_end\|>"):
        tokenizer.special(name)


@pytest.mark.parametrize("token_id", [-1, 262])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer, token_id: int) -> None:
    with pytest.raises(ValueError, match="expected 0 to 261"):
        tokenizer.decode([token_id])


def test_a_streamed_id_behind_the_vocabulary_has_no_text_and_is_said_once(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    decoder = tokenizer.stream_decoder()
    first, second, third = tokenizer.encode("日")
    ids = [*tokenizer.encode("a"), 262, first, 263, second, third]
    assert [decoder.feed(token_id) for token_id in ids] == ["a", "", "", "", "", "日"]
    assert decoder.flush() == ""
    assert [record.args for record in caplog.records] == [(262, 262)]
    with pytest.raises(ValueError, match="expected 0 to 261"):
        decoder.feed(-1)  # a placeholder of a picture: nobody can have drawn it


@pytest.mark.parametrize("text", [*TEXTS, "".join(TEXTS) * 8])
def test_streamed_pieces_join_to_the_text_and_never_split_a_character(
    tokenizer: Tokenizer, text: str
) -> None:
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.feed(token_id) for token_id in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + decoder.flush() == text


def test_streaming_gives_each_character_as_soon_as_it_is_whole(tokenizer: Tokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    assert [decoder.feed(token_id) for token_id in tokenizer.encode("aé日b")] == [
        "a", "", "é", "", "", "日", "b",
    ]  # fmt: skip


def test_an_unfinished_character_comes_out_at_the_end_as_a_replacement(
    tokenizer: Tokenizer,
) -> None:
    decoder = tokenizer.stream_decoder()
    ids = tokenizer.encode("x日")[:-1]
    assert [decoder.feed(token_id) for token_id in ids] == ["x", "", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.feed(tokenizer.encode("y")[0]) == "y"


def test_bytes_that_are_no_text_are_not_held_back_for_ever(tokenizer: Tokenizer) -> None:
    stray = tokenizer.encode("é")[1]  # a continuation byte with nothing to continue
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.feed(stray) for _ in range(40)]
    assert "".join(pieces)
    assert "".join(pieces) + decoder.flush() == "\ufffd" * 40


def sentencepiece_like() -> Tokenizer:
    """A vocabulary with byte pieces, as LLaMA's: what has no piece of its own is spelled in bytes, line breaks too."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{byte:02X}>" for byte in range(256)],
        "\u2581",
        "a",
        "b",
    ]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True
        )
    )
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(pieces[:3])
    return Tokenizer(backend, bos_token="<s>", eos_token="</s>", pad_token=None)


def test_byte_pieces_spell_what_has_no_piece() -> None:
    tokenizer = sentencepiece_like()
    for text in ("a\nb", "\n", "a 日 b😀", "<0x41>", "é"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([1, *ids, 2]) == text
        decoder = tokenizer.stream_decoder()
        pieces = [decoder.feed(token_id) for token_id in ids]
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) + decoder.flush() == text
    assert tokenizer.decode([1, *tokenizer.encode("\n")], skip_special=False).startswith("<s>")


def merging_tokenizer() -> Tokenizer:
    """Byte-level with merges: one token is a space and a letter, another a space and a third of a character."""
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u0120", "a"), ("\u0120", "\u00e6")]  # a space and 0xE6, which begins 日
    vocabulary = [*symbols, *(first + second for first, second in merges)]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={symbol: i for i, symbol in enumerate(vocabulary)}, merges=merges
        )
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_tokens([tokenizers.AddedToken("ŧé", special=False)])
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, bos_token=None, eos_token="<end>", pad_token=None)


def test_the_bytes_of_byte_level_tokens_join_to_the_text() -> None:
    merging = merging_tokenizer()
    for tokenizer in (byte_tokenizer(), merging):
        for text in TEXTS:
            found = [tokenizer.token_bytes(token) for token in tokenizer.encode(text)]
            assert b"".join(data or b"" for data in found) == text.encode()
    assert [merging.token_bytes(token) for token in merging.encode("b 日")] == [
        *(b"b", b" \xe6"),
        *(b"\x97", b"\xa5"),
    ]


def test_the_bytes_of_sentencepiece_tokens_join_to_the_text_behind_its_space() -> None:
    tokenizer = sentencepiece_like()
    for text in TEXTS:
        found = [tokenizer.token_bytes(token) for token in tokenizer.encode(text)]
        assert b"".join(data or b"" for data in found) == (f" {text}" if text else "").encode()


def test_control_tokens_have_a_name_and_no_bytes() -> None:
    for tokenizer, name in ((merging_tokenizer(), "<end>"), (sentencepiece_like(), "</s>")):
        assert tokenizer.token_bytes(tokenizer.eos_id) is None
        assert tokenizer.token_name(tokenizer.eos_id) == name
        assert tokenizer.token_bytes(tokenizer.vocab_size) is None
        assert tokenizer.token_name(tokenizer.vocab_size) is None


def test_an_added_word_is_written_as_it_is() -> None:
    merging = merging_tokenizer()
    (token,) = merging.encode("ŧé")
    assert merging.token_bytes(token) == "ŧé".encode()


def test_a_bad_byte_spoils_only_itself() -> None:
    tokenizer = sentencepiece_like()
    byte = {value: 3 + value for value in range(256)}
    line, whole, cut = (
        byte[10],
        [byte[x] for x in "日".encode()],
        [byte[x] for x in "日".encode()[:2]],
    )
    a = tokenizer.encode("a")[-1]
    assert tokenizer.decode([a, line, byte[0xFF], *whole, line]) == "a\n\ufffd日\n"
    # Two bytes of three are two bad bytes; a control token between bytes leaves no mark.
    assert tokenizer.decode([*cut, a]) == "\ufffd\ufffda"
    assert tokenizer.decode([line, tokenizer.eos_id, byte[0xC3]]) == "\n\ufffd"


def test_roles_come_from_the_config_beside_the_file(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "$"}
    loaded = load_tokenizer(write_tokenizer(tmp_path, config).parent)
    assert loaded.bos_id == loaded.special("<s>")
    assert loaded.eos_id == loaded.special("</s>")
    assert [loaded.pad_id] == loaded.encode("$")


def test_a_role_that_nothing_names_is_an_error_when_it_is_needed(tmp_path: Path) -> None:
    loaded = load_tokenizer(write_tokenizer(tmp_path))
    with pytest.raises(UserError, match="names no pad token"):
        _ = loaded.pad_id


def test_a_config_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path, {"pad_token": "<pad>"})
    with pytest.raises(UserError, match=r"pad token '<pad>' is not in its vocabulary of 262"):
        load_tokenizer(file)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"half": ')
    with pytest.raises(UserError, match=r"not a tokenizer\.json that can be read"):
        load_tokenizer(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_tokenizer(tmp_path)


def test_data_and_conversation_load_neither_jax_nor_grain() -> None:
    code = (
        "import sys, minigpt4_jax.conversation, minigpt4_jax.data.datasets, minigpt4_jax.data.images\n"
        "sys.exit(str(sorted({'jax', 'grain', 'torch'} & set(sys.modules))) * bool({'jax', 'grain', 'torch'}"
        " & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[]", "holds a list; expected an object"),
        ('{"eos_token": 2}', "eos_token in .* is 2; expected the text"),
    ],
)
def test_a_tokenizer_config_of_another_shape_is_refused(
    config: str, said: str, tmp_path: Path
) -> None:
    byte_tokenizer()._backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(UserError, match=said):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_said_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no tokenizer at .*tokenizer\.json; expected .*convert it again"
    ):
        load_tokenizer(tmp_path)
