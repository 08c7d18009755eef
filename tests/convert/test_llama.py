"""The LLaMA tables put every tensor in its place, turned the right way round.

Each fault that a table can have makes one test fail: a transposed kernel `test_*_kernels_are_in_out`, a missing row
permutation `test_gguf_q_and_k_rows_become_half_split`, a dropped row `test_*_table_drops_nothing`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import llama as tables
from convert.problems import ConversionError
from convert.rules import Rule, convert, flatten
from convert.sources import ArraySource, GgufSource, open_source
from minigpt4_jax.config import LlamaConfig, ModelConfig, UserError
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS

Arrays = dict[str, np.ndarray]

BLOCK_KERNELS = {  # parameter -> (llama.cpp, Hugging Face)
    "self_attn/q_proj": ("attn_q", "self_attn.q_proj"),
    "self_attn/k_proj": ("attn_k", "self_attn.k_proj"),
    "self_attn/v_proj": ("attn_v", "self_attn.v_proj"),
    "self_attn/o_proj": ("attn_output", "self_attn.o_proj"),
    "mlp/gate_proj": ("ffn_gate", "mlp.gate_proj"),
    "mlp/up_proj": ("ffn_up", "mlp.up_proj"),
    "mlp/down_proj": ("ffn_down", "mlp.down_proj"),
}
BLOCK_SCALES = {
    "input_layernorm": ("attn_norm", "input_layernorm"),
    "post_attention_layernorm": ("ffn_norm", "post_attention_layernorm"),
}


def target(config: LlamaConfig) -> dict[str, Any]:
    model: ModelConfig = dataclasses.replace(PRESETS["tiny"].model, llama=config)
    return abstract_params(model)["llama"]


def as_hugging_face(arrays: Arrays) -> Arrays:
    """The same numbers under Hugging Face's names (its q and k rows mean another order; here they are only numbers)."""
    names = dict((*BLOCK_KERNELS.values(), *BLOCK_SCALES.values()))
    renamed = {}
    for name, x in arrays.items():
        if name.startswith("blk."):
            _, layer, kind, _ = name.split(".")
            renamed[f"model.layers.{layer}.{names[kind]}.weight"] = x
    renamed["model.embed_tokens.weight"] = arrays["token_embd.weight"]
    renamed["model.norm.weight"] = arrays["output_norm.weight"]
    return renamed


def row(rules: tuple[Rule, ...], path: str) -> Rule:
    (found,) = (rule for rule in rules if rule.target == path)
    return found


# --- rows of the tables -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameter", [k for k in BLOCK_KERNELS if k[-6] not in "qk"])
def test_gguf_kernels_are_in_out(parameter: str, llama: LlamaConfig) -> None:
    rule = row(tables.gguf_rules(llama), f"layers/{{i}}/{parameter}/kernel")
    x = np.arange(16.0).reshape(4, 4)
    assert rule.sources == (f"blk.{{i}}.{BLOCK_KERNELS[parameter][0]}.weight",)
    np.testing.assert_array_equal(rule.op.apply(x), x.T)


@pytest.mark.parametrize("parameter", BLOCK_KERNELS)
def test_hugging_face_kernels_are_in_out(parameter: str, llama: LlamaConfig) -> None:
    rule = row(tables.hf_rules(llama), f"layers/{{i}}/{parameter}/kernel")
    x = np.arange(16.0).reshape(4, 4)
    assert rule.sources == (f"model.layers.{{i}}.{BLOCK_KERNELS[parameter][1]}.weight",)
    np.testing.assert_array_equal(rule.op.apply(x), x.T)


