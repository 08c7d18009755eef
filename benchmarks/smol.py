"""The smol model beside PyTorch: image encode, prefill, decode and train step, in float32 on two threads of one CPU.

    pip install -e ".[parity]"
    python benchmarks/smol.py [--rows encode_1 decode_64 ...] [--rounds 9] [--out benchmarks/results/smol.json]

Both sides have the same weights and the same inputs, run in one process and take turns, round after round; before a row
is timed, its numbers must agree. A round calls each side once untimed (the other side emptied the caches) and then for
about a second; its value is the median of those calls. Reported are the medians over the rounds and
ratio = torch time / our time: above 1 we are faster.

Ours is what the product runs: `Engine.encode_images`, `Engine.stream` (with its padding and its bookkeeping) and the
train step of `train.py`. Theirs (`smol_torch.py`) is `transformers` as it comes, without `torch.compile`; of its two
caches each row counts the faster one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.projection import read_projection
from minigpt4_jax.config import OptimizerConfig
from minigpt4_jax.conversation import Conversation
from minigpt4_jax.data.prompts import get_template
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.sampling import GREEDY
from minigpt4_jax.loading import load_frozen, shipped_projection
from minigpt4_jax.models.layout import DISK, TRAIN, convert_layout
from minigpt4_jax.models.minigpt4 import apply_method, make_model
from minigpt4_jax.presets import get_preset
from minigpt4_jax.training.optimizer import make_optimizer
from minigpt4_jax.training.state import TrainBatch, init_state
from minigpt4_jax.training.step import make_train_step

THREADS = 2
CONTEXT = 1024
NEW_TOKENS = 16
TOLERANCE = 1e-3
ROUND_S = 1.0
PRESET = get_preset("smol")
TEXT = (
    "The lighthouse stood at the end of the pier, white against the grey of the sea. Every evening at half past six an "
    "old man climbed its steps, lit the lamp, and wrote the weather into a book: wind from the north-west, waves of "
    "two metres, visibility good. In all those years he had never missed an evening, and the captains knew it. "
) * 8

Timed = Callable[[], float]
"""Runs a side once; returns the seconds of its timed part."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    units: int
    """Pictures, tokens or steps in one call; times are reported for one of them."""
    difference: float
    """Largest difference between the sides over the largest value, as found before timing."""
    ours: Timed
    theirs: dict[str, Timed]
    """By variant; the fastest one counts."""


