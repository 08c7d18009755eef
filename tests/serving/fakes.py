"""A model without weights for the server's tests, and who listens to its jobs.

The engine is the real one in what concerns the host (its queue, its slots, cancelling, what a fault ends): only the
device is replaced. Each answer repeats its question and its seed, so that nothing of one can be taken for another's.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from minigpt4_jax import GenerationConfig, MiniGPT4
from minigpt4_jax.config import IMAGE_TOKEN_ID
from minigpt4_jax.data.prompts import get_template
from minigpt4_jax.data.tokenizer import Tokenizer, byte_tokenizer
from minigpt4_jax.generation.beam_search import BeamSteps, Hypothesis
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.loop import Counters
from minigpt4_jax.generation.requests import Generation, Request, TokenLogprobs
from minigpt4_jax.generation.residents import Resident
from minigpt4_jax.image_cache import ImageCache, ImageEncoder
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.serve_config import CompileBeside, FaultsConfig
from minigpt4_jax.serving.errors import ApiError
from minigpt4_jax.serving.jobs import (
    Done,
    Ended,
    Event,
    Failed,
    Job,
    JobRecord,
    Piece,
    Started,
    Token,
)
from minigpt4_jax.serving.scheduler import Scheduler

LIMIT_S = 60.0
"""How long a test waits for what should come at once."""


class FakeEngine(Engine):
    """Writes `script(request)`, one id a step and row, and does what its hooks say."""

    programs_left = 0
    encoded_together = 4

    def __init__(self, script: Callable[[Request], Sequence[int]], *, num_slots: int) -> None:
        self.num_slots, self.context = num_slots, 400
        self.config = PRESETS["tiny"].model
        self.counters = Counters()
        self._runner: Any = SimpleNamespace(make_state=self._make_state, config=self.config)
        self._waiting, self._pending = deque(), deque()
        self._slots = [None] * num_slots
        self._residents = [Resident() for _ in range(num_slots)]
        self._state: Any = None
        self._script = script
        self.submitted: list[Request] = []
        self.encoded: list[int] = []
        """Pictures of each batch."""
        self.on_step: Callable[[], None] = lambda: None
        """Runs in each step; what it raises is a fault of the device."""
        self.on_rebuild: Callable[[], None] = lambda: None
        """Runs where a fault is mended; what it raises leaves no engine."""
        self.on_encode: Callable[[np.ndarray], None] = lambda images: None
        self.on_search: Callable[[], None] = lambda: None
        """Runs in each piece of a search."""
        self.search_pauses = 0
        """Pieces of a search before its last."""
        self.searches = 0
        """Under way."""
        self.on_compile: Callable[[], None] = lambda: None
        self.spoilt: Callable[[Request], bool] = lambda request: False
        """Whose logits are no numbers."""

    def _make_state(self) -> Any:
        self.on_rebuild()

    def compile_core(self, progress: Any = None) -> None:
        self.on_compile()
        if progress is not None:
            progress(1, 1)

    def submit(self, request: Request, *, count: int = 1) -> list[Generation]:
        self.submitted.append(request)
        return super().submit(request, count=count)

    def _admit(self) -> None:
        self.on_step()
        while self._waiting and None in self._slots:
            generation = self._waiting.popleft()
            generation.slot = self._slots.index(None)
            self._slots[generation.slot] = generation
            self._begun(generation)

    def _dispatch(self) -> bool:
        return False

    def _collect(self, changed: dict[int, Generation], *, leave: int) -> None:
        for generation in [one for one in self._slots if one is not None]:
            changed[id(generation)] = generation
            request = generation.request
            if self.spoilt(request):
                generation.error = FloatingPointError("The model's logits are not finite.")
                self._finish(generation, "error")
                continue
            generation.ids.append(self._script(request)[len(generation.ids)])
            if request.logprobs:
                chosen = -0.5 - len(generation.logprobs)
                top = ((generation.ids[-1], chosen),)
                generation.logprobs.append(TokenLogprobs(chosen=chosen, top=top))
            if generation.ids[-1] in request.stop_tokens:
                self._finish(generation, "stop")
            elif len(generation.ids) == request.max_new_tokens:
                self._finish(generation, "length")

    def beam_steps(
        self, requests: Sequence[Request], *, num_beams: int, length_penalty: float = 1.0
    ) -> BeamSteps:
        self.searches += 1
        try:
            for _ in range(self.search_pauses):
                self.on_search()
                yield
            self.on_search()
            return [
                [Hypothesis(self._beam(request, beam), -float(beam)) for beam in range(num_beams)]
                for request in requests
            ]
        finally:
            self.searches -= 1

    def _beam(self, request: Request, number: int) -> list[int]:
        return list(self._script(request.with_seed_plus(number)))[: request.max_new_tokens]

    def encode_images(self, images: Any) -> list[Any]:
        self.encoded.append(len(images))
        self.on_encode(images)
        return [np.zeros((self.config.num_image_tokens, 4), np.float32) for _ in images]


class FakeModel(MiniGPT4):
    """What the server asks of a model. `script` gives the text of an answer, without its stop token."""

    def __init__(self, *, num_slots: int = 2, template: str = "chatml") -> None:
        self.tokenizer: Tokenizer = byte_tokenizer()
        self.preset = SimpleNamespace(  # type: ignore[assignment]  # as much of it as is read
            model=PRESETS["tiny"].model, template=template, generation=GenerationConfig()
        )
        self.context, self.fingerprint = 400, "fake"
        self.engine = FakeEngine(self._ids, num_slots=num_slots)
        self.fake = self.engine
        self.image_cache = ImageCache(2**20)
        self.encoder = ImageEncoder(
            self.engine.encode_images,
            self.image_cache,
            model="fake",
            size=self.preset.model.vit.image_size,
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
        )
        self.script: Callable[[str, int], str] = lambda question, seed: f"{question}/{seed} " * 50
        self._end = self.tokenizer.special(get_template(template).stop_tokens[0])

    def _ids(self, request: Request) -> list[int]:
        text = self.tokenizer.decode([token for token in request.prompt if token != IMAGE_TOKEN_ID])
        asked = text.replace("Human: ", "user\n").split("user\n")[-1]
        question = asked.split("assistant")[0].split("###")[0].strip().removeprefix("</Img>")
        answer = self.script(question.strip(), request.sampling.seed)
        return [*self.tokenizer.encode(answer), self._end]


class Listener:
    """What a job was told. Its mistakes are noted, since an `emit` must not raise."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.mistakes: list[str] = []
        self.over = threading.Event()
        self.on_event: Callable[[Event], None] = lambda event: None

    def __call__(self, event: Event) -> None:
        if self.over.is_set():
            self.mistakes.append(f"{event} came behind {self.events[-1]}")
        if (not self.events) != isinstance(event, Started) and not isinstance(event, Failed):
            self.mistakes.append(f"{event} came as number {len(self.events)}")
        self.events.append(event)
        self.on_event(event)
        if isinstance(event, Done | Failed):
            self.over.set()

    def text(self, index: int = 0) -> str:
        return "".join(piece.text for piece in self.pieces if piece.index == index)

    def tokens(self, index: int = 0) -> list[Token]:
        return [token for piece in self.pieces if piece.index == index for token in piece.tokens]

    @property
    def pieces(self) -> list[Piece]:
        return [event for event in self.events if isinstance(event, Piece)]

    @property
    def ends(self) -> dict[int, Ended]:
        return {event.index: event for event in self.events if isinstance(event, Ended)}

    @property
    def done(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Done)

    @property
    def status(self) -> int | None:
        """Of the error that ended the job."""
        last = self.events[-1] if self.events else None
        return last.error.status if isinstance(last, Failed) else None


