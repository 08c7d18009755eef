"""The engine's side of the scheduler: jobs into slots, a step, and what was written out of it.

For: encoding, submitting, stepping, searching and reading, all on the one thread that owns the model, and for what
happens to a job when one of them fails. Not for: who waits and who may come (`scheduler.py`).

Pictures and beams have memory of their own beside the slots, which may run out for one request alone. Where encoding or
a search fails, only that job does; the slots go a step then, also if nobody is in them (`Engine.probe`), and only if
this fails too is it a fault of the engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from minigpt4_jax.api import MiniGPT4
from minigpt4_jax.asking import make_request, pick_seed, search_steps
from minigpt4_jax.generation.requests import Generation, Request
from minigpt4_jax.image_cache import PreparedImage
from minigpt4_jax.serving.errors import internal
from minigpt4_jax.serving.jobs import Done, Event, Failed, Observer, Outcome, Started
from minigpt4_jax.serving.rows import Row, Task
from minigpt4_jax.serving.watchdog import Clock

logger = logging.getLogger(__name__)

LOST = ("error", "cancelled")
"""How an answer ends in the engine that is not complete. Nobody else cancels, so that only Ctrl-C gives the second."""


class Slots:
    """What is in the engine now.

    Args:
        observer: never raises.
        tell: gives an event to a job, unless it is over.
        end: ends a job with its last event, unless it is over; somebody calls `release` for it then.
        fault: the engine failed; may give it up.
        moved: some work was finished.
    """

    def __init__(
        self,
        model: MiniGPT4,
        *,
        observer: Observer,
        tell: Callable[[Task, Event], None],
        end: Callable[[Task, Outcome, Event | None], None],
        fault: Callable[[], None],
        moved: Callable[[], None],
        clock: Clock,
    ) -> None:
        self.tasks: tuple[Task, ...] = ()
        """Jobs that have slots or are about to. Replaced and never changed: any thread may read it."""
        self.leaks = 0
        """How often slots were taken while no job was there. Anything but 0 is a mistake."""
        self._engine, self._encoder, self._observer = model.engine, model.encoder, observer
        self._tell, self._end, self._fault, self._moved = tell, end, fault, moved
        self._clock = clock
        self._unseen: list[Task] = []  # whose pictures are not all encoded
        self._not_finite = False
        self._suspect = False  # something beside the slots failed, and no step came after it

    @property
    def searching(self) -> bool:
        """Whether a job of beams is under way."""
        return any(task.searches for task in self.tasks)

    @property
    def free(self) -> int:
        """Slots that no job has or waits for; below 0 where a job has more answers than there are slots."""
        return self._engine.num_slots - sum(task.slots for task in self.tasks)

    def reserve(self, tasks: Sequence[Task]) -> None:
        """Sets slots aside for jobs that `begin` is called with next."""
        now = self._clock()
        for task in tasks:
            task.taken_s = now
        self.tasks = (*self.tasks, *tasks)

    def begin(self, tasks: Sequence[Task]) -> None:
        """Submits reserved jobs; those with pictures once these are encoded, a batch with each `step`."""
        for task in tasks:
            if task.job.conversation.pictures:
                self._unseen.append(task)
            else:
                self._submit(task)

    def _encode(self) -> None:
        """Encodes the next batch of pictures, and submits the jobs that have all of theirs. No more at once: it is the
        time that answers under way are held up, and that a stall takes to be one."""
        batch: list[tuple[Task, Sequence[PreparedImage]]] = []
        left = self._engine.encoded_together
        for task in self._unseen:
            if not task.over:
                first = len(task.embeds)
                batch.append((task, task.job.conversation.pictures[first : first + left]))
                left -= len(batch[-1][1])
            if not left:
                break
        try:
            embeds = iter(self._encoder.embed([picture for _, part in batch for picture in part]))
        # Whatever the device raises; the slots are not touched by it.
        except Exception as error:
            self._suspect = True
            self._encode_singly(batch, error)
        else:
            for task, part in batch:
                task.embeds += [next(embeds) for _ in part]
        self._moved()
        seen = [t for t in self._unseen if len(t.embeds) == len(t.job.conversation.pictures)]
        self._unseen = [task for task in self._unseen if task not in seen and not task.over]
        for task in seen:
            if not task.over:
                self._submit(task)

    def _encode_singly(
        self, batch: Sequence[tuple[Task, Sequence[PreparedImage]]], error: Exception
    ) -> None:
        """After a failure: only those fail whose own pictures cannot be encoded."""
        if len(batch) > 1:
            names = ", ".join(task.job.id for task, _ in batch)
            logger.warning("Encoding the pictures of %s together failed", names, exc_info=error)
        for task, part in batch:
            if task.over:  # cancelled, or the engine was given up meanwhile
                continue
            if len(batch) == 1:
                self._fail(task, error)
                return
            try:
                task.embeds += self._encoder.embed(part)
            # As above.
            except Exception as own:
                self._fail(task, own)
                continue
            self._moved()

    def _submit(self, task: Task) -> None:
        try:
            request = _request(task)
            if task.searches:
                task.search = search_steps(self._engine, request, generation=task.job.generation)
                return
            task.handles = self._engine.submit(request, count=task.job.n)
            for _ in task.handles:
                task.new_row()
        # The engine refused this request alone, or this job cannot be read: nobody else has a part in it.
        except Exception as error:
            self._fail(task, error)

    def _search(self, task: Task) -> None:
        """A piece of a search, and its answers when it was the last."""
        assert task.search is not None
        try:
            next(task.search)
        except StopIteration as end:
            self._moved()
            try:
                self._tell_found(task, end.value)
            # A mistake in reading these answers is that job's alone.
            except Exception as error:
                self._fail(task, error)
        # Whatever the device raises.
        except Exception as error:
            self._suspect = True
            self._fail(task, error)
        else:
            self._moved()

    def _tell_found(self, task: Task, found: Sequence[Sequence[int]]) -> None:
        """The answers of beams, all at once."""
        job = task.job
        if len(found) < job.n:
            raise RuntimeError(f"Beams found {len(found)} answers; expected {job.n}, as asked for.")
        now = self._clock()
        self._tell(task, Started(cached_tokens=0))
        for ids in found[: job.n]:
            row = task.new_row()
            self._observer.first_token(now - job.arrived_s)
            for event in row.take(ids, ended=True):
                self._tell(task, event)
        self._end(task, _outcome(task.rows[-1]), Done())

    # --- the step ---

    @property
    def busy(self) -> bool:
        """Whether a step has something to do."""
        return (
            self._steps
            or bool(self._unseen)
            or any(task.search and not task.over for task in self.tasks)
        )

    @property
    def _steps(self) -> bool:
        return self._suspect or any(task.handles and not task.over for task in self.tasks)

    def step(self) -> None:
        """A batch of pictures, a piece of the search that is under way and one step of the engine, and what they gave
        to whom. Raises what the engine raises: it is lost then."""
        if self._unseen:
            self._encode()
        for task in self.tasks:
            if task.search is not None and not task.over:
                self._search(task)
        if self._steps:
            self._step()

    def _step(self) -> None:
        faults = self._engine.counters.faults
        if self._suspect:
            self._suspect = False
            self._engine.probe()
        self._engine.step()
        self._moved()
        now = self._clock()
        faulted = self._engine.counters.faults > faults
        num_tokens, not_finite = 0, False
        for task in self.tasks:
            if not task.handles or task.over:
                continue
            try:
                num_tokens += self._read(task, now)
            # A mistake in reading one answer is that job's alone.
            except Exception as error:
                self._fail(task, error)
            lost = [handle for handle, row in _open(task) if handle.finish_reason in LOST]
            if lost and not task.over:
                not_finite |= not faulted
                self._fail(task, lost[0].error)
        self._observer.stepped(num_tokens)
        if faulted or (not_finite and self._not_finite):
            self._fault()
        # Logits that are no numbers may be one request's. With no answer completed in between they are everybody's,
        # and the second step with such rows is a fault of the engine.
        self._not_finite |= not_finite

    def _read(self, task: Task, now_s: float) -> int:
        """Tells a job what is new, and returns the number of new tokens."""
        if not task.started and any(handle.slot >= 0 or handle.ids for handle in task.handles):
            task.started, task.cached_tokens = True, task.handles[0].reused
            self._tell(task, Started(task.cached_tokens))
        num_tokens = 0
        for handle, row in _open(task):
            num_tokens += self._read_row(task, handle, row, now_s)
        if all(row.finish_reason for row in task.rows):
            self._not_finite = False
            last = max(task.rows, key=lambda row: (row.last_s or 0.0, row.index))
            self._end(task, _outcome(last), Done())
        return num_tokens

    def _read_row(self, task: Task, handle: Generation, row: Row, now_s: float) -> int:
        before = row.num_tokens
        ended = handle.finish_reason in ("stop", "length")
        events = row.take(handle.ids[before:], ended=ended, logprobs=handle.logprobs)
        self._note_tokens(task, row, row.num_tokens - before, now_s)
        if row.finish_reason:
            self._engine.cancel(handle)  # a stop string ended it: the engine does not know
        for event in events:
            self._tell(task, event)
        return row.num_tokens - before

    def _note_tokens(self, task: Task, row: Row, num_tokens: int, now_s: float) -> None:
        """Tokens that were read together share the time since the last one."""
        if not num_tokens:
            return
        gap_s = 0.0 if row.last_s is None else (now_s - row.last_s) / num_tokens
        if row.last_s is None:
            self._observer.first_token(now_s - task.job.arrived_s)
        for _ in range(num_tokens - (row.last_s is None)):
            self._observer.next_token(gap_s)
        row.last_s = now_s
        task.note_token(now_s)

    # --- out of the slots ---

    def _fail(self, task: Task, error: Exception | None) -> None:
        logger.error("The request %s failed", task.job.id, exc_info=error)
        self._end(task, "error", Failed(internal()))

    def release(self, task: Task) -> None:
        """Takes back what a job that is over still has in the engine."""
        if task.search is not None:
            task.search.close()
            task.search = None
        for handle in task.handles:
            self._engine.cancel(handle)
        self._unseen = [other for other in self._unseen if other is not task]
        self.tasks = tuple(other for other in self.tasks if other is not task)

    def check(self) -> None:
        """Without jobs every slot must be free; anything else is logged and counted."""
        if self.tasks or (
            not self._engine.busy and self._engine.free_slots == self._engine.num_slots
        ):
            return
        self.leaks += 1
        logger.error(
            "%d of %d slots are free while no request is being answered; expected all of them.",
            self._engine.free_slots,
            self._engine.num_slots,
        )


def _request(task: Task) -> Request:
    job = task.job
    return make_request(
        job.conversation,
        job.prompt,
        task.embeds,
        generation=job.generation,
        seed=pick_seed(job.generation),
        max_new_tokens=job.max_new_tokens,
        logprobs=job.logprobs,
        logit_bias=job.logit_bias,
        salt=job.salt,
    )


def _open(task: Task) -> list[tuple[Generation, Row]]:
    """The answers that are not complete."""
    rows = zip(task.handles, task.rows, strict=True)
    return [(handle, row) for handle, row in rows if not row.finish_reason]


def _outcome(row: Row) -> Outcome:
    assert row.finish_reason
    return row.finish_reason
