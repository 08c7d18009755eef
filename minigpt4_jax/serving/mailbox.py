"""The way of events from the engine's thread to the event loop.

For: `Post`, one of a server, and its `Mailbox`es, one of a job. Not for: what the events mean.

All events between two turns of the loop are handed over by one wake-up: a step of 64 slots costs one system call
rather than 64.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class Post:
    """Hands items from any thread to mailboxes of one event loop. Make it on that loop's thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._sent: deque[tuple[Mailbox[object], object]] = deque()
        self._rung = False

    def send(self, box: Mailbox[object], item: object) -> None:
        """From any thread; neither blocks nor raises."""
        # Append first, then look: who finds the bell rung is heard, since `_deliver` silences it before it looks.
        # (Two threads that both find it silent ring twice, which does no harm.)
        self._sent.append((box, item))
        if not self._rung:
            self._rung = True
            try:
                self._loop.call_soon_threadsafe(self._deliver)
            except (
                RuntimeError
            ):  # the loop is closed: the server has ended, and nobody waits any more
                self._sent.clear()

    def _deliver(self) -> None:
        self._rung = False
        while self._sent:
            box, item = self._sent.popleft()
            box.put(item)


class Mailbox(Generic[ItemT]):
    """Items in order; one task takes them. All but `send` only on the loop's thread."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self._items: deque[ItemT] = deque()
        self._filled = asyncio.Event()

    def send(self, item: ItemT) -> None:
        """From any thread; neither blocks nor raises."""
        self._post.send(self, item)  # type: ignore[arg-type]  # the post carries the items of every kind of mailbox

    def put(self, item: ItemT) -> None:
        """As `send`, from the loop's own thread."""
        self._items.append(item)
        self._filled.set()

    async def take(self) -> list[ItemT]:
        """Waits until there is something, and gives all that is there."""
        await self._filled.wait()
        self._filled.clear()
        taken = list(self._items)
        self._items.clear()
        return taken
