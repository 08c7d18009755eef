"""minigpt4_jax.serving.scheduler under anything in any order: no slot leaks, no token crosses, every job ends once."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from PIL import Image

from minigpt4_jax import GenerationConfig
from minigpt4_jax.serve_config import FaultsConfig
from minigpt4_jax.serving.errors import ApiError
from minigpt4_jax.serving.jobs import Job
from tests.serving.fakes import Bench, FakeModel, Listener

MAX_WAITING = 3


@dataclasses.dataclass
class Asked:
    job: Job
    heard: Listener
    question: str
    cancelled: bool = False
    heard_then: int = 0


class Life(RuleBasedStateMachine):
    """A server's life, one round of its thread at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(
            FakeModel(num_slots=3),
            max_waiting=MAX_WAITING,
            faults=FaultsConfig(max_faults=3, faults_window_s=20.0),
        )
        self.bench.scheduler.prepare()
        self.engine = self.bench.engine
        self.engine.spoilt = self.is_spoilt
        self.asked: list[Asked] = []
        self.spoil = False

    def is_spoilt(self, request: Any) -> bool:
        return self.spoil and request.sampling.seed % 2 == 1

    # --- what may happen ---

    @rule(
        n=st.integers(1, 5),
        length=st.integers(1, 12),
        seed=st.integers(0, 9),
        room_s=st.sampled_from([3.0, 1e6]),
        stop=st.sampled_from([(), ("/",), ("1 ",)]),
        beams=st.booleans(),
        picture=st.integers(-1, 3),
        stream=st.booleans(),
    )
    def submit(
        self, *, n: int, length: int, seed: int, beams: bool, picture: int, **more: Any
    ) -> None:
        question = f"q{len(self.asked)}x"
        stop = more.pop("stop")
        generation = GenerationConfig(max_new_tokens=length, seed=seed, num_beams=5 if beams else 1)
        pixels = np.full((4, 4, 3), max(0, picture), np.uint8)
        job, heard = self.bench.job(
            question,
            n=n,
            generation=generation,
            stop_strings=stop,
            pictures=[Image.fromarray(pixels)] if picture >= 0 else [],
            **more,
        )
        ready = self.bench.scheduler.state == "ready"
        try:
            self.bench.scheduler.submit(job)
            self.asked.append(Asked(job, heard, question))
            return
        except ApiError as refusal:
            error = refusal
        assert error.status == (429 if ready else 503)
        assert not ready or self.bench.scheduler.load().waiting >= MAX_WAITING
        assert (error.retry_after_s is not None) == ready

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: Any) -> None:
        one = data.draw(st.sampled_from(self.asked))
        self.bench.scheduler.cancel(one.job)
        if not one.cancelled:
            one.cancelled, one.heard_then = True, len(one.heard.events)

    @precondition(lambda self: self.bench.scheduler.state != "broken")
    @rule(rounds=st.integers(1, 4))
    def turn(self, rounds: int) -> None:
        for _ in range(rounds):
            if self.bench.scheduler.state != "broken":
                self.bench.scheduler.turn()

    @precondition(lambda self: self.bench.scheduler.state != "broken")
    @rule(hook=st.sampled_from(["on_step", "on_encode", "on_search"]))
    def fault(self, hook: str) -> None:
        def fail(*args: Any) -> None:
            raise RuntimeError("the device is gone")

        before = getattr(self.engine, hook)
        setattr(self.engine, hook, fail)
        self.bench.scheduler.turn()
        setattr(self.engine, hook, before)

    @precondition(lambda self: self.bench.scheduler.state != "broken")
    @rule()
    def not_finite(self) -> None:
        self.spoil = True
        self.bench.scheduler.turn()
        self.spoil = False

    @rule(seconds=st.sampled_from([1, 5, 30]))
    def time_passes(self, seconds: int) -> None:
        self.bench.clock.now_s += seconds

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def an_emit_breaks(self, data: Any) -> None:
        one = data.draw(st.sampled_from(self.asked))

        def refuse(event: Any) -> None:
            one.heard.events.pop()  # it did not arrive
            raise RuntimeError("nobody is there")

        if not one.heard.over.is_set() and not one.cancelled:
            one.heard.on_event = refuse
            one.cancelled, one.heard_then = True, len(one.heard.events)

    # --- what always holds ---

    @invariant()
    def slots_belong_to_jobs(self) -> None:
        if self.bench.scheduler.state == "broken":
            return
        slots = self.bench.scheduler._slots
        held = {id(handle) for task in slots.tasks for handle in task.handles}
        taken = [one for one in self.engine._slots if one is not None]
        assert {id(one) for one in taken} <= held
        assert {id(one) for one in self.engine._waiting} <= held
        assert self.bench.scheduler.leaks == 0
        # Somebody waits inside the engine only for the other answers of a job that has begun.
        assert len(slots.tasks) <= self.engine.num_slots + 1

    @invariant()
    def no_token_crosses(self) -> None:
        for one in self.asked:
            assert one.heard.mistakes == []
            for index in range(one.job.n):
                seed = one.job.generation.seed
                assert seed is not None
                whole = f"{one.question}/{seed + index} " * 5
                assert whole.startswith(one.heard.text(index))
                end = one.heard.ends.get(index)
                if end is not None and not one.job.stop_strings:
                    assert one.heard.text(index) == whole[: end.num_tokens].rstrip()

    @invariant()
    def every_job_ends_once(self) -> None:
        for one in self.asked:
            terminal = [e for e in one.heard.events if type(e).__name__ in ("Done", "Failed")]
            assert len(terminal) <= 1
            if one.heard.done:
                assert set(one.heard.ends) == set(range(one.job.n))
            if one.cancelled:
                assert len(one.heard.events) == one.heard_then

    @invariant()
    def faults_are_counted(self) -> None:
        broken = self.bench.scheduler.state == "broken"
        assert len(self.bench.fatal) == broken
        if broken:
            assert self.bench.notes.faults > 3

    def teardown(self) -> None:
        if self.bench.scheduler.state != "broken":
            self.bench.finish()
            self.bench.scheduler.turn()
            assert self.engine.free_slots == self.engine.num_slots
            assert not self.engine.busy
        for one in self.asked:
            assert one.cancelled or one.heard.over.is_set()
        # One record for each job, whatever became of it.
        assert len(self.bench.notes.records) == len(self.asked)
        self.slots_belong_to_jobs()
        self.no_token_crosses()
        self.every_job_ends_once()


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=50, stateful_step_count=25, deadline=None)
