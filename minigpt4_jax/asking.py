"""What the engine is asked about a conversation: requests, searches with beams, the ranking of given answers.

For: everything that has a prompt and wants ids (`answers.py`, `chat.py`) or likelihoods. Not for: reading ids as text
(`conversation.py`), nor for the loop over steps.

Differs from the original's ranking (`multi_select`): likelihoods may be normalised by the candidate's own length.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from minigpt4_jax.config import UserError
from minigpt4_jax.conversation import Conversation
from minigpt4_jax.data.prompts import encode_answer
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Request
from minigpt4_jax.generation.sampling import Sampling
from minigpt4_jax.generation.score import Candidates, multi_select
from minigpt4_jax.presets import MAX_SEED, GenerationConfig

NORMALISATIONS = ("tokens", "none", "original")
"""What a candidate's log-probability may be divided by: see `MiniGPT4.score`."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """How likely the model finds a candidate as the answer to a question."""

    candidate: str
    index: int
    """Its place among the candidates."""
    score: float
    """What it is ranked by: `logprob`, normalised. The higher, the likelier."""
    logprob: float
    """Natural logarithm of the probability of the candidate and its end symbol."""
    num_tokens: int
    """Of the candidate, its end symbol included."""


def pick_seed(generation: GenerationConfig) -> int:
    """The seed of one conversation: the one that was set, or a new one."""
    return secrets.randbelow(MAX_SEED + 1) if generation.seed is None else generation.seed


def make_request(
    conversation: Conversation[Any],
    prompt: Sequence[int],
    embeds: Sequence[Any],
    *,
    generation: GenerationConfig,
    seed: int,
    max_new_tokens: int,
    logprobs: bool = False,
    logit_bias: Sequence[tuple[int, float]] = (),
    salt: Hashable = None,
) -> Request:
    """What the engine is asked for the answer to a conversation's last question.

    Args:
        prompt: what `conversation.ask` returned.
        embeds: one embedding per picture of the conversation.
        max_new_tokens: at most as many as `conversation.room`.
        logit_bias: (token, what is added to its logit).
        salt: whose prompts it may share: see `Request.salt`.
    """
    return Request(
        prompt=tuple(prompt),
        image_embeds=tuple(embeds),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(generation.min_new_tokens, max_new_tokens),
        stop_tokens=conversation.stop_ids,
        sampling=Sampling(
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
            min_p=generation.min_p,
            repetition_penalty=generation.repetition_penalty,
            presence_penalty=generation.presence_penalty,
            frequency_penalty=generation.frequency_penalty,
            logit_bias=tuple(logit_bias),
            seed=seed,
        ),
        written=conversation.written_ids,
        logprobs=logprobs,
        salt=salt,
    )


def search(
    engine: Engine, requests: Sequence[Request], *, generation: GenerationConfig
) -> list[list[list[int]]]:
    """The ids of the answers that beams find, best first, for each request (all with one generation's settings).

    As in the original a stop string ends no beam: the text behind it is to be cut off afterwards.
    """
    found = engine.beam_search(
        requests, num_beams=generation.num_beams, length_penalty=generation.length_penalty
    )
    return [[hypothesis.ids for hypothesis in hypotheses] for hypotheses in found]


def search_steps(
    engine: Engine, request: Request, *, generation: GenerationConfig
) -> Generator[None, None, list[list[int]]]:
    """`search` for one request, a piece at a time: see `Engine.beam_steps`."""
    (found,) = yield from engine.beam_steps(
        [request], num_beams=generation.num_beams, length_penalty=generation.length_penalty
    )
    return [hypothesis.ids for hypothesis in found]


def rank(
    engine: Engine,
    conversation: Conversation[Any],
    *,
    prompt: str,
    candidates: Sequence[str],
    tokenizer: Tokenizer,
    normalise: str,
) -> list[Scored]:
    """Candidates as answers to `prompt`, asked next in a conversation (of embeddings); see `MiniGPT4.score`."""
    if isinstance(candidates, str) or not candidates or not all(map(str.strip, candidates)):
        raise UserError(
            f"candidates is {candidates!r}; expected a list of texts, at least one and none of them empty."
        )
    if normalise not in NORMALISATIONS:
        raise UserError(f"normalise is {normalise!r}; expected one of {', '.join(NORMALISATIONS)}.")
    answers = [
        encode_answer(conversation.template, text, tokenizer=tokenizer) for text in candidates
    ]
    question = Candidates(
        prompt=tuple(conversation.ask(prompt, room=max(map(len, answers)))),
        image_embeds=conversation.pictures,
        answers=tuple(map(tuple, answers)),
    )
    (found,) = engine.score([question])
    if normalise == "original":
        scores = [-float(loss) for loss in multi_select([found])[0][0]]
    else:
        scores = [one.logprob / (one.num_tokens if normalise == "tokens" else 1) for one in found]
    ranked = [
        Scored(
            candidate=text,
            index=index,
            score=score,
            logprob=one.logprob,
            num_tokens=one.num_tokens,
        )
        for index, (text, score, one) in enumerate(zip(candidates, scores, found, strict=True))
    ]
    return sorted(ranked, key=lambda one: -one.score)
