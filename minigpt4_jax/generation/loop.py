"""The loop of the engine: which request has which slot, what is dispatched next, and what was read.

Host side only; everything on the device goes through `runner.py`. One thread owns a loop.

The order of a step matters. Requests are let in first, so that a new one is part of the next `decode_step`; that one is
dispatched before the step before it is read, so that the device never waits for the host; and a token that was
dispatched for a request that has ended meanwhile is dropped when it is read, since it is known by its request and not
by its slot.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import jax
import numpy as np

from minigpt4_jax.config import IMAGE_TOKEN_ID
from minigpt4_jax.generation.requests import (
    FinishReason,
    Generation,
    Request,
    SharedPrompt,
    TokenLogprobs,
)
from minigpt4_jax.generation.residents import (
    LEAST_REUSE,
    Resident,
    common_start,
    embeds_behind,
)
from minigpt4_jax.generation.runner import Runner
from minigpt4_jax.generation.state import Chosen


@dataclass
class Counters:
    """What the engine did so far."""

    decode_steps: int = 0
    """Dispatched, each for all active slots together."""
    prefills: int = 0
    extends: int = 0
    moves: int = 0
    images: int = 0
    """Encoded."""
    reused_tokens: int = 0
    """Of prompts, that were not read again."""
    faults: int = 0
    """Steps that failed; each ended what was in flight and left empty slots behind."""


@dataclass
class Pending:
    """A dispatched program whose choices were not read yet."""

    chosen: Chosen
    generations: dict[int, Generation]
    """By the row of `chosen`."""


class Loop:
    """Slots and a queue. See `Engine`, which is what callers use."""

    def __init__(self, runner: Runner, *, num_slots: int, context: int) -> None:
        self.num_slots = num_slots
        self.context = context
        self.counters = Counters()
        self._runner = runner
        self._waiting: deque[Generation] = deque()
        self._pending: deque[Pending] = deque()
        self._slots: list[Generation | None] = [None] * num_slots
        self._residents = [Resident() for _ in range(num_slots)]
        self._state = self._runner.make_state()
        self._probing = False

    def submit(self, request: Request, *, count: int = 1) -> list[Generation]:
        """Queues a request; `count` answers to it are written side by side and its prompt is read once.

        With a seed, answer `i` draws by `seed + i`.

        Raises:
            ValueError: prompt and answer together exceed the context, or an id is not in the vocabulary.
        """
        self._check(request)
        shared = SharedPrompt(waiting=count)
        found = [
            Generation(request=request.with_seed_plus(number), shared=shared)
            for number in range(count)
        ]
        self._waiting.extend(found)
        return found

    def _check(self, request: Request) -> None:
        """What would fail later, in the middle of others' answers, fails here."""
        ids = {token for token in request.prompt if token != IMAGE_TOKEN_ID}
        ids |= {*request.stop_tokens, *request.written}
        ids |= {token for token, _ in request.sampling.logit_bias}
        vocab = self._runner.config.llama.vocab_size
        strange = sorted(token for token in ids if not 0 <= token < vocab)
        if strange:
            raise ValueError(
                f"The request holds the ids {strange[:5]}; expected 0 to {vocab - 1}, those of the vocabulary."
            )
        if len(request.prompt) + request.max_new_tokens > self.context:
            raise ValueError(
                f"The prompt has {len(request.prompt)} tokens and {request.max_new_tokens} new ones are asked for; "
                f"expected together at most {self.context}, the context."
            )

    def cancel(self, generation: Generation) -> None:
        """Ends a request, waiting or running. Its slot is free at once; nothing is read for it any more."""
        if generation.finished:
            return
        if generation.slot < 0:
            self._waiting.remove(generation)
            self._begun(generation)
        self._finish(generation, "cancelled")

    @property
    def busy(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._waiting) or any(self._slots)

    @property
    def free_slots(self) -> int:
        """Slots that no request has."""
        return self._slots.count(None)

    def step(self) -> list[Generation]:
        """One round of the loop; returns the requests that got a token or ended.

        A fault of the device ends every request in flight with `finish_reason` "error", and the slots are made anew;
        what waits goes on waiting.
        """
        changed: dict[int, Generation] = {}
        try:
            self._admit()
            dispatched = self._dispatch()
            self._collect(changed, leave=1 if dispatched else 0)
        # Whatever the device raises: the state was donated and is lost, and the engine goes on with a new one.
        except Exception as error:
            self.counters.faults += 1
            changed |= {id(generation): generation for generation in self._abandon("error", error)}
        # Ctrl-C inside a dispatch: the old state was donated, and the new one has no name yet.
        except BaseException:
            self._abandon("cancelled", None)
            raise
        return list(changed.values())

    def probe(self) -> None:
        """Has the next `step` use the device also where no request wants a token, and wait for it: what failed beside
        the slots (a picture, a search) says nothing about them. A device that fails here too is a fault of that step.
        """
        self._probing = True

    # --- letting requests in ---

    def _admit(self) -> None:
        """Fills free slots from the queue.

        Until half of the slots are taken prompts go first, as many as `Runner.read_tokens` allows, since a step over
        few rows costs nearly as much as one over many; then at most one batch of prompts is read per step, so that
        answers under way are held up by no more.
        """
        read, most = 0, self._runner.read_tokens  # tokens
        while self._waiting and None in self._slots:
            generation = self._waiting[0]
            if generation.shared.prefix is None:
                half = 2 * self.free_slots <= self.num_slots
                if read and (half or read + generation.length > most):
                    return
                if self._extend(generation):
                    read += generation.length - generation.reused
                    continue
                read += self._read_prompts(most - read)
            self._insert(generation)

    def _read_prompts(self, most: int) -> int:
        """Reads the prompt of the first in the queue, with others of its size that could be let in too, and together
        have no more tokens than `most`. Returns the number of tokens, with their padding."""
        sizes = self._runner.prompt_sizes
        group = [self._waiting[0]]
        for generation in list(self._waiting)[1 : self.free_slots]:
            if generation.shared in [other.shared for other in group]:
                continue
            known = generation.shared.prefix is not None
            if not known and sizes.fit(generation.length) == sizes.fit(group[0].length):
                group.append(generation)
        fitting = max(1, most // sizes.fit(group[0].length))
        key = self._runner.prompt_key(min(len(group), fitting), group[0].length)
        del group[key[0] :]
        prefix = self._runner.read([generation.request for generation in group], key)
        self.counters.prefills += 1
        for row, generation in enumerate(group):
            generation.shared.prefix = (prefix, row)
        batch, size = key
        return batch * size

    def _insert(self, generation: Generation) -> None:
        """Into the first free slot: the fewer rows a step runs over, the better."""
        assert generation.shared.prefix is not None
        slot = self._slots.index(None)
        self._state, chosen = self._runner.insert(
            self._state, *generation.shared.prefix, slot, generation.request
        )
        self._start(generation, slot, chosen)

    def _extend(self, generation: Generation) -> bool:
        """Continues what a free slot holds, if the prompt begins with enough of it; says whether it did."""
        request = generation.request
        slot, start = self._longest_resident(request)
        if generation.shared.waiting > 1 or start < LEAST_REUSE:
            return False
        key = self._runner.extend_key(generation.length, start)
        if key is None:
            return False
        self._state, chosen = self._runner.extend(
            self._state, slot, request, embeds_behind(request, start), start=start, key=key
        )
        self.counters.extends += 1
        self.counters.reused_tokens += start
        generation.reused = start
        self._start(generation, slot, chosen)
        return True

    def _longest_resident(self, request: Request) -> tuple[int, int]:
        """The free slot that holds the longest beginning of a prompt, and its length: never the whole prompt, and
        never a part of a picture."""
        best = (0, 0)
        for slot, (owner, resident) in enumerate(zip(self._slots, self._residents, strict=True)):
            if owner is None:
                common = common_start(request, resident)
                if common > best[1]:
                    best = (slot, common)
        return best

    def _start(self, generation: Generation, slot: int, chosen: Chosen) -> None:
        """The first in the queue runs from here on: until now an interruption leaves it waiting."""
        self._waiting.popleft()
        self._slots[slot] = generation
        generation.slot = slot
        generation.asked = 1
        self._begun(generation)
        self._note(chosen, {0: generation})

    def _begun(self, generation: Generation) -> None:
        generation.shared.waiting -= 1
        if not generation.shared.waiting:
            generation.shared.prefix = None

    # --- the step ---

    def _dispatch(self) -> bool:
        """Dispatches the next step, if any request wants another token."""
        probing, self._probing = self._probing, False
        running = [g for g in self._slots if g and g.asked < g.request.max_new_tokens]
        if not running:
            if probing:
                nobody = np.zeros(self.num_slots, bool)
                self._state, chosen = self._runner.decode(
                    self._state, nobody, last_slot=0, length=1, plain=True
                )
                jax.block_until_ready(chosen)
            return False
        self._compact(running)
        alive = np.zeros(self.num_slots, bool)
        alive[[g.slot for g in running]] = True
        self._state, chosen = self._runner.decode(
            self._state,
            alive,
            last_slot=max(g.slot for g in running),
            length=max(g.length + g.asked for g in running),
            plain=all(g.request.is_plain for g in running),
        )
        self.counters.decode_steps += 1
        for generation in running:
            generation.asked += 1
        self._note(chosen, {g.slot: g for g in running})
        return True

    def _compact(self, running: list[Generation]) -> None:
        """Moves requests down into free slots where a step then runs over fewer rows."""
        rows = self._runner.row_sizes
        while True:
            last = max(running, key=lambda generation: generation.slot)
            used = self.num_slots - self.free_slots
            if rows.fit(used) >= rows.fit(last.slot + 1):
                return
            source, target = last.slot, self._slots.index(None)
            if target > source:
                return
            self._state = self._runner.move(self._state, source, target)
            self._slots[source], self._slots[target] = None, last
            self._residents[source] = Resident()
            last.slot = target
            self.counters.moves += 1

    def _note(self, chosen: Chosen, generations: dict[int, Generation]) -> None:
        """Remembers what to read, and lets it come over while the device goes on."""
        if not any(g.request.logprobs for g in generations.values()):
            chosen = Chosen(token=chosen.token, finite=chosen.finite, logprobs=None)
        for leaf in jax.tree.leaves(chosen):
            leaf.copy_to_host_async()
        self._pending.append(Pending(chosen, generations))

    def _collect(self, changed: dict[int, Generation], *, leave: int) -> None:
        """Reads all but the newest `leave` of what was dispatched; adds to `changed`, also where a reading fails."""
        while len(self._pending) > leave:
            pending = self._pending.popleft()
            chosen: Chosen = jax.device_get(pending.chosen)
            for row, generation in pending.generations.items():
                if not generation.finished and chosen.token[row] >= 0:
                    self._take(generation, chosen, row)
                    changed[id(generation)] = generation

    def _take(self, generation: Generation, chosen: Chosen, row: int) -> None:
        if not chosen.finite[row]:
            generation.error = FloatingPointError(
                "The model's logits are not finite; expected finite weights and a dtype that holds its activations."
            )
            self._finish(generation, "error")
            return
        request, token = generation.request, int(chosen.token[row])
        generation.ids.append(token)
        if request.logprobs:
            assert chosen.logprobs is not None
            found = chosen.logprobs
            pairs = zip(found.top_ids[row].tolist(), found.top[row].tolist(), strict=True)
            generation.logprobs.append(
                TokenLogprobs(chosen=float(found.chosen[row]), top=tuple(pairs))
            )
        if token in request.stop_tokens:
            self._finish(generation, "stop")
        elif len(generation.ids) == request.max_new_tokens:
            self._finish(generation, "length")

    def _finish(self, generation: Generation, reason: FinishReason) -> None:
        generation.finish_reason = reason
        if generation.slot >= 0:
            # Before its first token was read nobody knows whether the prompt gave numbers or NaN.
            known = generation.ids and reason != "error"
            images = tuple(generation.request.image_embeds)
            self._residents[generation.slot] = (
                Resident(generation.history(), images, generation.request.salt)
                if known
                else Resident()
            )
            self._slots[generation.slot] = None
            generation.slot = -1

    def _abandon(self, reason: FinishReason, error: Exception | None) -> list[Generation]:
        """Ends everything in flight and begins with empty slots."""
        ended = [generation for generation in self._slots if generation is not None]
        if error is not None and not ended and self._waiting:
            # Its own reading failed: left in the queue it would fail again for ever.
            ended = [self._waiting.popleft()]
            self._begun(ended[0])
        for generation in ended:
            generation.error = error
            self._finish(generation, reason)
        for generation in self._waiting:
            generation.shared.prefix = None
        self._pending.clear()
        self._residents = [Resident() for _ in range(self.num_slots)]
        del self._state  # before there is another one: it may fill the device
        self._state = self._runner.make_state()
        return ended