def whole_call(call: Callable[[], Any]) -> Timed:
    """Times all of `call`."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timed


def require_agreement(what: str, found: Any, expected: Any) -> float:
    """The largest difference over the largest expected value. Ends the program where it is more than the tolerance."""
    wide = np.asarray(expected, np.float64)
    difference = float(np.abs(np.asarray(found) - wide).max() / np.abs(wide).max())
    if not difference <= TOLERANCE:
        raise SystemExit(
            f"{what}: the sides differ by {difference:.2e} of the largest value; expected at most {TOLERANCE}. Nothing "
            "was timed: first find out which side is wrong."
        )
    return difference


class Bench:
    """The weights, once, and what the rows are made of."""

    def __init__(self) -> None:
        frozen, self.tokenizer = load_frozen("smol")
        projection, _ = read_projection(shipped_projection("smol"), PRESET.model)
        self.params = {**frozen, "llama_proj": projection}
        self.engine = Engine(self.params, PRESET.model, dtype=jnp.float32, context=CONTEXT)
        size = PRESET.model.vit.image_size
        shape = (8, size, size, 3)
        self.images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        self.rows_of_image = self.engine.encode_images(self.images[:1])[0]

    @functools.cached_property
    def llama(self) -> Any:
        """The language model of the other side."""
        from smol_torch import LlamaTwin

        return LlamaTwin(self.params, PRESET.model, context=CONTEXT)

    def prompt(self, length: int) -> list[int]:
        """Ids of a chat about one picture, with so much text before it that there are `length` of them (0: none)."""
        chat: Conversation[Any] = Conversation(
            get_template(PRESET.template),
            self.tokenizer,
            num_image_tokens=PRESET.model.num_image_tokens,
            context=CONTEXT,
        )
        chat.add_image(None)
        ids = chat.ask("What is this?")
        return [*self.tokenizer.encode(TEXT)[: max(0, length - len(ids))], *ids]


def encode_row(bench: Bench, batch: int) -> Row:
    """Pictures to image embeddings."""
    from smol_torch import ImageTwin

    images = bench.images[:batch]
    encode = ImageTwin(bench.params, PRESET.model).encoder(images)
    return Row(
        what=f"image encode, batch {batch}: ms per picture",
        units=batch,
        difference=require_agreement("image encode", bench.engine.encode_images(images), encode()),
        ours=whole_call(lambda: bench.engine.encode_images(images)),
        theirs={"sdpa": whole_call(encode)},
    )


def logits(bench: Bench, ids: Sequence[int]) -> np.ndarray:
    """Our logits at every position of a prompt with the picture, `[S, V]`, without a cache."""
    model = make_model(PRESET.model, layout=DISK, dtype=jnp.float32)

    @jax.jit
    def whole(params: Any, token_ids: jax.Array, image_embeds: jax.Array) -> jax.Array:
        positions = jnp.arange(token_ids.shape[1])[None]
        hidden, _, _ = apply_method(
            model, params, "decode",
            apply_method(model, params, "embed_prompt", token_ids, image_embeds),
            positions=positions, mask=positions[:, :, None] >= positions[:, None], caches=None,
        )  # fmt: skip
        return apply_method(model, params, "head", hidden)[0]

    llama = {"llama": bench.params["llama"]}
    return np.asarray(whole(llama, jnp.asarray([ids], jnp.int32), bench.rows_of_image[None]))


def generation_row(bench: Bench, length: int, *, prefill: bool) -> Row:
    """The first token of an answer (`prefill`), or the tokens after it; the prompt has `length` tokens at least.

    Agreement: the logits of the prompt; and every token of our engine has, in the other side's logits for the same
    text, the largest one, up to the tolerance.
    """
    ids = bench.prompt(length)
    steps = 0 if prefill else NEW_TOKENS

    def our_stream() -> Iterator[int]:
        return bench.engine.stream(
            ids, bench.rows_of_image, max_new_tokens=NEW_TOKENS + 1, stop_tokens=(), sampling=GREEDY
        )  # fmt: skip

    def timed(stream: Callable[[], Iterator[int]]) -> float:
        start = time.perf_counter()
        tokens = stream()
        next(tokens)
        if steps:
            start = time.perf_counter()
            for _ in range(steps):
                next(tokens)
        return time.perf_counter() - start

    chosen = list(our_stream())
    their_logits = bench.llama.logits([*ids, *chosen], bench.rows_of_image)
    difference = require_agreement("prompt", logits(bench, ids), their_logits[: len(ids)])
    at_answer = their_logits[len(ids) - 1 : -1]
    require_agreement("greedy tokens", at_answer[np.arange(len(chosen)), chosen], at_answer.max(1))
    return Row(
        what=f"prefill, {len(ids)} tokens: ms"
        if prefill
        else f"decode at {len(ids)} to {len(ids) + steps} tokens: ms per token",
        units=max(1, steps),
        difference=difference,
        ours=functools.partial(timed, our_stream),
        theirs={
            cache: functools.partial(
                timed, functools.partial(bench.llama.stream, ids, bench.rows_of_image, cache=cache)
            )
            for cache in ("dynamic", "static")
        },
    )


def train_row(bench: Bench, length: int, num_targets: int) -> Row:
    """One AdamW step of the projection, 16 rows of `length` tokens without padding, the last `num_targets` count.

    Agreement: the losses of three steps, of which the later ones depend on the gradient and on the optimizer.
    """
    config = PRESET.model
    # So small a rate that the third loss is no chaos: Adam's first steps have one length for every weight.
    optimizer = OptimizerConfig(init_lr=1e-6, min_lr=1e-6, warmup_steps=0)
    rng = np.random.default_rng(length)
    ids = rng.integers(0, config.llama.vocab_size, (16, length), np.int32)
    ids[:, : config.num_image_tokens] = -1
    places = np.broadcast_to(
        np.arange(length - num_targets, length, dtype=np.int32), (16, num_targets)
    )
    tower = make_model(config, layout=DISK, dtype=jnp.float32)
    encode = jax.jit(lambda params, x: apply_method(tower, params, "encode_vision", x)[0])
    vision = {name: bench.params[name] for name in config.vision_parts}
    batch = {
        "token_ids": ids,
        "attention_mask": np.ones(ids.shape, bool),
        "target_positions": places - 1,
        "target_ids": np.take_along_axis(ids, places, axis=1),
        "target_mask": np.ones(places.shape, bool),
        "features": np.tile(np.asarray(encode(vision, bench.images)), (2, 1, 1)),
    }
    tx = make_optimizer(optimizer)
    model = make_model(config, layout=TRAIN, dtype=jnp.float32)
    train_step = jax.jit(make_train_step(model, tx), donate_argnums=0)
    llama = convert_layout(bench.params["llama"], DISK, TRAIN, llama=config.llama)
    frozen = {"llama": jax.tree.map(jnp.asarray, llama)}
    on_device = TrainBatch(**{name: jnp.asarray(array) for name, array in batch.items()})
    state = init_state(jax.tree.map(jnp.array, bench.params["llama_proj"]), tx)

    def our_step() -> float:
        nonlocal state
        state, numbers = train_step(state, frozen, on_device)
        return float(numbers.loss)

    their_step = bench.llama.train_step(bench.params["llama_proj"], batch, optimizer)
    losses = [(our_step(), their_step()) for _ in range(3)]
    ours, theirs = zip(*losses, strict=True)
    if not max(theirs) - min(theirs) > 3 * TOLERANCE * max(theirs):
        raise SystemExit(f"train step: the losses {theirs} hardly move, so they show nothing.")
    return Row(
        what=f"train step, batch 16 x {length} tokens, {num_targets} targets each: ms",
        units=1,
        difference=require_agreement("train step", ours, theirs),
        ours=whole_call(our_step),
        theirs={"adamw": whole_call(their_step)},
    )


ROWS: dict[str, Callable[[Bench], Row]] = {
    "encode_1": lambda bench: encode_row(bench, 1),
    "encode_8": lambda bench: encode_row(bench, 8),
    "prefill_chat": lambda bench: generation_row(bench, 0, prefill=True),
    "prefill_chat_256": lambda bench: generation_row(bench, len(bench.prompt(0)) + 256, prefill=True),
    "decode_64": lambda bench: generation_row(bench, 56, prefill=False),
    "decode_512": lambda bench: generation_row(bench, 504, prefill=False),
    "train_36": lambda bench: train_row(bench, 36, 8),
    "train_96": lambda bench: train_row(bench, 96, 64),
}  # fmt: skip


def measure(row: Row, rounds: int) -> dict[str, Any]:
    """Runs the sides in turns; the order changes every round."""
    sides = {"ours": row.ours, **row.theirs}
    medians: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        for name in names:
            sides[name]()
            samples: list[float] = []
            end = time.perf_counter() + ROUND_S
            while time.perf_counter() < end or not samples:
                samples.append(sides[name]())
            medians[name].append(1000 * statistics.median(samples) / row.units)
    return summary(medians) | {
        "what": row.what,
        "difference": float(f"{row.difference:.1e}"),
        "load_after": round(os.getloadavg()[0], 2),
    }


def summary(medians: dict[str, list[float]]) -> dict[str, Any]:
    """The row of the table from each side's milliseconds, one per round: `ours`, and the variants of torch."""
    middle = {name: statistics.median(values) for name, values in medians.items()}
    best = min((name for name in middle if name != "ours"), key=middle.__getitem__)
    ratios = [t / o for o, t in zip(medians["ours"], medians[best], strict=True)]
    return {
        "ratio": round(middle[best] / middle["ours"], 3),
        "ratio_of_rounds": [round(min(ratios), 3), round(max(ratios), 3)],
        "torch_variant": best,
        "ms": {name: round(value, 3) for name, value in middle.items()},
        "ms_of_rounds": {
            name: [round(min(values), 3), round(max(values), 3)] for name, values in medians.items()
        },
    }


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
    }


