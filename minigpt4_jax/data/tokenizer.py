"""Text to token ids and back, over a Hugging Face `tokenizer.json`.

For: encoding text that people typed, naming control tokens, and decoding ids one at a time while an answer is
being generated. Not for: prompt layout (`prompts.py`), nor for making a `tokenizer.json` (`convert/`).

Differs from the original, which encodes through the slow LLaMA tokenizer of transformers: there a `<s>` or `</s>`
inside typed text becomes the control token. Here text is always plain text, and a control token enters a prompt
only when a template names it. And a `$$` in an answer stays, where the original drops it with its padding.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from minigpt4_jax.config import UserError

logger = logging.getLogger(__name__)

_REPLACEMENT = "\ufffd"
_SPACE = "\u2581"  # how sentencepiece writes a space
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
_KEEP_IDS = 8  # context that a trimmed StreamDecoder keeps: more tokens than one character ever has
_TRIM_IDS = 64
LONG_TEXT = 1000
"""Characters above which a text is encoded as a batch of one: only then does the library let other threads run, and
200,000 characters take it half a second."""
_MAX_HELD = 16  # replacement characters held back before they count as really invalid bytes


class Tokenizer:
    """A tokenizer with plain-text encoding and named control tokens. Make one with `load_tokenizer`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None,
        eos_token: str | None,
        pad_token: str | None,
    ) -> None:
        # Control tokens spelled out in text are encoded as the ordinary characters they are.
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._special = {
            token.content: token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special
        }
        self._special_ids = frozenset(self._special.values())
        self._byte_pieces = {
            token_id: int(match[1], 16)
            for token, token_id in backend.get_vocab(with_added_tokens=False).items()
            if (match := _BYTE_PIECE.fullmatch(token))
        }
        """Of a sentencepiece vocabulary: the pieces that stand for one byte of what has no piece."""
        self._added_ids = frozenset(backend.get_added_tokens_decoder())
        byte_level = isinstance(backend.decoder, tokenizers.decoders.ByteLevel)
        self._byte_symbols = _byte_symbols() if byte_level else {}
        """Of a byte-level vocabulary: the bytes that its symbols stand for."""
        self._role_ids: dict[str, int] = {}
        for role, token in (("bos", bos_token), ("eos", eos_token), ("pad", pad_token)):
            if token is None:
                continue
            token_id = backend.token_to_id(token)
            if token_id is None:
                raise UserError(
                    f"The tokenizer's {role} token {token!r} is not in its vocabulary of {self.vocab_size} tokens; "
                    "expected a tokenizer.json and a tokenizer_config.json that belong together. Fetch or convert "
                    "both again."
                )
            self._role_ids[role] = token_id

    @property
    def vocab_size(self) -> int:
        """Number of ids, control tokens included."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_id(self) -> int:
        """Id that starts a sequence. Raises `UserError` when the tokenizer names none."""
        return self._role_id("bos")

    @property
    def eos_id(self) -> int:
        """Id that ends an answer. Raises `UserError` when the tokenizer names none."""
        return self._role_id("eos")

    @property
    def pad_id(self) -> int:
        """Id that fills unused places. Raises `UserError` when the tokenizer names none."""
        return self._role_id("pad")

    def _role_id(self, role: str) -> int:
        if role not in self._role_ids:
            raise UserError(
                f"The tokenizer names no {role} token; expected `{role}_token` in a tokenizer_config.json "
                "beside the tokenizer.json."
            )
        return self._role_ids[role]

    def special(self, name: str) -> int:
        """Id of the control token spelled `name`, such as `<|im_end|>`. Raises `UserError` for any other text."""
        if name not in self._special:
            known = ", ".join(sorted(self._special)) or "none"
            raise UserError(
                f"The tokenizer has no control token {name!r}; expected one of: {known}. "
                "Is this template meant for another model?"
            )
        return self._special[name]

    def is_special(self, text: str) -> bool:
        """Whether `text` is the spelling of a control token."""
        return text in self._special

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no control tokens, neither added nor recognised in `text`."""
        if len(text) > LONG_TEXT:
            return self.encode_all([text])[0]
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once, on several threads."""
        batch = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [list(encoding.ids) for encoding in batch]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`. Control tokens leave no text unless `skip_special` is false; each byte that is not UTF-8
        becomes a U+FFFD. Raises `ValueError` for an id outside the vocabulary."""
        ids = [int(token_id) for token_id in ids]
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise ValueError(
                    f"Token id {token_id} is outside the vocabulary; expected 0 to {self.vocab_size - 1}. "
                    "Image placeholders have no text: leave them out before decoding."
                )
        if self._byte_pieces.keys().isdisjoint(ids):
            return str(self._backend.decode(ids, skip_special_tokens=skip_special))
        # The library gives up a whole run of byte pieces for one bad byte in it, and a line break is a byte piece.
        if skip_special:
            ids = [token_id for token_id in ids if token_id not in self._special_ids]
        pieces: list[str] = []
        for is_bytes, run in itertools.groupby(ids, self._byte_pieces.__contains__):
            if is_bytes:  # one character a piece, lest a text that reads <0x41> is taken for a byte
                pieces += _decode_utf8(bytes(self._byte_pieces[token_id] for token_id in run))
            else:
                pieces += [str(self._backend.id_to_token(token_id)) for token_id in run]
        return str(self._backend.decoder.decode(pieces))

    def token_bytes(self, token_id: int) -> bytes | None:
        """The UTF-8 bytes that a token is written as; None for a control token or an id without text.

        The bytes of all tokens joined are the text of `decode`, but for the space that a sentencepiece vocabulary puts
        in front of a text and `decode` takes away. One token may hold only a part of a character.
        """
        if token_id in self._special_ids:
            return None
        if token_id in self._byte_pieces:
            return bytes([self._byte_pieces[token_id]])
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return None
        if token_id not in self._added_ids and self._byte_symbols:
            return bytes(self._byte_symbols[symbol] for symbol in piece)
        return piece.replace(_SPACE, " ").encode()

    def token_name(self, token_id: int) -> str | None:
        """A token as its vocabulary spells it, such as `<|im_end|>`; None for an id outside."""
        return self._backend.id_to_token(token_id)

    def stream_decoder(self) -> StreamDecoder:
        """A new `StreamDecoder` over this tokenizer."""
        return StreamDecoder(self)


