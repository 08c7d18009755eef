"""Blocks one after the other, or a scan over stacked ones? One decode step in both forms, in turns, as a ratio.

    python benchmarks/decode_layout.py [--preset smol] [--batches 1 8] [--out benchmarks/results/decode_layout.json]
    python benchmarks/decode_layout.py --preset vicuna-7b --dtype bfloat16 --batches 1 64     # on a GPU

Unrolled is what the package does: one sub-tree and one cache per layer. The scan, which lives in this file only, runs
the same `Block` over weights with a leading layer axis; all layers' caches are the carry of the loop, so that nothing
is copied, and a token is written at (layer, row, place): `scan` scatters as `LayerCache` does, `scan_slice` writes one
slice for all rows at once, which works only while all rows stand at the same place. Random weights; the logits of both
sides must agree before anything is timed. ratio = time of the faster scan / time unrolled.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import measuring
from full_size import abstract_params_in, random_params
from measuring import Row

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.models.attention import make_cache_mask
from minigpt4_jax.models.kv_cache import KVCache, LayerCache, init_cache
from minigpt4_jax.models.layers import RMSNorm
from minigpt4_jax.models.layout import DECODE
from minigpt4_jax.models.llama import Block
from minigpt4_jax.models.minigpt4 import MiniGPT4, Params, apply_method, make_model
from minigpt4_jax.presets import get_preset

TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2}
"""Largest difference of the logits over the largest one: rounding, 30 layers deep."""
PLACES = 512
STEPS = 32


Caches = tuple[jax.Array, jax.Array]
"""Keys `[L, B, K, H, S]` and values `[L, B, K, S, H]` of all layers: the carry of the scan."""


@flax.struct.dataclass
class StackedCache(LayerCache):
    """One layer of the caches of all: what a block of the scan takes for its cache."""

    layer: jax.Array | None = None

    def update(
        self, k: jax.Array, v: jax.Array, positions: jax.Array, *, length: int
    ) -> StackedCache:
        """Scatters one token per row to the row's own place."""
        del length  # for TPUs
        rows, places = jnp.arange(k.shape[0]), positions[:, 0]
        return self.replace(
            k=self.k.at[self.layer, rows, :, :, places].set(k[:, 0].astype(self.k.dtype)),
            v=self.v.at[self.layer, rows, :, places].set(v[:, 0].astype(self.v.dtype)),
        )

    def read(self, rows: int, length: int) -> tuple[jax.Array, jax.Array]:
        """As `LayerCache.read`, of the layer."""
        _, _, heads, head_dim, _ = self.k.shape
        start = (self.layer, 0, 0, 0, 0)
        k = jax.lax.dynamic_slice(self.k, start, (1, rows, heads, head_dim, length))[0]
        v = jax.lax.dynamic_slice(self.v, start, (1, rows, heads, length, head_dim))[0]
        return k.transpose(0, 3, 1, 2), v.transpose(0, 2, 1, 3)


@flax.struct.dataclass
class SliceCache(StackedCache):
    """The same, where all rows write to one place."""

    def update(
        self, k: jax.Array, v: jax.Array, positions: jax.Array, *, length: int
    ) -> SliceCache:
        """Writes all rows as one slice, at the place of the first."""
        del length  # for TPUs
        place = positions[0, 0]
        k = k[None].transpose(0, 1, 3, 4, 2).astype(self.k.dtype)
        v = v[None].transpose(0, 1, 3, 2, 4).astype(self.v.dtype)
        write = jax.lax.dynamic_update_slice
        return self.replace(
            k=write(self.k, k, (self.layer, 0, 0, 0, place)),
            v=write(self.v, v, (self.layer, 0, 0, place, 0)),
        )


def unrolled_step(
    params: Params,
    caches: KVCache,
    token: jax.Array,
    position: jax.Array,
    *,
    model: MiniGPT4,
    places: int,
) -> tuple[KVCache, jax.Array, jax.Array, jax.Array]:
    """One greedy step as the package runs it. Returns the caches, the next tokens, their positions, the logits."""
    embeds = apply_method(model, params, "embed_prompt", token[:, None], None)
    hidden, caches, _ = apply_method(
        model, params, "decode", embeds,
        positions=position[:, None], mask=make_cache_mask(position[:, None], places), caches=caches,
    )  # fmt: skip
    logits = apply_method(model, params, "head", hidden[:, 0])
    return caches, jnp.argmax(logits, -1).astype(jnp.int32), position + 1, logits


