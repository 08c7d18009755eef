"""What the processes of a run do together: begin, agree, let one go first, and end when one of them is lost.

For: `run_beside_others` around a whole run; `first_process_first` around what writes a shared folder; `Agreement`,
`from_first`, `any_process` and `of_all_processes` for what they must know of each other. Not for: how they find each
other (`distributed.py`), meshes (`sharding.py`), which samples a process reads (`data/pipeline.py`), signals
(`stopping.py`).

What only process 0 does: the progress and the metrics (`metrics.py`), the checksums of a checkpoint
(`checkpoints.py`; its arrays are written by all), the finished projection (`loop.py`), and "Done" (`cli.py`). What all
do: read the frozen weights and their share of the samples, and say what goes wrong, with their number in front.

A process that fails says why, tells the others through JAX's coordination service, and leaves at once: at Python's end
JAX waits for all processes of a run, and they would wait for this one in the middle of a step. Of one that is killed
the others learn by an error of gloo, or when its heartbeat is missing for `distributed.heartbeat_s`: a TPU, and a CPU
with several devices, waits until then; NCCL was not tried. Then, and when process 0 is gone,
which holds the service, JAX ends them itself (SIGABRT) and says that another task died.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax._src import distributed as jax_distributed  # its client: there is no public one
from jax.experimental import multihost_utils

from minigpt4_jax.config import UserError
from minigpt4_jax.exits import PEER_LOST, PROBLEM, PeerLost, Stopped, run_command
from minigpt4_jax.sharding import one_for_each_device
from minigpt4_jax.train_config import DistributedConfig
from minigpt4_jax.training.distributed import first_lines, is_first_process, start_processes

TEXT_MULTIPLE = 4096
"""Bytes; texts between processes are padded up to a multiple, so that a run compiles their exchange once."""
DAY_MS = 24 * 3600 * 1000
FAREWELL = "minigpt4_jax/farewell"
"""Where a process that leaves writes why."""
LISTEN_S = 0.5
GRACE_S = 2.0
"""Between another process's farewell and the end of this one, which may have something to say itself."""
BUSY_S = 3.0
"""How much longer the others may take for that on a busy host before process 0 ends, and JAX them with it."""
LOST = re.compile(
    "gloo|nccl|connection (reset|refused|closed)|socket closed|broken pipe|heartbeat|coordination|barrier|"
    "unavailable|deadline_exceeded|remote process",
    re.IGNORECASE,
)
"""What errors of JAX say when another process is gone: the collectives' own words, and the coordination service's."""


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
    """The block in process 0, and when that is through it in all others: for files that one makes and all read.

    `name` may be used once in a run. Nothing but a process's death ends the waiting: the block may take hours.
    """
    wait = None if jax.process_count() == 1 else ocp.multihost.get_barrier_sync_fn()
    if wait is not None and not is_first_process():
        wait(key=name, timeout_ms=DAY_MS)
    yield
    if wait is not None and is_first_process():
        wait(key=name, timeout_ms=DAY_MS)


class Agreement:
    """What processes decide together after every step: the largest number that any of them gave, one call later.

    Each puts its number beside those of the others and takes the maximum on the devices, behind the step that runs
    there; it is read at the next call, when it is long there. So no step waits for it, and all read the same.
    """

    def __init__(self) -> None:
        self._side_by_side, everywhere = one_for_each_device(jax.devices())
        self._max = jax.jit(jnp.max, out_shardings=everywhere)
        self._before: jax.Array | None = None

    def after(self, number: int) -> int:
        """Gives `number`, returns the largest of the call before: 0 at the first call. Waits for no other process."""
        mine = np.full(jax.local_device_count(), number, np.int32)
        together = jax.make_array_from_process_local_data(self._side_by_side, mine)
        before, self._before = self._before, self._max(together)
        return 0 if before is None else int(before)


def from_first(value: int) -> int:
    """The `value` (of 32 bits) that process 0 gave. All must call it; in a run of one process nothing is sent."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def any_process(value: bool) -> bool:
    """Whether any process gave True. All must call it; in a run of one process nothing is sent."""
    if jax.process_count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))


def of_all_processes(value: Any) -> list[Any]:
    """A JSON-like value of every process, in their order. All must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(len(text), np.int32))
    padded = np.zeros(-(-sizes.max() // TEXT_MULTIPLE) * TEXT_MULTIPLE, np.uint8)
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True)]


def run_beside_others(command: Callable[[], int], *, config: DistributedConfig) -> int:
    """Meets the others and runs `command`; says with this process's number what went wrong, and returns the exit code.

    Alone it is just `command`. Beside others a process that fails ends here and now: at Python's end JAX waits for all
    processes of the run, and they would wait for this one in the middle of a step.
    """
    try:
        start_processes(config)
    except UserError as error:
        print(f"minigpt4: {error}", file=sys.stderr)
        _end(PEER_LOST if isinstance(error, PeerLost) else PROBLEM)
    if not jax.distributed.is_initialized():
        return command()
    others, together = _Others(), False

    def watched() -> int:
        nonlocal together
        try:
            code = _say_who_is_lost(command)
        except Stopped:
            together = True
            raise
        together = True
        return code

    try:
        code = run_command(watched, say=others.say)
    # A mistake of this project: its traceback, but no waiting for the others either.
    except BaseException:
        others.say(f"\n{traceback.format_exc()}")
        code = 1
    if not together:
        others.leave(code)
    others.close()
    return code


def _say_who_is_lost(command: Callable[[], int]) -> int:
    try:
        return command()
    except jax.errors.JaxRuntimeError as error:
        if not LOST.search(str(error)):
            raise
        raise PeerLost(
            f"Another process of the run died or cannot be reached; expected all {jax.process_count()} to its end. Its "
            "own output says why. Start all of them again: the run goes on at its last checkpoint. JAX says: "
            f"{first_lines(error)}"
        ) from error


class _Others:
    """The line to the other processes: what this one says at its end, and what the first of them said at its own."""

    def __init__(self) -> None:
        self._me = f"process {jax.process_index()} of {jax.process_count()}"
        self._said = "it was interrupted"
        self._client: Any = jax_distributed.global_state.client
        self._over = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="farewell", daemon=True)
        self._listener.start()

    def say(self, text: str) -> None:
        """A problem, to standard error."""
        self._said = text
        print(f"minigpt4 ({self._me}): {text}", file=sys.stderr)

    def leave(self, code: int) -> NoReturn:
        """Tells the others why this process ends, and ends it. Process 0 stays until they have heard."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or is gone
            self._client.key_value_set(FAREWELL, f"{self._me} ended with {code}: {self._said}")
        if is_first_process():  # JAX ends the others as soon as this one is gone
            time.sleep(LISTEN_S + GRACE_S + BUSY_S)
        _end(code)

    def close(self) -> None:
        """The run is over, and all processes know it."""
        self._over.set()
        self._listener.join()

    def _listen(self) -> None:
        grace_s = GRACE_S + is_first_process()
        # Never blocked in the client: Python could not end then.
        while not self._over.wait(LISTEN_S):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody has said anything
                why = self._client.key_value_try_get(FAREWELL)
                if why.startswith(f"{self._me} "):
                    return
                time.sleep(grace_s)
                self.say(f"{why}\nStart all of them again: the run goes on at its last checkpoint.")
                _end(PEER_LOST)


def _end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
