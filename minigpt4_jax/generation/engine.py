"""The engine: holds the parameters and the compiled functions, and runs generations. Ids in, ids out.

Prompts are padded to a few lengths (buckets), so that after the first answer of a bucket nothing is compiled again,
however many pictures a prompt shows and however its tokens are drawn; greedy and drawn answers are two programs. Simple
on purpose: one generation at a time, over one or several rows. Slots and continuous batching come later, behind the
same `prefill` and `decode_step`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig, UserError
from minigpt4_jax.generation.beam import BeamRules, BeamState, beam_step, rank, start_beams
from minigpt4_jax.generation.decode import DecodeState, decode_step, prefill
from minigpt4_jax.generation.sampling import GREEDY, Sampling
from minigpt4_jax.models.kv_cache import KVCache, init_cache
from minigpt4_jax.models.layout import DECODE, DISK, convert_layout
from minigpt4_jax.models.minigpt4 import Params, apply_method, make_model

LENGTH_BEFORE = 1
"""What the length of an answer counts in a beam search before its first token: the original's stand-in for a prompt."""


class Hypothesis(NamedTuple):
    """One of the answers that a beam search found."""

    ids: list[int]
    """The stop token included if one ends it."""
    score: float
    """Sum of the log-probabilities over `(1 + ids without the stop token) ** length_penalty`; higher is better."""


