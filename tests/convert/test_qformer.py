"""The Q-Former's tables put every tensor in its place, whatever the file calls it.

Each fault that a table can have makes one test fail: a transposed kernel, query and key in each other's place or a
dropped bias `test_every_parameter_comes_from_its_own_tensor`; a cross-attention too many or too few
`test_the_sizes_are_those_that_the_file_shows`; something new in a file `test_what_no_rule_uses_is_an_error`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from convert import qformer as tables
from convert.problems import UNUSED, ConversionError
from convert.rules import convert, flatten
from convert.sources import ArraySource
from minigpt4_jax.checkpoint import leaf_names
from minigpt4_jax.config import UserError
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import PRESETS

MODEL = PRESETS["tiny-qformer"].model
CONFIG = MODEL.qformer
assert CONFIG is not None
Arrays = dict[str, np.ndarray]
HF_LAYER, HF_LN = "qformer.encoder.layer.{i}", "vision_model.post_layernorm"
KINDS = {
    "blip2": (
        "Qformer.bert.encoder.layer.{i}",
        "attention.self",
        "Qformer.bert.embeddings.LayerNorm",
        "ln_vision",
    ),
    "hf_blip2": (HF_LAYER, "attention.attention", "qformer.layernorm", HF_LN),
    "instructblip": (HF_LAYER, "attention.attention", "qformer.embeddings.layernorm", HF_LN),
}


def names_of(kind: str) -> dict[str, str]:
    """Every parameter -> its tensor's name, written out here a second time, without the table's help."""
    layer, inner, norm, ln_vision = KINDS[kind]
    names = {"query_tokens": "query_tokens"}
    for ours, theirs in (("ln_vision", ln_vision), ("qformer/norm", norm)):
        names |= {f"{ours}/scale": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}
    for i in range(CONFIG.num_layers):
        name, target = layer.format(i=i), f"qformer/layer/{i}"
        dense = {
            "mlp/fc1": "intermediate_query.dense",
            "mlp/fc2": "output_query.dense",
            **{f"attention/{x[0]}_proj": f"{inner}.{x}" for x in ("query", "key", "value")},
            "attention/o_proj": "attention.output.dense",
        }
        norms = {
            "attention_norm": "attention.output.LayerNorm",
            "mlp_norm": "output_query.LayerNorm",
        }
        if i % 2 == 0:
            dense |= {
                f"cross_{ours}": f"cross{theirs}"
                for ours, theirs in dense.items()
                if ours.startswith("attention")
            }
            norms["cross_attention_norm"] = "crossattention.output.LayerNorm"
        for ours, theirs in (dense | norms).items():
            leaf = "kernel" if ours in dense else "scale"
            names[f"{target}/{ours}/{leaf}"] = f"{name}.{theirs}.weight"
            names[f"{target}/{ours}/bias"] = f"{name}.{theirs}.bias"
    return names


EXTRAS = {
    "blip2": [
        "t5_proj.weight", "t5_proj.bias", "Qformer.bert.embeddings.position_ids",
        "Qformer.bert.embeddings.word_embeddings.weight", "Qformer.bert.embeddings.position_embeddings.weight",
        "Qformer.bert.encoder.layer.1.intermediate.dense.weight", "Qformer.bert.encoder.layer.1.output.dense.bias",
        "Qformer.bert.encoder.layer.2.output.LayerNorm.weight", "Qformer.cls.predictions.bias",
    ],
    "hf_blip2": [
        "vision_model.embeddings.class_embedding", "vision_model.encoder.layers.0.mlp.fc1.weight",
        "language_projection.weight", "language_model.model.decoder.embed_tokens.weight",
    ],
    "instructblip": [
        "vision_model.encoder.layers.0.mlp.fc1.weight", "language_projection.bias", "language_model.lm_head.weight",
        "qformer.embeddings.word_embeddings.weight", "qformer.embeddings.position_embeddings.weight",
        "qformer.embeddings.position_ids", "qformer.encoder.layer.1.intermediate.dense.weight",
        "qformer.encoder.layer.1.output.dense.weight", "qformer.encoder.layer.2.output.LayerNorm.bias",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def target() -> dict[str, Any]:
    abstract = abstract_params(MODEL)
    return {part: abstract[part] for part in tables.PARTS}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def arrays(kind: str, target: dict[str, Any]) -> Arrays:
    """A file of that kind: PyTorch's layout, everything different, and what such files hold besides."""
    rng = np.random.default_rng(4)
    leaves = leaf_names(target)
    found = {}
    for ours, theirs in names_of(kind).items():
        shape = leaves[ours].shape
        shape = shape[::-1] if ours.endswith("kernel") else shape
        found[theirs] = rng.normal(size=shape).astype(np.float32)
    return found | {name: np.ones(3, np.float32) for name in EXTRAS[kind]}


