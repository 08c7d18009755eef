"""minigpt4_jax.serving.rows: how ids become pieces, and which tokens are told with them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.conversation import Conversation
from minigpt4_jax.data.prompts import clean_answer, get_template
from minigpt4_jax.data.tokenizer import Tokenizer, byte_tokenizer
from minigpt4_jax.generation.requests import TokenLogprobs
from minigpt4_jax.serving.jobs import Ended, Piece
from minigpt4_jax.serving.rows import RoleFilter, Row

TOKENIZER = byte_tokenizer()
VICUNA = get_template("vicuna_v0")


def byte_ids() -> dict[int, int]:
    """The ids of single bytes, of whole characters or not."""
    found: dict[int, int] = {}
    for point in [*range(128), *range(0x80, 0x800, 7), 0x20AC, 0x1F600, 0x10FFFF]:
        character = chr(point)
        ids = TOKENIZER.encode(character)
        found.update(zip(character.encode(), ids, strict=True))
    return found


BYTE_IDS = byte_ids()


def make_row(
    *, template: str = "chatml", stop: tuple[str, ...] = (), whole: bool = False
) -> tuple[Row, Tokenizer]:
    chosen = get_template(template)
    talk: Conversation[Any] = Conversation(chosen, TOKENIZER, num_image_tokens=2, context=400)
    stream = talk.answer_stream(stop_strings=stop)
    return Row(0, stream, template=chosen, whole=whole, logprobs=True), TOKENIZER


def write(row: Row, text: str | bytes, *, then: list[int] | None = None) -> list[Piece | Ended]:
    """One id a step, with a log-probability that says its place; `then` follows, and it ends."""
    raw = text if isinstance(text, bytes) else text.encode()
    ids = [*(BYTE_IDS[byte] for byte in raw), *(then or [])]
    known = [TokenLogprobs(chosen=-float(place), top=()) for place in range(len(ids))]
    found: list[Piece | Ended] = []
    for place, token in enumerate(ids):
        found += row.take([token], ended=place == len(ids) - 1, logprobs=known)
        if row.finish_reason:
            break
    return found


def pieces(events: list[Piece | Ended]) -> list[Piece]:
    return [event for event in events if isinstance(event, Piece)]


def test_tokens_come_with_the_piece_that_has_their_text() -> None:
    row, _ = make_row()
    found = pieces(write(row, "a é!"))
    assert [(piece.text, len(piece.tokens)) for piece in found] == [
        ("a", 1),
        ("", 1),  # white space is shown when something follows it
        (" é", 2),
        ("!", 1),
    ]
    assert [t.logprobs.chosen for piece in found for t in piece.tokens] == [0, -1, -2, -3, -4]
    assert [piece.num_tokens for piece in found] == [1, 2, 4, 5]


def test_a_stop_token_is_counted_and_not_told() -> None:
    row, tokenizer = make_row()
    events = write(row, "ab", then=[tokenizer.special("<|im_end|>")])
    assert sum(len(piece.tokens) for piece in pieces(events)) == 2
    assert events[-1] == Ended(0, "stop", 3)


@pytest.mark.parametrize(("text", "shown"), [("ab##", "ab##"), ("ab###c", "ab"), ("###", "")])
def test_tokens_of_what_may_be_a_stop_string_are_held_until_it_is_known(
    text: str, shown: str
) -> None:
    row, _ = make_row(stop=("###",))
    told = 0
    for event in write(row, text):
        if isinstance(event, Piece):
            told += len(event.tokens)
            if not row.finish_reason:
                assert "#" not in event.text
    assert told == len(shown)


def test_tokens_of_an_open_character_are_not_told_before_its_stop_string() -> None:
    row, _ = make_row(stop=("é",))
    events = write(row, "aéb")
    assert [(piece.text, len(piece.tokens)) for piece in pieces(events)] == [("a", 1)]
    assert events[-1] == Ended(0, "stop", 3)


def test_a_broken_character_at_the_end_is_told_with_its_tokens() -> None:
    row, _ = make_row()
    found = pieces(write(row, b"a\xe2\x82"))
    assert "".join(piece.text for piece in found).startswith("a�")
    assert sum(len(piece.tokens) for piece in found) == 3


def test_a_whole_answer_comes_in_one_piece() -> None:
    row, _ = make_row(whole=True)
    piece, end = write(row, " hello ")
    assert isinstance(piece, Piece)
    assert (piece.text, len(piece.tokens), piece.num_tokens) == ("hello", 7, 7)
    assert end == Ended(0, "length", 7)


def test_an_empty_answer_is_only_its_end() -> None:
    row, tokenizer = make_row()
    assert write(row, "", then=[tokenizer.special("<|im_end|>")]) == [Ended(0, "stop", 1)]


@pytest.mark.parametrize(
    "text", ["Assistant: hi", "  Assistant:  Assistant: hi", "hi", "Ass", "Assistant:", "A cat."]
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_role_that_is_written_again_is_dropped(whole: bool, text: str) -> None:
    row, _ = make_row(template="vicuna_v0", whole=whole)
    found = pieces(write(row, text))
    assert "".join(piece.text for piece in found) == clean_answer(VICUNA, text)


def test_a_role_in_the_middle_is_cut_off_where_the_answer_comes_whole(
    caplog: pytest.LogCaptureFixture,
) -> None:
    row, _ = make_row(template="vicuna_v0", whole=True)
    (piece, _) = write(row, "I am Assistant: hi")
    assert isinstance(piece, Piece)
    assert piece.text == "hi"
    assert not caplog.records
    row, _ = make_row(template="vicuna_v0")
    found = pieces(write(row, "I am Assistant: hi"))
    assert "".join(piece.text for piece in found) == "I am Assistant: hi"
    assert "repeats the role" in caplog.text


@given(st.lists(st.sampled_from(["Assistant:", "Assi", "a", " ", "hi", "ant:"]), max_size=8))
@settings(max_examples=60, deadline=None)
def test_only_a_role_behind_shown_text_stays(parts: list[str]) -> None:
    text = "".join(parts)
    role = RoleFilter("Assistant:")
    shown = "".join(role.feed(character) for character in text) + role.finish()
    assert text.endswith(shown)
    assert not shown.startswith(("Assistant:", " "))
    if "Assistant:" not in shown:
        assert shown.strip() == clean_answer(VICUNA, text)
    whole = RoleFilter("Assistant:")
    assert (whole.feed(text) + whole.finish()).strip() == clean_answer(VICUNA, text)


@given(
    text=st.text("ab#é \n", max_size=12),
    stops=st.lists(st.text("ab#é", min_size=1, max_size=3), max_size=2),
    ends=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_pieces_and_tokens_tell_the_same_answer(text: str, stops: list[str], ends: bool) -> None:
    row, tokenizer = make_row(stop=tuple(stops))
    then = [tokenizer.special("<|im_end|>")] if ends or not text else []
    found = pieces(write(row, text, then=then))
    # The first stop string that is complete ends the answer, where it begins.
    places = [
        min((text[:end].find(stop) for stop in stops if stop in text[:end]), default=-1)
        for end in range(len(text) + 1)
    ]
    kept = text[: next((place for place in places if place >= 0), len(text))]
    shown = "".join(piece.text for piece in found)
    assert shown == kept.strip()
    tokens = [token for piece in found for token in piece.tokens]
    assert tokenizer.decode([token.id for token in tokens]) == kept
    assert [token.logprobs.chosen for token in tokens] == [-place for place in range(len(tokens))]
    told = 0
    for piece in found:
        told += len(piece.tokens)
        assert told <= piece.num_tokens
