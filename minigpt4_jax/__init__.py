"""MiniGPT-4 in JAX and Flax: a frozen image tower, one trained projection, a frozen language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
_INTERFACE = ("Answer", "Ask", "Chat", "GenerationConfig", "MiniGPT4")
__all__ = ["Answer", "Ask", "Chat", "GenerationConfig", "MiniGPT4", "UserError", "__version__"]

if TYPE_CHECKING:
    from minigpt4_jax.api import Answer, Ask, Chat, GenerationConfig, MiniGPT4
    from minigpt4_jax.config import UserError


def __getattr__(name: str) -> Any:
    """Imports the interface on first use, so that `minigpt4_jax.data` alone never imports JAX."""
    if name in _INTERFACE:
        from minigpt4_jax import api

        return getattr(api, name)
    if name == "UserError":
        from minigpt4_jax.config import UserError

        return UserError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