class Engine:
    """Compiled generation over one set of parameters.

    Args:
        params: a full tree in the `DISK` layout.
        config: sizes of the model.
        dtype: compute dtype; the cache has it too.
        context: cache slots: the longest prompt plus answer, in tokens.

    Raises:
        UserError: `context` is more than the model's positions.
    """

    def __init__(
        self, params: Params, config: ModelConfig, *, dtype: DTypeLike, context: int
    ) -> None:
        if context > config.llama.max_positions:
            raise UserError(
                f"context is {context}; expected at most {config.llama.max_positions}, the positions that the model "
                "was trained for."
            )
        self.config = config
        self.context = context
        self._dtype = dtype
        self._params = jax.tree.map(
            jnp.asarray, convert_layout(params, DISK, DECODE, llama=config.llama)
        )
        self._model = make_model(config, layout=DECODE, dtype=dtype)
        self._prefill = jax.jit(functools.partial(prefill, model=self._model), donate_argnums=1)
        self._decode_step = jax.jit(
            functools.partial(decode_step, model=self._model),
            static_argnames="num_slots",
            donate_argnums=1,
        )
        self._encode = jax.jit(
            lambda params, images: apply_method(self._model, params, "encode_images", images)
        )
        self._start_beams = jax.jit(start_beams, static_argnames=("num_beams", "num_slots"))
        self._beam_step = jax.jit(functools.partial(beam_step, model=self._model), donate_argnums=1)
        self._rank = jax.jit(rank)
        self._free_caches: dict[int, KVCache] = {}

    def encode_images(
        self, images: Float[np.ndarray, "I height width 3"]
    ) -> Float[np.ndarray, "I T D"]:
        """Normalised pictures (float32) to image embeddings."""
        parts = (*self.config.vision_parts, "llama_proj")
        vision = {name: self._params[name] for name in parts}
        return np.asarray(self._encode(vision, images), np.float32)

    def stream(
        self,
        token_ids: Sequence[int],
        image_embeds: Float[np.ndarray, "R D"] | None,
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int],
        sampling: Sampling,
        written: Collection[int] = (),
    ) -> Iterator[int]:
        """Yields the ids of one answer as they are chosen, the stop token included if one ends it.

        Args:
            token_ids: the prompt; each `IMAGE_TOKEN_ID` takes the next row of `image_embeds`.
            image_embeds: embeddings of all pictures of the prompt, joined.
            sampling: with one seed per prompt, where tokens are drawn.
            written: ids that the repetition penalty counts as written before the answer. Never the prompt's.

        Raises:
            ValueError: placeholders and image embeddings do not match, prompt plus answer exceed the context, or
                prompts and seeds differ in number.
        """
        for tokens in self._run([token_ids], [image_embeds], max_new_tokens, sampling, written):
            token = int(tokens[0])
            yield token
            if token in stop_tokens:
                return

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        image_embeds: Sequence[Float[np.ndarray, "_ D"] | None],
        *,
        max_new_tokens: int,
        stop_tokens: Collection[int],
        sampling: Sampling,
        written: Collection[int] = (),
    ) -> list[list[int]]:
        """Several answers at once, one row each; a stop token ends its row and is included. Raises as `stream`."""
        answers: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        for tokens in self._run(prompts, image_embeds, max_new_tokens, sampling, written):
            for row in sorted(open_rows):
                answers[row].append(int(tokens[row]))
                if tokens[row] in stop_tokens:
                    open_rows.discard(row)
            if not open_rows:
                break
        return answers

    def beam_search(
        self,
        prompts: Sequence[Sequence[int]],
        image_embeds: Sequence[Float[np.ndarray, "_ D"] | None],
        *,
        num_beams: int,
        max_new_tokens: int,
        stop_tokens: Collection[int],
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
        written: Collection[int] = (),
    ) -> list[list[Hypothesis]]:
        """The `num_beams` best answers to each prompt, best first, by the rules of `generation/beam.py`.

        Fewer where there are not as many (a vocabulary smaller than `num_beams`). A row's answers do not depend on the
        other rows. Other prompts, stop tokens and penalties compile nothing; another `num_beams` does. Every step
        waits for the device once, so that Ctrl-C ends a search between two steps. Raises as `stream`.
        """
        token_ids, lengths = self._pad_prompts(prompts, max_new_tokens)
        images = self._pad_images(prompts, image_embeds, length=token_ids.shape[1])
        seen = self._mark(written, rows=len(prompts))
        rules = jax.device_put(
            BeamRules(
                stops=self._mark(stop_tokens, rows=1)[0],
                length_penalty=np.float32(length_penalty),
                repetition_penalty=np.float32(repetition_penalty),
                length_before=np.int32(LENGTH_BEFORE),
            )
        )
        caches = self._take_caches(len(prompts))
        prompt, logits = self._prefill(
            self._params, caches, token_ids, images, lengths, seen, sampling=jax.device_put(GREEDY)
        )
        state: BeamState = self._start_beams(
            logits,
            prompt.caches,
            lengths,
            seen,
            rules,
            num_beams=num_beams,
            num_slots=self.slots(int(lengths.max()) + max_new_tokens),
        )
        self._free_caches[len(prompts)] = prompt.caches
        for _ in range(max_new_tokens - 1):
            if np.asarray(state.done).all():
                break
            state = self._beam_step(self._params, state, rules)
        found = self._rank(state, rules)
        rows = jax.device_get((found.token_ids, found.lengths, found.scores))
        return [
            [
                Hypothesis(ids[:length].tolist(), float(score))
                for ids, length, score in zip(*row, strict=True)
                if score > -np.inf
            ]
            for row in zip(*rows, strict=True)
        ]

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        image_embeds: Sequence[Float[np.ndarray, "_ D"] | None],
        max_new_tokens: int,
        sampling: Sampling,
        written: Collection[int],
    ) -> Iterator[Int[np.ndarray, " B"]]:
        """Yields one token per row and step, for exactly `max_new_tokens` steps unless the caller stops."""
        batch = len(prompts)
        if sampling.draw is not None and len(sampling.draw.seeds) != batch:
            raise ValueError(
                f"There are {batch} prompts and {len(sampling.draw.seeds)} seeds; expected one seed per prompt."
            )
        token_ids, lengths = self._pad_prompts(prompts, max_new_tokens)
        images = self._pad_images(prompts, image_embeds, length=token_ids.shape[1])
        caches = self._take_caches(batch)
        num_slots = self.slots(int(lengths.max()) + max_new_tokens)
        seen = self._mark(written, rows=batch)
        sampling = jax.device_put(sampling)  # once, and not at every step
        state: DecodeState
        state, _ = self._prefill(
            self._params, caches, token_ids, images, lengths, seen, sampling=sampling
        )
        try:
            for _ in range(max_new_tokens - 1):
                yield np.asarray(state.token)
                state, _ = self._decode_step(
                    self._params, state, sampling=sampling, num_slots=num_slots
                )
            yield np.asarray(state.token)
        finally:
            # Ctrl-C inside a step: the old cache was donated, the new one has no name. The next answer makes one.
            if not state.caches[0].k.is_deleted():
                self._free_caches[batch] = state.caches

    def _take_caches(self, batch: int) -> KVCache:
        """The caches of the last answer to as many prompts, or new ones.

        One slot more than is ever read: XLA's CPU compiler copies a cache that a step updates and reads as a whole, and
        updates it in place where only a part of it is read.
        """
        return self._free_caches.pop(batch, None) or init_cache(
            self.config.llama, batch, capacity=self.context + 1, dtype=self._dtype
        )

    def _mark(self, tokens: Collection[int], *, rows: int) -> Bool[np.ndarray, "{rows} V"]:
        marked = np.zeros((rows, self.config.llama.vocab_size), bool)
        marked[:, list(tokens)] = True
        return marked

    def _pad_prompts(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, " B"]]:
        lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
        if lengths.min() < 1 or lengths.max() + max_new_tokens > self.context:
            raise ValueError(
                f"Prompts have {lengths.min()} to {lengths.max()} tokens and {max_new_tokens} new ones are asked for; "
                f"expected at least 1 and together at most {self.context}, the context."
            )
        padded = np.zeros((len(prompts), self.bucket(int(lengths.max()))), np.int32)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        return padded, lengths

    def bucket(self, length: int) -> int:
        """The padded length of a prompt: 64, 96, 128, 192, ... (powers of two and halfway between), or the context."""
        power = max(64, 1 << (length - 1).bit_length())
        halfway = power // 4 * 3
        return min(halfway if 64 < length <= halfway else power, self.context)

    def slots(self, length: int) -> int:
        """Cache slots that are read at every step of an answer that ends at `length`: 256, 512, ..., or the context.

        One number for the whole answer, and few of them: each is a program of its own.
        """
        return min(max(256, 1 << (length - 1).bit_length()), self.context)

    def _pad_images(
        self,
        prompts: Sequence[Sequence[int]],
        image_embeds: Sequence[Float[np.ndarray, "_ D"] | None],
        *,
        length: int,
    ) -> Float[Array, "B {length} D"]:
        """As many rows as the bucket has tokens: any number of pictures fits, and none makes a new shape."""
        width = self.config.llama.width
        rows = [np.zeros((0, width), np.float32) if e is None else e for e in image_embeds]
        for number, (prompt, embeds) in enumerate(zip(prompts, rows, strict=True)):
            slots = sum(token == IMAGE_TOKEN_ID for token in prompt)
            if slots != len(embeds):
                raise ValueError(
                    f"Prompt {number} has {slots} image slots and {len(embeds)} image embeddings; expected as many."
                )
        padded = np.zeros((len(rows), length, width), np.float32)
        for number, embeds in enumerate(rows):
            padded[number, : len(embeds)] = embeds
        return jnp.asarray(padded)
