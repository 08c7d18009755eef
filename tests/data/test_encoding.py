"""data/encoding.py: prompts drawn or brought, several turns, and lengths that do not fit."""

from __future__ import annotations

from typing import Any

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data.captions import blip_caption
from minigpt4_jax.data.encoding import Encoder
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.prompts import (
    CHATML,
    Picture,
    Special,
    Turn,
    conversation_pieces,
    encode_pieces,
    get_template,
    user_pieces,
)
from minigpt4_jax.data.sources import Example, Exchange
from minigpt4_jax.data.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()


def encoder(**changes: Any) -> Encoder:
    settings: dict[str, Any] = {
        "prompts": ("One?", "Two?"),
        "num_image_tokens": 2,
        "max_text_len": 16,
    }
    return Encoder(CHATML, TOKENIZER, **(settings | changes))


def example(*exchanges: Exchange) -> Example:
    return Example("line 3", 0, exchanges)


def test_an_example_is_asked_with_the_drawn_prompt_or_its_own() -> None:
    made = encoder()
    plain = example(Exchange(None, "x"))
    one, two = made.encode(plain, 0), made.encode(plain, 1)
    own = made.encode(example(Exchange("Two?", "x")), 0)
    assert one.token_ids.tolist() != two.token_ids.tolist() == own.token_ids.tolist()
    assert made.num_prompts == 2


def test_several_turns_read_as_in_chat_and_every_answer_counts() -> None:
    talk = example(Exchange("What?", "A cat."), Exchange("Sure?", "Yes."), Exchange("Why?", "Fur."))
    tokens = encoder().encode(talk, 0)
    turns = []
    for place, (question, answer) in enumerate(talk.exchanges):
        turns += [Turn("user", user_pieces(CHATML, question, num_pictures=int(place == 0)))]
        turns += [Turn("assistant", (answer,))]
    pieces = conversation_pieces(CHATML, turns, system=None, open_answer=False)
    assert pieces[-1] == "\n"
    chat = encode_pieces(pieces[:-1], TOKENIZER, num_image_tokens=2)
    assert tokens.token_ids.tolist() == chat
    counted = tokens.token_ids[tokens.loss_mask].tolist()
    assert counted == encode_pieces(
        ["A cat.", Special("<|im_end|>"), "Yes.", Special("<|im_end|>"), "Fur.", Special("<|im_end|>")],
        TOKENIZER, num_image_tokens=0,
    )  # fmt: skip
    assert (tokens.token_ids == -1).sum() == 2
    assert Picture() in pieces


def test_the_processor_changes_answers_only() -> None:
    loud = example(Exchange("What IS it?", "A DOG!"))
    tokens = encoder().encode(loud, 0, process=blip_caption)
    text = TOKENIZER.decode([i for i in tokens.token_ids.tolist() if i >= 0])
    assert "What IS it?" in text
    assert text.endswith("a dog")


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        ("a" * 16, {}, r"line 3 has 17 tokens with its end symbol; expected at most 16"),
        ("  ", {}, "The answer of line 3 is empty"),
        ("abc", {"max_positions": 20}, r"line 3 has \d+ tokens in all; expected at most 20"),
    ],
)
def test_words_that_do_not_fit_are_a_fault_with_a_name(
    words: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SampleFault, match=said) as raised:
        encoder(**changes).encode(example(Exchange(None, words)), 0)
    assert raised.value.reason == "text does not fit"


def test_a_processor_may_leave_nothing_and_that_is_a_fault() -> None:
    with pytest.raises(SampleFault, match="is empty"):
        encoder().encode(example(Exchange(None, "...")), 0, process=blip_caption)


def test_cut_answers_say_how_much() -> None:
    talk = example(Exchange("q", "a" * 20), Exchange("q", "a" * 18))
    tokens = encoder(truncate=True).encode(talk, 0)
    assert tokens.cut_tokens == 5 + 3
    assert tokens.loss_mask.sum() == 32


# --- prompts that are too long ---

VICUNA = get_template("vicuna_v0")  # with a bos, which the limit does not count
QUESTION = "What in the world is this?"


def prompted(question: str | None, **changes: Any) -> tuple[Encoder, list[int]]:
    """An encoder with one prompt, and the prompt's ids in a sample: the list's, or the sample's own."""
    settings: dict[str, Any] = {"num_image_tokens": 2, "max_text_len": 16, "prompts": (QUESTION,)}
    made = Encoder(VICUNA, TOKENIZER, **(settings | changes))
    tokens = made.encode(example(Exchange(question, "x")), 0)
    return made, tokens.token_ids[~tokens.loss_mask].tolist()


@pytest.mark.parametrize("own", [None, "And what is that?"])
def test_a_prompt_is_held_to_its_limit_to_the_token_without_counting_bos(own: str | None) -> None:
    short = {"prompts": ("x",)} if own else {}  # the other prompt fits in any case
    _, whole = prompted(own, **short)
    assert whole[0] == TOKENIZER.special("<s>")
    length = len(whole) - 1
    made, fitting = prompted(own, max_context_len=length, **short)
    assert (fitting, made.cut_prompts) == (whole, 0)
    made, cut = prompted(own, max_context_len=length - 1, truncate=True, **short)
    assert (cut, made.cut_prompts) == (whole[:-1], 1)
    made.encode(example(Exchange(own, "y")), 0)
    assert made.cut_prompts == 1  # of different prompts, however often they are asked
    said = f"has {length} tokens with its picture; expected at most {length - 1}"
    # The run's own prompt stops the run, a sample's is the sample's fault.
    with pytest.raises(SampleFault if own else UserError, match=said) as raised:
        prompted(own, max_context_len=length - 1, **short)
    assert isinstance(raised.value, SampleFault) == bool(own)


def test_a_cut_prompt_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    made, _ = prompted(None, prompts=("x",), max_context_len=60, truncate=True)
    assert not caplog.messages
    for question in (QUESTION * 3, QUESTION * 3, QUESTION * 4):
        made.encode(example(Exchange(question, "y")), 0)
    assert made.cut_prompts == 2
    (line,) = caplog.messages
    assert f"{QUESTION * 3!r}" in line
    assert "data.max_context_len (60)" in line
