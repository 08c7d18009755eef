"""The rows of `inference.py` on a GPU host: 7B and 13B shapes with random weights, through our engine.

    python benchmarks/inference_gpu.py --rows decode_7b_bf16_b1 ...   # started by `inference.py`, a part at a time

Every part runs in a process of its own, so that it has the memory for itself and may have XLA flags of its own; it
prints a line `ROW NAME {json}` as soon as a row is measured. Weights are made on the device (`full_size.py`).

Each time is set against what the card can do, measured in the same process: a decode step against the bytes that it
must read (weights and filled cache) at the bandwidth of a device copy, a prefill against its multiplications at the
speed of a large bfloat16 matmul. Imports nothing but the models, the generation and the sharding of the package.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import parts
from engine_side import decode_s, encode_s, picture_to_token_s, room
from full_size import matmul_weights, streamed_bytes, tree_bytes
from gpu_host import REPEATS, SIZES, WEIGHTS, Host
from hlo_report import report
from parts import Spec

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.generation.decode import decode_step, prefill
from minigpt4_jax.generation.programs import compile_program
from minigpt4_jax.generation.requests import Request
from minigpt4_jax.generation.state import SlotState, init_state
from minigpt4_jax.gpu_memory import take_gpu_memory
from minigpt4_jax.models.kv_cache import init_cache
from minigpt4_jax.models.minigpt4 import make_model

GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE,CONDITIONAL"
SETTINGS = {
    "default": "",
    "all_graphs": f"--xla_gpu_enable_command_buffer={GRAPHS}",
    "no_graphs": "--xla_gpu_enable_command_buffer=",
}
"""What may become a CUDA graph: XLA's default, everything but collectives, nothing."""


def decode_row(host: Host, *, model: str, weights: str, batch: str) -> dict[str, Any]:
    """Steps of the engine with every slot taken, up to a full context, as a share of the memory roofline.

    All answers go on from one prompt, which is read once and copied into every slot: a step costs the same.
    """
    slots, steps = host.sizes.batches[batch], host.sizes.steps
    engine = host.engine(model, weights, num_slots=slots)
    tokens = room(steps, apart=1)
    times, filled = [], 0.0
    for number in range(1 + REPEATS):
        prompt = host.ids(model, host.sizes.context - tokens)
        running = engine.submit(Request(prompt=prompt, max_new_tokens=tokens), count=slots)
        seconds, filled = decode_s(engine, running, steps=steps)
        times += [seconds / steps] if number else []
    layout, cache = WEIGHTS[weights]
    weight_bytes = streamed_bytes(host.params(model, layout))
    cache_bytes = round(slots * filled * _cache_bytes(host.config(model), cache or host.dtype))
    step_s = statistics.median(times)
    return {
        "what": f"decode, {model.upper()} {weights}, batch {slots}, context {host.sizes.context}: tokens per s",
        "tokens_per_s": round(slots / step_s, 2),
        "ms": round(1000 * step_s, 4),
        "ms_of_repeats": [round(1000 * min(times), 4), round(1000 * max(times), 4)],
        "weight_bytes": weight_bytes,
        "cache_bytes": cache_bytes,
        "filled": round(filled, 1),
        "share_of_roofline": _share(weight_bytes + cache_bytes, host.ceilings["bytes_per_s"], step_s),
    }  # fmt: skip


def prefill_row(host: Host, *, model: str, weights: str, length: str) -> dict[str, Any]:
    """One prompt through `prefill`, as a share of the matmul peak. Counted: what the layers must multiply, the scores
    and values below the diagonal, one row of the head."""
    layout, cache = WEIGHTS[weights]
    config, tokens = host.config(model), host.sizes.prefill[length]
    llama, params = config.llama, host.params(model, layout)
    network = make_model(config, layout=layout, dtype=host.dtype)
    run = jax.jit(
        functools.partial(
            prefill, model=network, cache_dtype=jnp.dtype(cache) if cache else host.dtype
        )
    )
    ids = jnp.asarray([host.ids(model, tokens)], jnp.int32)
    images = jnp.zeros((1, config.num_image_tokens, llama.width), host.dtype)
    lengths = jnp.asarray([tokens], jnp.int32)
    seconds = host.time(lambda: run(params, ids, images, lengths).logits, calls=5)
    attention = 2 * tokens**2 * llama.num_heads * llama.head_dim * llama.num_layers
    flop = 2 * matmul_weights(params) * tokens + attention + 2 * llama.width * llama.vocab_size
    return {
        "what": f"prefill, {model.upper()} {weights}, {tokens} tokens: ms",
        "ms": round(1000 * seconds, 3),
        "share_of_peak": _share(flop, host.ceilings["flop_per_s"], seconds),
    }