@pytest.mark.parametrize("source", ["output.weight", "lm_head.weight"])
def test_untied_head_is_in_out(source: str, llama: LlamaConfig) -> None:
    untied = dataclasses.replace(llama, tie_embeddings=False)
    table = tables.gguf_rules if source == "output.weight" else tables.hf_rules
    rule = row(table(untied), "lm_head/kernel")
    x = np.arange(6.0).reshape(3, 2)
    assert rule.sources == (source,)
    np.testing.assert_array_equal(rule.op.apply(x), x.T)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_gguf_q_and_k_rows_become_half_split(num_kv_heads: int, llama: LlamaConfig) -> None:
    """Attention scores are those of llama.cpp, which rotates neighbours; this project rotates the halves of a head."""
    rng = np.random.default_rng(3)
    llama = dataclasses.replace(llama, num_kv_heads=num_kv_heads)
    steps, head_dim = 5, llama.head_dim
    x = rng.normal(size=(steps, llama.width))
    angles = np.arange(steps)[:, None] * llama.rope_base ** (-np.arange(0, head_dim, 2) / head_dim)
    turn = np.exp(1j * angles)[:, None]  # [step, head, pair]

    def neighbours(rows: np.ndarray) -> np.ndarray:
        y = (x @ rows.T).reshape(steps, -1, head_dim)
        return (y[..., 0::2] + 1j * y[..., 1::2]) * turn

    def halves(kernel: np.ndarray) -> np.ndarray:
        y = (x @ kernel).reshape(steps, -1, head_dim)
        return (y[..., : head_dim // 2] + 1j * y[..., head_dim // 2 :]) * turn

    def scores(q: np.ndarray, k: np.ndarray) -> np.ndarray:
        k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
        return np.einsum("snp,tnp->nst", q, k.conj()).real

    rules = tables.gguf_rules(llama)
    rows = [rng.normal(size=(n * head_dim, llama.width)) for n in (llama.num_heads, num_kv_heads)]
    kernels = [
        row(rules, f"layers/{{i}}/self_attn/{x}_proj/kernel").op.apply(r)
        for x, r in zip("qk", rows, strict=True)
    ]
    expected = scores(*(neighbours(r) for r in rows))
    np.testing.assert_allclose(scores(*(halves(k) for k in kernels)), expected, rtol=1e-9)


# --- whole files ------------------------------------------------------------------------------------------------------


def test_gguf_table_drops_nothing(llama: LlamaConfig, gguf_arrays: Arrays) -> None:
    done = convert(
        ArraySource(gguf_arrays),
        tables.gguf_rules(llama),
        excuses=tables.GGUF_EXCUSES,
        target=target(llama),
    )
    assert len(list(flatten(done.params))) == len(gguf_arrays)
    assert not done.excused


def test_hugging_face_table_drops_nothing(llama: LlamaConfig, gguf_arrays: Arrays) -> None:
    source = as_hugging_face(gguf_arrays)
    source |= {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    done = convert(
        ArraySource(source),
        tables.hf_rules(llama),
        excuses=tables.hf_excuses(llama),
        target=target(llama),
    )
    assert len(list(flatten(done.params))) == len(gguf_arrays)
    assert [name for name, _ in done.excused] == ["model.layers.1.self_attn.rotary_emb.inv_freq"]


def test_norms_and_embeddings_are_copied(llama: LlamaConfig, gguf_arrays: Arrays) -> None:
    expected = {
        "embed_tokens/embedding": gguf_arrays["token_embd.weight"],
        "norm/scale": gguf_arrays["output_norm.weight"],
    }
    for i in range(llama.num_layers):
        for ours, (theirs, _) in BLOCK_SCALES.items():
            expected[f"layers/{i}/{ours}/scale"] = gguf_arrays[f"blk.{i}.{theirs}.weight"]
    for source, rules in (
        (gguf_arrays, tables.gguf_rules(llama)),
        (as_hugging_face(gguf_arrays), tables.hf_rules(llama)),
    ):
        for path, value in expected.items():
            layer = path.split("/")[1]
            rule = row(rules, path.replace(f"layers/{layer}/", "layers/{i}/"))
            (name,) = (s.replace("{i}", layer) for s in rule.sources)
            np.testing.assert_array_equal(rule.op.apply(source[name]), value)


def test_untied_head_of_a_gguf_file_is_found(llama: LlamaConfig, gguf_arrays: Arrays) -> None:
    untied = dataclasses.replace(llama, tie_embeddings=False)
    head = np.ones((llama.vocab_size, llama.width), np.float32)
    done = convert(
        ArraySource(gguf_arrays | {"output.weight": head}),
        tables.gguf_rules(untied),
        excuses=tables.GGUF_EXCUSES,
        target=target(untied),
    )
    assert done.params["lm_head"]["kernel"].shape == (llama.width, llama.vocab_size)


def test_tied_copy_of_the_head_is_left_out_only_while_equal(
    llama: LlamaConfig, gguf_arrays: Arrays
) -> None:
    source = as_hugging_face(gguf_arrays)
    embeddings = source["model.embed_tokens.weight"]

    def run(head: np.ndarray) -> None:
        convert(
            ArraySource(source | {"lm_head.weight": head}),
            tables.hf_rules(llama),
            excuses=tables.hf_excuses(llama),
            target=target(llama),
        )

    run(embeddings.copy())
    with pytest.raises(
        ConversionError, match=r"lm_head\.weight, said to equal model\.embed_tokens"
    ):
        run(embeddings + 1e-3)


def test_quantised_gguf_file_becomes_float32(
    tmp_path: Path,
    llama: LlamaConfig,
    gguf_arrays: Arrays,
    write_gguf: Callable[..., Path],
) -> None:
    quantised = ("token_embd.weight", "blk.0.ffn_up.weight")
    source = GgufSource(write_gguf(tmp_path / "m.gguf", gguf_arrays, quantised))
    assert tables.gguf_config(source) == llama
    done = convert(
        source, tables.gguf_rules(llama), excuses=tables.GGUF_EXCUSES, target=target(llama)
    )
    assert {x.dtype for _, x in flatten(done.params)} == {np.dtype(np.float32)}
    up = done.params["layers"]["0"]["mlp"]["up_proj"]["kernel"].T
    # Q8_0: 127 steps up to the largest of 32 values, rounded to the nearest.
    step = np.abs(gguf_arrays["blk.0.ffn_up.weight"]).max() / 127
    np.testing.assert_allclose(up, gguf_arrays["blk.0.ffn_up.weight"], atol=0.51 * step)
    np.testing.assert_array_equal(
        done.params["layers"]["0"]["mlp"]["gate_proj"]["kernel"].T,
        gguf_arrays["blk.0.ffn_gate.weight"],
    )


# --- configs ----------------------------------------------------------------------------------------------------------

HF_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
}


def hf_config(folder: Path, **changes: Any) -> LlamaConfig:
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | changes))
    return tables.hf_config(folder)


