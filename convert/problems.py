"""What can be wrong with a conversion: kinds of problems, and the error that lists all of them together.

For: `ConversionError`. Not for: finding problems (`rules.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from minigpt4_jax.config import UserError

_LAYER = "{i}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `kind` is the heading it is listed under."""

    kind: str
    text: str


MISSING = "missing in the source"
UNUSED = "in the source, but used by no rule and excused by none"
CONFLICT = "excused, but a rule uses it"
DOUBLE = "filled by more than one rule"
UNKNOWN = "filled by a rule, but not a parameter of the model"
UNFILLED = "a parameter of the model that no rule fills"
MISSHAPEN = "of the wrong shape"
UNFIT = "not what its operation takes"
NOT_FINITE = "not finite"
NOT_EQUAL = "excused as a copy, but not equal to it"
KINDS = (
    MISSING,
    UNUSED,
    CONFLICT,
    DOUBLE,
    UNKNOWN,
    UNFILLED,
    MISSHAPEN,
    UNFIT,
    NOT_FINITE,
    NOT_EQUAL,
)


class ConversionError(UserError):
    """Everything that is wrong with a conversion, listed together. Nothing was converted."""

    def __init__(self, source: str, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: KINDS.index(p.kind)))
        lines = [f"{source} cannot be converted: {len(self.problems)} problem(s)."]
        for kind in KINDS:
            texts = [p.text for p in self.problems if p.kind == kind]
            if texts:
                lines.append(f"  {kind} ({len(texts)}):")
                lines += [f"    {text}" for text in _join_layers(texts)]
        lines.append(
            "Expected: every tensor used or excused, every parameter filled once. Check that the file and the chosen "
            "model belong together."
        )
        super().__init__("\n".join(lines))


def _join_layers(texts: list[str]) -> list[str]:
    """Lines that differ only in the layer number become one: `blocks.{4..38}.norm1.weight`."""
    number = re.compile(r"(?<=[./])\d+(?=[./])")
    groups: dict[str, list[tuple[int, str]]] = {}
    for text in texts:
        numbers = {int(n) for n in number.findall(text)}
        same = numbers.pop() if len(numbers) == 1 else None
        groups.setdefault(text if same is None else number.sub(_LAYER, text), []).append(
            (-1 if same is None else same, text)
        )
    lines = []
    for pattern, members in groups.items():
        layers = sorted(layer for layer, _ in members)
        if len(layers) == 1 or layers[-1] - layers[0] + 1 != len(layers):
            lines += [text for _, text in members]
        else:
            lines.append(pattern.replace(_LAYER, f"{{{layers[0]}..{layers[-1]}}}"))
    return lines
