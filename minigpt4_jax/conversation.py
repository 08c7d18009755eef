"""A dialogue about pictures: what was said, what the model reads next, and where its answer ends.

For: the history of one conversation and the text of one answer as it is generated. Not for: running a model
(`generation/`), the formats themselves (`data/prompts.py`), terminals or HTTP.

Differs from the original: it cuts a prompt that is too long from the left, through pictures if need be; here a full
context is an error that says the numbers (`ContextFull`). It takes `<ImageHere>` in typed text for a picture; here
pictures are objects. An answer enters the history as the very ids that were generated where the template says so; for
the published models its text is tokenised again, as they were used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Literal, TypeVar

from minigpt4_jax.config import UserError
from minigpt4_jax.data.prompts import (
    Generated,
    Piece,
    Template,
    Turn,
    check_template,
    clean_answer,
    conversation_pieces,
    encode_prompt,
    pieces_text,
    user_pieces,
)
from minigpt4_jax.data.tokenizer import StreamDecoder, Tokenizer

PictureT = TypeVar("PictureT")


class ContextFull(UserError):
    """The next prompt would not leave room for an answer. Nothing was added to the conversation.

    `used` tokens are in the prompt, `room` are wanted for the answer, `limit` is what the model can hold; `adding` says
    whether a question or a picture was too much.
    """

    def __init__(
        self,
        *,
        used: int,
        room: int,
        limit: int,
        num_pictures: int,
        adding: Literal["question", "picture"],
    ) -> None:
        self.used, self.room, self.limit = used, room, limit
        hint = ", or ask something shorter" if adding == "question" else ""
        super().__init__(
            f"The conversation is full: with this {adding} it has {used} tokens ({num_pictures} picture(s) among "
            f"them) and the answer needs room for {room}, but the model holds {limit}. "
            f"Start a new conversation{hint}."
        )


class Conversation(Generic[PictureT]):
    """Turns and pictures of one dialogue.

    `PictureT` is whatever the caller keeps for a picture (a PIL picture, its embeddings): it is only kept, in order.
    The order of use: `add_image` (any number), `ask`, then `add_answer` with what was generated. A history from
    elsewhere comes first, through `recall`.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Tokenizer,
        *,
        num_image_tokens: int,
        context: int,
        system: str | None = None,
    ) -> None:
        """
        Args:
          num_image_tokens: placeholders of one picture.
          context: tokens that the model holds, prompt and answer together.
          system: system text; None takes the template's own.

        Raises `UserError` when the tokenizer lacks a control token of the template.
        """
        check_template(template, tokenizer)
        self.template = template
        self._tokenizer = tokenizer
        self._num_image_tokens = num_image_tokens
        self._context = context
        self._system = template.system if system is None else system
        self._turns: list[Turn] = []
        self._pictures: list[PictureT] = []
        self._unasked = 0  # pictures after the last question
        self._prompt_tokens = 0

    @property
    def pictures(self) -> tuple[PictureT, ...]:
        """The pictures in the order of their placeholders."""
        return tuple(self._pictures)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was said so far; a picture joins when it is asked about (`text` shows it before)."""
        return tuple(self._turns)

    @property
    def room(self) -> int:
        """Tokens left for the answer to the last question."""
        return self._context - self._prompt_tokens

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return tuple(self._tokenizer.special(name) for name in self.template.stop_tokens)

    @property
    def written_ids(self) -> tuple[int, ...]:
        """Ids that the repetition penalty counts as written before an answer: the template's bos, as in the original.

        There it is the stand-in that transformers 4.30 begins its history with when a prompt comes as embeddings; the
        prompt itself is never counted.
        """
        bos = self.template.bos
        return () if bos is None else (self._tokenizer.special(bos),)

    def add_image(self, picture: PictureT) -> None:
        """Shows a picture; the next question is about it.

        Raises `ContextFull`, and adds nothing, when not even an empty question about it would leave room.
        """
        turns = [*self._turns, *self._user_turns(None, self._unasked + 1)]
        self._encode(turns, room=1, num_pictures=len(self._pictures) + 1, adding="picture")
        self._pictures.append(picture)
        self._unasked += 1

    def ask(
        self, question: str | None, *, room: int = 1, pictures: Sequence[PictureT] = ()
    ) -> list[int]:
        """Adds a question and returns the ids of the whole prompt, with `IMAGE_TOKEN_ID` for each image token.

        Args:
          question: typed text, taken literally: no marker in it has a meaning. None asks with the pictures alone.
          room: tokens that must be left for the answer.
          pictures: shown with the question, after those of `add_image`.

        Raises `ContextFull`, and adds nothing, when prompt and `room` together are more than the context.
        """
        turns = [*self._turns, *self._user_turns(question, self._unasked + len(pictures))]
        num_pictures = len(self._pictures) + len(pictures)
        ids = self._encode(turns, room=room, num_pictures=num_pictures, adding="question")
        self._pictures.extend(pictures)
        self._turns, self._unasked, self._prompt_tokens = turns, 0, len(ids)
        return ids

    def recall(
        self,
        role: Literal["user", "assistant"],
        text: str | None,
        *,
        pictures: Sequence[PictureT] = (),
    ) -> None:
        """Adds a message of a dialogue that was held elsewhere, word for word; pictures only with the user's.

        Looks at no room, so that a long history is encoded once: by the `ask` that comes after it.
        """
        if role == "user":
            self._turns += self._user_turns(text, len(pictures))
            self._pictures.extend(pictures)
        else:
            self._turns.append(Turn("assistant", (text,) if text else ()))

    def _encode(
        self,
        turns: Sequence[Turn],
        *,
        room: int,
        num_pictures: int,
        adding: Literal["question", "picture"],
    ) -> list[int]:
        """Ids of a prompt with these turns; raises `ContextFull` when `room` is not left behind it."""
        ids = encode_prompt(
            self.template,
            conversation_pieces(self.template, turns, system=self._system),
            tokenizer=self._tokenizer,
            num_image_tokens=self._num_image_tokens,
        )
        if len(ids) + room > self._context:
            raise ContextFull(
                used=len(ids),
                room=room,
                limit=self._context,
                num_pictures=num_pictures,
                adding=adding,
            )
        return ids

    def _user_turns(self, question: str | None, num_pictures: int) -> list[Turn]:
        """The turns that pictures and the question about them are written as."""
        if self.template.images_share_turn or num_pictures == 0:
            inside = user_pieces(self.template, question, num_pictures=num_pictures)
            return [Turn("user", inside)]
        alone = Turn("user", user_pieces(self.template, None, num_pictures=1))
        asked = Turn("user", user_pieces(self.template, question, num_pictures=1))
        return [*[alone] * (num_pictures - 1), asked]

    def add_answer(self, text: str, ids: Sequence[int] | None = None) -> str:
        """Adds an answer to the history and returns it cleaned: `AnswerStream.text` and `.ids`, or text from elsewhere.

        With `ids` and a template that says `reuse_answer_ids`, exactly those ids are in later prompts, less a stop
        token at their end (the template closes the turn) and less whatever follows a stop string in them.
        """
        cleaned = clean_answer(self.template, text)
        self._turns.append(Turn("assistant", tuple(self._answer_pieces(cleaned, ids))))
        return cleaned

    def _answer_pieces(self, cleaned: str, ids: Sequence[int] | None) -> list[Piece]:
        if ids is None or not self.template.reuse_answer_ids:
            return [cleaned] if cleaned else []
        kept = list(ids)
        while kept and kept[-1] in self.stop_ids:
            kept.pop()
        # Ids that say more than the answer (a stop string and what came after it) cannot be kept as they are.
        if self._tokenizer.decode(kept).strip() != cleaned:
            return [cleaned] if cleaned else []
        return [Generated(tuple(kept), cleaned)] if kept else []

    def answer_stream(self, *, stop_strings: Sequence[str] = ()) -> AnswerStream:
        """A new `AnswerStream` for the answer to come; `stop_strings` end it beside the template's own."""
        return AnswerStream(
            self._tokenizer.stream_decoder(),
            self.stop_ids,
            (*self.template.stop_strings, *stop_strings),
        )

    def text(self) -> str:
        """The conversation so far as people read it, control tokens and `<ImageHere>` spelled out.

        Pictures that wait for a question stand at its end.
        """
        waiting = self._user_turns(None, self._unasked) if self._unasked else []
        turns = [*self._turns, *waiting]
        return pieces_text(
            conversation_pieces(self.template, turns, system=self._system, open_answer=False)
        )


