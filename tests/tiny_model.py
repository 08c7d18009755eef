"""The tiny model as `loading` gives it, made to write printable text only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.projection import ProjectionInfo, write_projection
from minigpt4_jax import MiniGPT4, loading
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.model_folder import find_preset
from minigpt4_jax.models.layout import DISK, convert_layout


def make_frozen(params: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """The frozen parts of a tree in the layout `DISK`, with an embedding for printable ASCII bytes only."""
    embedding = np.array(params["llama"]["embed_tokens"]["embedding"])
    printable = tokenizer.encode("".join(map(chr, range(32, 127))))
    silent = np.setdiff1d(np.arange(len(embedding)), printable)
    embedding[silent] = 0  # tied to the head: a logit of 0, and some other logit is always above it
    llama = {**params["llama"], "embed_tokens": {"embedding": embedding}}
    return {"vit": params["vit"], "ln_vision": params["ln_vision"], "llama": llama}


def make_loader(frozen: Any, tokenizer: Tokenizer) -> Callable[..., Any]:
    """Takes the place of `loading.load_decode_params`; the projection is read as there."""

    def load(name: str, *, dtype: Any, layout: Any, projection: Any = None, **_: Any) -> Any:
        preset = find_preset(name)
        whole = {**frozen, "llama_proj": loading.load_projection(name, projection, preset=preset)}
        whole = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), whole)
        return convert_layout(whole, DISK, layout, llama=preset.model.llama), tokenizer

    return load


def write_tiny_projection(path: Path, params: Any, *, config: ModelConfig) -> Path:
    """The projection of a tree in the layout `DISK`, as a file."""
    projection = {name: np.asarray(leaf) for name, leaf in params["llama_proj"].items()}
    info = ProjectionInfo(config=config, licence="x", attribution="y", frozen_parts={})
    write_projection(path, projection, info=info)
    return path


def load_tiny(params: Any, tokenizer: Tokenizer, *, projection: Path, **settings: Any) -> MiniGPT4:
    """The tiny model through `MiniGPT4.load`. Only printable bytes have an embedding, so every answer is text that
    never ends by itself."""
    with pytest.MonkeyPatch.context() as patch:
        frozen = make_frozen(params, tokenizer)
        patch.setattr(loading, "load_decode_params", make_loader(frozen, tokenizer))
        return MiniGPT4.load("tiny", projection=projection, **settings)