def images_row(host: Host, *, model: str, count: str) -> dict[str, Any]:
    """Pictures from the host to embeddings on the device."""
    pictures = host.pictures(model, host.sizes.images[count])
    engine = host.engine(model, "bf16", num_slots=1)
    times = [encode_s(engine, pictures) for _ in range(1 + REPEATS)][1:]
    seconds = statistics.median(times)
    return {
        "what": f"image encode, batch {len(pictures)}: pictures per s",
        "images_per_s": round(len(pictures) / seconds, 1),
        "ms": round(1000 * seconds, 3),
        "ms_of_repeats": [round(1000 * min(times), 3), round(1000 * max(times), 3)],
    }


def first_token_row(host: Host, *, model: str) -> dict[str, Any]:
    """One picture and a prompt to the first token, with nothing else running."""
    engine = host.engine(model, "bf16", num_slots=1)
    slots = [IMAGE_TOKEN_ID] * host.config(model).num_image_tokens
    times = []
    for _ in range(2 + REPEATS):
        text = host.ids(model, host.sizes.prompt - len(slots))
        prompt = [*text[:2], *slots, *text[2:]]
        times.append(picture_to_token_s(engine, host.pictures(model, 1), prompt))
    times = times[2:]
    return {
        "what": f"time to first token, {model.upper()} bf16, picture and {host.sizes.prompt} tokens: ms",
        "ms": round(1000 * statistics.median(times), 3),
        "ms_of_repeats": [round(1000 * min(times), 3), round(1000 * max(times), 3)],
    }


def settings_row(host: Host, *, flags: str) -> dict[str, Any]:
    """`decode_step` alone, without the engine around it, and what XLA made of it, under the flags of this process."""
    found = {}
    for weights, batch in (("bf16", "b1"), ("bf16", "b64"), ("int8", "b1"), ("int8kv", "b64")):
        found[f"{weights}_{batch}"] = _bare_step(host, weights, host.sizes.batches[batch])
    return {
        "what": f"bare decode step, 7B, command buffers: {flags}",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "steps": found,
    }


def _bare_step(host: Host, weights: str, batch: int) -> dict[str, Any]:
    layout, cache = WEIGHTS[weights]
    config, places = host.config("7b"), host.sizes.context
    params = host.params("7b", layout)
    network = make_model(config, layout=layout, dtype=host.dtype)
    step = functools.partial(decode_step, model=network, rows=batch, places=places, plain=True)
    state = _full_slots(host, config, batch, cache)
    alive = jnp.ones(batch, bool)
    program = compile_program(step, (params, state, alive), donate=(1,))  # as the engine does
    start_at = state.position
    times = []
    for _ in range(1 + REPEATS):
        state = dataclasses.replace(state, position=start_at + 0)
        jax.block_until_ready(state)
        start = time.perf_counter()
        for _ in range(host.sizes.steps):
            state, chosen = program(params, state, alive)
        jax.block_until_ready(chosen)
        times.append((time.perf_counter() - start) / host.sizes.steps)
    memory = program.compiled.memory_analysis()
    leaves = jax.tree.leaves(params["llama"]["layers"])
    return {
        "ms": round(1000 * statistics.median(times[1:]), 4),
        "alias_bytes": memory.alias_size_in_bytes,
        "cache_bytes": tree_bytes(state.caches),
        "temp_bytes": memory.temp_size_in_bytes,
        **report(
            program.compiled.as_text(),
            num_layers=config.llama.num_layers,
            cache_shape=max(jax.tree.leaves(state.caches), key=lambda leaf: leaf.size).shape,
            weight_elements=min(leaf.size for leaf in leaves if leaf.ndim == 2),
        ),
    }


