"""Many questions to one model: pulled lazily, answered side by side in the engine's slots, given as each is finished.

For: what stands between a list of questions and the engine. Pictures are decoded on threads ahead of the device and
encoded in batches; every new token is read as text, so that a stop string ends its row at once; a question that cannot
be asked is an answer of its own and not the end of the others. `MiniGPT4.generate`, captioning and evaluation go
through here. Not for: conversations with a memory (`chat.py`), the device loop (`generation/engine.py`).

Differs from the original, whose batches end with their longest answer, and whose stop strings end nothing there.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from minigpt4_jax.asking import make_request, pick_seed, search
from minigpt4_jax.config import UserError
from minigpt4_jax.conversation import AnswerStream, Conversation
from minigpt4_jax.data.prompts import Template, clean_answer
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Generation, Request, TokenLogprobs
from minigpt4_jax.image_cache import ImageEncoder, Picture, PreparedImage
from minigpt4_jax.presets import GenerationConfig

KeyT = TypeVar("KeyT")
MAX_THREADS = 8
"""Threads that decode pictures; fewer on a machine with fewer cores."""


@dataclass(frozen=True, kw_only=True)
class Ask(Generic[KeyT]):
    """A question about no, one or several pictures."""

    key: KeyT
    """Whatever tells the caller which answer is this one's."""
    images: Sequence[Picture] = ()
    prompt: str | None
    """None asks with the pictures alone."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was generated for a question."""

    text: str
    """Cleaned as in a chat: without white space around it, stop string and stop token."""
    ids: tuple[int, ...]
    """All ids up to the end of the answer, a stop token among them."""
    finish_reason: Literal["stop", "length"]
    """It ended by itself, or at `max_new_tokens`."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """Where they were asked for: one for every id."""


Outcome = tuple[Answer, ...] | UserError
"""The answers to one question, or why there is none."""


@dataclass(eq=False)
class _Row:
    """One answer being written."""

    handle: Generation
    stream: AnswerStream
    done: bool = False


@dataclass(eq=False)
class _Job(Generic[KeyT]):
    """A question with its prompt, and the answers being written to it."""

    key: KeyT
    conversation: Conversation[Any]
    prompt: list[int]
    embeds: Sequence[Any] = ()
    rows: list[_Row] = field(default_factory=list)


class AnswerRun(Generic[KeyT]):
    """One pass over questions. Iterate it once; closing the iterator takes back what is still being written.

    Args:
        engine: what writes; other users may step it in between.
        encoder: from pictures to embeddings.
        start: makes a new conversation.
        generation: how answers are written. With a seed, answer `i` of a question draws by `seed + i`; without one
            every answer has a seed of its own.
        n: answers to each question, drawn or found by beams.
        logprobs: also tell the log-probability of every token, and of the likeliest ones in its place.

    Raises:
        UserError: `n` answers that would all be the same, more than there are beams, or log-probabilities from beams.
    """

    def __init__(
        self,
        engine: Engine,
        encoder: ImageEncoder,
        start: Callable[[], Conversation[Any]],
        *,
        generation: GenerationConfig,
        n: int = 1,
        logprobs: bool = False,
    ) -> None:
        _check(generation, n=n, logprobs=logprobs)
        self._engine, self._encoder, self._start = engine, encoder, start
        self._generation, self._n, self._logprobs = generation, n, logprobs
        self._preparing: deque[tuple[Ask[KeyT], list[Future[PreparedImage]]]] = deque()
        self._ready: deque[_Job[KeyT]] = deque()
        self._open: list[_Job[KeyT]] = []

    def answer(self, asks: Iterable[Ask[KeyT]]) -> Generator[tuple[KeyT, Outcome], None, None]:
        """Yields key and outcome of every question, in the order in which they are finished.

        Never more than twice as many questions as the engine has slots are taken from `asks` and unfinished.
        """
        source = iter(asks)
        threads = min(MAX_THREADS, os.cpu_count() or 1)
        pool = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
        try:
            while True:
                self._pull(source, pool)
                if not (self._preparing or self._ready or self._open):
                    return
                yield from self._make_ready()
                if self._generation.num_beams > 1:
                    yield from self._search()
                    continue
                self._submit()
                if self._open:
                    self._engine.step()
                    yield from self._collect()
        finally:
            for job in self._open:
                for row in job.rows:
                    self._end(row)
            pool.shutdown(cancel_futures=True)

    def _pull(self, source: Iterator[Ask[KeyT]], pool: ThreadPoolExecutor) -> None:
        room = 2 * self._engine.num_slots
        while len(self._preparing) + len(self._ready) + len(self._open) < room:
            ask = next(source, None)
            if ask is None:
                return
            decoded = [pool.submit(self._encoder.prepare, picture) for picture in ask.images]
            self._preparing.append((ask, decoded))

    def _make_ready(self) -> Iterator[tuple[KeyT, UserError]]:
        """Encodes the pictures of the next questions together; yields those that cannot be asked.

        Where nothing is being written it waits for as many questions as there are slots; else it takes those whose
        pictures the threads have decoded, at least half as many, so that pictures are encoded in batches.
        """
        free = self._free_slots()
        if len(self._ready) >= free:
            return
        jobs: list[_Job[KeyT]] = []
        while self._preparing and len(jobs) < max(free, self._engine.num_slots // 2):
            ask, decoded = self._preparing[0]
            if self._open and not all(future.done() for future in decoded):
                break
            self._preparing.popleft()
            try:
                conversation = self._start()
                for future in decoded:
                    conversation.add_image(future.result())
                prompt = conversation.ask(ask.prompt, room=self._generation.max_new_tokens)
                jobs.append(_Job(ask.key, conversation, prompt))
            except UserError as error:
                yield ask.key, error
        shown = [picture for job in jobs for picture in job.conversation.pictures]
        embeds = iter(self._encoder.embed(shown))
        for job in jobs:
            job.embeds = [next(embeds) for _ in job.conversation.pictures]
        self._ready.extend(jobs)

    def _submit(self) -> None:
        """Fills the slots that this run left free."""
        while self._ready and self._free_slots() > 0:
            job = self._ready.popleft()
            self._open.append(job)
            request = self._request(job)
            job.rows = [
                _Row(handle, job.conversation.answer_stream())
                for handle in self._engine.submit(request, count=self._n)
            ]

    def _free_slots(self) -> int:
        busy = sum(not row.done for job in self._open for row in job.rows)
        return self._engine.num_slots - busy

    def _collect(self) -> Iterator[tuple[KeyT, Outcome]]:
        """Reads what was written since the last step and yields the questions that are answered."""
        for job in tuple(self._open):
            for row in job.rows:
                _read(row)
                if row.done:
                    self._end(row)
            if all(row.done for row in job.rows):
                self._open.remove(job)
                yield job.key, _outcome(job)

    def _end(self, row: _Row) -> None:
        """Takes a request back whose answer is over before the engine knows it (a stop string), or is not wanted."""
        if not row.handle.finished:
            self._engine.cancel(row.handle)

    def _request(self, job: _Job[KeyT]) -> Request:
        return make_request(
            job.conversation,
            job.prompt,
            job.embeds,
            generation=self._generation,
            seed=pick_seed(self._generation),
            max_new_tokens=self._generation.max_new_tokens,
            logprobs=self._logprobs,
        )

    def _search(self) -> Iterator[tuple[KeyT, Outcome]]:
        """The best answers to all ready questions that beams find, together."""
        jobs = list(self._ready)
        self._ready.clear()
        if not jobs:
            return
        requests = [self._request(job) for job in jobs]
        found = search(self._engine, requests, generation=self._generation)
        for job, hypotheses in zip(jobs, found, strict=True):
            answers = []
            for ids in hypotheses[: self._n]:
                stream = job.conversation.answer_stream()
                _feed(stream, ids)
                answers.append(_finish(stream, job.conversation.template))
            yield job.key, tuple(answers)


def _check(generation: GenerationConfig, *, n: int, logprobs: bool) -> None:
    if n < 1:
        raise UserError(f"n is {n}; expected at least 1 answer to each question.")
    if generation.num_beams > 1:
        if n > generation.num_beams:
            raise UserError(
                f"n is {n} and num_beams is {generation.num_beams}; expected at most as many answers as beams."
            )
        if logprobs:
            raise UserError(
                f"logprobs are asked for with {generation.num_beams} beams; expected num_beams 1: beams add "
                "log-probabilities up and keep none of them."
            )
    elif n > 1 and generation.temperature == 0:
        raise UserError(
            f"n is {n} and temperature is 0, which gives {n} times the same answer; expected a temperature above 0, "
            "beams, or n 1."
        )


def _feed(stream: AnswerStream, ids: Iterable[int]) -> None:
    for token in ids:
        stream.feed(token)
        if stream.stopped:
            return


def _read(row: _Row) -> None:
    if row.done:
        return
    _feed(row.stream, row.handle.ids[len(row.stream.ids) :])
    row.done = row.stream.stopped or row.handle.finished


def _finish(
    stream: AnswerStream, template: Template, *, logprobs: Sequence[TokenLogprobs] = ()
) -> Answer:
    """The answer that a stream has taken. What was generated behind a stop string is not part of it."""
    stopped = stream.stopped
    stream.finish()
    return Answer(
        text=clean_answer(template, stream.text),
        ids=tuple(stream.ids),
        finish_reason="stop" if stopped else "length",
        logprobs=tuple(logprobs[: len(stream.ids)]) or None,
    )


def _outcome(job: _Job[Any]) -> Outcome:
    for row in job.rows:
        if not row.stream.stopped and row.handle.finish_reason in ("error", "cancelled"):
            fault = UserError(
                f"The engine gave this answer up ({row.handle.error or 'cancelled'}); ask again."
            )
            fault.__cause__ = row.handle.error
            return fault
    template = job.conversation.template
    return tuple(_finish(row.stream, template, logprobs=row.handle.logprobs) for row in job.rows)
