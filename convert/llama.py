"""Tables for LLaMA-family language models: GGUF files and Hugging Face folders -> the `llama` tree.

For: MHA and GQA, tied and untied heads; the config is read from the file, never assumed.
Not for: opening files (`llama_files.py`, which is what callers want), Meta's files (`meta.py` shows them under Hugging
Face's names), LoRA deltas of MiniGPT-v2 (a later table) and tokenizers (`tokenizer.py`).

Differs from the original, which downloads through `transformers` and needs torch. Kernels become `[in, out]`. GGUF
keeps the rows of q and k so that rotary pairs are neighbours; Hugging Face and this project rotate the two halves of a
head, so these rows are put back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.rules import Excuse, Rule, identity, interleaved_to_half_split, transpose
from convert.sources import TensorSource
from minigpt4_jax.config import LlamaConfig, UserError


def gguf_rules(config: LlamaConfig) -> tuple[Rule, ...]:
    """Names of llama.cpp -> the `llama` tree."""
    q_rows = interleaved_to_half_split(config.num_heads).then(transpose)
    k_rows = interleaved_to_half_split(config.num_kv_heads).then(transpose)
    block = "layers/{i}"
    table = (
        Rule("embed_tokens/embedding", ("token_embd.weight",), identity),
        Rule(f"{block}/input_layernorm/scale", ("blk.{i}.attn_norm.weight",), identity),
        Rule(f"{block}/self_attn/q_proj/kernel", ("blk.{i}.attn_q.weight",), q_rows),
        Rule(f"{block}/self_attn/k_proj/kernel", ("blk.{i}.attn_k.weight",), k_rows),
        Rule(f"{block}/self_attn/v_proj/kernel", ("blk.{i}.attn_v.weight",), transpose),
        Rule(f"{block}/self_attn/o_proj/kernel", ("blk.{i}.attn_output.weight",), transpose),
        Rule(f"{block}/post_attention_layernorm/scale", ("blk.{i}.ffn_norm.weight",), identity),
        Rule(f"{block}/mlp/gate_proj/kernel", ("blk.{i}.ffn_gate.weight",), transpose),
        Rule(f"{block}/mlp/up_proj/kernel", ("blk.{i}.ffn_up.weight",), transpose),
        Rule(f"{block}/mlp/down_proj/kernel", ("blk.{i}.ffn_down.weight",), transpose),
        Rule("norm/scale", ("output_norm.weight",), identity),
    )
    if config.tie_embeddings:
        return table
    return (*table, Rule("lm_head/kernel", ("output.weight",), transpose))


GGUF_EXCUSES: tuple[Excuse, ...] = ()
"""Nothing: a `rope_freqs.weight`, for one, changes the rotation and must not be dropped."""


def hf_rules(config: LlamaConfig) -> tuple[Rule, ...]:
    """Names of Hugging Face `LlamaForCausalLM` -> the `llama` tree."""
    block, name = "layers/{i}", "model.layers.{i}"
    kernels = [f"self_attn/{x}_proj" for x in "qkvo"]
    kernels += [f"mlp/{x}_proj" for x in ("gate", "up", "down")]
    norms = ("input_layernorm", "post_attention_layernorm")
    table = (
        Rule("embed_tokens/embedding", ("model.embed_tokens.weight",), identity),
        *(Rule(f"{block}/{n}/scale", (f"{name}.{n}.weight",), identity) for n in norms),
        *(
            Rule(f"{block}/{k}/kernel", (f"{name}.{k.replace('/', '.')}.weight",), transpose)
            for k in kernels
        ),
        Rule("norm/scale", ("model.norm.weight",), identity),
    )
    if config.tie_embeddings:
        return table
    return (*table, Rule("lm_head/kernel", ("lm_head.weight",), transpose))


def hf_excuses(config: LlamaConfig) -> tuple[Excuse, ...]:
    """What older Hugging Face files carry besides the parameters."""
    inv_freq = Excuse(
        "model.layers.{i}.self_attn.rotary_emb.inv_freq",
        "a buffer of older files; the rotation is computed from the rope base",
    )
    if not config.tie_embeddings:
        return (inv_freq,)
    return (
        inv_freq,
        Excuse(
            "lm_head.weight",
            "the head is tied to the input embeddings, of which this is a copy",
            same_as="model.embed_tokens.weight",
        ),
    )


def gguf_config(source: TensorSource) -> LlamaConfig:
    """Reads the sizes from GGUF metadata.

    Raises:
        UserError: another architecture, or rope scaling, which the model does not have.
    """
    meta, where = source.metadata, source.describe()
    architecture = _need(meta, "general.architecture", where)
    if architecture != "llama":
        raise UserError(f"{where} holds the architecture {architecture!r}; expected 'llama'.")
    # Before this key there was `scale_linear`, a factor.
    scaling = meta.get("llama.rope.scaling.type") or meta.get("llama.rope.scale_linear", 1.0)
    if scaling not in ("none", 1.0):
        raise UserError(f"{where} scales its rope ({scaling!r}); expected a model without scaling.")

    def need(key: str) -> Any:
        return _need(meta, f"llama.{key}", where)

    width, heads = need("embedding_length"), need("attention.head_count")
    head_dim = meta.get("llama.attention.key_length", width // heads)
    rotated = meta.get("llama.rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise UserError(
            f"{where} rotates {rotated} of {head_dim} dimensions of a head; expected all of them."
        )
    return LlamaConfig(
        vocab_size=source.shape("token_embd.weight")[0],
        width=width,
        mlp_width=need("feed_forward_length"),
        num_layers=need("block_count"),
        num_heads=heads,
        # llama.cpp writes the key only for grouped heads in some versions; the format defines its absence as MHA.
        num_kv_heads=meta.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        # Of LLaMA 1 and 2 the key is left out, as config.json has none; the format defines its absence as 10000.
        rope_base=_decimal(meta.get("llama.rope.freq_base", 10000.0)),
        norm_eps=_decimal(need("attention.layer_norm_rms_epsilon")),
        tie_embeddings="output.weight" not in source.names(),
        max_positions=need("context_length"),
    )


def hf_config(folder: Path) -> LlamaConfig:
    """Reads the sizes from a Hugging Face `config.json`.

    Keys that the format lets a file leave out (GQA, head dim, rope base and tying, all younger than LLaMA 1) take the
    value that their absence means there. The dtype is not read: every tensor says its own.

    Raises:
        UserError: no config.json, another architecture, rope scaling, biases, or quantised weights.
    """
    path = folder / "config.json"
    if not path.exists():
        raise UserError(f"There is no {path}; expected a Hugging Face folder with its config.json.")
    meta = _read_config(path)
    rope: dict[str, Any] = meta.get("rope_parameters") or {}
    # transformers 4 keeps the scaling apart, under `type` or `rope_type`; 5 in rope_parameters.
    scaling: dict[str, Any] = meta.get("rope_scaling") or {}
    unsupported = {
        "model_type": (meta.get("model_type"), "llama"),
        "hidden_act": (meta.get("hidden_act"), "silu"),
        "rope_scaling": (scaling.get("rope_type", scaling.get("type", "default")), "default"),
        "rope_parameters.rope_type": (rope.get("rope_type", "default"), "default"),
        "attention_bias": (meta.get("attention_bias", False), False),
        "mlp_bias": (meta.get("mlp_bias", False), False),
        "quantization_config": (meta.get("quantization_config"), None),
    }
    wrong = [
        f"{k} is {have!r}, expected {want!r}"
        for k, (have, want) in unsupported.items()
        if have != want
    ]
    if wrong:
        raise UserError(f"{path} describes a model that is not built here: {'; '.join(wrong)}.")

    def need(key: str) -> Any:
        return _need(meta, key, str(path))

    width, heads = need("hidden_size"), need("num_attention_heads")
    return LlamaConfig(
        vocab_size=need("vocab_size"),
        width=width,
        mlp_width=need("intermediate_size"),
        num_layers=need("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=meta.get("num_key_value_heads") or heads,
        head_dim=meta.get("head_dim") or width // heads,
        rope_base=float(rope.get("rope_theta") or meta.get("rope_theta", 10000.0)),
        norm_eps=need("rms_norm_eps"),
        tie_embeddings=meta.get("tie_word_embeddings", False),
        # The first conversions of LLaMA 1 wrote another name; the format's default is 2048.
        max_positions=meta.get("max_position_embeddings", meta.get("max_sequence_length", 2048)),
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}). Fetch it again.") from error
    if not isinstance(meta, dict):
        raise UserError(f"{path} holds no table of sizes; expected a config.json of Hugging Face.")
    return meta


def _need(meta: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in meta:
        raise UserError(f"{where} does not say {key!r}, which the model needs.")
    return meta[key]


def _decimal(x: float) -> float:
    """The number that a person wrote, from its float32 (9.999999747378752e-06 -> 1e-05)."""
    return float(f"{x:.7g}")