def _byte_symbols() -> dict[str, int]:
    """GPT-2's letters for bytes: a printable byte is its own Latin-1 letter, the others follow from U+0100 on."""
    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    own = [symbol for symbol in symbols if ord(symbol) < 256]
    rest = sorted(set(range(256)) - set(map(ord, own)))
    return {symbol: ord(symbol) for symbol in own} | dict(
        zip(symbols[len(own) :], rest, strict=True)
    )


def _decode_utf8(data: bytes) -> str:
    """Every byte that is in no whole character becomes a U+FFFD, as in sentencepiece (Python joins some)."""
    text, at = "", 0
    while at < len(data):
        for end in range(at + 1, at + 5):
            try:
                text += data[at:end].decode("utf-8")
            except UnicodeDecodeError:
                continue
            at = end
            break
        else:
            text += _REPLACEMENT
            at += 1
    return text


class StreamDecoder:
    """Turns generated ids into text as they come, never giving out half a UTF-8 character.

    The pieces joined, with `flush()` at the end, are `tokenizer.decode(all ids)`. An id behind the vocabulary has no
    text, which is logged once: embeddings are often padded above it, and such a row may be drawn.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0  # characters of decode(self._ids) that were handed out
        self._strange = False

    def feed(self, token_id: int) -> str:
        """Takes the next id and returns the text that is now certain: often a word, sometimes ''."""
        if token_id >= self._tokenizer.vocab_size:
            if not self._strange:
                logger.warning(
                    "The model wrote token %d, which its tokenizer of %d tokens has no text for; the answer is without "
                    "it, as without others of this kind.",
                    token_id,
                    self._tokenizer.vocab_size,
                )
            self._strange = True
            return ""
        self._ids.append(int(token_id))
        text = self._tokenizer.decode(self._ids)
        certain = text.rstrip(_REPLACEMENT)
        if len(text) - len(certain) > _MAX_HELD:
            certain = text[
                : len(text) - 3
            ]  # a character has four bytes, so only three can still be open
        piece = certain[self._given :]
        self._given = max(self._given, len(certain))
        if len(self._ids) >= _TRIM_IDS and self._given == len(text):
            self._ids = self._ids[-_KEEP_IDS:]
            self._given = len(self._tokenizer.decode(self._ids))
        return piece

    def flush(self) -> str:
        """Returns what was still held back; an unfinished character becomes U+FFFD. The decoder starts afresh."""
        piece = self._tokenizer.decode(self._ids)[self._given :]
        self._ids, self._given = [], 0
        return piece


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a `tokenizer.json`, or a folder that holds one.

    The bos, eos and pad tokens are those of the `tokenizer_config.json` beside it; without one there are none.
    Raises `UserError` when a file is missing, cannot be read, or the two do not belong together.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"There is no tokenizer at {file}; expected a Hugging Face tokenizer.json. Fetch or convert it again."
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the Rust library raises the bare Exception class
        raise UserError(
            f"{file} is not a tokenizer.json that can be read ({error}). Fetch or convert it again."
        ) from error
    return Tokenizer(backend, **_named_tokens(file.with_name("tokenizer_config.json")))


def _named_tokens(config_file: Path) -> dict[str, str | None]:
    config: dict[str, Any] = {}
    if config_file.is_file():
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(
                f"{config_file} is not JSON ({error}). Fetch or convert it again."
            ) from error
        if not isinstance(config, dict):
            raise UserError(
                f"{config_file} holds a {type(config).__name__}; expected an object with bos_token, eos_token and "
                "pad_token. Fetch or convert it again."
            )
    named: dict[str, str | None] = {}
    for role in ("bos_token", "eos_token", "pad_token"):
        token = config.get(role)
        # Older files hold the token as an object with its text under "content".
        named[role] = token.get("content") if isinstance(token, dict) else token
        if not isinstance(named[role], str | None):
            raise UserError(
                f"{role} in {config_file} is {token!r}; expected the text of a token. Fetch or convert it again."
            )
    return named


def byte_tokenizer() -> Tokenizer:
    """The tokenizer of the `tiny` preset: every byte is a token, after the control tokens of ChatML and LLaMA.

    262 ids, no file. For tests and for models without a vocabulary of their own; it compresses nothing.
    """
    control = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    symbols = [*control, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {symbol: token_id for token_id, symbol in enumerate(symbols)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in control]
    )
    return Tokenizer(
        backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
