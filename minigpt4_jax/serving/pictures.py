"""Where the pictures of a request come from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PictureSource:
    """One picture of a request."""

    url: str
    """As the client wrote it."""
    param: str
    """Its place in the request, for refusals: `messages[0].content[1].image_url.url`."""