class Notes:
    """An observer that keeps everything."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.gaps: list[float] = []
        self.steps: list[int] = []
        self.records: list[JobRecord] = []
        self.faults = 0

    def first_token(self, seconds: float) -> None:
        self.first.append(seconds)

    def next_token(self, seconds: float) -> None:
        self.gaps.append(seconds)

    def stepped(self, num_tokens: int) -> None:
        self.steps.append(num_tokens)

    def finished(self, record: JobRecord) -> None:
        self.records.append(record)

    def faulted(self) -> None:
        self.faults += 1


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Bench:
    """A scheduler whose thread is the test: `turn` is one round of it."""

    def __init__(
        self,
        model: MiniGPT4,
        *,
        max_waiting: int = 8,
        beside: CompileBeside = "none",
        faults: FaultsConfig | None = None,
        real_time: bool = False,
    ) -> None:
        self.model, self.clock, self.notes = model, Clock(), Notes()
        self.time: Callable[[], float] = time.monotonic if real_time else self.clock
        self.fatal: list[str] = []
        self.names = itertools.count()
        self.scheduler = Scheduler(
            model,
            max_waiting=max_waiting,
            beside=beside,
            faults=faults or FaultsConfig(),
            observer=self.notes,
            on_fatal=self.fatal.append,
            clock=self.time,
        )

    @property
    def engine(self) -> Any:
        return self.model.engine

    def job(self, question: str = "What?", **settings: Any) -> tuple[Job, Listener]:
        settings = {"id": f"job-{next(self.names)}", "now_s": self.time(), **settings}
        return make_job(self.model, question, **settings)

    def submit(self, question: str = "What?", **settings: Any) -> tuple[Job, Listener]:
        job, heard = self.job(question, **settings)
        self.scheduler.submit(job)
        return job, heard

    def submit_together(self, *questions: str, **settings: Any) -> list[Listener]:
        """All of them wait before the scheduler's thread sees the first: its next turn finds them in this order."""
        with self.scheduler._lock:
            return [self.submit(question, **settings)[1] for question in questions]

    def refusal(self, **settings: Any) -> ApiError:
        """Of a job that is not taken."""
        with pytest.raises(ApiError) as caught:
            self.submit(**settings)
        return caught.value

    def all_free(self) -> bool:
        """No slot is held, and the scheduler itself found nothing else."""
        self.scheduler.turn()
        engine = self.engine
        free: bool = engine.free_slots == engine.num_slots
        return free and not engine.busy and not self.scheduler.leaks

    def turns(self, number: int) -> None:
        for _ in range(number):
            self.scheduler.turn()

    def finish(self, limit: int = 1000) -> None:
        """Until nobody waits for an answer any more."""
        for _ in range(limit):
            load = self.scheduler.load()
            if not load.waiting and not load.running:
                return
            self.scheduler.turn()
        raise AssertionError(f"still {self.scheduler.load()} after {limit} turns")


