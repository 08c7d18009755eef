"""What the GPU rows of one process share: sizes, random weights, the engine, and what the card can do.

For: `inference_gpu.py`. Not for: what is measured. At `TINY` sizes it runs on a CPU, in tests.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ceilings import matmul_flop_per_s, time_calls
from full_size import abstract_params_in, random_params

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.models.layout import DECODE, DECODE_INT8, Layout
from minigpt4_jax.models.minigpt4 import Params
from minigpt4_jax.presets import get_preset

REPEATS = 5
"""Times of a row; the median is reported."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is."""

    models: dict[str, str]
    """Name in the rows -> preset."""
    dtype: str
    context: int
    steps: int
    batches: dict[str, int]
    prefill: dict[str, int]
    images: dict[str, int]
    prompt: int
    """Tokens of a first turn with one picture."""
    copied_bytes: int
    matmul: int
    """Rows and columns of the square matmul that stands for the card's peak."""


FULL = Sizes(
    models={"7b": "vicuna-7b", "13b": "vicuna-13b"},
    dtype="bfloat16",
    context=512,
    steps=64,
    batches={"b1": 1, "b8": 8, "b64": 64},
    prefill={"128": 128, "512": 512, "1024": 1024},
    images={"1": 1, "16": 16},
    prompt=110,
    copied_bytes=4 * 2**30,
    matmul=8192,
)
TINY = Sizes(
    models={"7b": "tiny-qformer", "13b": "tiny-qformer"},
    dtype="float32",
    context=64,
    steps=4,
    batches={"b1": 1, "b8": 2, "b64": 3},
    prefill={"128": 8, "512": 16, "1024": 32},
    images={"1": 1, "16": 2},
    prompt=12,
    copied_bytes=2**16,
    matmul=64,
)
"""For tests: every row in seconds on a CPU."""
SIZES = {"full": FULL, "tiny": TINY}

WEIGHTS: dict[str, tuple[Layout, str | None]] = {
    "bf16": (DECODE, None),
    "int8": (DECODE_INT8, None),
    "int8kv": (DECODE_INT8, "int8"),
}
"""Name in the rows -> layout of the weights, dtype of the cache (None: the compute dtype)."""


class Host:
    """What the rows of one process share. Only the newest engine is kept: its cache may be a third of the memory."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.dtype = jnp.dtype(sizes.dtype)
        self.rng = np.random.default_rng(0)
        self._engine: tuple[Any, Engine] | None = None

    @functools.cached_property
    def ceilings(self) -> dict[str, float]:
        """What the device can do: `bytes_per_s` of a copy, read and written bytes both; `flop_per_s` of a matmul."""
        flop_per_s = matmul_flop_per_s(self.sizes.matmul, self.dtype, repeats=REPEATS)
        block = jax.random.bits(jax.random.key(0), (self.sizes.copied_bytes // 4,), jnp.uint32)
        copy = jax.jit(lambda x: x ^ jnp.uint32(1))  # a plain copy might be left out
        bytes_per_s = 2 * block.size * 4 / self.time(lambda: copy(block), calls=5)
        return {"bytes_per_s": bytes_per_s, "flop_per_s": flop_per_s}

    def time(self, call: Callable[[], Any], *, calls: int) -> float:
        """As `time_calls`."""
        return time_calls(call, calls=calls, repeats=REPEATS)

    def config(self, model: str) -> ModelConfig:
        """Sizes of the model that a row names."""
        return get_preset(self.sizes.models[model]).model

    @functools.cache  # noqa: B019 # a host lives as long as its process
    def params(self, model: str, layout: Layout) -> Params:
        """Random weights on the device."""
        return random_params(abstract_params_in(self.config(model), layout, self.dtype))

    def engine(self, model: str, weights: str, *, num_slots: int) -> Engine:
        """The engine of one kind of weights, with so many slots."""
        key = (model, weights, num_slots)
        if self._engine is None or self._engine[0] != key:
            self._engine = None  # frees its cache first
            layout, cache = WEIGHTS[weights]
            engine = Engine(
                self.params(model, layout), self.config(model), dtype=self.dtype,
                context=self.sizes.context, num_slots=num_slots, layout=layout,
                cache_dtype=jnp.dtype(cache) if cache else None,
            )  # fmt: skip
            self._engine = (key, engine)
        return self._engine[1]

    def ids(self, model: str, length: int) -> list[int]:
        """Random ids: no prompt begins as another does."""
        return self.rng.integers(3, self.config(model).llama.vocab_size, length).tolist()

    def pictures(self, model: str, count: int) -> np.ndarray:
        """Random pictures, normalised."""
        size = self.config(model).vit.image_size
        return self.rng.normal(size=(count, size, size, 3)).astype(np.float32)
