"""POST /v1/chat/completions: from the bytes of a body to a job, and from the events of the job to a response.

For: the way between the socket and the scheduler, streamed and whole, and what happens when the client goes away. Not
for: the fields of a request (`protocol.py`), its prompt (`dialogue.py`), the JSON of an answer (`replies.py`).

Nothing that takes time runs on the event loop: parsing, tokenising and the JSON of a whole answer go to threads, as do
pictures (CVE-2025-62426 and CVE-2026-6607 are servers that others made wait); a stream that its client reads slowly is
written a few events at a time.

Of a request nothing is kept but its job: the body and the pictures in it, which may be many times larger than all else,
are gone before the answer begins.

A stream opens when its first event is there; a job that fails before is an HTTP error. After `QUEUED_AFTER_S` without
one it opens all the same, with the SSE comment `: queued N` (N requests wait for a slot), so that the client knows
where it stands. An error behind that is an event `data: {"error": ...}`, and the stream ends without `[DONE]`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from minigpt4_jax.api import MiniGPT4
from minigpt4_jax.serve_config import ServeConfig
from minigpt4_jax.serving.bodies import take_body
from minigpt4_jax.serving.dialogue import make_job, picture_sources
from minigpt4_jax.serving.guards import Refusal, abort
from minigpt4_jax.serving.jobs import Done, Event, Failed, Job
from minigpt4_jax.serving.mailbox import Mailbox, Post
from minigpt4_jax.serving.pictures import PictureReader
from minigpt4_jax.serving.protocol import parse_chat
from minigpt4_jax.serving.replies import ChatReply
from minigpt4_jax.serving.scheduler import Scheduler

log = logging.getLogger(__name__)
ResultT = TypeVar("ResultT")

QUEUED_AFTER_S = 1.0
MOST_EVENTS = 16
"""In one piece of a stream, and in one turn of the event loop: with log-probabilities a token takes about 0.1 ms."""
PING_S = 15
"""Proxies give up on a connection that is silent for a minute (nginx's `proxy_read_timeout`)."""
GONE_STATUS = 499
"""nginx's word for "the client closed the request"; only the log ever sees it."""


@dataclass(frozen=True)
class Gone:
    """The client closed the connection."""


Letter = Event | Gone


class ChatRoute:
    """Answers chat completions.

    Args:
        pool: threads for parsing and tokenising.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        model: MiniGPT4,
        scheduler: Scheduler,
        pictures: PictureReader,
        pool: ThreadPoolExecutor,
        post: Callable[[], Post],
    ) -> None:
        self._config, self._model, self._scheduler = config, model, scheduler
        self._pictures, self._pool, self._post = pictures, pool, post

    async def answer(self, request: Request) -> Response:
        """The response to one request; raises `ApiError` for what never became a job."""
        box: Mailbox[Letter] = Mailbox(self._post())
        reading = asyncio.create_task(
            self._read(await take_body(request.receive), box, request.state)
        )
        watcher = asyncio.create_task(_watch(request.receive, box))
        try:
            await asyncio.wait((reading, watcher), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return Response(status_code=GONE_STATUS)
            job, reply = reading.result()
            request.state.body_done()
            self._scheduler.submit(job)
            try:
                if job.stream:
                    return await self._stream(box, reply, job)
                return await self._whole(box, reply, job)
            except BaseException:  # also when this task is cancelled: nobody will take what comes
                self._scheduler.cancel(job)
                raise
        finally:
            watcher.cancel()
            reading.cancel()  # no-op unless the client has gone
            del reading  # else an error in it holds this frame, and this frame the error with all of the request

    async def _read(self, body: bytes, box: Mailbox[Letter], state: State) -> tuple[Job, ChatReply]:
        """What the engine is asked, and what writes its answer. All else of the request is gone with this frame."""
        parsing = self._in_thread(functools.partial(_parse, body, self._config))
        del body
        chat, sources = await parsing
        pictures = await self._pictures.read(sources, caller=state.caller)
        job = await self._in_thread(
            functools.partial(
                make_job,
                chat,
                pictures,
                model=self._model,
                id=f"chatcmpl-{state.request_id}",
                deadline_s=state.arrived_s + self._config.limits.request_timeout_s,
                emit=box.send,
                salt=state.caller,
            )
        )
        # Its body, its pictures and its tokenising are part of its time.
        job.arrived_s = state.arrived_s
        reply = ChatReply(
            chat,
            job,
            model_name=self._config.name,
            fingerprint=self._model.fingerprint[:16],
            created=int(time.time()),
            tokenizer=self._model.tokenizer,
        )
        return job, reply

    async def _in_thread(self, work: Callable[[], ResultT]) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _whole(self, box: Mailbox[Letter], reply: ChatReply, job: Job) -> Response:
        events: list[Event] = []
        while True:
            for letter in await box.take():
                if isinstance(letter, Gone):
                    self._scheduler.cancel(job)
                    return Response(status_code=GONE_STATUS)
                if isinstance(letter, Failed):
                    return Refusal(letter.error)
                events.append(letter)
            if isinstance(events[-1], Done):
                content = await self._in_thread(functools.partial(_written, reply, events))
                return Response(content, media_type="application/json")

    async def _stream(self, box: Mailbox[Letter], reply: ChatReply, job: Job) -> Response:
        first: list[Letter] = []
        with contextlib.suppress(TimeoutError):  # it waits for a slot: the stream opens and says so
            first = await asyncio.wait_for(box.take(), QUEUED_AFTER_S)
        for letter in first:
            if isinstance(letter, Gone):
                self._scheduler.cancel(job)
                return Response(status_code=GONE_STATUS)
        if first and isinstance(first[0], Failed):
            return Refusal(first[0].error)
        return _Stream(
            stream_bytes(
                first,
                box,
                reply=reply,
                num_waiting=lambda: self._scheduler.load().waiting,
            ),
            job=job,
            scheduler=self._scheduler,
            send_timeout=self._config.limits.write_timeout_s,
        )


async def stream_bytes(
    first: Sequence[Letter],
    box: Mailbox[Letter],
    *,
    reply: ChatReply,
    num_waiting: Callable[[], int],
) -> AsyncIterator[bytes]:
    """The bytes of a stream: the events that came together in one piece, or in pieces of `MOST_EVENTS`.

    Args:
        first: what has come already; may be nothing.
        num_waiting: how many jobs wait for a slot.
    """
    letters = first
    if not letters:
        yield f": queued {num_waiting()}\n\n".encode()
        letters = await box.take()
    while True:
        for begin in range(0, len(letters), MOST_EVENTS):
            piece: list[bytes] = []
            over = False
            for letter in letters[begin : begin + MOST_EVENTS]:
                if isinstance(letter, Gone):
                    return
                piece += [_event(_json(chunk)) for chunk in reply.feed(letter)]
                if isinstance(letter, Done):
                    piece.append(_event(b"[DONE]"))
                over = isinstance(letter, Done | Failed)
            if piece:
                yield b"".join(piece)
            if over:
                return
            await asyncio.sleep(0)  # sending waits for nobody as long as the system takes it
        letters = await box.take()


class _Stream(EventSourceResponse):
    """A stream that cancels its job however it ends, also when it never begins."""

    def __init__(
        self, chunks: AsyncIterator[bytes], *, job: Job, scheduler: Scheduler, send_timeout: float
    ) -> None:
        super().__init__(
            chunks,
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            ping=PING_S,
            ping_message_factory=lambda: ServerSentEvent(comment="ping", sep="\n"),
            send_timeout=send_timeout,
        )
        self._job, self._scheduler = job, scheduler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.info("[%s] its client took nothing for %g s", self._job.id, self.send_timeout)
            await abort(scope)
        finally:
            self._scheduler.cancel(self._job)


def _parse(body: bytes, config: ServeConfig) -> tuple[Any, Any]:
    chat = parse_chat(body, config)
    return chat, picture_sources(chat)


def _written(reply: ChatReply, events: Sequence[Event]) -> bytes:
    for event in events:
        reply.feed(event)
    return _json(reply.result())


async def _watch(receive: Receive, box: Mailbox[Letter]) -> None:
    """Puts `Gone` into the box when the client goes away. Starlette does not tell a handler by itself."""
    while (await receive())["type"] != "http.disconnect":
        pass
    box.put(Gone())


def _json(value: object) -> bytes:
    """ASCII alone: a lone surrogate in a client's text, quoted in a refusal, has no UTF-8."""
    return json.dumps(value, separators=(",", ":")).encode()


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
