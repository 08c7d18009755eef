"""The real server with a real engine that is made to fail: what `tools/serve_faults.py` starts.

    python -m tools.faulty_server FAULT SHARE --config configs/serve/smol.yaml [key=value ...]

FAULT is `dispatch` (the device raises, and the donated state is lost), `read` (what was dispatched cannot be read) or
`nan` (the logits of one row are no numbers); it happens in that share of the steps, or for `nan` of the tokens, by a
fixed seed. Nothing of this is in the package: the engine's methods are wrapped before the server starts.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from minigpt4_jax.cli import main
from minigpt4_jax.generation.loop import Loop

INJECTED = "injected by tools/faulty_server.py"


def failing(method: Callable[..., Any], share: float) -> Callable[..., Any]:
    """`method`, which raises in this share of its calls."""
    rng = random.Random(0)

    def call(*args: Any, **kwargs: Any) -> Any:
        if rng.random() < share:
            raise RuntimeError(INJECTED)
        return method(*args, **kwargs)

    return call


def without_numbers(take: Callable[..., Any], share: float) -> Callable[..., Any]:
    """`Loop._take`, told that the row's logits are not finite in this share of its calls."""
    rng = random.Random(0)

    def call(loop: Loop, generation: Any, chosen: Any, row: int) -> Any:
        if rng.random() < share:
            finite = np.array(chosen.finite)
            finite[row] = False
            chosen = dataclasses.replace(chosen, finite=finite)
        return take(loop, generation, chosen, row)

    return call


def break_engine(fault: str, share: float) -> None:
    """From here on the engines of this process fail."""
    if fault == "dispatch":
        Loop._dispatch = failing(Loop._dispatch, share)  # type: ignore[method-assign]  # that is the purpose
    elif fault == "read":
        Loop._collect = failing(Loop._collect, share)  # type: ignore[method-assign]  # that is the purpose
    elif fault == "nan":
        Loop._take = without_numbers(Loop._take, share)  # type: ignore[method-assign]  # that is the purpose
    else:
        sys.exit(f"The fault is {fault!r}; expected dispatch, read or nan.")


if __name__ == "__main__":
    break_engine(sys.argv[1], float(sys.argv[2]))
    sys.exit(main(["serve", *sys.argv[3:]]))