class AnswerStream:
    """Generated ids in, text to show out; knows when the answer is over.

    The pieces joined are the answer without white space around it and without its stop string or stop token.
    """

    def __init__(
        self, decoder: StreamDecoder, stop_ids: Sequence[int], stop_strings: Sequence[str]
    ) -> None:
        self._decoder = decoder
        self._stop_ids = frozenset(stop_ids)
        self._filter = StopStringFilter(stop_strings)
        self._space = ""  # white space that is shown only if something follows it
        self._text = ""
        self.ids: list[int] = []
        """All ids taken so far, a stop token among them."""
        self._ends: list[int] = []  # characters that were decoded when each of them had been taken
        self.settled = 0
        """How many of `ids`, from the first on, belong to the answer for certain: all their text was let through. Never
        those of a stop token, of what may be or is a stop string, or of a character that is not complete."""
        self.stopped = False
        """True once a stop token or stop string came: feed no more."""

    @property
    def text(self) -> str:
        """All text given out so far."""
        return self._text

    def feed(self, token_id: int) -> str:
        """Takes the next id and returns the text that can be shown now. Raises `ValueError` after the end."""
        if self.stopped:
            raise ValueError("The answer is over (`stopped`); start a new answer_stream.")
        self.ids.append(int(token_id))
        if token_id in self._stop_ids:
            self.stopped = True
            return self._show(self._close(num_ids=len(self.ids) - 1))
        decoded = self._decoder.feed(token_id)
        self._ends.append(self._end + len(decoded))
        piece = self._filter.feed(decoded)
        self.stopped = self._filter.stopped
        self._settle()
        return self._show(piece)

    def finish(self) -> str:
        """Returns what was still held back when generation ends without a stop. Returns '' after one."""
        if self.stopped:
            return ""
        piece = self._close(num_ids=len(self.ids))
        self.stopped = True
        return self._show(piece)

    @property
    def _end(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _close(self, *, num_ids: int) -> str:
        """What was held back; the first `num_ids` wrote the answer."""
        rest = self._decoder.flush()
        if self._ends:
            self._ends[-1] += len(rest)
        piece = self._filter.feed(rest) + self._filter.flush()
        if self._filter.stopped:
            self._settle()
        else:
            self.settled = num_ids
        return piece

    def _settle(self) -> None:
        """An id without text of its own is part of a character, and goes with the id that completes it."""
        passed, stopped = self._filter.passed, self._filter.stopped
        while self.settled < len(self._ends):
            start = self._ends[self.settled - 1] if self.settled else 0
            end = next((end for end in self._ends[self.settled :] if end > start), None)
            # What a stop string cut in two has been shown in part.
            if end is None or (start >= passed if stopped else end > passed):
                return
            self.settled += 1

    def _show(self, piece: str) -> str:
        waiting = self._space + piece
        if not self._text:
            waiting = waiting.lstrip()
        shown = waiting.rstrip()
        self._space = waiting[len(shown) :]
        self._text += shown
        return shown


class StopStringFilter:
    """Lets text through up to the first stop string, holding back only what may be the start of one."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        """Raises `ValueError` for an empty stop string, which would end every answer before it begins."""
        if "" in stop_strings:
            raise ValueError(f"stop_strings is {stop_strings!r}; expected no empty string in it.")
        self._stop_strings = tuple(stop_strings)
        self._held = ""
        self.passed = 0
        """Characters that were let through."""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Takes more text and returns what is certainly not part of a stop string. '' after a stop."""
        if self.stopped:
            return ""
        self._held += text
        places = [place for stop in self._stop_strings if (place := self._held.find(stop)) >= 0]
        if places:
            shown, self._held, self.stopped = self._held[: min(places)], "", True
            self.passed += len(shown)
            return shown
        keep = max((self._open_length(stop) for stop in self._stop_strings), default=0)
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(shown) :]
        self.passed += len(shown)
        return shown

    def _open_length(self, stop: str) -> int:
        """How many characters at the end of the held text may be the beginning of `stop`."""
        for length in range(min(len(stop) - 1, len(self._held)), 0, -1):
            if self._held.endswith(stop[:length]):
                return length
        return 0

    def flush(self) -> str:
        """Returns what was held back: no stop string will come any more."""
        shown, self._held = self._held, ""
        self.passed += len(shown)
        return shown