def _full_slots(host: Host, config: ModelConfig, batch: int, cache: str | None) -> SlotState:
    """Every slot active, `steps` before a full context."""
    dtype = jnp.dtype(cache) if cache else host.dtype
    state = init_state(config.llama, batch, capacity=host.sizes.context + 1, dtype=dtype)
    left = jnp.full(batch, 2**30, jnp.int32)
    return dataclasses.replace(
        state,
        active=jnp.ones(batch, bool),
        position=jnp.full(batch, host.sizes.context - host.sizes.steps - 1, jnp.int32),
        settings=dataclasses.replace(state.settings, left=left),
    )


def _cache_bytes(config: ModelConfig, dtype: Any) -> float:
    """Bytes of cache for one token of one row, scales included."""
    places = 8
    leaves = jax.eval_shape(
        lambda: jax.tree.leaves(
            init_cache(config.llama, 1, capacity=places, dtype=jnp.dtype(dtype))
        )
    )
    return tree_bytes(leaves) / places


def _share(amount: float, per_s: float, seconds: float) -> float:
    return float(f"{amount / per_s / seconds:.3g}")


_spec = functools.partial(Spec, script="inference_gpu.py")


def _decode(model: str, weights: str, batch: str) -> tuple[str, Spec]:
    measure = functools.partial(decode_row, model=model, weights=weights, batch=batch)
    return f"decode_{model}_{weights}_{batch}", _spec(part=model, seconds=60, measure=measure)


def _prefill(model: str, length: str) -> tuple[str, Spec]:
    measure = functools.partial(prefill_row, model=model, weights="bf16", length=length)
    return f"prefill_{model}_bf16_{length}", _spec(part=model, seconds=30, measure=measure)


def _first_token(model: str) -> tuple[str, Spec]:
    measure = functools.partial(first_token_row, model=model)
    return f"first_token_{model}", _spec(part=model, seconds=45, measure=measure)


def _images(count: str) -> tuple[str, Spec]:
    measure = functools.partial(images_row, model="7b", count=count)
    return f"images_{count}", _spec(part="7b", seconds=25, measure=measure)


def _torch(kind: str, batch: str) -> tuple[str, Spec]:
    seconds = {"eager": 60, "compiled": 120}[kind]
    spec = Spec(part=f"torch {kind}", seconds=seconds, script="full_size_torch.py", measure=None)
    return f"torch_7b_{kind}_{batch}", spec


ROWS: dict[str, Spec] = dict(
    [
        *(
            (
                f"settings_{name}",
                _spec(
                    part=f"settings {name}",
                    seconds=110,
                    measure=functools.partial(settings_row, flags=name),
                    xla_flags=flags,
                ),
            )
            for name, flags in SETTINGS.items()
        ),
        _decode("7b", "bf16", "b1"), _decode("7b", "int8", "b1"),
        _decode("7b", "bf16", "b64"), _decode("7b", "int8kv", "b64"),
        _first_token("7b"), _prefill("7b", "512"), _images("16"),
        _decode("13b", "bf16", "b1"), _decode("13b", "int8", "b1"),
        _torch("compiled", "b1"), _torch("eager", "b1"),
        _decode("13b", "bf16", "b64"), _decode("13b", "int8kv", "b64"), _first_token("13b"),
        _torch("compiled", "b64"), _torch("eager", "b64"),
        _prefill("7b", "1024"), _prefill("7b", "128"), _images("1"),
        _decode("7b", "bf16", "b8"), _decode("7b", "int8", "b8"), _decode("7b", "int8kv", "b8"),
        _decode("7b", "int8kv", "b1"), _decode("7b", "int8", "b64"),
        _prefill("13b", "512"), _prefill("13b", "128"), _prefill("13b", "1024"),
        _decode("13b", "bf16", "b8"), _decode("13b", "int8", "b8"), _decode("13b", "int8kv", "b8"),
        _decode("13b", "int8kv", "b1"), _decode("13b", "int8", "b64"),
        _torch("compiled", "b8"), _torch("eager", "b8"),
    ]
)  # fmt: skip
"""In the order of their value."""


def main() -> None:
    """Measures the rows that are named and prints them, one line each."""
    args = parts.read_part_arguments(__doc__.split("\n\n")[0], rows=list(ROWS), sizes=list(SIZES))
    take_gpu_memory()
    host = Host(SIZES[args.sizes])
    ceilings = host.ceilings  # before weights and caches take the memory
    for name, row in parts.measure_rows(ROWS, args.rows, host, budget_s=args.budget_s):
        parts.print_row(name, row if "error" in row else row | ceilings)


if __name__ == "__main__":
    main()
