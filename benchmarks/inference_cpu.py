"""The rows of `inference.py` on a CPU: the smol model through our engine beside `transformers`, in float32.

Not for: the command (`inference.py`), taking turns (`measuring.py`), our clock (`engine_side.py`), the other side's
models (`smol_torch.py`).

Both sides get the same weights, the same pictures as normalised arrays, and the same ids. Before a row is timed they
must agree: embeddings and logits up to rounding, tokens by the logits of the other side. The other side runs as well as
it can here: prompts of one length without padding, a static cache of exactly the places that are needed and the dynamic
one, and for the captions all of them in one batch, which is its fastest (8 and 16 took longer).
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from engine_side import (
    answer_all,
    decode_s,
    encode_s,
    first_token_s,
    on_device,
    picture_to_token_s,
    room,
)
from measuring import Row, Timed, require_agreement, until_stop, whole_call

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Generation, Request
from minigpt4_jax.models.layout import DECODE, DISK
from minigpt4_jax.models.minigpt4 import Params, apply_method, make_model

CACHES = ("dynamic", "static")
OUR_SLOTS = (16, 32)
"""How many captions are written at once: the fastest counts, as on the other side."""
THEIR_BATCHES = (64,)
STEP_SETTINGS = (*CACHES, "static, compiled") if shutil.which("g++") else CACHES
"""Of a single answer's steps; compiling takes a minute and a C++ compiler."""
IN_THE_TOP = 5
"""Where two greedy answers part, each side's token must be among so many likeliest ones: a tie up to rounding."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """The model and what it is asked."""

    config: ModelConfig
    params: Params
    """The layout `DISK`, float32."""
    images: np.ndarray
    """`[64, H, W, 3]`, normalised; eight or more."""
    prompts: list[list[int]]
    """Ids of one question about one picture each, as many as pictures."""
    text: list[int]
    """Ids without pictures, to lengthen prompts with; longer than any prompt."""
    stop_tokens: Collection[int]
    max_new_tokens: int
    """Longest caption."""
    context: int
    prefill: tuple[int, int] = (64, 256)
    decode_steps: int = 32
    said: str = ""
    """Where pictures and questions come from."""


class Bench:
    """The weights, once for each side, and prompts that begin differently every time."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.params = on_device(work.params, DECODE, work.config)
        self._asked = 0

    @functools.cached_property
    def llama(self) -> Any:
        """The other side's language model."""
        from smol_torch import LlamaTwin

        return LlamaTwin(self.work.params, self.work.config)

    @functools.cached_property
    def tower(self) -> Any:
        """The other side's image tower."""
        from smol_torch import ImageTwin

        return ImageTwin(self.work.params, self.work.config)

    @functools.cache  # noqa: B019 # one bench lives as long as the program
    def engine(self, num_slots: int) -> Engine:
        """Ours, with so many slots."""
        work = self.work
        return Engine(
            self.params, work.config, dtype=jnp.float32, context=work.context, num_slots=num_slots
        )

    @functools.cached_property
    def embeds(self) -> np.ndarray:
        """Embeddings of one picture for prompts that are read, `[R, D]`; the same for both sides."""
        return np.asarray(self.engine(1).encode_images(self.work.images[:1])[0], np.float32)

    def prompt(self, length: int) -> list[int]:
        """A prompt of exactly so many ids with one picture, no two of them with one beginning."""
        self._asked += 1
        ids = self.work.prompts[0]
        start = 7 * self._asked % (len(self.work.text) // 2)
        return [*self.work.text[start : start + length - len(ids)], *ids]


def encode_row(bench: Bench, batch: int) -> Row:
    """Pictures to image embeddings."""
    images, engine = bench.work.images[:batch], bench.engine(1)
    encode = bench.tower.encoder(images)
    found = np.asarray(jnp.stack(engine.encode_images(images)))
    return Row(
        what=f"image encode, batch {batch}: ms per picture",
        units=batch,
        difference=require_agreement("image encode", found, encode()),
        ours=functools.partial(encode_s, engine, images),
        theirs={"sdpa": whole_call(encode)},
    )


def prefill_row(bench: Bench, length: int) -> Row:
    """From a prompt of `length` ids, whose picture is encoded already, to the first token."""
    engine, embeds = bench.engine(1), bench.embeds

    def ours() -> float:
        request = Request(prompt=bench.prompt(length), image_embeds=[embeds], max_new_tokens=1)
        return first_token_s(engine, request)

    def theirs(cache: str) -> float:
        prompt = bench.prompt(length)
        start = time.perf_counter()
        bench.llama.first_tokens([prompt], embeds[None], cache=cache, room=1)
        return time.perf_counter() - start

    return Row(
        what=f"prefill, {length} tokens: ms",
        units=1,
        difference=_require_same_logits(bench, bench.prompt(length)),
        ours=ours,
        theirs={cache: functools.partial(theirs, cache) for cache in CACHES},
    )


def first_token_row(bench: Bench) -> Row:
    """From one picture and a question about it to the first token."""
    image, engine, prompt = bench.work.images[:1], bench.engine(1), bench.work.prompts[0]
    encode = bench.tower.encoder(image)

    def theirs(cache: str) -> None:
        bench.llama.first_tokens([prompt], encode(), cache=cache, room=1)

    return Row(
        what=f"time to first token, picture and {len(prompt)} tokens: ms",
        units=1,
        difference=_require_same_logits(bench, prompt),
        ours=functools.partial(picture_to_token_s, engine, image, prompt),
        theirs={cache: whole_call(functools.partial(theirs, cache)) for cache in CACHES},
    )


def decode_row(bench: Bench, batch: int) -> Row:
    """Steps of `batch` answers side by side, behind prompts of one length."""
    length, steps = bench.work.prefill[0], bench.work.decode_steps
    engine, embeds = bench.engine(batch), bench.embeds

    def submit() -> list[Generation]:
        tokens = room(steps, apart=batch)
        return [
            engine.submit(
                Request(prompt=bench.prompt(length), image_embeds=[embeds], max_new_tokens=tokens)
            )[0]
            for _ in range(batch)
        ]

    def theirs(cache: str) -> float:
        prompts = [bench.prompt(length) for _ in range(batch)]
        rows = np.broadcast_to(embeds, (batch, *embeds.shape)).copy()
        return bench.llama.decode(prompts, rows, cache=cache, steps=steps)

    running = submit()
    decode_s(engine, running, steps=steps)
    difference = max(_require_likeliest(bench, g.request.prompt, g.ids) for g in running)
    settings = STEP_SETTINGS if batch == 1 else CACHES
    for cache in settings:
        theirs(cache)  # compiles, where it does
    seconds = {cache: theirs(cache) for cache in settings}
    return Row(
        what=f"decode, batch {batch}, {length} to {length + steps} tokens: ms per step",
        units=steps,
        difference=difference,
        ours=lambda: decode_s(engine, submit(), steps=steps)[0],
        theirs={
            cache: functools.partial(theirs, cache)
            for cache in sorted(settings, key=seconds.__getitem__)[:2]
        },
        facts={"tried_ms": {name: round(1000 * s / steps, 2) for name, s in seconds.items()}},
    )


def captions_row(bench: Bench) -> Row:
    """All pictures and questions to whole answers, end to end.

    Every setting of either side runs twice before, and the second time decides: our fastest number of slots and the two
    fastest settings of the other side take turns.
    """
    work = bench.work
    ours = {f"{slots} slots": functools.partial(_our_captions, bench, slots) for slots in OUR_SLOTS}
    theirs = {
        f"{cache}, batch {batch}": functools.partial(_their_captions, bench, cache, batch)
        for cache in CACHES
        for batch in THEIR_BATCHES
    }
    answers = {name: run() for name, run in (ours | theirs).items()}
    compare = functools.partial(compare_answers, top=functools.partial(_top_tokens, bench))
    for mine in ours:
        for other in theirs:
            compare(answers[mine], answers[other])
    seconds = {name: whole_call(run)() for name, run in (ours | theirs).items()}
    best = min(ours, key=seconds.__getitem__)
    kept: dict[str, Timed] = {
        name: whole_call(theirs[name]) for name in sorted(theirs, key=seconds.__getitem__)[:2]
    }
    lengths = [len(answer) for answer in answers[best]]
    return Row(
        what=f"{len(work.prompts)} captions, pictures to whole answers: ms per caption",
        units=len(work.prompts),
        difference=0.0,
        ours=whole_call(ours[best]),
        theirs=kept,
        facts={
            **compare(answers[best], answers[next(iter(kept))]),
            "our_setting": best,
            "tried_s": {name: round(value, 2) for name, value in seconds.items()},
            "answer_tokens": [min(lengths), statistics.median(lengths), max(lengths)],
            "max_new_tokens": work.max_new_tokens,
            "work": work.said,
        },
        round_s=0.0,
        untimed=0,
    )


def compare_answers(
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    *,
    top: Callable[[int, Sequence[int]], Sequence[int]],
) -> dict[str, Any]:
    """How many answers are the same, by the rule "equal until the first difference".

    Args:
        ours, theirs: without their stop tokens, which `-1` stands for in the comparison.
        top: (number of the answer, its tokens before the difference) -> the likeliest next tokens; a stop is -1.

    Returns:
        `equal` answers, of `answers`, and how many `tokens` each side wrote.

    Raises:
        SystemExit: where two answers part, one side's token is not among the likeliest.
    """
    equal = 0
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if list(mine) == list(other):
            equal += 1
            continue
        pairs = zip([*mine, -1], [*other, -1], strict=False)
        place, parted = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        likeliest = list(top(number, mine[:place]))
        if not set(parted) <= set(likeliest):
            raise SystemExit(
                f"Answer {number} parts at token {place}: ours {parted[0]}, theirs {parted[1]}; expected both among "
                f"{likeliest}, the likeliest there. Nothing was timed: first find out which side is wrong."
            )
    return {
        "answers": len(ours),
        "equal": equal,
        "tokens": {"ours": sum(map(len, ours)), "theirs": sum(map(len, theirs))},
    }


def _our_captions(bench: Bench, slots: int) -> list[list[int]]:
    work = bench.work
    found = answer_all(
        bench.engine(slots), work.images, work.prompts,
        max_new_tokens=work.max_new_tokens, stop_tokens=work.stop_tokens,
    )  # fmt: skip
    return [until_stop(answer, work.stop_tokens) for answer in found]


def _their_captions(bench: Bench, cache: str, batch: int) -> list[list[int]]:
    work, found = bench.work, []
    for first in range(0, len(work.prompts), batch):
        embeds = bench.tower.encoder(work.images[first : first + batch])()
        found += bench.llama.generate(
            work.prompts[first : first + batch], embeds,
            cache=cache, max_new_tokens=work.max_new_tokens, stop_tokens=work.stop_tokens,
        )  # fmt: skip
    return found


def _top_tokens(bench: Bench, number: int, answer: Sequence[int]) -> list[int]:
    """The likeliest tokens behind a part of an answer, by the other side's logits; a stop token is -1."""
    work = bench.work
    embeds = bench.tower.encoder(work.images[number : number + 1])()[0]
    logits = bench.llama.logits([*work.prompts[number], *answer], embeds)[-1]
    found = np.argsort(-logits)[:IN_THE_TOP].tolist()
    return [-1 if token in work.stop_tokens else token for token in found]


def _require_same_logits(bench: Bench, ids: Sequence[int]) -> float:
    """The logits of a prompt with one picture, at every position, by either side without a cache."""
    expected = bench.llama.logits(ids, bench.embeds)
    return require_agreement("prompt", _logits(bench, ids), expected)


def _logits(bench: Bench, ids: Sequence[int]) -> np.ndarray:
    model = make_model(bench.work.config, layout=DISK, dtype=jnp.float32)

    @jax.jit
    def whole(params: Params, token_ids: jax.Array, image_embeds: jax.Array) -> jax.Array:
        positions = jnp.arange(token_ids.shape[1])[None]
        hidden, _, _ = apply_method(
            model, params, "decode",
            apply_method(model, params, "embed_prompt", token_ids, image_embeds),
            positions=positions, mask=positions[:, :, None] >= positions[:, None], caches=None,
        )  # fmt: skip
        return apply_method(model, params, "head", hidden)[0]

    llama = {"llama": bench.work.params["llama"]}
    return np.asarray(whole(llama, jnp.asarray([ids], jnp.int32), bench.embeds[None]))


def _require_likeliest(bench: Bench, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Every token of our answer has, in the other side's logits for the same text, the largest one, up to rounding."""
    logits = bench.llama.logits([*prompt, *answer], bench.embeds)[len(prompt) - 1 : -1]
    chosen = logits[np.arange(len(answer)), list(answer)]
    return require_agreement("greedy tokens", chosen, logits.max(1))


ROWS: dict[str, Callable[[Bench], Row]] = {
    "captions_64": captions_row,
    "decode_1": lambda bench: decode_row(bench, 1),
    "first_token": first_token_row,
    "decode_8": lambda bench: decode_row(bench, 8),
    "prefill_64": lambda bench: prefill_row(bench, bench.work.prefill[0]),
    "prefill_256": lambda bench: prefill_row(bench, bench.work.prefill[1]),
    "encode_1": lambda bench: encode_row(bench, 1),
    "encode_8": lambda bench: encode_row(bench, 8),
}
"""In the order of their value; a row is made when its turn comes."""
