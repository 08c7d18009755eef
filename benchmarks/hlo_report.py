"""What XLA made of a decode step: kernels per layer, int8 converts that stand alone, copies of the cache.

Reads the text of a compiled program (`compiled.as_text()`), of a GPU or a CPU. A kernel is an instruction that the
program launches: not the inside of a fusion, not one that only renames memory. A loop counts as often as it runs.
Not for: times.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from typing import Any

FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "async-done", "copy-done", "opt-barrier", "add-dependency",
}  # fmt: skip
"""Opcodes that launch nothing: names, and the waiting half of a pair."""
CALLS = {"call", "while", "conditional", "async-start"}
"""Opcodes that run other computations of the program; `fusion` is a kernel of its own."""

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\s*\{"n":\s*"?(\d+)')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """(dtype, dimensions) of its result, several for a tuple."""
    operands: tuple[str, ...]
    called: tuple[str, ...]
    """Computations that it names."""
    trips: int | None
    """How often a loop runs, where the program says so."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a program, by name."""

    entry: str
    computations: dict[str, list[Instruction]]


def parse(text: str) -> Program:
    """Reads the text of a compiled program. Raises `ValueError` where it has no entry computation."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            current = computations.setdefault(opened[2], [])
            entry = opened[2] if opened[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current.append(_instruction(found[1], found[2]))
    if not entry:
        raise ValueError(
            "The text has no ENTRY computation; expected that of `compiled.as_text()`."
        )
    return Program(entry, computations)


def report(
    text: str, *, num_layers: int, cache_shape: tuple[int, ...], weight_elements: int
) -> dict[str, Any]:
    """What the issue asks of a decode step.

    Args:
        cache_shape: of one layer's keys.
        weight_elements: of the smallest kernel of a layer: converts of so much or more are of weights.

    Returns:
        `kernels` in all, `kernels_per_layer`, `opcodes` (how many of each), `converts_alone` and `converts_fused`
        (int8 weights: written out as a kernel's result, or read inside a matmul), `cache_copies` (names of kernels
        whose result is a whole cache and that do not write one token into it), `unknown_loops`.
    """
    program = parse(text)
    counts, unknown = _launched(program, program.entry)
    alone, fused = _converts(program, weight_elements)
    return {
        "kernels": sum(counts.values()),
        "kernels_per_layer": round(sum(counts.values()) / num_layers, 2),
        "opcodes": dict(sorted(counts.items(), key=lambda item: -item[1])),
        "converts_alone": alone,
        "converts_fused": fused,
        "cache_copies": _cache_copies(program, cache_shape),
        "unknown_loops": unknown,
    }


def _instruction(name: str, rest: str) -> Instruction:
    end = _end_of_type(rest)
    opcode, _, behind = rest[end:].strip().partition("(")
    depth, stop = 1, 0
    for stop, letter in enumerate(behind):  # noqa: B007 # the place where the operands end is used behind the loop
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth:
            break
    inside, attributes = behind[:stop], behind[stop + 1 :]
    called = [
        name for found in _CALLED.findall(attributes) for name in re.findall(r"[\w.\-]+", found)
    ]
    trips = _TRIPS.search(attributes)
    return Instruction(
        name=name,
        opcode=opcode.strip(),
        shapes=_shapes(rest[:end]),
        operands=tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(re.findall(r"[\w.\-]+", inside)),
        called=tuple(called),
        trips=int(trips[1]) if trips else None,
    )  # fmt: skip


def _end_of_type(rest: str) -> int:
    """Where the result's type ends: at the first space outside brackets."""
    depth = 0
    for place, letter in enumerate(rest):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == " " and not depth:
            return place
    return len(rest)


def _shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple(
        (dtype, tuple(int(n) for n in sizes.split(",") if n))
        for dtype, sizes in _SHAPE.findall(text)
    )


def _launched(program: Program, name: str) -> tuple[collections.Counter[str], int]:
    """Kernels that running a computation launches, by opcode, and how many loops do not say how often they run."""
    counts: collections.Counter[str] = collections.Counter()
    unknown = 0
    for instruction in program.computations[name]:
        if instruction.opcode in FREE:
            continue
        if instruction.opcode not in CALLS:
            counts[instruction.opcode] += 1
            continue
        times = 1
        if instruction.opcode == "while":
            times, unknown = instruction.trips or 1, unknown + (instruction.trips is None)
        for called in instruction.called:
            inner, inside = _launched(program, called)
            unknown += inside
            counts.update({opcode: times * count for opcode, count in inner.items()})
    return counts, unknown


def _callers(program: Program) -> dict[str, list[str]]:
    """Computation -> computations that name it."""
    callers: dict[str, list[str]] = collections.defaultdict(list)
    for name, instructions in program.computations.items():
        for instruction in instructions:
            for called in instruction.called:
                callers[called].append(name)
    return callers


def _multiplies(program: Program, name: str) -> bool:
    opcodes = {instruction.opcode for instruction in program.computations[name]}
    return bool(opcodes & {"dot", "reduce", "convolution"})


def _converts(program: Program, weight_elements: int) -> tuple[int, int]:
    """Converts from int8 of a weight's size: (outside every matmul, inside one)."""
    fused_bodies = _fused_bodies(program)
    callers = _callers(program)
    alone = fused = 0
    for name, instructions in program.computations.items():
        types = {instruction.name: instruction.shapes for instruction in instructions}
        for instruction in instructions:
            if instruction.opcode != "convert":
                continue
            source = types.get(instruction.operands[0], ())
            if not source or source[0][0] != "s8" or math.prod(source[0][1]) < weight_elements:
                continue
            # The matmul may be in this kernel, around a fusion within it: but never in what launches the kernel.
            inside = {name} & fused_bodies
            for _ in range(3):
                inside |= {c for body in inside for c in callers[body] if c in fused_bodies}
            if any(_multiplies(program, body) for body in inside):
                fused += 1
            else:
                alone += 1
    return alone, fused


def _fused_bodies(program: Program) -> set[str]:
    """Computations that are the inside of a kernel."""
    return {
        called
        for instructions in program.computations.values()
        for instruction in instructions
        if instruction.opcode == "fusion"
        for called in instruction.called
    }


def _cache_copies(program: Program, cache_shape: tuple[int, ...]) -> list[str]:
    """Names of kernels that write a whole cache anew (in any order of its axes)."""
    size, bodies = sorted(cache_shape), _fused_bodies(program)
    found = []
    for name, instructions in program.computations.items():
        if name in bodies:
            continue
        for instruction in instructions:
            if not any(sorted(sizes) == size for _, sizes in instruction.shapes):
                continue
            if instruction.opcode in ("copy", "copy-start", "transpose"):
                found.append(instruction.name)
            elif instruction.opcode == "fusion":
                inside = {
                    inner.opcode
                    for called in instruction.called
                    for inner in program.computations[called]
                }
                if not inside & {"dynamic-update-slice", "scatter", "fusion"}:
                    found.append(instruction.name)
    return found
