"""Requests that nobody disturbs, at a server that is ill-treated: each must be answered as it was before the trouble.

For: the parts of `serve_faults.py` and `engine_faults.py`. Not for: those that leave (`rude_clients.py`).
"""

from __future__ import annotations

import asyncio
import collections
import random
import time
from collections.abc import Sequence
from typing import Any

from tests.benchmark_scripts import load_script
from tools.rude_clients import LEAVES, Leave, Visit, crowd

serve_load = load_script("serve_load")
server_process = load_script("server_process")

AT_ONCE = 24
"""Three times the slots, so that most wait; fewer than `limits.max_per_key`."""
MAX_TOKENS = 16
IDLE_S = 60.0
"""The longest that a server may take to notice that all have left."""
Row = dict[str, Any]


class Wrong(Exception):
    """What should not have happened."""


def require(holds: bool, said: str, found: object) -> None:
    """Raises `Wrong`."""
    if not holds:
        raise Wrong(f"{said}: {found}")


class Asking:
    """Requests to one server, the same for the same seed."""

    def __init__(self, server: Any, *, seed: int, max_tokens: int = MAX_TOKENS) -> None:
        self.server, self.url, self.rng = server, server.url, random.Random(seed)
        self._max_tokens = max_tokens
        self._questions = serve_load.make_questions(24, pictures=0.5, seed=seed)
        self.expected = self.alone()
        """The answer to the first question, before any trouble."""

    def body(self, number: int, *, stream: bool) -> bytes:
        question = self._questions[number % len(self._questions)]
        found: bytes = serve_load.chat_body(
            question, model="smol", max_tokens=self._max_tokens, stream=stream
        )
        return found

    def alone(self) -> str:
        """One request among no others; raises `Wrong` unless it is answered."""
        (found,) = asyncio.run(
            crowd(
                self.url, [(self.body(0, stream=False), False)], ["never"], at_once=1, rng=self.rng
            )
        )
        require(found.status == 200 and found.whole, "a request that nobody disturbed", found)
        return found.text

    def many(self, count: int, *, leaving: float) -> list[Visit]:
        """So many visits; this share of them leaves somewhere."""
        rng = self.rng
        bodies, leaves = [], []
        for number in range(count):
            stream = rng.random() < 0.5
            bodies.append((self.body(number, stream=stream), stream))
            leave: Leave = rng.choice(LEAVES) if rng.random() < leaving else "never"
            leaves.append(leave)
        return asyncio.run(crowd(self.url, bodies, leaves, at_once=AT_ONCE, rng=rng))

    def left_behind(self) -> Row:
        """Waits until the server is idle; what it still holds then, and how long it took to be."""
        start = time.monotonic()
        busy = ("num_requests_running", "num_requests_waiting", "slots_used")
        found: dict[str, float] = {}

        def idle() -> bool:
            found.update(server_process.read_metrics(self.url))
            return not any(found[name] for name in busy)

        reached = server_process.wait_until(idle, limit_s=IDLE_S)
        return {
            "idle_after_s": round(time.monotonic() - start, 1),
            "leaked_slots": int(found["slots_used"] + found.get("slot_leaks_total", 0)),
            "left_requests": int(found["num_requests_running"] + found["num_requests_waiting"]),
            "idle": reached,
        }

    def end(self) -> Row:
        """The last words of a part: nothing leaked, the process lives and answers as before."""
        left = self.left_behind()
        require(left["idle"] and not left["leaked_slots"], "left behind", left)
        require(self.server.alive, "the process has ended", self.server.process.returncode)
        same = self.alone() == self.expected
        require(same, "the answer alone", "another one than before")
        return {**left, "alive": True, "answers_as_before": same}


def statuses(visits: Sequence[Visit]) -> dict[str, int]:
    """How often each status came; `none` where the client left before one."""
    counts = collections.Counter(str(v.status) if v.status else "none" for v in visits)
    return dict(sorted(counts.items()))