Convert = Callable[[Arrays], Any]


@pytest.fixture
def run(target: dict[str, Any]) -> Convert:
    def call(arrays: Arrays) -> Any:
        source = ArraySource(arrays)
        naming = tables.naming_of(source)
        rules, excuses = tables.qformer_rules(CONFIG, naming), tables.qformer_excuses(naming)
        return convert(source, rules, excuses=excuses, target=target)

    return call


def test_every_parameter_comes_from_its_own_tensor(kind: str, arrays: Arrays, run: Convert) -> None:
    found = dict(flatten(run(arrays).params))
    names = names_of(kind)
    assert set(found) == set(names)
    for ours, theirs in names.items():
        expected = arrays[theirs].T if ours.endswith("kernel") else arrays[theirs]
        np.testing.assert_array_equal(found[ours], expected, err_msg=ours)


def test_only_the_extras_are_left_out(kind: str, arrays: Arrays, run: Convert) -> None:
    done = run(arrays)
    assert sorted(name for name, _ in done.excused) == sorted(EXTRAS[kind])
    assert all(reason for _, reason in done.excused)


def test_what_no_rule_uses_is_an_error(kind: str, arrays: Arrays, run: Convert) -> None:
    layer = KINDS[kind][0].format(i=1)
    new = [f"{layer}.crossattention.output.dense.weight", "itm_head.weight"]  # layer 1 has none
    with pytest.raises(ConversionError) as caught:
        run(arrays | {name: np.ones(3, np.float32) for name in new})
    assert [problem.kind for problem in caught.value.problems] == [UNUSED] * 2
    assert all(name in str(caught.value) for name in new)


@pytest.mark.parametrize(
    "ours", ["query_tokens", "ln_vision/bias", "qformer/layer/2/cross_attention/k_proj/bias"]
)
def test_a_tensor_that_is_missing_is_named(
    ours: str, kind: str, arrays: Arrays, run: Convert
) -> None:
    name = names_of(kind)[ours]
    del arrays[name]
    with pytest.raises(ConversionError) as caught:
        run(arrays)
    assert [problem.text for problem in caught.value.problems] == [f"{name} (for {ours})"]


def test_the_sizes_are_those_that_the_file_shows(kind: str, arrays: Arrays) -> None:
    found = tables.qformer_config(ArraySource(arrays), num_heads=CONFIG.num_heads)
    assert found == CONFIG
    layer = KINDS[kind][0].format(i=1)
    arrays[f"{layer}.crossattention.output.dense.weight"] = np.ones((24, 24), np.float32)
    every = tables.qformer_config(ArraySource(arrays), num_heads=3)
    assert every.cross_attention_every == 1
    del arrays[f"{KINDS[kind][0].format(i=2)}.crossattention.output.dense.weight"]
    with pytest.raises(UserError, match=r"layers \[0, 1, 2\], cross-attention in \[0, 1\]"):
        tables.qformer_config(ArraySource(arrays), num_heads=3)


def test_a_file_without_a_qformer_is_told_what_was_looked_for() -> None:
    with pytest.raises(
        UserError, match=r"holds 0 Q-Formers .*qformer\.layernorm\.weight \(BLIP-2 of"
    ):
        tables.naming_of(ArraySource({"blocks.0.norm1.weight": np.ones(3)}))


def test_a_file_without_query_tokens_is_told_so(arrays: Arrays) -> None:
    del arrays["query_tokens"]
    with pytest.raises(UserError, match=r"no query_tokens; expected layers from 0"):
        tables.qformer_config(ArraySource(arrays), num_heads=3)
