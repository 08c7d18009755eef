"""The files of a published MiniGPT-4, tiny: image tower, Q-Former, language model, projection, with the real names.

Written from the formats' side; knows nothing of the tables under test. Language models in every form: `llama_forms.py`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.presets import PRESETS
from tests import llama_forms as forms
from tests.tiny_tokenizer import tiny_pieces, write_model

Arrays = dict[str, np.ndarray]
LLAMA = dataclasses.replace(forms.LLAMA, vocab_size=len(tiny_pieces()), max_positions=1024)
MODELS = {
    "vicuna-7b": dataclasses.replace(PRESETS["tiny-qformer"].model, llama=LLAMA),
    "llama2-7b": dataclasses.replace(PRESETS["tiny"].model, llama=LLAMA),
}


def draw(shapes: dict[str, tuple[int, ...]]) -> Arrays:
    """Kernels keep the variance of what passes, norms scale by about 1, and no bias is zero."""
    rng = np.random.default_rng(len(shapes))
    found = {}
    for name, shape in shapes.items():
        x = rng.normal(size=shape)
        if "norm" in name.lower() or "ln_vision" in name:
            x = 0.2 * x + (1 if name.endswith("weight") else 0)
        elif len(shape) > 1 and name.endswith("weight"):
            x /= np.sqrt(np.prod(shape[1:]))
        found[name] = x.astype(np.float32)
    return found


def linear(name: str, out: int, inside: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, inside), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def eva_shapes(model: ModelConfig, *, grid: int) -> dict[str, tuple[int, ...]]:
    """`eva_vit_g.pth`: one block more than is used."""
    vit, d = model.vit, model.vit.width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, grid**2 + 1, d),
        "patch_embed.proj.weight": (d, 3, vit.patch_size, vit.patch_size),
        "patch_embed.proj.bias": (d,),
        **norm("norm", d),
        **linear("head", 7, d),
    }
    for i in range(vit.num_layers + 1):
        name = f"blocks.{i}"
        shapes |= norm(f"{name}.norm1", d) | norm(f"{name}.norm2", d)
        shapes |= {f"{name}.attn.q_bias": (d,), f"{name}.attn.v_bias": (d,)}
        shapes[f"{name}.attn.qkv.weight"] = (3 * d, d)
        shapes |= linear(f"{name}.attn.proj", d, d)
        shapes |= linear(f"{name}.mlp.fc1", vit.mlp_width, d)
        shapes |= linear(f"{name}.mlp.fc2", d, vit.mlp_width)
    return shapes


def blip2_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """`blip2_pretrained_flant5xxl.pth`: the Q-Former, its queries and `ln_vision`."""
    cfg = model.qformer
    assert cfg is not None
    d = cfg.width
    shapes: dict[str, tuple[int, ...]] = {"query_tokens": (1, cfg.num_queries, d)}
    shapes |= norm("ln_vision", model.vit.width) | norm("Qformer.bert.embeddings.LayerNorm", d)
    for i in range(cfg.num_layers):
        name = f"Qformer.bert.encoder.layer.{i}"
        blocks = {"attention": d}
        if i % cfg.cross_attention_every == 0:
            blocks["crossattention"] = model.vit.width
        for block, width in blocks.items():
            for x in ("query", "key", "value"):
                inside = d if x == "query" else width
                shapes |= linear(f"{name}.{block}.self.{x}", d, inside)
            shapes |= linear(f"{name}.{block}.output.dense", d, d)
            shapes |= norm(f"{name}.{block}.output.LayerNorm", d)
        shapes |= linear(f"{name}.intermediate_query.dense", cfg.mlp_width, d)
        shapes |= linear(f"{name}.output_query.dense", d, cfg.mlp_width)
        shapes |= norm(f"{name}.output_query.LayerNorm", d)
    return shapes | linear("t5_proj", 11, d)


def llama_arrays() -> Arrays:
    """A Hugging Face state dict whose numbers stay of one size."""
    arrays = forms.draw(LLAMA, dtype=np.float32)
    return {n: x / x.shape[1] ** 0.5 if x.ndim == 2 else x for n, x in arrays.items()}


def words(folder: Path) -> Path:
    """`folder` with a tokenizer in it."""
    write_model(folder / "tokenizer.model")
    return folder
