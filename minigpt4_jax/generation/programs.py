"""Compiled programs, found by name and size: compiled when first wanted, or a core ahead and the rest beside requests.

For: `Programs`, which the engine runs everything through, and `Ladder`, the few sizes that lengths and batches are
rounded up to. Not for: what the programs compute (`decode.py`) nor when they run (`loop.py`).

Every program is lowered from flat lists of arrays. Dispatch is then a plain call, arguments are donated leaf by leaf,
and abstract values never pass through the checked signatures of the states.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax

Key = tuple[int, ...]
Size = tuple[str, Key]
"""A program by its name, and its size."""


@dataclass(frozen=True)
class Ladder:
    """Sizes in ascending order; the last one is the largest that there is."""

    steps: tuple[int, ...]

    def fit(self, size: int) -> int:
        """The smallest step that holds `size`. Raises `ValueError` above the last one."""
        for step in self.steps:
            if size <= step:
                return step
        raise ValueError(f"Size {size} is above {self.steps[-1]}, the largest there is.")


def make_ladder(first: int, last: int, *, halfway: bool = False) -> Ladder:
    """Powers of two from `first` on, `last`, and with `halfway` what lies between two powers."""
    steps = set()
    power = first
    while power < last:
        steps.add(power)
        if halfway and power // 2 * 3 < last:
            steps.add(power // 2 * 3)
        power *= 2
    return Ladder((*sorted(steps), last))


@dataclass(frozen=True)
class Program:
    """One compiled program and the trees of its arguments and results."""

    compiled: Any
    in_tree: Any
    out_tree: Any

    def __call__(self, *args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        if tree != self.in_tree:
            raise ValueError(f"A program got {tree}; it was compiled for {self.in_tree}.")
        return jax.tree.unflatten(self.out_tree, self.compiled(*leaves))


class NotCompiled(RuntimeError):
    """A program was asked for that was not compiled ahead, after compiling had been closed."""


class Programs:
    """The programs of one engine. `get` may be called from one thread while another compiles ahead."""

    def __init__(self) -> None:
        self._found: dict[Size, Program] = {}
        self._lock = threading.Lock()
        self._naming = threading.Lock()
        self._thread = threading.local()
        self.closed = False
        """True after everything that requests need was compiled: nothing is compiled for a request any more."""
        self.compiled = 0
        """Programs compiled so far."""
        self._wanted: queue.SimpleQueue[Size] = queue.SimpleQueue()
        self._named: set[Size] = set()  # wanted ever
        self._tried = 0

    def get(self, name: str, key: Key, compile_it: Callable[[], Program]) -> Program:
        """The program of this name and key; compiled now, if need be and allowed.

        Raises:
            NotCompiled: it is not there, and `closed` is set.
        """
        found = self._found.get((name, key))
        if found is not None:
            return found
        if not self.compiles_now:
            raise NotCompiled(
                f"{name}{list(key)} was not compiled ahead; expected only sizes that were: {self.keys(name)}."
            )
        with self._lock:
            found = self._found.get((name, key))
            if found is None:
                found = compile_it()
                self.compiled += 1
                self._found[name, key] = found
            return found

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """Inside, in this thread, programs are compiled though `closed` is set: nobody waits for them."""
        self._thread.ahead = True
        try:
            yield
        finally:
            self._thread.ahead = False

    def want(self, size: Size) -> None:
        """Has a size that is not there compiled by whoever asks `next_wanted`; only once, whatever came of it."""
        if size in self._found:
            return
        with self._naming:
            if size not in self._named:
                self._named.add(size)
                self._wanted.put(size)

    @contextmanager
    def next_wanted(self, *, timeout_s: float) -> Iterator[Size | None]:
        """Gives the size that is wanted for the longest time, to be compiled inside; None if there is none."""
        try:
            size = self._wanted.get(timeout=timeout_s)
        except queue.Empty:
            yield None
            return
        try:
            with self.ahead():
                yield size
        finally:
            self._tried += 1

    @property
    def left(self) -> int:
        """Sizes that are wanted and not compiled yet, the one under way among them."""
        return len(self._named) - self._tried

    @property
    def compiles_now(self) -> bool:
        """Whether `get` compiles what is not there, in this thread."""
        return not self.closed or getattr(self._thread, "ahead", False)

    def keys(self, name: str) -> list[Key]:
        """Sizes that the program of this name was compiled for, ascending."""
        return sorted(key for found, key in list(self._found) if found == name)

    def choose(self, name: str, wanted: Key) -> Key:
        """The sizes to run with: `wanted` while programs may be compiled; then the cheapest compiled ones that hold
        it, and somebody may compile `wanted` beside requests.

        Raises:
            NotCompiled: nothing that was compiled ahead is large enough.
        """
        if self.compiles_now:
            return wanted
        self.want((name, wanted))
        found = self.cheapest(name, wanted)
        if found is None:
            raise NotCompiled(
                f"{name}{list(wanted)} was not compiled ahead, and nothing larger: {self.keys(name)}."
            )
        return found

    def cheapest(self, name: str, wanted: Key) -> Key | None:
        """Of the compiled sizes that hold `wanted` the one with the least product; None where there is none."""
        fitting = [
            key
            for key in self.keys(name)
            if all(have >= need for have, need in zip(key, wanted, strict=True))
        ]
        return min(fitting, key=lambda key: math.prod(max(1, size) for size in key), default=None)


def compile_program(
    function: Callable[..., Any],
    args: Sequence[Any],
    *,
    donate: Sequence[int] = (),
    place: Callable[[str], jax.sharding.Sharding] | None = None,
) -> Program:
    """Compiles `function` for arguments of these shapes, dtypes and shardings.

    Args:
        args: trees of arrays or `jax.ShapeDtypeStruct`.
        donate: which of them are given away: their memory holds the results of the same shape and dtype.
        place: the sharding of a result by its path in the tree of results; None lets XLA decide.
    """
    leaves, in_tree = jax.tree.flatten(tuple(args))
    ends = [0]
    for arg in args:
        ends.append(ends[-1] + len(jax.tree.leaves(arg)))
    donated = tuple(i for arg in donate for i in range(ends[arg], ends[arg + 1]))
    out_tree: Any = None
    paths: list[str] = []

    def flat(*flat_args: Any) -> tuple[Any, ...]:
        nonlocal out_tree
        results = function(*jax.tree.unflatten(in_tree, flat_args))
        out_tree = jax.tree.structure(results)
        paths[:] = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(results)]
        return tuple(jax.tree.leaves(results))

    abstract = [as_abstract(leaf) for leaf in leaves]
    settings: dict[str, Any] = {}
    if place is not None:
        jax.eval_shape(flat, *abstract)
        settings["out_shardings"] = tuple(place(path) for path in paths)
    compiled = jax.jit(flat, donate_argnums=donated, **settings).lower(*abstract).compile()
    return Program(compiled=compiled, in_tree=in_tree, out_tree=out_tree)


def as_abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place of an array."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
