"""Conversations with the composed models, end to end: picture and words to ids, ids to an answer, and again.

The original always draws; the sets make it certain by drawing from one token (top-k 1), so that ids must be equal with
every other knob as it was. Tolerances are those of the sets' README.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from minigpt4_jax.config import IMAGE_TOKEN_ID
from minigpt4_jax.conversation import ContextFull, Conversation
from minigpt4_jax.data.prompts import TEMPLATES, conversation_pieces, pieces_text
from minigpt4_jax.generation.sampling import Sampling
from minigpt4_jax.presets import ORIGINAL_GENERATION
from tests.engines import make_engine, make_request

ENCODED: dict[str, Any] = {"atol": 5e-5, "rtol": 0.0}
MAX_LENGTH = 2000
"""The original's limit for prompt and answer unless a case gives another."""
KNOBS = {"max_new_tokens", "temperature", "top_p", "repetition_penalty"}


class ChatCase:
    """A recorded conversation, its weights, and the ids of its prompts."""

    def __init__(self, golden: Any, folder: str, name: str) -> None:
        self.record = golden.report(f"{folder}/cases.json")[name]
        self.held = golden.arrays(f"{folder}/{name}.npz")
        self.picture = self.held["image"].transpose(1, 2, 0)[None]
        self.config, params = golden.minigpt4(self.picture.shape[1], variant=folder)
        self.special = golden.special_ids("llama_mha")
        self.table = params["llama"]["embed_tokens"]["embedding"]
        self.settings = {name: getattr(ORIGINAL_GENERATION, name) for name in KNOBS} | self.record[
            "answer_kwargs"
        ]
        self.limit = self.settings.pop("max_length", MAX_LENGTH)
        self.least = self.settings.pop("min_length", 1)
        assert set(self.settings) == KNOBS, "a setting that is not known here"
        self.prompts = [self.read_prompt(turn) for turn in range(len(self.record["turns"]))]
        longest = max(map(len, self.prompts)) + self.settings["max_new_tokens"]
        self.engine = make_engine(params, self.config, context=longest)

    def read_prompt(self, turn: int) -> list[int]:
        """The ids whose embeddings the original mixed; what no id has came out of the picture."""
        ids = {row.tobytes(): number for number, row in reversed(list(enumerate(self.table)))}
        embeds = self.held[f"turn{turn}_context_emb"][0]
        return [ids.get(row.tobytes(), IMAGE_TOKEN_ID) for row in embeds]

    def answer(self, prompt: list[int], image_embeds: np.ndarray) -> list[int]:
        """The ids of an answer up to the first stop, which is in it.

        The original drops what is too long from the left, even out of a picture. No `Chat` here does (it raises
        `ContextFull`), so the prompt is cut before the engine gets it.
        """
        prompt = prompt[max(0, len(prompt) + self.settings["max_new_tokens"] - self.limit) :]
        image_embeds = image_embeds[len(image_embeds) - prompt.count(IMAGE_TOKEN_ID) :]
        settings = dict(self.settings)
        request = make_request(
            (prompt, image_embeds),
            steps=settings.pop("max_new_tokens"),
            # The history begins with a stand-in bos, which counts towards the least length.
            min_new_tokens=self.least - 1,
            stop_tokens={self.special["eos"]},
            sampling=Sampling(**settings, top_k=self.record["top_k_forced_to"]),
            written=[self.special["bos"]],
        )
        return self.until_stopped(self.engine.stream(request))

    def until_stopped(self, tokens: Iterator[int]) -> list[int]:
        stops = [*self.record["stops"], [self.special["eos"]]]
        answer: list[int] = []
        for token in tokens:
            answer.append(token)
            if any(answer[-len(stop) :] == stop for stop in stops):
                break
        return answer


@pytest.fixture(scope="module")
def run(golden: Any, chat_case: tuple[str, str]) -> ChatCase:
    return ChatCase(golden, *chat_case)


def test_golden_chat_picture(run: ChatCase) -> None:
    embeds = np.asarray(run.engine.encode_images(run.picture))
    np.testing.assert_allclose(embeds, run.held["image_emb"], **ENCODED)
    for turn, prompt in enumerate(run.prompts):
        mixed = run.held[f"turn{turn}_context_emb"][0][np.equal(prompt, IMAGE_TOKEN_ID)]
        np.testing.assert_allclose(embeds[0], mixed, **ENCODED)


