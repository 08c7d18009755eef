"""An engine without a model: it writes what a script says, one id a step, in as many rows as it has slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Generation, Request, SharedPrompt


class ScriptedEngine(Engine):
    """What `AnswerRun` asks of an engine, and nothing else. `script` gives the ids that a request is answered with."""

    def __init__(self, script: Callable[[Request], Sequence[int]], *, num_slots: int = 2) -> None:
        self.num_slots = num_slots
        self.requests: list[Request] = []
        self.counts: list[int] = []
        self.handles: list[Generation] = []
        self.rows_per_step: list[int] = []
        self.fault_at: int | None = None
        """The step that fails."""
        self._script = script

    def submit(self, request: Request, *, count: int = 1) -> list[Generation]:
        self.requests.append(request)
        self.counts.append(count)
        shared = SharedPrompt(waiting=count)
        found = [Generation(request=request, shared=shared) for _ in range(count)]
        self.handles += found
        return found

    def step(self) -> list[Generation]:
        active = [handle for handle in self.handles if not handle.finished][: self.num_slots]
        self.rows_per_step.append(len(active))
        for handle in active:
            if len(self.rows_per_step) == self.fault_at:
                handle.finish_reason, handle.error = "error", RuntimeError("the device is gone")
                continue
            handle.ids.append(self._script(handle.request)[len(handle.ids)])
            if handle.ids[-1] in handle.request.stop_tokens:
                handle.finish_reason = "stop"
            elif len(handle.ids) == handle.request.max_new_tokens:
                handle.finish_reason = "length"
        return active

    def cancel(self, generation: Generation) -> None:
        assert not generation.finished
        generation.finish_reason = "cancelled"
