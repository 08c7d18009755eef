"""A job under way: its answers, how their ids become pieces of text, and what its record says in the end.

For: what the scheduler knows of one job. Not for: slots and threads (`scheduler.py`).

Differs from `answers.py`, whose answers are read once they are whole: here each piece is told as soon as it is certain.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterable, Sequence
from typing import Any, Literal

from minigpt4_jax.conversation import AnswerStream
from minigpt4_jax.data.prompts import Template, clean_answer
from minigpt4_jax.generation.requests import Generation, TokenLogprobs
from minigpt4_jax.serving.jobs import Ended, Job, JobRecord, Outcome, Piece, Token

logger = logging.getLogger(__name__)


class RoleFilter:
    """Drops a role that a model writes again in front of its answer, as `clean_answer` does, while nothing is shown.

    The original cuts everything up to the last `Assistant:` of the whole text. A stream cannot take back what was
    shown, so that a role in the middle of an answer stays in it.
    """

    def __init__(self, role: str | None) -> None:
        self._role, self._held, self._open = role, "", role is not None

    def feed(self, text: str) -> str:
        """Takes more text and returns what can be shown."""
        if self._role is None or not self._open:
            return text
        # White space behind the role goes with it: an answer begins with none.
        self._held = (self._held + text).rsplit(self._role, 1)[-1].lstrip()
        if self._role.startswith(self._held):
            return ""
        self._open = False
        return self._held

    def finish(self) -> str:
        """What was held back, when nothing comes any more."""
        return self._held if self._open else ""


class Row:
    """One answer being written.

    Args:
        index: which of the job's answers.
        stream: of the job's conversation, with its stop strings.
        whole: tell its text in one piece, when it has ended.
    """

    def __init__(
        self, index: int, stream: AnswerStream, *, template: Template, whole: bool, logprobs: bool
    ) -> None:
        self.index = index
        self.finish_reason: Literal["", "stop", "length"] = ""
        """"" until its end."""
        self.last_s: float | None = None
        """When its newest token was read; None before the first."""
        self._stream, self._template = stream, template
        self._whole, self._logprobs = whole, logprobs
        self._role = RoleFilter(template.answer_after)
        self._shown = ""
        self._told = 0  # tokens

    @property
    def num_tokens(self) -> int:
        """Generated so far, a stop token among them."""
        return len(self._stream.ids)

    def take(
        self, ids: Iterable[int], *, ended: bool, logprobs: Sequence[TokenLogprobs] = ()
    ) -> list[Piece | Ended]:
        """Reads new ids up to the end of the answer, and gives what can be told now.

        Args:
            ended: no more will come.
            logprobs: of all ids of this answer, from its first.
        """
        text = ""
        for token in ids:
            text += self._stream.feed(token)
            if self._stream.stopped:
                break
        stopped = self._stream.stopped
        over = stopped or ended
        if over:
            text += self._stream.finish()
        text = self._show(text, over=over)
        found: list[Piece | Ended] = []
        tokens = () if self._whole and not over else self._tokens(logprobs)
        if text or tokens:
            found.append(
                Piece(index=self.index, text=text, num_tokens=self.num_tokens, tokens=tokens)
            )
        if over:
            self.finish_reason = "stop" if stopped else "length"
            found.append(Ended(self.index, self.finish_reason, self.num_tokens))
        return found

    def _show(self, text: str, *, over: bool) -> str:
        if self._whole:
            return clean_answer(self._template, self._stream.text) if over else ""
        text = self._role.feed(text)
        if over:
            text += self._role.finish()
        self._shown += text
        if over and self._shown != clean_answer(self._template, self._stream.text):
            logger.warning(
                "A streamed answer repeats the role %r after its beginning, which stays in it; without streaming only "
                "what follows would have been given.",
                self._template.answer_after,
            )
        return text

    def _tokens(self, logprobs: Sequence[TokenLogprobs]) -> tuple[Token, ...]:
        if not self._logprobs:
            return ()
        first, self._told = self._told, self._stream.settled
        places = range(first, self._told)
        return tuple(Token(self._stream.ids[place], logprobs[place]) for place in places)


class Task:
    """A job between `submit` and its end, with what the scheduler notes about it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.lock = threading.RLock()
        """Held while the job is told something and while it is ended, so that nothing is told after the end. Innermost
        but for the scheduler's own lock, which is taken inside it and never around it."""
        self.outcome: Outcome | None = None
        """How it ended; None until then."""
        self.handles: list[Generation] = []
        """Its answers in the engine; empty before it is there, and with beams."""
        self.search: Generator[None, None, list[list[int]]] | None = None
        """With beams: what is left of its search, until the job is out of the engine."""
        self.rows: list[Row] = []
        self.embeds: list[Any] = []
        """Of its pictures, those that are encoded; in the end all."""
        self.started = False
        self.cached_tokens = 0
        self.taken_s: float | None = None
        """When slots were set aside for it, or its search began."""
        self.ended_s: float | None = None
        self._first_s: float | None = None
        self._last_s: float | None = None

    @property
    def over(self) -> bool:
        """Whether it was told its end, or wants to hear no more."""
        return self.outcome is not None

    @property
    def searches(self) -> bool:
        """Whether beams answer it, which take no slots."""
        return self.job.generation.num_beams > 1

    @property
    def slots(self) -> int:
        """Slots that it has or waits for."""
        if self.searches:
            return 0
        if not self.handles:
            return self.job.n
        return sum(not handle.finished for handle in self.handles)

    def new_row(self) -> Row:
        """The next of its answers."""
        job = self.job
        row = Row(
            len(self.rows),
            job.conversation.answer_stream(stop_strings=job.stop_strings),
            template=job.conversation.template,
            whole=not job.stream or self.searches,
            logprobs=job.logprobs,
        )
        self.rows.append(row)
        return row

    def note_token(self, now_s: float) -> None:
        """A token of one of its answers was read."""
        self._first_s = now_s if self._first_s is None else self._first_s
        self._last_s = now_s

    def record(self) -> JobRecord:
        """What the metrics are told when it is over."""
        assert self.outcome is not None
        assert self.ended_s is not None
        job, taken_s = self.job, self.taken_s
        prefill_s = decode_s = None
        if taken_s is not None and self._first_s is not None and self._last_s is not None:
            prefill_s, decode_s = self._first_s - taken_s, self._last_s - self._first_s
        return JobRecord(
            outcome=self.outcome,
            prompt_tokens=len(job.prompt),
            cached_tokens=self.cached_tokens,
            generated_tokens=sum(row.num_tokens for row in self.rows),
            n=job.n,
            max_new_tokens=job.max_new_tokens,
            queue_s=(self.ended_s if taken_s is None else taken_s) - job.arrived_s,
            prefill_s=prefill_s,
            decode_s=decode_s,
            total_s=self.ended_s - job.arrived_s,
        )
