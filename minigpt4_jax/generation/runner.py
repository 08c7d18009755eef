"""What the engine runs on the device: its compiled functions over one set of parameters, and the sizes they come in.

For: padding requests into the few shapes that programs have, and compiling these ahead or on demand. Not for: which
request runs when (`loop.py`), nor what a program computes (`decode.py`).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.generation.decode import decode_step, extend, insert, move_row, prefill
from minigpt4_jax.generation.programs import (
    Ladder,
    NotCompiled,
    Program,
    Programs,
    compile_program,
    make_ladder,
)
from minigpt4_jax.generation.requests import Request
from minigpt4_jax.generation.score import score_rows
from minigpt4_jax.generation.state import (
    Chosen,
    Prefix,
    Settings,
    SlotState,
    init_state,
    make_settings,
)
from minigpt4_jax.models.layout import Layout
from minigpt4_jax.models.minigpt4 import Params, apply_method, make_model
from minigpt4_jax.sharding import cache_sharding, replicated

READ_TOGETHER = (1, 2, 4)
"""How many prompts of one size are read at once."""

ENCODED_TOGETHER = {"cpu": (1, 4)}
"""How many pictures are encoded at once, by platform: 16 take half as long again for each of them on a CPU as 4 do."""
ENCODED_TOGETHER_ELSEWHERE = (1, 4, 16)

READ_TOKENS = {"cpu": 2048}
"""Tokens of prompts that are read between two steps of the slots, by platform, padding among them: what bounds how long
answers under way are held up, and the memory of the activations. A longer prompt is read alone."""
READ_TOKENS_ELSEWHERE = 4096

ANY_REQUEST = Request(prompt=(0,), max_new_tokens=1)
"""Stands for any request where only shapes matter."""

_ZERO, _ONE = np.int32(0), np.ones(1, np.int32)


class Runner:
    """The device side of one engine. See `Engine` for the arguments."""

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        context: int,
        num_slots: int,
        layout: Layout,
        cache_dtype: DTypeLike,
        mesh: Mesh | None,
    ) -> None:
        shards = 1 if mesh is None else mesh.shape["tensor"]
        if layout.shards != shards:
            raise ValueError(
                f"layout.shards is {layout.shards}; expected {shards}, the mesh's axis tensor."
            )
        self.config = config
        self.programs = Programs()
        self.params = params
        self.model = make_model(config, layout=layout, dtype=dtype)
        # Questions about a picture have 30 to 60 tokens, and on a CPU every token of padding costs like another one.
        short = [size for size in (32, 40, 48, 56) if size < context]
        self.prompt_sizes = Ladder((*short, *make_ladder(64, context, halfway=True).steps))
        self.extend_sizes = make_ladder(16, context)  # a question is shorter than a prompt
        self.place_sizes = make_ladder(128, context)
        self.row_sizes = make_ladder(1, num_slots)
        self._context = context
        self._num_slots = num_slots
        self._dtype = jnp.dtype(dtype)
        self._cache_dtype = cache_dtype
        self._alive: tuple[bytes, Array] | None = None
        self._mesh = mesh
        self._everywhere: jax.sharding.Sharding
        self._cache_sharding: jax.sharding.Sharding
        device = next(iter(jax.tree.leaves(params)[0].devices()))
        self.encoded_together = ENCODED_TOGETHER.get(device.platform, ENCODED_TOGETHER_ELSEWHERE)
        self.read_tokens = READ_TOKENS.get(device.platform, READ_TOKENS_ELSEWHERE)
        if mesh is None:
            self._everywhere = self._cache_sharding = SingleDeviceSharding(device)
        else:
            heads = config.llama.num_kv_heads
            self._everywhere = replicated(mesh)
            self._cache_sharding = cache_sharding(mesh, num_kv_heads=heads)

    def make_state(self) -> SlotState:
        """Empty slots.

        They have one place more than is ever read: XLA's CPU compiler copies a cache that a step updates and reads as
        a whole, and updates it in place where only a part of it is read.
        """

        def empty() -> SlotState:
            return init_state(
                self.config.llama, self._num_slots, capacity=self._context + 1, dtype=self._cache_dtype
            )  # fmt: skip

        state: SlotState = self._program("state", (), empty, ())()
        return state

    # --- prompts ---

    def prompt_key(self, prompts: int, length: int) -> tuple[int, int]:
        """How many prompts of this length to read together, at most `prompts`, and to what length they are padded."""
        size = self.prompt_sizes.fit(length)
        counts = [count for count in self.read_together(size) if count <= prompts]
        name, wanted = "insert", (counts[-1], size)  # what puts them into a slot is compiled last
        if self.programs.compiles_now:
            return wanted
        self.programs.want((name, wanted))
        found = [
            (key, count)
            for count in reversed(counts)
            if (key := self.programs.cheapest(name, (count, size))) is not None
        ]
        if not found:
            raise NotCompiled(f"No program reads a prompt of {length} tokens.")
        # The fewest tokens for each; the most prompts where these are the same.
        (batch, size), _ = min(found, key=lambda each: math.prod(each[0]) / each[1])
        return batch, size

    def read_together(self, size: int) -> tuple[int, ...]:
        """How many prompts of this padded length may be read at once, ascending."""
        most = max(1, self.read_tokens // size)
        return tuple(count for count in READ_TOGETHER if count <= min(most, self._num_slots))

    def read(self, requests: Sequence[Request], key: tuple[int, int]) -> Prefix:
        """Prompts through `prefill`, padded to `key`: (prompts, tokens)."""
        batch, _ = key
        token_ids = np.zeros(key, np.int32)
        lengths = np.ones(batch, np.int32)
        for row, request in enumerate(requests):
            lengths[row] = len(request.prompt)
            token_ids[row, : lengths[row]] = request.prompt
        images = self._place_images([request.image_embeds for request in requests], key)
        args = (self.params, token_ids, images, lengths)
        function = functools.partial(prefill, model=self.model, cache_dtype=self._cache_dtype)
        prefix: Prefix = self._program("prefill", key, function, args)(*args)
        return prefix

    def insert(
        self, state: SlotState, prefix: Prefix, row: int, slot: int, request: Request
    ) -> tuple[SlotState, Chosen]:
        """Puts a prompt that was read into a slot; takes the state away."""
        length = np.asarray([len(request.prompt)], np.int32)
        found: tuple[SlotState, Chosen] = self.insert_program(state, prefix)(
            state, prefix, np.int32(row), np.int32(slot), length, self.settings(request)
        )
        return found

    def insert_program(self, state: SlotState, prefix: Prefix) -> Program:
        key = (len(prefix.logits), prefix.caches[0].capacity)
        args = (state, prefix, _ZERO, _ZERO, _ONE, self.settings(ANY_REQUEST))
        return self._program("insert", key, insert, args, donate=(0,))

    def extend_key(self, length: int, start: int) -> tuple[int, int] | None:
        """Padded length of what follows the first `start` tokens, and places that are read; None if nothing fits."""
        size = self.extend_sizes.fit(length - start)
        if start + size > self._context:
            return None
        try:
            size, places = self.programs.choose(
                "extend", (size, self.place_sizes.fit(start + size))
            )
        except NotCompiled:
            return None
        return (size, places) if start + size <= places else None

    def extend(
        self,
        state: SlotState,
        slot: int,
        request: Request,
        image_embeds: Sequence[Any],
        *,
        start: int,
        key: tuple[int, int],
    ) -> tuple[SlotState, Chosen]:
        """Reads a prompt behind its first `start` tokens, which are in the slot; takes the state away.

        `image_embeds` are those behind `start`.
        """
        size, _ = key
        length = len(request.prompt)
        token_ids = np.zeros((1, size), np.int32)
        token_ids[0, : length - start] = request.prompt[start:]
        images = self._place_images([image_embeds], (1, size))
        found: tuple[SlotState, Chosen] = self.extend_program(state, key)(
            self.params,
            state,
            np.int32(slot),
            token_ids,
            images,
            np.int32(start),
            np.asarray([length], np.int32),
            self.settings(request),
        )
        return found

    def extend_program(self, state: SlotState, key: tuple[int, int]) -> Program:
        size, places = key
        args = (
            self.params,
            state,
            _ZERO,
            np.zeros((1, size), np.int32),
            self._place_images([()], (1, size)),
            _ZERO,
            _ONE,
            self.settings(ANY_REQUEST),
        )
        function = functools.partial(extend, model=self.model, places=places)
        return self._program("extend", key, function, args, donate=(1,))

    def settings(self, request: Request) -> Settings:
        """What `insert` is told about a request."""
        settings = make_settings(
            self.config.llama,
            [request.sampling],
            max_new_tokens=request.max_new_tokens,
            min_new_tokens=request.min_new_tokens,
            stop_tokens=tuple(sorted(set(request.stop_tokens))),
            written=tuple(request.written),
        )
        placed: Settings = jax.device_put(settings, self._everywhere)
        return placed

    # --- steps ---

    def decode(
        self, state: SlotState, alive: Bool[np.ndarray, " B"], *, last_slot: int, length: int, plain: bool
    ) -> tuple[SlotState, Chosen]:  # fmt: skip
        """One step over the slots up to `last_slot`, which read `length` places at most; takes the state away."""
        wanted = (self.row_sizes.fit(last_slot + 1), self.place_sizes.fit(length), int(not plain))
        key = self.programs.choose("decode", wanted)
        program = self.decode_program(state, key)
        found: tuple[SlotState, Chosen] = program(self.params, state, self._placed(alive))
        return found

    def decode_program(self, state: SlotState, key: tuple[int, ...]) -> Program:
        rows, places, full = key
        function = functools.partial(
            decode_step, model=self.model, rows=rows, places=places, plain=not full
        )
        args = (self.params, state, self._placed(np.zeros(self._num_slots, bool)))
        return self._program("decode", key, function, args, donate=(1,))

    def _placed(self, alive: Bool[np.ndarray, " B"]) -> Array:
        """On the device; the same array as long as nothing changes."""
        kept = self._alive
        if kept is None or kept[0] != alive.tobytes():
            kept = self._alive = (alive.tobytes(), jax.device_put(alive, self._everywhere))
        return kept[1]

    def move(self, state: SlotState, source: int, target: int) -> SlotState:
        """Moves what is in a slot to another one; takes the state away."""
        moved: SlotState = self.move_program(state)(state, np.int32(source), np.int32(target))
        return moved

    def move_program(self, state: SlotState) -> Program:
        return self._program("move", (), move_row, (state, _ZERO, _ZERO), donate=(0,))

    # --- pictures ---

    def encode_images(
        self, images: Float[np.ndarray, "I height width 3"]
    ) -> list[Float[Array, "T D"]]:
        """See `Engine.encode_images`."""
        parts = (*self.config.vision_parts, "llama_proj")
        vision = {name: self.params[name] for name in parts}
        found: list[Array] = []
        while len(found) < len(images):
            batch = self._encode_size(len(images) - len(found))
            taken = images[len(found) : len(found) + batch]
            part = np.zeros((batch, *images.shape[1:]), np.float32)
            part[: len(taken)] = taken
            args = (vision, part)
            found += self._program("encode", (batch,), self._encode, args)(*args)[: len(taken)]
        return found

    def _encode_size(self, left: int) -> int:
        """How many of the pictures that are left to encode together."""
        for count in sorted(self.encoded_together, reverse=True):
            if count <= left:
                with contextlib.suppress(NotCompiled):  # the larger sizes come behind the core
                    (batch,) = self.programs.choose("encode", (count,))
                    return batch
        raise NotCompiled(f"No program encodes {left} pictures.")

    def _encode(self, vision: Params, images: Array) -> list[Array]:
        return list(apply_method(self.model, vision, "encode_images", images))

    def _place_images(
        self, pictures: Sequence[Sequence[Any]], key: tuple[int, int]
    ) -> Float[Array, "B S D"] | Float[np.ndarray, "B S D"]:
        """Image embeddings in rows that `prefill` takes: as many as the prompts have tokens, so that any number of
        pictures fits and none makes a new shape. What is on the device stays there."""
        shape, rows = (*key, self.config.llama.width), self.config.num_image_tokens
        # Compiled with the first prompt of a size, whatever pictures it has: a later one waits for nothing.
        blank = self._program("blank", key, functools.partial(jnp.zeros, shape, self._dtype), ())
        abstract = (
            jax.ShapeDtypeStruct(shape, self._dtype),
            jax.ShapeDtypeStruct((rows, shape[-1]), self._dtype),
            np.int32(0),
            np.int32(0),
        )
        place = self._program("place", key, _place_image, abstract, donate=(0,))
        flat = [embeds for images in pictures for embeds in images]
        if not all(isinstance(e, jax.Array) and e.shape[0] == rows for e in flat):
            padded = np.zeros(shape, self._dtype)
            for number, images in enumerate(pictures):
                if images:
                    joined = np.concatenate([np.asarray(e, np.float32) for e in images])
                    padded[number, : len(joined)] = joined
            return padded
        placed: Array = blank()
        for number, images in enumerate(pictures):
            for order, embeds in enumerate(images):
                placed = place(placed, embeds, np.int32(number), np.int32(order * rows))
        return placed

    # --- ranking ---

    def score(
        self,
        token_ids: Int[np.ndarray, "B S"],
        image_embeds: Float[np.ndarray, "B R D"],
        prompt_lengths: Int[np.ndarray, " B"],
        lengths: Int[np.ndarray, " B"],
    ) -> Float[Array, " B"]:
        """`score_rows`, compiled at the first use of a size also after all else was compiled ahead."""
        args = (self.params, token_ids, image_embeds, prompt_lengths, lengths)
        function = functools.partial(score_rows, model=self.model)
        with self.programs.ahead():
            program = self._program("score", token_ids.shape, function, args)
        found: Float[Array, " B"] = program(*args)
        return found

    # --- compiling ---

    def _program(
        self,
        name: str,
        key: tuple[int, ...],
        function: Callable[..., Any],
        args: Sequence[Any],
        *,
        donate: Sequence[int] = (),
    ) -> Program:
        def compile_it() -> Program:
            with contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh):
                return compile_program(function, args, donate=donate, place=self._place)

        return self.programs.get(name, key, compile_it)

    def _place(self, path: str) -> jax.sharding.Sharding:
        """Where a result lies: caches by their heads, all else everywhere."""
        return self._cache_sharding if ".caches" in path else self._everywhere


def _place_image(
    rows: Float[Array, "B S D"], image: Float[Array, "T D"], row: Int[Array, ""], at: Int[Array, ""]
) -> Float[Array, "B S D"]:
    return jax.lax.dynamic_update_slice(rows, image[None].astype(rows.dtype), (row, at, 0))
