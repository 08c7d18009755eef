"""What a free slot still holds, and how much of a prompt need not be read again because of it.

Host side only: ids and the identity of image embeddings are compared, never the cache.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int

from minigpt4_jax.config import IMAGE_TOKEN_ID
from minigpt4_jax.generation.requests import Request

LEAST_REUSE = 32
"""Tokens that a prompt must share with what is in a free slot before it is continued there instead of read anew."""


@dataclass
class Resident:
    """What a free slot still holds, from its first place on."""

    ids: Int[np.ndarray, " S"] = field(default_factory=lambda: np.zeros(0, np.int32))
    image_embeds: tuple[Any, ...] = ()
    salt: Hashable = None
    """Of the request that left it."""


def common_start(request: Request, resident: Resident) -> int:
    """How many tokens a prompt and a slot have in common from the first on: pictures whole or not at all. None with
    another salt."""
    if request.salt != resident.salt:
        return 0
    ids = np.asarray(request.prompt, np.int32)
    most = min(len(ids) - 1, len(resident.ids))  # the last token must be read for its logits
    differ = np.flatnonzero(ids[:most] != resident.ids[:most])
    common = int(differ[0]) if len(differ) else most
    places = np.flatnonzero(ids == IMAGE_TOKEN_ID)
    begin = 0
    for number, embeds in enumerate(request.image_embeds):
        first, last = int(places[begin]), int(places[begin + len(embeds) - 1])
        begin += len(embeds)
        same = number < len(resident.image_embeds) and resident.image_embeds[number] is embeds
        if first < common and (not same or last >= common):
            return first
    return common


def embeds_behind(request: Request, start: int) -> list[Any]:
    """The pictures of a prompt that stand at `start` or later."""
    before = sum(token == IMAGE_TOKEN_ID for token in request.prompt[:start])
    kept = []
    for embeds in request.image_embeds:
        if before >= len(embeds):
            before -= len(embeds)
        else:
            kept.append(embeds)
    return kept
