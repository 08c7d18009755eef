"""generation/engine.py under any order of submitting, cancelling, stepping and failing: no slot leaks, no token goes to
another request, and every request ends once.

The engine is the real one on a model of width 32 with 48 tokens, so few that answers share theirs and a stop token of
one request would end another. What a request must get is what an engine that has nothing else to do gives it
(`World.alone`, itself held to the whole forward), cut by the request's own stop tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.generation import runner
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.programs import Program, Programs
from minigpt4_jax.generation.requests import Generation, Request
from minigpt4_jax.generation.sampling import GREEDY, Sampling
from minigpt4_jax.models.attention import make_causal_mask
from minigpt4_jax.models.layout import DECODE, DISK, convert_layout
from minigpt4_jax.models.minigpt4 import abstract_params, apply_method, make_model
from minigpt4_jax.presets import PRESETS

VOCAB, CONTEXT, SLOTS, MOST = 48, 96, 4, 10
"""`MOST`: tokens of the longest answer that the machine asks for."""
SAMPLINGS = [
    GREEDY,
    GREEDY,
    Sampling(temperature=1.5, seed=7),
    Sampling(temperature=0.8, top_k=9, top_p=0.9, min_p=0.02, seed=2**32 - 1),
    Sampling(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.2),
    Sampling(temperature=1.0, seed=3, logit_bias=((5, 2.0), (6, -9.0))),
]


class PlantedFault(RuntimeError):
    """What a device call raises because a test wants it to."""


class FaultyPrograms(Programs):
    """The programs of all engines of this file, compiled once. The next run of one kind may be made to fail."""

    armed: str | None = None
    """The kind. It fails after it ran: what was donated is gone, as after a fault of the device."""

    def get(self, name: str, key: tuple[int, ...], compile_it: Callable[[], Program]) -> Program:
        program = super().get(name, key, compile_it)
        if name != self.armed:
            return program

        def run_and_fail(*leaves: Any) -> None:
            program.compiled(*leaves)
            self.armed = None
            raise PlantedFault(name)

        return dataclasses.replace(program, compiled=run_and_fail)


class World:
    """The model, the prompts, the compiled programs, and what each request must get."""

    def __init__(self, config: ModelConfig, params: Any) -> None:
        self.config = config
        self.disk = params
        self.params = jax.tree.map(
            jnp.asarray, convert_layout(params, DISK, DECODE, llama=config.llama)
        )
        self._programs: dict[int, FaultyPrograms] = {}
        rng = np.random.default_rng(5)
        shape = (config.num_image_tokens, config.llama.width)
        self.pictures = [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2)]
        self.broken_picture = jnp.full(shape, jnp.nan)
        slots = (IMAGE_TOKEN_ID,) * config.num_image_tokens

        def text(length: int) -> tuple[int, ...]:
            return tuple(rng.integers(0, VOCAB, length).tolist())

        shared = text(50)  # long enough to be continued where a free slot still holds it
        self.prompts: list[tuple[tuple[int, ...], list[jax.Array]]] = [
            (text(1), []),
            (text(9), []),
            ((*text(3), *slots, *text(20)), self.pictures[:1]),
            ((*text(1), *slots, *text(2), *slots, *text(5)), self.pictures),
            (shared, []),
            ((*shared, *text(20)), []),
            ((*shared, *text(30)), []),
            (text(70), []),
        ]
        self.broken_prompt = (*text(60), *slots, *text(10)), [self.broken_picture]
        self._idle = self.make_engine()
        self._alone: dict[Any, list[int]] = {}

    def make_engine(self, *, num_slots: int = SLOTS) -> Engine:
        """Fresh slots over programs that all engines with as many share."""
        programs = self._programs.setdefault(num_slots, FaultyPrograms())
        with mock.patch.object(runner, "Programs", return_value=programs):
            return Engine(
                self.params, self.config, dtype=jnp.float32, context=CONTEXT, num_slots=num_slots
            )

    def alone(self, prompt: int, sampling: Sampling, **bans: Any) -> list[int]:
        """What an engine answers that has nothing else to do, `MOST` tokens. `bans`: stop tokens that are held back."""
        key = (prompt, sampling, *bans.values())
        if key not in self._alone:
            ids, pictures = self.prompts[prompt]
            request = Request(
                prompt=ids, image_embeds=pictures, max_new_tokens=MOST, sampling=sampling, **bans
            )
            (done,) = self._idle.generate([request])
            self._alone[key] = done.ids
        return self._alone[key]


@pytest.fixture(scope="module")
def world(draw_params: Callable[[Any], Any]) -> World:
    tiny = PRESETS["tiny"].model
    # With a head of its own: tied to the embeddings, these weights repeat the last token for ever.
    llama = dataclasses.replace(tiny.llama, vocab_size=VOCAB, tie_embeddings=False)
    config = dataclasses.replace(tiny, llama=llama)
    return World(config, draw_params(abstract_params(config)))


@dataclasses.dataclass
class Asked:
    """A request that was submitted, what it must get, and what became of it."""

    generation: Generation
    ids: list[int]
    reason: str
    broken: bool = False
    cancelled: bool = False
    ended: int = 0
    """How often the engine said that it ended."""


def expect(world: World, prompt: int, request: Request) -> tuple[list[int], str]:
    """The answer alone, cut where the request says."""
    stops = request.stop_tokens
    bans = {"stop_tokens": stops, "min_new_tokens": request.min_new_tokens}
    whole = world.alone(prompt, request.sampling, **bans if request.min_new_tokens else {})
    ids = whole[: request.max_new_tokens]
    for place, token in enumerate(ids):
        if token in stops:
            assert place >= request.min_new_tokens
            return ids[: place + 1], "stop"
    return ids, "length"


class EngineMachine(RuleBasedStateMachine):
    """Requests come, go and fail in any order. `world` is set before it runs."""

    world: World
    programs: Any

    def __init__(self) -> None:
        super().__init__()
        self.engine = self.world.make_engine()
        self.asked: list[Asked] = []
        self.programs = self.engine._runner.programs
        self.programs.armed = None

    @rule(
        prompt=st.integers(0, 7),
        sampling=st.sampled_from(SAMPLINGS),
        stops=st.sets(st.integers(0, VOCAB - 1), max_size=8).map(frozenset),
        length=st.integers(1, MOST),
        least=st.sampled_from([0, 0, 0, 1, 4]),
        count=st.sampled_from([1, 1, 1, 2, 5]),
    )
    def submit(
        self, prompt: int, sampling: Sampling, stops: frozenset[int], length: int, least: int, count: int
    ) -> None:  # fmt: skip
        ids, pictures = self.world.prompts[prompt]
        request = Request(
            prompt=ids,
            image_embeds=pictures,
            max_new_tokens=length,
            min_new_tokens=least,
            stop_tokens=stops,
            sampling=sampling,
        )
        for generation in self.engine.submit(request, count=count):
            expected = expect(self.world, prompt, generation.request)
            self.asked.append(Asked(generation, *expected))

    @rule()
    def submit_a_picture_of_nan(self) -> None:
        ids, pictures = self.world.broken_prompt
        request = Request(prompt=ids, image_embeds=pictures, max_new_tokens=MOST)
        (generation,) = self.engine.submit(request)
        self.asked.append(Asked(generation, [], "error", broken=True))

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(self.asked))
        each.cancelled |= not each.generation.finished
        self.engine.cancel(each.generation)
        assert each.generation.finished

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.run_step()

    @rule(
        kind=st.sampled_from(
            ["prefill", "insert", "extend", "decode", "move", "read", "second read"]
        )
    )
    def fail_at(self, kind: str) -> None:
        """The next device call of this kind raises, if the next step makes one."""
        if kind.endswith("read"):
            answers = [PlantedFault(kind)] if kind == "read" else [mock.DEFAULT, PlantedFault(kind)]
            with mock.patch("jax.device_get", wraps=jax.device_get, side_effect=answers):
                self.run_step()
            return
        self.programs.armed = kind
        self.run_step()
        self.programs.armed = None

    def run_step(self) -> None:
        """One step, and what it says about the requests."""
        before = self.engine.counters.faults
        known = {id(each.generation): each for each in self.asked}
        failed_before = [each.generation.finish_reason == "error" for each in self.asked]
        changed = self.engine.step()
        assert len({id(generation) for generation in changed}) == len(changed)
        for generation in changed:
            known[id(generation)].ended += generation.finished
        faults = self.engine.counters.faults - before
        assert faults in (0, 1)
        for each, failed in zip(self.asked, failed_before, strict=True):
            generation = each.generation
            if generation.finish_reason == "error" and not failed:
                assert faults or each.broken, generation.error
        if faults:
            assert self.engine.free_slots == SLOTS, "a fault ends all that is in flight"

    @invariant()
    def every_slot_is_free_or_has_one_request(self) -> None:
        owners = [each for each in self.engine._slots if each is not None]
        assert self.engine.free_slots + len(owners) == SLOTS
        assert len({id(each) for each in owners}) == len(owners)
        waiting = [id(each) for each in self.engine._waiting]
        assert len(set(waiting)) == len(waiting)
        here = {id(each) for each in owners} | set(waiting)
        assert len(here) == len(owners) + len(waiting)
        unfinished = {id(a.generation) for a in self.asked if not a.generation.finished}
        assert here == unfinished, "a request is lost, or holds a slot after its end"
        assert self.engine.busy == bool(unfinished)

    @invariant()
    def answers_are_those_of_an_engine_with_nothing_else_to_do(self) -> None:
        for each in self.asked:
            generation = each.generation
            match generation.finish_reason:
                case "stop" | "length":
                    assert (generation.ids, generation.finish_reason) == (each.ids, each.reason)
                case "cancelled":
                    assert each.cancelled
                case "error":
                    assert generation.error is not None
                    assert each.broken or isinstance(generation.error, PlantedFault)
            assert generation.ids == each.ids[: len(generation.ids)]
            assert (generation.finish_reason == "cancelled") == each.cancelled

    def teardown(self) -> None:
        """Whatever is left is answered, in no more steps than it has tokens."""
        steps = 3 + sum(2 + MOST for each in self.asked if not each.generation.finished)
        for _ in range(steps):
            if not self.engine.busy:
                break
            self.run_step()
        self.engine.step()  # what was dispatched last
        assert not self.engine.busy, "a request never ends"
        self.every_slot_is_free_or_has_one_request()
        self.answers_are_those_of_an_engine_with_nothing_else_to_do()
        for each in self.asked:
            assert each.ended == (0 if each.cancelled else 1)


def test_no_order_of_requests_and_faults_leaks_a_slot_or_mixes_tokens(world: World) -> None:
    run_state_machine_as_test(
        type("Machine", (EngineMachine,), {"world": world}),
        settings=settings(
            max_examples=30,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[
                Phase.generate
            ],  # minutes without end go into a shorter example: add Phase.shrink for one
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


# --- single claims ---


def requests_of_all_kinds(world: World, number: int) -> list[Request]:
    """As many requests: request `i` has prompt `i % 8`, with one sampling after the other."""
    found = []
    for i in range(number):
        ids, pictures = world.prompts[i % len(world.prompts)]
        sampling = SAMPLINGS[1 + i % (len(SAMPLINGS) - 1)]
        found.append(
            Request(prompt=ids, image_embeds=pictures, max_new_tokens=MOST, sampling=sampling)
        )
    return found


def test_a_greedy_answer_of_the_idle_engine_is_what_the_full_model_says(world: World) -> None:
    """The oracle of this file is held to the model without a cache."""
    model = make_model(world.config, layout=DISK, dtype=jnp.float32)

    @jax.jit
    def likeliest(token_ids: jax.Array, image_embeds: jax.Array) -> jax.Array:
        hidden, _, _ = apply_method(
            model, world.disk, "decode",
            apply_method(model, world.disk, "embed_prompt", token_ids, image_embeds),
            positions=jnp.arange(CONTEXT)[None],
            mask=make_causal_mask(jnp.ones((1, CONTEXT), bool)), caches=None,
        )  # fmt: skip
        return apply_method(model, world.disk, "head", hidden)[0].argmax(-1)

    for prompt, (ids, pictures) in enumerate(world.prompts):
        answer = world.alone(prompt, GREEDY)
        assert len(answer) == MOST
        token_ids = np.zeros((1, CONTEXT), np.int32)
        token_ids[0, : len(ids) + MOST] = [*ids, *answer]
        rows = np.zeros((1, CONTEXT, world.config.llama.width), np.float32)
        if pictures:
            joined = np.concatenate(pictures)
            rows[0, : len(joined)] = joined
        said = np.asarray(likeliest(jnp.asarray(token_ids), jnp.asarray(rows)))
        assert said[len(ids) - 1 : len(ids) + MOST - 1].tolist() == answer


def test_an_answer_alone_is_the_answer_among_63_others(world: World) -> None:
    """Greedy, drawn and penalised, by sixteen seeds for each of four prompts."""
    engine = world.make_engine(num_slots=64)
    handles = [engine.submit(request, count=16) for request in requests_of_all_kinds(world, 4)]
    together = 0
    while engine.busy:
        engine.step()
        together = max(together, 64 - engine.free_slots)
    assert together == 64
    for prompt, answers in enumerate(handles):
        for generation in answers:
            assert generation.ids == world.alone(prompt, generation.request.sampling)
    assert len({tuple(each.ids) for each in handles[1]}) == 16
    assert engine.counters.decode_steps < 2 * MOST, "a step serves all slots"


def test_two_requests_in_one_batch_stop_at_their_own_tokens(world: World) -> None:
    whole = world.alone(2, GREEDY)
    early, late = whole[2], whole[6]
    assert late not in whole[:6]
    ids, pictures = world.prompts[2]
    ends = {stop: whole.index(stop) + 1 for stop in (early, late)}
    assert ends[early] < ends[late]
    for order in ((early, late), (late, early)):
        engine = world.make_engine()
        requests = [
            Request(prompt=ids, image_embeds=pictures, max_new_tokens=MOST, stop_tokens={stop})
            for stop in order
        ]
        found = engine.generate(requests)
        assert [each.ids for each in found] == [whole[: ends[stop]] for stop in order]
        assert [each.finish_reason for each in found] == ["stop", "stop"]


def test_a_cancelled_request_gives_its_slot_to_the_next_within_one_dispatch(world: World) -> None:
    engine = world.make_engine()
    running = [engine.submit(request)[0] for request in requests_of_all_kinds(world, SLOTS)]
    while engine.free_slots:
        engine.step()
    request = requests_of_all_kinds(world, SLOTS + 2)[-1]
    (waiting,) = engine.submit(request)
    engine.step()
    assert waiting.slot == -1
    assert waiting.ids == []
    dispatched = engine.counters.decode_steps
    engine.cancel(running[1])
    assert engine.free_slots == 1
    written = list(running[1].ids)
    engine.step()
    assert waiting.slot >= 0, "admitted in the very next step"
    assert engine.counters.decode_steps == dispatched + 1
    while engine.busy:
        engine.step()
    assert waiting.ids == world.alone(SLOTS + 1, request.sampling)
    assert running[1].ids == written, "nothing is read for it any more"
    assert [each.finish_reason for each in running] == ["length", "cancelled", "length", "length"]


def test_answers_to_one_prompt_draw_by_seeds_of_their_own_and_read_it_once(world: World) -> None:
    engine = world.make_engine()
    ids, pictures = world.prompts[3]
    drawn = Sampling(temperature=1.5, seed=7)
    request = Request(prompt=ids, image_embeds=pictures, max_new_tokens=MOST, sampling=drawn)
    answers = engine.submit(request, count=3)
    while engine.busy:
        engine.step()
    seeds = [dataclasses.replace(drawn, seed=7 + number) for number in range(3)]
    assert [each.ids for each in answers] == [world.alone(3, seed) for seed in seeds]
    assert len({tuple(each.ids) for each in answers}) == 3
    assert engine.counters.prefills == 1


def test_who_ended_before_the_fault_of_the_same_step_is_said_to_have_ended(world: World) -> None:
    engine = world.make_engine()
    ids, _ = world.prompts[1]
    first, second = (engine.submit(Request(prompt=ids, max_new_tokens=1))[0] for _ in range(2))
    answers = [mock.DEFAULT, PlantedFault("the second reading")]
    with mock.patch("jax.device_get", wraps=jax.device_get, side_effect=answers):
        changed = engine.step()
    assert [first.finish_reason, second.finish_reason] == ["length", "error"]
    assert {id(each) for each in changed} == {id(first), id(second)}


def test_what_a_request_of_nan_leaves_behind_reaches_nobody(world: World) -> None:
    """The next request lives in the slot where NaN was written, behind its own places: what is masked must not count.
    And the same picture of NaN gives NaN again: nothing of it is taken for a prompt that was read."""
    engine = world.make_engine()
    ids, pictures = world.broken_prompt
    for prompt in (1, 2, 4):
        for _ in range(2):
            (broken,) = engine.submit(
                Request(prompt=ids, image_embeds=pictures, max_new_tokens=MOST)
            )
            while engine.busy:
                engine.step()
            assert (broken.finish_reason, broken.ids) == ("error", [])
        clean_ids, clean = world.prompts[prompt]
        (after,) = engine.submit(Request(prompt=clean_ids, image_embeds=clean, max_new_tokens=MOST))
        while engine.busy:
            engine.step()
        assert (after.finish_reason, after.ids) == ("length", world.alone(prompt, GREEDY))