@contextmanager
def running(bench: Bench) -> Any:
    """The scheduler in its own thread, ready."""
    bench.scheduler.start()
    try:
        wait_until(lambda: bench.scheduler.state != "starting")
        yield bench.scheduler
    finally:
        bench.scheduler.close()


def wait_until(holds: Callable[[], bool]) -> None:
    """Looks again and again, for what has no event to wait for."""
    pause = threading.Event()
    for _ in range(int(LIMIT_S / 0.002)):
        if holds():
            return
        pause.wait(0.002)
    raise AssertionError(f"not within {LIMIT_S} s")


def make_job(
    model: MiniGPT4,
    question: str,
    *,
    pictures: Sequence[Any] = (),
    generation: GenerationConfig | None = None,
    id: str = "job",
    now_s: float = 0.0,
    room_s: float = 1e6,
    max_new_tokens: int | None = None,
    **settings: Any,
) -> tuple[Job, Listener]:
    """A job as the HTTP side makes it, and what it will be told. `room_s`: from now to its deadline."""
    generation = generation or GenerationConfig(max_new_tokens=12)
    conversation = model.start_conversation()
    for picture in pictures:
        conversation.add_image(model.encoder.prepare(picture))
    heard = Listener()
    job = Job(
        id=id,
        conversation=conversation,
        prompt=tuple(conversation.ask(question)),
        generation=generation,
        max_new_tokens=max_new_tokens or generation.max_new_tokens,
        deadline_s=now_s + room_s,
        arrived_s=now_s,
        emit=settings.pop("emit", heard),
        **settings,
    )
    return job, heard
