"""One tiny language model in every published form: Hugging Face (two kinds of file), Meta's shards, GGUF, a delta.

Written from the formats' side; knows nothing of the tables under test. Numbers are random, norms scale by about 1.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

from minigpt4_jax.config import LlamaConfig
from minigpt4_jax.presets import PRESETS
from tests.torch_files import write_pth

Arrays = dict[str, np.ndarray]

LLAMA = dataclasses.replace(
    PRESETS["tiny"].model.llama, num_kv_heads=2, mlp_width=96, tie_embeddings=False, rope_base=1e4
)
"""Grouped heads and an MLP of Meta's formula: 32 * ceil(8 * 32 / 3 / 32)."""
MULTIPLE_OF = 32

ATTENTION = {"q": "wq", "k": "wk", "v": "wv", "o": "wo"}
MLP = {"gate": "w1", "down": "w2", "up": "w3"}
BY_COLUMNS = (".wo.", ".w2.", "tok_embeddings.")
WHOLE = ("norm.weight", "rope.freqs")


def draw(config: LlamaConfig = LLAMA, *, dtype: Any = np.float16, seed: int = 0) -> Arrays:
    """A `LlamaForCausalLM` state dict, `[out, in]`, with the buffer of older files."""
    rng = np.random.default_rng(seed)
    width, queries = config.width, config.num_heads * config.head_dim
    keys = config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (config.vocab_size, width),
    }
    for i in range(config.num_layers):
        name = f"model.layers.{i}"
        shapes |= {
            f"{name}.self_attn.q_proj.weight": (queries, width),
            f"{name}.self_attn.k_proj.weight": (keys, width),
            f"{name}.self_attn.v_proj.weight": (keys, width),
            f"{name}.self_attn.o_proj.weight": (width, queries),
            f"{name}.mlp.gate_proj.weight": (config.mlp_width, width),
            f"{name}.mlp.up_proj.weight": (config.mlp_width, width),
            f"{name}.mlp.down_proj.weight": (width, config.mlp_width),
            f"{name}.input_layernorm.weight": (width,),
            f"{name}.post_attention_layernorm.weight": (width,),
        }
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    arrays |= {name: 1 + 0.2 * x for name, x in arrays.items() if "norm" in name}
    arrays = {name: x.astype(dtype) for name, x in arrays.items()}
    for i in range(config.num_layers):
        freqs = 1 / config.rope_base ** (np.arange(0, config.head_dim, 2) / config.head_dim)
        arrays[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = freqs.astype(np.float32)
    return arrays


def hf_json(config: LlamaConfig = LLAMA, **changes: Any) -> dict[str, Any]:
    """What `config.json` holds."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "bfloat16",
    } | changes


def write_hugging_face(
    folder: Path,
    arrays: Mapping[str, np.ndarray],
    *,
    config: Mapping[str, Any] | None = None,
    kind: str = "safetensors",
    shards: int = 2,
) -> Path:
    """A folder of one file, or of shards with an index."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_json() if config is None else config))
    stem, ending = {
        "safetensors": ("model", ".safetensors"),
        "bin": ("pytorch_model", ".bin"),
    }[kind]
    save = save_file if kind == "safetensors" else lambda part, path: write_pth(path, part)
    if shards == 1:
        save(dict(arrays), folder / f"{stem}{ending}")
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}{ending}"
        part = dict(list(arrays.items())[number::shards])
        save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}{ending}.index.json").write_text(json.dumps(index))
    return folder


