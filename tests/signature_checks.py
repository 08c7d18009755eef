"""Switching the checks of annotated signatures off where JAX puts something else than arrays into our dataclasses."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jaxtyping


@contextlib.contextmanager
def without_signature_checks() -> Iterator[None]:
    """For `jit(...).lower`, which rebuilds its arguments from abstract values, and for trees of shardings."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
