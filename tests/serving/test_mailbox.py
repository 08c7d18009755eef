"""mailbox.py: everything arrives, in order, with one wake-up for many."""

from __future__ import annotations

import asyncio
import threading

from minigpt4_jax.serving.mailbox import Mailbox, Post


def test_items_of_many_threads_all_arrive_each_threads_in_order() -> None:
    async def scenario() -> None:
        post = Post()
        boxes: list[Mailbox[tuple[int, int]]] = [Mailbox(post) for _ in range(3)]

        def send(thread: int) -> None:
            for number in range(2000):
                boxes[number % 3].send((thread, number))

        threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        found: list[list[tuple[int, int]]] = [[] for _ in boxes]

        async def collect(place: int) -> None:
            while len(found[place]) < 4 * len(range(place, 2000, 3)):
                found[place] += await boxes[place].take()

        async with asyncio.timeout(60):
            await asyncio.gather(*map(collect, range(3)))
        for items in found:
            for thread in range(4):
                numbers = [number for who, number in items if who == thread]
                assert numbers == sorted(numbers)

    asyncio.run(scenario())


def test_what_was_sent_between_two_turns_of_the_loop_is_one_wake_up() -> None:
    async def scenario() -> None:
        post = Post()
        box: Mailbox[int] = Mailbox(post)
        loop = asyncio.get_running_loop()
        calls: list[object] = []
        real = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda call, *args, **_: (
            calls.append(call),
            real(call, *args),
        )[1]  # type: ignore[assignment, func-returns-value, misc]
        for number in range(64):
            box.send(number)
        assert await box.take() == list(range(64))
        assert len(calls) == 1

    asyncio.run(scenario())


def test_a_loop_that_has_ended_is_told_nothing_and_nobody_fails() -> None:
    async def scenario() -> Mailbox[int]:
        return Mailbox(Post())

    box = asyncio.run(scenario())
    box.send(1)
    box.send(2)