def scan_step(
    params: Params, caches: Caches, token: jax.Array, position: jax.Array,
    *, model: MiniGPT4, places: int, cache_type: type[StackedCache],
) -> tuple[Caches, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The same step as a loop over layers: `params["stacked"]` has their weights, `caches` the caches of all."""
    llama = model.config.llama
    positions, mask = position[:, None], make_cache_mask(position[:, None], places)
    block = Block(llama, model.layout, model.dtype)

    def body(carry: tuple[jax.Array, Caches], layer: tuple[Params, jax.Array]) -> Any:
        x, (k, v) = carry
        weights, number = layer
        cache = cache_type(k=k, v=v, layer=number)
        x, cache = block.apply({"params": weights}, x, cache, positions, mask)
        return (x, (cache.k, cache.v)), None

    x = apply_method(model, params, "embed_prompt", token[:, None], None)
    numbers = jnp.arange(llama.num_layers)
    (x, caches), _ = jax.lax.scan(body, (x, caches), (params["stacked"], numbers))
    norm = RMSNorm(llama.norm_eps, model.dtype)
    hidden = norm.apply({"params": params["llama"]["norm"]}, x)
    logits = apply_method(model, params, "head", hidden[:, 0])
    return caches, jnp.argmax(logits, -1).astype(jnp.int32), position + 1, logits


def stacked_params(params: Params) -> Params:
    """The language model with its layers stacked, beside the parts that are not repeated."""
    layers = params["llama"]["layers"]
    names = sorted(layers, key=int)
    stack = jax.jit(lambda *leaves: jnp.stack(leaves))
    stacked = jax.tree.map(stack, *[layers[name] for name in names])
    return {
        "llama": {k: v for k, v in params["llama"].items() if k != "layers"},
        "stacked": stacked,
    }


class Side:
    """A compiled step with its state, which it donates to itself."""

    def __init__(self, step: Callable[..., Any], params: Params, caches: Any, batch: int) -> None:
        self.params, self.caches, self.batch = params, caches, batch
        self.run = jax.jit(step, donate_argnums=1)

    def start(self, place: int) -> tuple[jax.Array, jax.Array]:
        """Tokens and positions to go on from: every row at `place`."""
        return jnp.arange(1, self.batch + 1, dtype=jnp.int32), jnp.full(
            self.batch, place, jnp.int32
        )

    def steps(self, count: int, *, place: int) -> jax.Array:
        """Runs so many steps, each fed with the token before; returns the last logits, on the device."""
        token, position = self.start(place)
        for _ in range(count):
            self.caches, token, position, logits = self.run(
                self.params, self.caches, token, position
            )
        return logits

    def timed(self, count: int, *, place: int) -> float:
        """Seconds of so many steps; the host waits once, at the end."""
        start = time.perf_counter()
        self.steps(count, place=place).block_until_ready()
        return time.perf_counter() - start


def make_sides(
    config: ModelConfig, params: Params, batch: int, *, dtype: str, places: int
) -> dict[str, Side]:
    """`ours`, `scan` and `scan_slice` over the same weights, each with empty caches of its own."""
    model = make_model(config, layout=DECODE, dtype=jnp.dtype(dtype))
    llama = config.llama
    new_cache = functools.partial(
        init_cache, llama, batch, capacity=places + 1, dtype=jnp.dtype(dtype)
    )
    stacked = stacked_params(params)

    def joint_cache() -> Caches:
        one = new_cache()[0]
        return tuple(jnp.zeros((llama.num_layers, *leaf.shape), dtype) for leaf in (one.k, one.v))

    make = functools.partial(functools.partial, model=model, places=places)
    return {
        "ours": Side(make(unrolled_step), params, new_cache(), batch),
        "scan": Side(make(scan_step, cache_type=StackedCache), stacked, joint_cache(), batch),
        "scan_slice": Side(make(scan_step, cache_type=SliceCache), stacked, joint_cache(), batch),
    }


def layout_row(
    config: ModelConfig, params: Params, batch: int, *, dtype: str, places: int, steps: int
) -> Row:
    """All forms at one batch size, over the last `steps` of `places`."""
    sides = make_sides(config, params, batch, dtype=dtype, places=places)
    # Greedy tokens of bfloat16 may part; the first steps, fed with the same tokens, may not.
    logits = {name: side.steps(1, place=places - steps) for name, side in sides.items()}
    difference = max(
        measuring.require_agreement(name, found, logits["ours"], tolerance=TOLERANCES[dtype])
        for name, found in logits.items()
        if name != "ours"
    )
    timed = {
        name: functools.partial(side.timed, steps, place=places - steps)
        for name, side in sides.items()
    }
    return Row(
        what=f"decode step, batch {batch}, {places} places: ms",
        units=steps,
        difference=difference,
        ours=timed.pop("ours"),
        theirs=timed,
    )


def main() -> None:
    """Runs the comparison; prints every row and writes the JSON as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="smol")
    parser.add_argument("--dtype", default="float32", choices=TOLERANCES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=measuring.ROUNDS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not measuring.gpu_name():
        measuring.use_two_threads()
    config = get_preset(args.preset).model
    head = {"hardware": measuring.hardware(), "preset": args.preset, "dtype": args.dtype}
    results = measuring.Results(args.out, head)
    abstract = abstract_params_in(config, DECODE, args.dtype)
    params = random_params({"llama": abstract["llama"]})
    names = {f"batch_{batch}": batch for batch in args.batches}
    for name in filter(results.missing, names):
        row = measuring.measure(
            layout_row(config, params, names[name], dtype=args.dtype, places=PLACES, steps=STEPS),
            args.rounds,
        )
        print(measuring.one_line(name, row), flush=True)
        results.add(name, row, order=list(names))


if __name__ == "__main__":
    main()
