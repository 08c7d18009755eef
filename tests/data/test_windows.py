"""data/windows.py: each sample of a window once, those of a length together, read once by however many threads."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4_jax.config import UserError
from minigpt4_jax.data.batches import join_example
from minigpt4_jax.data.reading import Pick, Words
from minigpt4_jax.data.windows import Windows, arrange


@settings(deadline=None)
@given(
    size=st.integers(1, 6), batches=st.integers(1, 6), seed=st.integers(0, 2**32), data=st.data()
)
def test_a_window_holds_every_sample_once_and_its_batches_follow_each_other_in_length(
    size: int, batches: int, seed: int, data: st.DataObject
) -> None:
    count = size * batches
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
    order = arrange(lengths, size, rng=np.random.default_rng(seed))
    assert order.shape == (batches, size)
    assert sorted(order.ravel().tolist()) == list(range(count))
    if batches == 1:
        assert order[0].tolist() == list(range(count))
    else:
        by_length = sorted([lengths[place] for place in row] for row in order.tolist())
        assert [length for row in by_length for length in row] == sorted(lengths)


def test_the_batches_of_a_window_come_in_an_order_of_their_own() -> None:
    lengths = list(range(40))
    firsts = {
        tuple(arrange(lengths, 4, rng=np.random.default_rng(seed))[:, 0].tolist())
        for seed in range(5)
    }
    assert len(firsts) == 5


@pytest.mark.parametrize(("window", "padding"), [(1, 0.28), (16, 0.06)])
def test_captions_as_the_webs_are_padded_as_little_as_docs_own_data_says(
    window: int, padding: float
) -> None:
    rng = np.random.default_rng(0)
    real = padded = 0
    for _ in range(32 // window):
        text = np.clip(rng.normal(14, 4, window * 256).round(), 3, 32).astype(int)
        lengths = text + 33  # with bos and 32 image tokens
        for batch in lengths[arrange(lengths.tolist(), 256, rng=rng)]:
            real += batch.sum()
            padded += 256 * min(bucket for bucket in (44, 48, 52, 65) if bucket >= batch.max())
    assert 1 - real / padded == pytest.approx(padding, abs=0.01)


def words(position: int) -> Words:
    tokens = join_example([1], [7] * (1 + position * 5 % 11))
    return Words(Pick(0, position, 0), position, 0, tokens, "x", position, (), 0)


def windows(read: Callable[[int], Words] = words, *, kept: int = 3, seed: int = 1) -> Windows:
    return Windows(read, size=4, batch_size=3, seed=seed, kept=kept)


def samples(of: Windows, numbers: range) -> list[list[int]]:
    return [[one.pick.sample for one in of.batch(number)] for number in numbers]


def test_batches_depend_on_seed_and_number_and_not_on_what_was_asked_before() -> None:
    straight = samples(windows(), range(12))
    for number in reversed(range(12)):
        assert samples(windows(kept=1), range(number, number + 1)) == [straight[number]]
    for first in (0, 4, 8):  # twelve samples in each window of four batches
        inside = [sample for batch in straight[first : first + 4] for sample in batch]
        assert sorted(inside) == list(range(3 * first, 3 * first + 12))
    assert samples(windows(seed=2), range(12)) != straight


def test_a_window_is_read_once_by_however_many_threads() -> None:
    read: Counter[int] = Counter()

    def counting(position: int) -> Words:
        read[position] += 1
        time.sleep(0.001)  # so that the others come while it reads
        return words(position)

    of = windows(counting)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(of.batch, [0, 1, 2, 3, 0, 1, 4, 5]))
    assert found[0] == found[4]
    assert read == Counter(range(24))


def test_threads_that_need_the_same_window_read_it_side_by_side() -> None:
    together = threading.Barrier(4, timeout=60)

    def meeting(position: int) -> Words:
        if position % 3 == 0:  # the first of each batch's worth: four of them are under way at once
            together.wait()
        return words(position)

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(windows(meeting).batch, range(4)))
    assert [[one.sample for one in batch] for batch in found] == samples(windows(), range(4))


def test_what_goes_wrong_in_one_thread_is_raised_in_all_that_wait() -> None:
    def failing(position: int) -> Words:
        time.sleep(0.001)
        if position == 7:
            raise UserError("sample 7")
        return words(position)

    of = windows(failing)
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(of.batch, number) for number in (0, 1, 2, 3)]
        for batch in asked:
            with pytest.raises(UserError, match="sample 7"):
                batch.result(timeout=60)