def test_config_of_an_old_hugging_face_folder(tmp_path: Path) -> None:
    """LLaMA 1 wrote no rope base, no grouped heads and no tying: absence means these values."""
    config = hf_config(tmp_path)
    assert (config.num_kv_heads, config.rope_base, config.tie_embeddings) == (4, 10000.0, False)
    assert config.head_dim == 8


def test_config_of_a_new_hugging_face_folder(tmp_path: Path, llama: LlamaConfig) -> None:
    new = hf_config(
        tmp_path,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    assert new == dataclasses.replace(llama, rope_base=500000.0)
    assert hf_config(tmp_path, rope_theta=1e5).rope_base == 1e5
    assert hf_config(tmp_path, rope_scaling={"rope_type": "default"}).rope_base == 1e4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral', expected 'llama'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is 'linear'"),
        ({"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": {"rope_theta": 1e4}}, "'yarn'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config is \{'bits': 4\}"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn', expected 'default'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ],
)
def test_model_that_is_not_built_here_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        hf_config(tmp_path, **changes)


def test_size_that_is_not_said_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_act": "silu"}))
    with pytest.raises(UserError, match="does not say 'hidden_size'"):
        tables.hf_config(tmp_path)
    with pytest.raises(UserError, match=r"does not say 'general\.architecture'"):
        tables.gguf_config(ArraySource({}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, "holds the architecture 'qwen2'"),
        ({"llama.rope.scaling.type": "yarn"}, "scales its rope"),
        ({"llama.rope.scale_linear": 4.0}, r"scales its rope \(4\.0\)"),
        ({"llama.rope.dimension_count": 4}, "rotates 4 of 8 dimensions"),
    ],
)
def test_gguf_file_that_is_not_built_here_is_refused(
    tmp_path: Path,
    gguf_arrays: Arrays,
    write_gguf: Callable[..., Path],
    changes: dict[str, Any],
    message: str,
) -> None:
    source = open_source(write_gguf(tmp_path / "m.gguf", gguf_arrays))
    with pytest.raises(UserError, match=message):
        tables.gguf_config(ArraySource(gguf_arrays, metadata={**source.metadata, **changes}))