def to_meta(arrays: Mapping[str, np.ndarray], *, heads: int, kv_heads: int) -> Arrays:
    """Meta's names, and its rope order: the halves of a head become neighbours."""

    def neighbours(x: np.ndarray, n: int) -> np.ndarray:
        size = len(x) // n
        order = [h * size + at // 2 + at % 2 * (size // 2) for h in range(n) for at in range(size)]
        return x[order]

    renamed: Arrays = {
        "tok_embeddings.weight": arrays["model.embed_tokens.weight"],
        "norm.weight": arrays["model.norm.weight"],
        "output.weight": arrays["lm_head.weight"],
    }
    layers = {name.split(".")[2] for name in arrays if name.startswith("model.layers.")}
    for i in sorted(layers, key=int):
        theirs, ours = f"layers.{i}", f"model.layers.{i}"
        for x, w in ATTENTION.items():
            value = arrays[f"{ours}.self_attn.{x}_proj.weight"]
            if x in "qk":
                value = neighbours(value, heads if x == "q" else kv_heads)
            renamed[f"{theirs}.attention.{w}.weight"] = value
        for x, w in MLP.items():
            renamed[f"{theirs}.feed_forward.{w}.weight"] = arrays[f"{ours}.mlp.{x}_proj.weight"]
        renamed[f"{theirs}.attention_norm.weight"] = arrays[f"{ours}.input_layernorm.weight"]
        renamed[f"{theirs}.ffn_norm.weight"] = arrays[f"{ours}.post_attention_layernorm.weight"]
    return renamed | {"rope.freqs": np.ones(4, np.float32)}


def params_json(config: LlamaConfig = LLAMA, **changes: Any) -> dict[str, Any]:
    """What `params.json` holds for a LLaMA 1; grouped heads are named only where there are any."""
    params = {
        "dim": config.width,
        "multiple_of": MULTIPLE_OF,
        "n_heads": config.num_heads,
        "n_layers": config.num_layers,
        "norm_eps": config.norm_eps,
        "vocab_size": -1,
    }
    if config.num_kv_heads != config.num_heads:
        params["n_kv_heads"] = config.num_kv_heads
    return params | changes


def write_meta(
    folder: Path,
    arrays: Mapping[str, np.ndarray],
    *,
    params: Mapping[str, Any] | None = None,
    shards: int = 2,
) -> Path:
    """`consolidated.NN.pth`, split as the layers of a model on `shards` devices are."""
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params_json() if params is None else params))
    for number in range(shards):
        part = {}
        for name, x in arrays.items():
            axis = 1 if any(mark in name for mark in BY_COLUMNS) else 0
            part[name] = x if name.endswith(WHOLE) else np.split(x, shards, axis=axis)[number]
        write_pth(folder / f"consolidated.{number:02}.pth", part)
    return folder


def write_gguf(
    path: Path, arrays: Mapping[str, np.ndarray], *, config: LlamaConfig = LLAMA, **metadata: Any
) -> Path:
    """A GGUF file of what `to_meta` gives: llama.cpp keeps Meta's rope order. Norms are float32 there, always."""
    names = {
        "tok_embeddings": "token_embd",
        "norm": "output_norm",
        "output": "output",
        **{f"attention.w{x}": f"attn_{x}" for x in "qkv"},
        "attention.wo": "attn_output",
        "feed_forward.w1": "ffn_gate",
        "feed_forward.w2": "ffn_down",
        "feed_forward.w3": "ffn_up",
        "attention_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(value)
    for theirs, x in arrays.items():
        if theirs == "rope.freqs":
            continue
        layer, name = "", theirs.removesuffix(".weight")
        if name.startswith("layers."):
            _, number, name = name.split(".", 2)
            layer = f"blk.{number}."
        value = x.astype(np.float32) if x.ndim == 1 else x
        if value.dtype == "bfloat16":
            kind = gguf.GGMLQuantizationType.BF16
            raw = value.view(np.uint8)
            writer.add_tensor(f"{layer}{names[name]}.weight", raw, raw_dtype=kind)
        else:
            writer.add_tensor(f"{layer}{names[name]}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_delta(merged: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> Arrays:
    """What FastChat publishes: merged - base, the added row of a grown tensor as it is; buffers cancel."""
    delta = {}
    for name, x in merged.items():
        difference = x.copy()
        difference[: len(base[name])] -= base[name]
        delta[name] = difference
    return delta