def use_two_threads() -> None:
    """Pins the process to two cores, before JAX sizes its pool by them, so that both sides have the same ones."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    os.environ["NPROC"] = str(THREADS)


def main() -> None:
    """Runs the benchmark; prints every row and writes the JSON as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    use_two_threads()
    jax.config.update("jax_platforms", "cpu")
    try:
        import smol_torch
    except ModuleNotFoundError as error:
        raise SystemExit(
            f'{error.name} is not installed; expected torch and transformers. Run pip install -e ".[parity]".'
        ) from error
    smol_torch.use_threads(THREADS)
    result: dict[str, Any] = {"hardware": hardware() | smol_torch.VERSIONS, "rounds": args.rounds}
    result["rows"] = {}
    bench = Bench()
    for name in args.rows:
        row = result["rows"][name] = measure(ROWS[name](bench), args.rounds)
        times = ", ".join(f"{side} {value:.2f}" for side, value in row["ms"].items())
        low, high = row["ratio_of_rounds"]
        print(
            f"{name:17} {row['ratio']:5.2f} ({low:.2f} to {high:.2f})  {times}  [{row['what']}]",
            flush=True,
        )
        if args.out:
            beside = args.out.with_suffix(".tmp")
            beside.write_text(json.dumps(result, indent=1) + "\n")
            os.replace(beside, args.out)


if __name__ == "__main__":
    main()
