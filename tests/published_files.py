"""The published files of a tiny MiniGPT-4, written on the spot: what a person has before a conversion.

EVA's tower and BLIP-2's Q-Former as `.pth`, a Hugging Face LLaMA with its tokenizer, a released projection. Every part
has a dtype of its own, so that one which lost its dtype on the way is seen. Written from the formats' side; knows
nothing of the tables under test.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.pth import write_pth
from minigpt4_jax.config import LlamaConfig, ModelConfig, QFormerConfig, VitConfig
from minigpt4_jax.presets import PRESETS
from tests import llama_forms as forms
from tests.tiny_tokenizer import tiny_pieces, write_model

Arrays = dict[str, np.ndarray]

LLAMA = dataclasses.replace(
    forms.LLAMA, vocab_size=len(tiny_pieces()) + 1, max_positions=1024, norm_eps=1e-6
)
"""One row more than the tokenizer has pieces, as in Vicuna v0; and room for a conversation in single bytes, which is
what the tiny tokenizer makes of most words."""
MODEL = dataclasses.replace(
    PRESETS["tiny-qformer"].model, llama=LLAMA, ln_vision_eps=PRESETS["vicuna-7b"].model.ln_vision_eps
)  # fmt: skip
WITHOUT_QFORMER = dataclasses.replace(MODEL, qformer=None, patches_per_token=4)
DTYPES = {
    "vit": np.float16,
    "qformer": np.float32,
    "llama": ml_dtypes.bfloat16,
    "llama_proj": np.float32,
}
"""Of the parts, as they are published; that of `ln_vision` and the queries is the Q-Former file's."""


def write_files(folder: Path, *, model: ModelConfig = MODEL) -> dict[str, str]:
    """Writes all files into `folder` and returns the options that they are given with."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"vit": "eva.pth", "llm": "llm", "projection": "proj.pth"}
    write_pth(folder / options["vit"], eva_arrays(model.vit))
    if model.qformer is not None:
        options["qformer"] = "blip2.pth"
        arrays = qformer_arrays(model.qformer, model.vit)
        write_pth(folder / options["qformer"], {"model": arrays})
    arrays = forms.draw(model.llama, dtype=DTYPES["llama"])
    forms.write_hugging_face(folder / "llm", arrays, config=forms.hf_json(model.llama))
    write_model(folder / "llm" / "tokenizer.model")
    write_pth(folder / options["projection"], {"model": projection_arrays(model)})
    return {option: str(folder / name) for option, name in options.items()}


def command(files: dict[str, str], *, out: Path, model: ModelConfig = MODEL) -> list[str]:
    """The options of `python -m convert PRESET` for these files and the sizes of `model`."""
    given = [text for option, path in files.items() for text in (f"--{option}", path)]
    return [*given, "--out", str(out), *sizes(model)]


def sizes(model: ModelConfig) -> list[str]:
    """`model.vit.width=32` and so on: every size, since no preset is so small."""
    return [f"model.{key}={'null' if value is None else value}" for key, value in flat(model)]


def flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every field."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from flat(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def eva_arrays(vit: VitConfig, *, seed: int = 1) -> Arrays:
    """As `eva_vit_g.pth`: a block too many, a final norm and a head."""
    d, f = vit.width, vit.mlp_width
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, vit.num_patches + 1, d),
        "patch_embed.proj.weight": (d, 3, vit.patch_size, vit.patch_size),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "head.weight": (7, d),
    }
    for i in range(vit.num_layers + 1):
        name = f"blocks.{i}"
        shapes |= {f"{name}.{n}.{x}": (d,) for n in ("norm1", "norm2") for x in ("weight", "bias")}
        shapes |= {
            f"{name}.attn.q_bias": (d,),
            f"{name}.attn.v_bias": (d,),
            f"{name}.attn.qkv.weight": (3 * d, d),
            f"{name}.attn.proj.weight": (d, d),
            f"{name}.attn.proj.bias": (d,),
            f"{name}.mlp.fc1.weight": (f, d),
            f"{name}.mlp.fc1.bias": (f,),
            f"{name}.mlp.fc2.weight": (d, f),
            f"{name}.mlp.fc2.bias": (d,),
        }
    return _draw(shapes, DTYPES["vit"], seed)


def qformer_arrays(config: QFormerConfig, vit: VitConfig, *, seed: int = 2) -> Arrays:
    """As `blip2_pretrained_flant5xxl.pth`, with some of what else it holds."""
    d, f, bert = config.width, config.mlp_width, "Qformer.bert"
    shapes: dict[str, tuple[int, ...]] = {
        "query_tokens": (1, config.num_queries, d),
        "ln_vision.weight": (vit.width,),
        "ln_vision.bias": (vit.width,),
        f"{bert}.embeddings.LayerNorm.weight": (d,),
        f"{bert}.embeddings.LayerNorm.bias": (d,),
        "t5_proj.weight": (9, d),
        "t5_proj.bias": (9,),
    }
    for i in range(config.num_layers):
        layer = f"{bert}.encoder.layer.{i}"
        dense = {"intermediate_query.dense": (f, d), "output_query.dense": (d, f)}
        dense |= {"intermediate.dense": (f, d), "output.dense": (d, f)}  # for text
        norms = ["output_query.LayerNorm", "output.LayerNorm"]
        read = {"attention": d}
        if i % config.cross_attention_every == 0:
            read["crossattention"] = vit.width
        for name, width in read.items():
            dense |= {f"{name}.self.query": (d, d), f"{name}.output.dense": (d, d)}
            dense |= {f"{name}.self.{x}": (d, width) for x in ("key", "value")}
            norms.append(f"{name}.output.LayerNorm")
        for name, shape in dense.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        shapes |= {f"{layer}.{name}.{x}": (d,) for name in norms for x in ("weight", "bias")}
    ids = {f"{bert}.embeddings.position_ids": np.arange(16).reshape(1, 16)}
    return _draw(shapes, DTYPES["qformer"], seed) | ids


def projection_arrays(model: ModelConfig, *, seed: int = 3) -> Arrays:
    """As `pretrained_minigpt4*.pth`."""
    width = model.llama.width
    shapes = {"llama_proj.weight": (width, model.projection_in), "llama_proj.bias": (width,)}
    return _draw(shapes, DTYPES["llama_proj"], seed)


def _draw(shapes: dict[str, Any], dtype: Any, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: (rng.normal(size=shape) / 4).astype(dtype) for name, shape in shapes.items()}


def llama_arrays(config: LlamaConfig = LLAMA) -> Arrays:
    """A Hugging Face state dict in float32 whose numbers stay of one size from layer to layer."""
    arrays = forms.draw(config, dtype=np.float32)
    return {n: x / x.shape[1] ** 0.5 if x.ndim == 2 else x for n, x in arrays.items()}


def with_tokenizer(folder: Path) -> Path:
    """`folder`, and a `tokenizer.model` in it."""
    write_model(folder / "tokenizer.model")
    return folder
