"""The rule engine: a conversion is a table with one row per parameter of a block, checked in both directions.

For: binding the tensors of a `TensorSource` to a parameter tree. Every source tensor is used by a rule or excused by
name, every target is filled exactly once, shapes are compared with the abstract tree and values must be finite. All
problems of a file are found in one pass and reported together.
Not for: knowing any format or model. The tables live in `llama.py`, `eva_vit.py`, `qformer.py` and `projection.py`.

Differs from the PyTorch original, whose loaders call `load_state_dict(strict=False)` and drop the report.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from convert.arrays import contiguous, count_not_finite
from convert.problems import (
    CONFLICT,
    DOUBLE,
    MISSHAPEN,
    MISSING,
    NOT_EQUAL,
    NOT_FINITE,
    UNFILLED,
    UNFIT,
    UNKNOWN,
    UNUSED,
    ConversionError,
    Problem,
)
from convert.sources import TensorSource
from minigpt4_jax.config import UserError

Array = npt.NDArray[Any]
Tree = dict[str, Any]
"""Nested dict whose leaves are arrays."""

LAYER = "{i}"
"""Stands for the layer number in target paths, source names and excuses."""


@dataclass(frozen=True)
class Op:
    """A named function from source arrays to one target array."""

    name: str
    apply: Callable[..., Array]

    def then(self, other: Op) -> Op:
        """This operation, and `other` on its result."""
        return Op(f"{self.name}, {other.name}", lambda *arrays: other.apply(self.apply(*arrays)))


@dataclass(frozen=True)
class Rule:
    """One row of a table: the parameter at `target` is `op` of the tensors named `sources`.

    `target` is a path with "/"; `{i}` in it is expanded over the layers that the model has, and in `sources` it is the
    same number.
    """

    target: str
    sources: tuple[str, ...]
    op: Op

    def __post_init__(self) -> None:
        if self.target.count(LAYER) > 1 or not self.sources:
            raise ValueError(
                f"Rule {self.target!r} <- {self.sources!r}: expected at most one {LAYER} in the "
                "target and at least one source."
            )


@dataclass(frozen=True)
class Excuse:
    """Source tensors that no rule uses, and why that is right.

    `pattern` is a name in which `{i}` stands for a number and `*` for anything; it has to start with a literal, so that
    a catch-all cannot be written. With `same_as`, the excuse only holds while both tensors are equal.
    """

    pattern: str
    reason: str
    same_as: str | None = None

    def __post_init__(self) -> None:
        literal = re.split(r"\*|\{i\}", self.pattern)[0]
        if not re.search(r"[A-Za-z]", literal):
            raise UserError(
                f"The excuse {self.pattern!r} starts with a wildcard; expected a literal beginning such as "
                "'head.*'. Name what is left out, so that nothing else slips through."
            )

    def matches(self, name: str) -> bool:
        pieces = re.split(r"(\*|\{i\})", self.pattern)
        regex = "".join({"*": ".*", LAYER: r"\d+"}.get(p, re.escape(p)) for p in pieces)
        return re.fullmatch(regex, name) is not None


@dataclass(frozen=True)
class Conversion:
    """A finished conversion."""

    params: Tree
    excused: tuple[tuple[str, str], ...]
    """(source name, reason)."""


# --- operations -------------------------------------------------------------------------------------------------------

identity = Op("as it is", lambda x: x)
transpose = Op("transpose to [in, out]", lambda x: _expect_ndim(x, 2).T)
conv_kernel = Op("OIHW to HWIO", lambda x: _expect_ndim(x, 4).transpose(2, 3, 1, 0))


def _fold(x: Array, scale: Array) -> Array:
    if scale.shape != x.shape[-1:]:
        raise ValueError(f"a layer scale {list(scale.shape)} for outputs of {list(x.shape)}")
    return x * scale


fold_scale = Op("times the layer scale of the output", _fold)


def interleaved_to_half_split(num_heads: int) -> Op:
    """Rows of q or k, `[num_heads * head_dim, in]`: rotary pairs (0, 1), (2, 3)... -> (0, H/2), (1, H/2 + 1)..."""

    def apply(x: Array) -> Array:
        rows, width = _expect_ndim(x, 2).shape
        pairs = x.reshape(num_heads, rows // num_heads // 2, 2, width)
        return pairs.swapaxes(1, 2).reshape(rows, width)

    return Op(f"rope rows of {num_heads} heads to half-split", apply)


def rows(part: int, of: int) -> Op:
    """One of `of` equal parts along the first axis, as q, k and v are stacked in one kernel."""

    def apply(x: Array) -> Array:
        if x.shape[0] % of:
            raise ValueError(f"{x.shape[0]} rows do not divide into {of} equal parts")
        return x[part * x.shape[0] // of : (part + 1) * x.shape[0] // of]

    return Op(f"part {part + 1} of {of}", apply)


def _expect_ndim(x: Array, ndim: int) -> Array:
    if x.ndim != ndim:
        raise ValueError(f"expected {ndim} axes, the tensor has shape {list(x.shape)}")
    return x


# --- the engine -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One parameter to be filled: its path, the row that says how, and that row's source names."""

    path: str
    rule: Rule
    sources: tuple[str, ...]


