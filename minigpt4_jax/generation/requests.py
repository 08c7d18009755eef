"""What the engine is asked for and what it gives back: ids in, ids out."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from minigpt4_jax.config import IMAGE_TOKEN_ID
from minigpt4_jax.generation.sampling import GREEDY, Sampling
from minigpt4_jax.generation.state import MAX_STOPS, Prefix

FinishReason = Literal["", "stop", "length", "cancelled", "error"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One answer to one prompt.

    Raises `ValueError` for what no engine could run: no tokens, none asked for, too many stop tokens.
    """

    prompt: Sequence[int]
    """Token ids; `IMAGE_TOKEN_ID` stands once for every row of the image embeddings."""
    image_embeds: Sequence[Any] = field(default=(), repr=False)
    """One array `[R, D]` for each picture in the order of the prompt: what `Engine.encode_images` gives (it then
    stays on the device) or NumPy."""
    max_new_tokens: int
    min_new_tokens: int = 0
    """A stop token is not chosen before so many others."""
    stop_tokens: Collection[int] = ()
    """Ids that end the answer; the one that does is part of it."""
    sampling: Sampling = GREEDY
    written: Collection[int] = ()
    """Ids that the repetition penalty counts as written before the answer. Never the prompt's."""
    logprobs: bool = False
    """Also give the log-probability of every token and of the likeliest ones in its place."""
    salt: Hashable = None
    """Only what a request with an equal salt left in a slot is continued. Strangers who share an engine get different
    ones: how much of a prompt need not be read (`Generation.reused`, and the time it takes) would tell one of them what
    another has asked. vLLM calls it `cache_salt`."""

    def __post_init__(self) -> None:
        if not len(self.prompt):
            raise ValueError("The prompt is empty; expected at least one token.")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1.")
        if len(set(self.stop_tokens)) > MAX_STOPS:
            raise ValueError(
                f"There are {len(set(self.stop_tokens))} stop tokens; expected at most {MAX_STOPS}."
            )
        slots = sum(token == IMAGE_TOKEN_ID for token in self.prompt)
        rows = sum(len(embeds) for embeds in self.image_embeds)
        if slots != rows:
            raise ValueError(
                f"The prompt has {slots} image slots and {rows} image embeddings; expected as many."
            )

    def with_seed_plus(self, number: int) -> Request:
        """The same request drawing by another seed."""
        seed = (self.sampling.seed + number) % 2**32
        return replace(self, sampling=replace(self.sampling, seed=seed))

    @property
    def is_plain(self) -> bool:
        """Whether a plain step serves it: see `decode_step`."""
        return self.sampling.is_plain and not self.logprobs and self.min_new_tokens == 0


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities at one place of an answer, by the model's own logits."""

    chosen: float
    top: tuple[tuple[int, float], ...]
    """(token, log-probability) of the `TOP_LOGPROBS` likeliest tokens, the likeliest first."""


@dataclass(eq=False)
class SharedPrompt:
    """One prompt that several answers are given to: it is read once."""

    waiting: int
    """Answers that were not begun yet."""
    prefix: tuple[Prefix, int] | None = field(default=None, repr=False)
    """Where it was read to, and in which row; None before, and when nobody waits for it any more."""


@dataclass(eq=False)
class Generation:
    """A request under way, and its answer. The engine writes here; callers read."""

    request: Request
    shared: SharedPrompt
    ids: list[int] = field(default_factory=list)
    """The answer so far, the stop token included if one ended it."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """As long as `ids` where the request asks for them."""
    finish_reason: FinishReason = ""
    """"" while it runs or waits; then why it ended: by itself, at `max_new_tokens`, by the caller, by a fault."""
    error: Exception | None = None
    """What went wrong, where `finish_reason` is "error"."""
    slot: int = -1
    """Where it runs; -1 while it waits and after its end."""
    asked: int = 0
    """Tokens that were dispatched for it, read or not."""
    reused: int = 0
    """Tokens of the prompt that were still in the slot and not read again."""

    @property
    def finished(self) -> bool:
        """Whether anything more will come."""
        return self.finish_reason != ""

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    def history(self) -> np.ndarray:
        """Prompt and answer, int32, without the newest token, which the model has not read."""
        return np.asarray([*self.request.prompt, *self.ids[:-1]], np.int32)
