"""What the HTTP side hands to the thread that owns the engine, and what comes back from there.

For: the words that `scheduler.py` and the routes share. Not for: JSON (`protocol.py`), nor what is done with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from minigpt4_jax.conversation import Conversation
from minigpt4_jax.generation.requests import TokenLogprobs
from minigpt4_jax.image_cache import PreparedImage
from minigpt4_jax.presets import GenerationConfig
from minigpt4_jax.serving.errors import ApiError


@dataclass(frozen=True)
class Token:
    """One generated token with its log-probabilities, where they were asked for."""

    id: int
    logprobs: TokenLogprobs


@dataclass(frozen=True)
class Started:
    """The prompt of a job was read and its first answer has a slot; comes before all else. (Of more answers than there
    are slots the last ones begin later.)"""

    cached_tokens: int
    """Of the prompt, that were still in a slot from an earlier request."""


@dataclass(frozen=True)
class Piece:
    """Text of one answer that can be shown. Pieces joined are the answer as `MiniGPT4.generate` gives it."""

    index: int
    """Which of the `n` answers."""
    text: str
    """May be empty where only tokens are told."""
    num_tokens: int
    """Generated for this answer so far, a stop token among them."""
    tokens: tuple[Token, ...] = ()
    """Since the piece before; empty unless log-probabilities were asked for. Those of a stop token and of what a stop
    string cut off are not told, as in OpenAI's API."""


@dataclass(frozen=True)
class Ended:
    """One answer is complete; its last text came in a `Piece` before."""

    index: int
    finish_reason: Literal["stop", "length"]
    num_tokens: int


@dataclass(frozen=True)
class Failed:
    """The job is over without (all of) its answers. Nothing comes after it."""

    error: ApiError


@dataclass(frozen=True)
class Done:
    """All answers of the job have ended. Nothing comes after it."""


Event = Started | Piece | Ended | Failed | Done


@dataclass(eq=False, kw_only=True)
class Job:
    """One request for `n` answers to one prompt, ready for the engine: read, checked, tokenised, pictures decoded."""

    id: str
    """The request's id, in the log and on the wire."""
    conversation: Conversation[PreparedImage]
    """With the last question asked; its pictures are decoded and not yet encoded."""
    prompt: tuple[int, ...]
    """What `conversation.ask` returned."""
    generation: GenerationConfig
    """How the answers are written. `seed` None: each answer has a seed of its own."""
    max_new_tokens: int
    """At most as many as `conversation.room`."""
    n: int = 1
    logprobs: bool = False
    stream: bool = True
    """False: each answer comes in one `Piece`, when it has ended. Only then is the text exactly that of
    `MiniGPT4.generate` also where a model of the Vicuna templates repeats its role in the middle of an answer: what
    stands before it is dropped, and cannot be where it was shown already."""
    stop_strings: tuple[str, ...] = ()
    """Beside the template's own."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    deadline_s: float
    """On the clock of `time.monotonic`; behind it the job fails with a timeout, waiting or running."""
    salt: Hashable = None
    """Whose job it is: callers do not learn from each other's prompts (`Request.salt`), and share the slots."""
    emit: Callable[[Event], None]
    """Called on the engine's thread; must neither block nor raise."""
    arrived_s: float = field(default_factory=time.monotonic)


Outcome = Literal["stop", "length", "abort", "timeout", "error"]
"""How a job ended: its last answer by itself or by its length, its client gone, its time over, or a fault."""


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A job that is over, for the metrics. Times in seconds; None where it never came so far."""

    outcome: Outcome
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    """Of all its answers."""
    n: int
    max_new_tokens: int
    queue_s: float
    """From arrival until a slot took it, or until its end."""
    prefill_s: float | None
    """From the slot to the first token, encoding pictures too; None with beams."""
    decode_s: float | None
    """From the first to the last token; None with beams."""
    total_s: float
    """From arrival to the end."""


@runtime_checkable
class Observer(Protocol):
    """What the scheduler tells, on the engine's thread (`finished` also on others); must neither block nor raise."""

    def first_token(self, seconds: float) -> None:
        """From arrival to the first token of an answer."""

    def next_token(self, seconds: float) -> None:
        """Between two tokens of one answer."""

    def stepped(self, num_tokens: int) -> None:
        """One step of the engine gave so many tokens in all."""

    def finished(self, record: JobRecord) -> None:
        """A job is over."""

    def faulted(self) -> None:
        """The engine failed and was made anew."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is going on now; to be asked from any thread."""

    waiting: int
    """Jobs without a slot."""
    running: int
    """Jobs with one, with one set aside for them, or with a search."""
    busy_slots: int
    num_slots: int
    cache_usage: float
    """Share of the KV cache's places that hold something that is being answered, 0 to 1."""
    stalled_s: float
    """For so long there was work and no step was finished; 0 when idle."""
    programs_left: int
    """Sizes that wait for being compiled beside the jobs."""
