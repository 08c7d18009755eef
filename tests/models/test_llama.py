"""models/llama.py against a NumPy LLaMA in float64: every layer and the logits, for each kind of attention and head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import LlamaConfig, ModelConfig
from minigpt4_jax.models.attention import make_causal_mask
from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.llama import Llama

LENGTH = 70  # more than 64: rope and masks beyond the first bucket


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def numpy_llama(params: Any, token_ids: np.ndarray, config: LlamaConfig) -> dict[str, np.ndarray]:
    """One sequence without padding, one head and one query at a time."""
    x = params["embed_tokens"]["embedding"][token_ids]
    half = config.head_dim // 2
    turn = np.exp(1j * np.arange(len(x))[:, None] * config.rope_base ** (-np.arange(half) / half))
    states = []

    def head_of(y: np.ndarray, n: int, *, rotated: bool) -> np.ndarray:
        part = y[:, n * config.head_dim : (n + 1) * config.head_dim]
        if not rotated:
            return part
        pairs = (part[:, :half] + 1j * part[:, half:]) * turn
        return np.concatenate([pairs.real, pairs.imag], -1)

    for i in range(config.num_layers):
        layer = params["layers"][str(i)]
        kernels = {name: leaf["kernel"] for name, leaf in layer["self_attn"].items()}
        y = rms_norm(x, layer["input_layernorm"]["scale"], config.norm_eps)
        heads = []
        for n in range(config.num_heads):
            shared = n * config.num_kv_heads // config.num_heads
            q = head_of(y @ kernels["q_proj"], n, rotated=True)
            k = head_of(y @ kernels["k_proj"], shared, rotated=True)
            v = head_of(y @ kernels["v_proj"], shared, rotated=False)
            rows = []
            for s in range(len(x)):
                weights = np.exp(k[: s + 1] @ q[s] / np.sqrt(config.head_dim))
                rows.append(weights / weights.sum() @ v[: s + 1])
            heads.append(np.stack(rows))
        x = x + np.concatenate(heads, -1) @ kernels["o_proj"]
        y = rms_norm(x, layer["post_attention_layernorm"]["scale"], config.norm_eps)
        gate, up = y @ layer["mlp"]["gate_proj"]["kernel"], y @ layer["mlp"]["up_proj"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down_proj"]["kernel"]
        states.append(x)
    final = rms_norm(x, params["norm"]["scale"], config.norm_eps)
    head = (
        params["embed_tokens"]["embedding"].T
        if config.tie_embeddings
        else params["lm_head"]["kernel"]
    )
    return {"layers": np.stack(states), "norm": final, "logits": final @ head}


CONFIGS = {
    "grouped, tied": {},
    "one key head, untied": {"num_kv_heads": 1, "tie_embeddings": False},
    "as many key heads, other base": {"num_kv_heads": 4, "rope_base": 100.0},
    "heads wider than the model": {"head_dim": 12},
}


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_layer_equals_the_numpy_llama(
    changes: dict[str, Any], tiny_config: ModelConfig, draw_params: Callable[[Any], Any]
) -> None:
    config = dataclasses.replace(tiny_config.llama, **changes)
    llama = Llama(config, DISK, jnp.float32)
    token_ids = np.random.default_rng(6).integers(0, config.vocab_size, LENGTH)

    def run(module: Llama, ids: jax.Array) -> Any:
        counts = jnp.ones(ids.shape, bool)
        hidden, caches, states = module(
            module.embed(ids),
            positions=jnp.arange(LENGTH)[None],
            mask=make_causal_mask(counts),
            caches=None,
        )
        assert caches is None
        return hidden, states, module.head(hidden)

    ids = jnp.asarray(token_ids[None])
    abstract = jax.eval_shape(lambda ids: llama.init(jax.random.key(0), ids, method=run), ids)
    params = draw_params(abstract["params"])
    hidden, states, logits = jax.jit(
        lambda params, ids: llama.apply({"params": params}, ids, method=run)
    )(params, ids)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    expected = numpy_llama(wide, token_ids, config)
    for found, name in ((states[:, 0], "layers"), (hidden[0], "norm"), (logits[0], "logits")):
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=1e-5 * scale, err_msg=name)


def test_logits_are_float32_whatever_the_compute_dtype(
    tiny_params: Any, tiny_config: ModelConfig
) -> None:
    llama = Llama(tiny_config.llama, DISK, jnp.bfloat16)
    hidden = jnp.ones((2, tiny_config.llama.width), jnp.bfloat16)
    logits = llama.apply({"params": tiny_params["llama"]}, hidden, method="head")
    assert logits.dtype == jnp.float32
