"""Where a run's frozen weights come from: what they are, and any part of them straight onto the devices.

For: the protocol that training asks, and its form over a tree in memory. The form over a model folder is
`loading.FrozenFolder`. Not for: reading files.

Differs from the original, where every process loads the whole model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.typing import DTypeLike

from minigpt4_jax.checkpoint import leaf_names
from minigpt4_jax.config import LlamaConfig
from minigpt4_jax.models.layout import DISK, Layout, convert_layout
from minigpt4_jax.models.minigpt4 import Params

Place = Callable[[Params], Any]
"""A tree of anything with a `.shape` -> its shardings: one for all leaves, or a tree like it."""


@runtime_checkable  # so that tests can check signatures
class FrozenWeights(Protocol):
    """All parameters of a model but `llama_proj`, wherever they are kept."""

    def fingerprints(self) -> dict[str, str]:
        """Part (`vit`, `llama`, ...) -> digest of its weights, without reading them all."""

    def load(
        self, parts: Collection[str], *, layout: Layout, dtype: DTypeLike, place: Place
    ) -> Params:
        """Some parts on devices, in `layout`, as `dtype`; a process reads what its own devices hold."""

    def read(self, name: str) -> np.ndarray:
        """One parameter on the host as it is stored, by its path in the layout `DISK`."""


class FrozenArrays:
    """`FrozenWeights` over a tree of arrays in the layout `DISK`."""

    def __init__(self, params: Params, *, llama: LlamaConfig) -> None:
        self._params, self._llama = params, llama

    def fingerprints(self) -> dict[str, str]:
        """See `FrozenWeights`."""
        return {part: hash_tree(tree) for part, tree in self._params.items()}

    def load(
        self, parts: Collection[str], *, layout: Layout, dtype: DTypeLike, place: Place
    ) -> Params:
        """See `FrozenWeights`."""
        chosen = {part: self._params[part] for part in parts}
        tree = convert_layout(chosen, DISK, layout, llama=self._llama)
        shardings = place(tree)
        if isinstance(shardings, jax.sharding.Sharding):
            shardings = jax.tree.map(lambda _: shardings, tree)

        def put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
            values = np.asarray(leaf)
            return jax.make_array_from_callback(
                values.shape, sharding, lambda index: values[index].astype(dtype)
            )

        placed: Params = jax.tree.map(put, tree, shardings)
        return placed

    def read(self, name: str) -> np.ndarray:
        """See `FrozenWeights`."""
        return np.asarray(leaf_names(self._params)[name])


def hash_tree(tree: Any) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of all leaves."""
    digest = hashlib.sha256()
    for name, leaf in sorted(leaf_names(tree).items()):
        values = np.asarray(leaf)
        digest.update(f"{name} {values.dtype} {values.shape};".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