def test_golden_chat_ids_of_every_answer(run: ChatCase) -> None:
    embeds = np.asarray(run.engine.encode_images(run.picture)[0])
    for turn, prompt in zip(run.record["turns"], run.prompts, strict=True):
        answer = run.answer(prompt, embeds)
        assert [run.special["bos"], *answer] == turn["output_ids"]


def test_golden_chat_through_a_conversation(golden: Any, run: ChatCase) -> None:
    """The same with nothing but strings and the picture going in: prompts as ids, answers as text, history as text."""
    tokenizer = golden.tokenizer("llama_mha")
    embeds = np.asarray(run.engine.encode_images(run.picture)[0])
    turns = run.record["turns"]
    (template,) = [t for t in TEMPLATES.values() if written_as(t, turns[0])]
    chat: Conversation[np.ndarray] = Conversation(
        template, tokenizer, num_image_tokens=len(embeds), context=run.engine.context
    )
    chat.add_image(embeds)
    assert chat.written_ids == (run.special["bos"],)
    for turn, prompt in zip(turns, run.prompts, strict=True):
        assert chat.ask(turn["question"], room=run.settings["max_new_tokens"]) == prompt
        system = template.system
        opened = pieces_text(conversation_pieces(template, chat.turns, system=system))
        assert opened == turn["prompt"]
        stream = chat.answer_stream()
        for token in run.answer(prompt, embeds):
            if token != tokenizer.pad_id:  # the word `$$`, which the original leaves out of answers
                stream.feed(token)
        stream.finish()
        assert chat.add_answer(stream.text, stream.ids) == turn["answer"]
        said = [pieces_text(message.pieces) for message in chat.turns]
        assert said == [text for _, text in turn["messages_after"]]


def written_as(template: Any, turn: dict[str, Any]) -> bool:
    before, _, _ = turn["prompt"].partition("<ImageHere>")
    opened = [template.system or "", *template.system_suffix, *template.user_prefix]
    return pieces_text([*opened, template.image_before]) == before


def test_golden_chat_a_prompt_is_refused_exactly_where_the_original_would_cut_it(
    golden: Any, run: ChatCase
) -> None:
    """The original drops the first `max(0, length + new tokens - limit)` embeddings, the bos and pictures first."""
    tokenizer = golden.tokenizer("llama_mha")
    turn, prompt, room = run.record["turns"][0], run.prompts[0], run.settings["max_new_tokens"]
    (template,) = [t for t in TEMPLATES.values() if written_as(t, turn)]
    for limit in (len(prompt) + room - 1, len(prompt) + room):
        cut = max(0, len(prompt) + room - limit)
        chat: Conversation[str] = Conversation(
            template, tokenizer, num_image_tokens=run.config.num_image_tokens, context=limit
        )
        chat.add_image("picture")
        if not cut:
            assert chat.ask(turn["question"], room=room) == prompt
            continue
        with pytest.raises(ContextFull) as raised:
            chat.ask(turn["question"], room=room)
        full = raised.value
        assert full.used + full.room - full.limit == cut
        assert chat.turns == ()


def test_golden_chat_every_spelling_of_the_stop_ends_an_answer_by_its_text(
    golden: Any, tokenizer_file: str
) -> None:
    """The original lists the ids of `###` at the start of a line and after a word; here the text is what stops."""
    tokenizer = golden.tokenizer("llama_mha")
    word, joined = tokenizer.encode("a"), tokenizer.encode("a###")
    assert joined[: len(word)] == word
    spellings = [tokenizer.encode("###"), joined[len(word) :]]
    assert spellings[0] != spellings[1]
    for template in (t for t in TEMPLATES.values() if "###" in t.stop_strings):
        chat: Conversation[None] = Conversation(
            template, tokenizer, num_image_tokens=1, context=10_000
        )
        for ids in spellings:
            chat.ask("?")
            stream = chat.answer_stream()
            for token in [*word, *ids]:
                assert not stream.stopped
                stream.feed(token)
            assert stream.stopped
            assert chat.add_answer(stream.text, stream.ids) == "a"