class Plan:
    """A table laid over one source and one tree: what will be made, and what is wrong with it, before a value is read.

    Args:
        source: where tensors come from.
        rules: the table.
        excuses: source tensors that are left out on purpose.
        target: nested dict of anything with a `.shape` (`jax.ShapeDtypeStruct`).
        dtype: storage type of the result; None keeps the dtype that the source and the operations give.
    """

    def __init__(
        self,
        source: TensorSource,
        rules: Iterable[Rule],
        *,
        excuses: Iterable[Excuse],
        target: Mapping[str, Any],
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        self.source = source
        self._excuses = tuple(excuses)
        self._dtype = dtype
        self._shapes = dict(flatten(target))
        self.steps = [
            Step(path, rule, sources)
            for rule in rules
            for path, sources in _expand(rule, target, self._shapes)
        ]
        self.problems, self.excused = _name_problems(
            source, self.steps, self._excuses, self._shapes
        )

    def make(self, step: Step) -> tuple[Array | None, list[Problem]]:
        """Reads and computes one parameter. It is None where there is nothing that could be stored."""
        if not set(step.sources) <= set(self.source.names()):
            return None, []  # among the plan's own problems
        try:
            value = step.rule.op.apply(*(self.source.get(name) for name in step.sources))
        except ValueError as error:
            text = f"{step.path} <- {' , '.join(step.sources)}: {error}"
            return None, [Problem(UNFIT, text)]
        value = contiguous(value)
        value = value if self._dtype is None else value.astype(self._dtype, copy=False)
        return value, _value_problems(step.path, step.sources, value, self._shapes)

    def size(self, step: Step) -> int:
        """Bytes that a parameter will take, as far as shapes and dtypes tell before it is made."""
        names = set(self.source.names())
        dtypes = [self.source.dtype(name) for name in step.sources if name in names]
        dtype = np.dtype(self._dtype) if self._dtype is not None else np.result_type(*dtypes)
        shape: tuple[int, ...] = tuple(self._shapes[step.path].shape)
        return math.prod(shape) * dtype.itemsize

    def copy_problems(self) -> list[Problem]:
        """Excuses that rest on being a copy of another tensor, checked value by value."""
        return _copy_problems(self.source, self._excuses)


def convert(
    source: TensorSource,
    rules: Iterable[Rule],
    *,
    excuses: Iterable[Excuse],
    target: Mapping[str, Any],
    dtype: npt.DTypeLike | None = None,
    on_tensor: Callable[[int, int, str], None] | None = None,
) -> Conversion:
    """Fills the tree `target` from `source` in memory, one tensor at a time. For small parts and for tests; `model.py`
    streams whole models to disk.

    Args:
        source, rules, excuses, target, dtype: see `Plan`.
        on_tensor: called after every tensor with (done, total, target path).

    Raises:
        ConversionError: with every problem of the whole file.
    """
    plan = Plan(source, rules, excuses=excuses, target=target, dtype=dtype)
    problems = list(plan.problems)
    params: Tree = {}
    for done, step in enumerate(plan.steps, start=1):
        value, found = plan.make(step)
        problems += found
        if not problems and value is not None:
            # Only a conversion without a problem so far is worth its memory.
            insert(params, step.path, value)
        if on_tensor is not None:
            on_tensor(done, len(plan.steps), step.path)
    problems += plan.copy_problems()
    if problems:
        raise ConversionError(source.describe(), problems)
    return Conversion(params=params, excused=tuple(plan.excused))


def _expand(
    rule: Rule, tree: Mapping[str, Any], shapes: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The rule's targets with their source names: one per layer, or one."""
    if LAYER not in rule.target:
        yield rule.target, rule.sources
        return
    node: Any = tree
    for key in rule.target.split(LAYER)[0].strip("/").split("/"):
        node = node.get(key, {}) if isinstance(node, Mapping) else {}
    if not node:
        yield rule.target, rule.sources  # reported as no parameter of the model
    for i in sorted(node, key=int):
        yield rule.target.replace(LAYER, i), tuple(s.replace(LAYER, i) for s in rule.sources)


def _name_problems(
    source: TensorSource,
    steps: list[Step],
    excuses: tuple[Excuse, ...],
    shapes: Mapping[str, Any],
) -> tuple[list[Problem], list[tuple[str, str]]]:
    """What can be seen without reading a tensor, and the (name, reason) pairs that are excused."""
    names = dict.fromkeys(source.names())
    used = {name for step in steps for name in step.sources}
    problems: list[Problem] = []
    excused: list[tuple[str, str]] = []

    for step in steps:
        for name in step.sources:
            if name not in names:
                problems.append(Problem(MISSING, f"{name} (for {step.path})"))
    for name in names:
        excuse = next((e for e in excuses if e.matches(name)), None)
        if excuse is None and name not in used:
            problems.append(Problem(UNUSED, f"{name} {list(source.shape(name))}"))
        elif excuse is not None and name in used:
            problems.append(Problem(CONFLICT, f"{name} (excuse {excuse.pattern!r})"))
        elif excuse is not None:
            excused.append((name, excuse.reason))

    times = Counter(step.path for step in steps)
    for path, count in times.items():
        if count > 1:
            by = [", ".join(step.sources) for step in steps if step.path == path]
            problems.append(Problem(DOUBLE, f"{path} (from {'; from '.join(by)})"))
        if path not in shapes:
            problems.append(Problem(UNKNOWN, path))
    for path in shapes:
        if path not in times:
            problems.append(Problem(UNFILLED, f"{path} {list(shapes[path].shape)}"))
    return problems, excused


def _value_problems(
    path: str, sources: tuple[str, ...], value: Array, shapes: Mapping[str, Any]
) -> list[Problem]:
    problems = []
    if path in shapes and tuple(shapes[path].shape) != value.shape:
        problems.append(
            Problem(
                MISSHAPEN,
                f"{path} <- {', '.join(sources)}: shape {list(value.shape)}, the model has {list(shapes[path].shape)}",
            )
        )
    bad = count_not_finite(value)
    if bad:
        problems.append(
            Problem(
                NOT_FINITE,
                f"{path} <- {', '.join(sources)}: {bad} of {value.size} values are NaN or infinite",
            )
        )
    return problems


def _copy_problems(source: TensorSource, excuses: tuple[Excuse, ...]) -> list[Problem]:
    """Excuses that rest on being a copy of another tensor, checked value by value."""
    problems = []
    names = source.names()
    for excuse in excuses:
        if excuse.same_as is None or excuse.same_as not in names:
            continue
        for name in filter(excuse.matches, names):
            if not np.array_equal(source.get(name), source.get(excuse.same_as)):
                problems.append(Problem(NOT_EQUAL, f"{name}, said to equal {excuse.same_as}"))
    return problems


# --- trees ------------------------------------------------------------------------------------------------------------


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path with "/", leaf) of a nested dict, in the dict's order."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def insert(tree: Tree, path: str, value: Any) -> None:
    """Puts `value` into a nested dict at a path with "/"."""
    *parents, leaf = path.split("/")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[leaf] = value
