"""The engine: one set of parameters, a fixed number of slots, and requests that join and leave at any step.

    engine.submit(Request(...)); while ...: for generation in engine.step(): ...

One `step` lets waiting requests in (`prefill` -> `insert`), dispatches the next `decode_step` over all active slots,
and then reads the one before it: the device computes while the host reads, and nothing inside the loop waits for the
step that was just dispatched. All state is on the device and donated. `generate`, `stream`, chats, captioning and the
server go through this one loop.

Not for: text, tokenizers, stop strings (the caller reads the answer and cancels), threads (one owns an engine, but for
what is compiled beside it).
Differs from the original, which runs one request at a time, allocates its cache anew for every token and knows no
batches of prompts that end at different times.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from minigpt4_jax.config import ModelConfig, UserError
from minigpt4_jax.generation.ahead import compile_size, core_sizes, other_sizes
from minigpt4_jax.generation.beam import BeamRules
from minigpt4_jax.generation.beam_search import LENGTH_BEFORE, BeamSearch, BeamSteps, Hypothesis
from minigpt4_jax.generation.loop import Loop
from minigpt4_jax.generation.requests import Generation, Request
from minigpt4_jax.generation.residents import Resident
from minigpt4_jax.generation.runner import Runner
from minigpt4_jax.generation.score import AnswerScore, Candidates, score_answers
from minigpt4_jax.models.layout import DECODE, Layout
from minigpt4_jax.models.minigpt4 import Params

CompileProgress = Callable[[int, int], None]
"""Called with (sizes done, sizes in all)."""
LOOK_S = 0.5
"""How often `compile_wanted` looks whether to go on while nothing is wanted."""


class Engine(Loop):
    """Compiled generation over one set of parameters.

    Args:
        params: a full tree in `layout`.
        config: sizes of the model.
        dtype: compute dtype.
        context: the longest prompt plus answer, in tokens.
        num_slots: how many answers are written at once; the cache is allocated for all of them.
        layout: of `params`, one of the fused layouts.
        cache_dtype: of the KV cache: `dtype`, which is the default, or int8.
        mesh: over whose axis `tensor` the parameters lie already (`layout` is cut for it) and the cache will.

    Raises:
        UserError: `context` is more than the model's positions, or there are no slots.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        context: int,
        num_slots: int = 8,
        layout: Layout = DECODE,
        cache_dtype: DTypeLike | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        if context > config.llama.max_positions:
            raise UserError(
                f"context is {context}; expected at most {config.llama.max_positions}, the positions that the model "
                "was trained for."
            )
        if num_slots < 1:
            raise UserError(f"num_slots is {num_slots}; expected at least 1.")
        self.config = config
        runner = Runner(
            params,
            config,
            dtype=dtype,
            context=context,
            num_slots=num_slots,
            layout=layout,
            cache_dtype=dtype if cache_dtype is None else cache_dtype,
            mesh=mesh,
        )
        super().__init__(runner, num_slots=num_slots, context=context)
        self._beams = BeamSearch(runner.model)

    # --- compiling ---

    @property
    def ready(self) -> bool:
        """Whether `compile_core` has run: from then on no request waits for a compiler, but for beams and
        `score`."""
        return self._runner.programs.closed

    @property
    def compiled_programs(self) -> int:
        """How many programs were compiled so far. After `ready` only `compile_rest` and `compile_wanted` add to
        them."""
        return self._runner.programs.compiled

    @property
    def programs_left(self) -> int:
        """Sizes that are wanted and not compiled yet: `compile_rest` and `compile_wanted` are at it, if they run."""
        return self._runner.programs.left

    def compile_core(self, progress: CompileProgress | None = None) -> None:
        """Compiles what any request can be served with, ahead; the engine is `ready` then.

        A request that no compiled program fits exactly runs with the next larger one. Without this, programs are
        compiled when they are first wanted. Beams and `score` are not among them: they compile at their first use.
        """
        sizes = core_sizes(self._runner)
        with self._runner.programs.ahead():
            for number, size in enumerate(sizes):
                compile_size(self._runner, self._state, size)
                if progress is not None:
                    progress(number + 1, len(sizes))
        self._runner.programs.closed = True

    def compile_rest(self) -> None:
        """Compiles the other sizes, which make requests cheaper. May run in a thread of its own while requests are
        served; what it compiled is used as soon as it is there."""
        self.want_rest()
        while self._compile_next(timeout_s=0.0):
            pass

    def want_rest(self) -> None:
        """Leaves the other sizes to `compile_wanted`."""
        for size in other_sizes(self._runner):
            self._runner.programs.want(size)

    def compile_wanted(self, go_on: Callable[[], bool]) -> None:
        """As `compile_rest`, but only sizes that a request would have run with, had they been there; waits for more
        until `go_on()`, asked between two of them and `LOOK_S` apart, is False. For a thread of its own.

        Raises what the compiler raises; that size is not tried again, and the method can be called again.
        """
        while go_on():
            self._compile_next(timeout_s=LOOK_S)

    def _compile_next(self, *, timeout_s: float) -> bool:
        with self._runner.programs.next_wanted(timeout_s=timeout_s) as size:
            if size is not None:
                compile_size(self._runner, self._state, size)
            return size is not None

    # --- other weights ---

    def drop_params(self) -> None:
        """Weights and cache leave the device until `take_params`; what was compiled stays. All must be answered."""
        self._pending.clear()
        self._residents = [Resident() for _ in range(self.num_slots)]
        del self._runner.params, self._state

    def take_params(self, params: Params) -> None:
        """Weights like those that were dropped."""
        self._runner.params = params
        self._state = self._runner.make_state()

    # --- requests ---

    def stream(self, request: Request) -> Iterator[int]:
        """Yields the ids of one answer as they are chosen, the stop token included. Closing it cancels the request.

        Raises the device's error if there was one.
        """
        (generation,) = self.submit(request)
        shown = 0
        try:
            while True:
                while shown < len(generation.ids):
                    shown += 1
                    yield generation.ids[shown - 1]
                if generation.finished:
                    break
                self.step()
            if generation.error is not None:
                raise generation.error
        finally:
            self.cancel(generation)

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Answers several requests, as many at once as there are slots. Raises as `stream`."""
        found = [self.submit(request)[0] for request in requests]
        try:
            while not all(generation.finished for generation in found):
                self.step()
        finally:
            for generation in found:
                self.cancel(generation)
        for generation in found:
            if generation.error is not None:
                raise generation.error
        return found

    def beam_search(
        self,
        requests: Sequence[Request],
        *,
        num_beams: int,
        length_penalty: float = 1.0,
    ) -> list[list[Hypothesis]]:
        """The `num_beams` best answers to each request, best first, by the rules of `generation/beam.py`.

        The requests have the same settings; of the sampling only the repetition penalty counts. Fewer answers where
        there are not as many (a vocabulary smaller than `num_beams`). A row's answers do not depend on the other rows.
        Beams have caches of their own beside the slots, which wait here while a search runs: see `beam_steps`.

        Raises:
            ValueError: prompt and answer exceed the context, or the requests differ in more than their prompts.
        """
        steps = self.beam_steps(requests, num_beams=num_beams, length_penalty=length_penalty)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                found: list[list[Hypothesis]] = end.value
                return found

    def beam_steps(
        self,
        requests: Sequence[Request],
        *,
        num_beams: int,
        length_penalty: float = 1.0,
    ) -> BeamSteps:
        """`beam_search` a piece at a time. Between two of them `step` may be called; closing it gives the search up.

        Raises as `beam_search`, but at the first piece.
        """
        first = requests[0]
        for request in requests:
            self._check(request)
            if _beam_settings(request) != _beam_settings(first):
                raise ValueError(
                    f"A beam search got requests with {_beam_settings(first)} and {_beam_settings(request)}; "
                    "expected the same settings for all."
                )
        if self.ready and len(requests) > 1:  # only single prompts are sure to be compiled
            settings: Any = {"num_beams": num_beams, "length_penalty": length_penalty}
            found: list[list[Hypothesis]] = []
            for request in requests:
                found += yield from self.beam_steps([request], **settings)
            return found
        lengths = np.asarray([len(request.prompt) for request in requests], np.int32)
        longest, vocab = int(lengths.max()), self.config.llama.vocab_size
        sizes = self._runner.prompt_sizes
        batch, size = self._runner.programs.choose("prefill", (len(requests), sizes.fit(longest)))
        prefix = jax.block_until_ready(self._runner.read(requests, (batch, size)))
        self.counters.prefills += 1
        yield
        rules = BeamRules(
            stops=_mark(first.stop_tokens, vocab),
            length_penalty=np.float32(length_penalty),
            repetition_penalty=np.float32(first.sampling.repetition_penalty),
            length_before=np.int32(LENGTH_BEFORE),
        )
        return (
            yield from self._beams.steps(
                self._runner.params,
                prefix,
                lengths,
                np.tile(_mark(first.written, vocab), (len(requests), 1)),
                rules,
                num_beams=num_beams,
                places=self._runner.place_sizes.fit(longest + first.max_new_tokens),
                max_new_tokens=first.max_new_tokens,
            )
        )

    def score(self, questions: Sequence[Candidates]) -> list[list[AnswerScore]]:
        """How likely the candidate answers of each question are: see `score_answers`; rank them by `rank_by_mean`, or
        as the original does by `multi_select`."""
        return score_answers(
            self._runner.score,
            questions,
            bucket=self._runner.prompt_sizes.fit,
            context=self.context,
            width=self.config.llama.width,
        )

    @property
    def encoded_together(self) -> int:
        """How many pictures `encode_images` takes through the tower at once, at most."""
        return self._runner.encoded_together[-1]

    def encode_images(
        self, images: Float[np.ndarray, "I height width 3"]
    ) -> list[Float[Array, "T D"]]:
        """Normalised pictures (float32) to image embeddings in the compute dtype. They stay on the device.

        Waits for them, so that what fails fails here, and nobody keeps an embedding that never came to be.
        """
        found = self._runner.encode_images(images)
        jax.block_until_ready(found)
        self.counters.images += len(images)
        return found


def _beam_settings(request: Request) -> tuple[Any, ...]:
    penalty = request.sampling.repetition_penalty
    return (request.max_new_tokens, set(request.stop_tokens), set(request.written), penalty)


def _mark(tokens: Collection[int], vocab_size: int) -> Bool[np.ndarray, " V"]:
    marked = np.zeros(vocab_size, bool)
    marked[list(tokens)] = True
    return marked
