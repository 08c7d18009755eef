"""A file in the wrong place, a delta for a model, another language model: each is told by name, with what to do."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from convert import detect
from convert.detect import Kind
from convert.sources import ArraySource
from minigpt4_jax.config import LlamaConfig, UserError
from minigpt4_jax.presets import PRESETS
from tests import llama_forms as forms

LAYER = "Qformer.bert.encoder.layer.0.attention.self.query.weight"
MARKS: dict[Kind, tuple[str, ...]] = {
    Kind.EVA_VIT: ("cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    Kind.QFORMER: ("query_tokens", "ln_vision.weight", LAYER),
    Kind.BLIP2: (
        "query_tokens",
        "vision_model.embeddings.patch_embedding.weight",
        "language_model.model.embed_tokens.weight",
    ),
    Kind.LLAMA: ("model.embed_tokens.weight", "model.norm.weight"),
    Kind.PROJECTION: ("llama_proj.weight", "llama_proj.bias"),
    Kind.TRAINER: ("llama_proj.weight", "Qformer.bert.embeddings.position_ids"),
    Kind.MINIGPT_V2: ("llama_proj.weight", "llama_model.x.q_proj.lora_A.default.weight"),
    Kind.UNKNOWN: ("a.weight",),
}
"""What such files hold, by their formats; made up but for the names."""


def source_of(kind: Kind) -> ArraySource:
    return ArraySource({name: np.ones((2, 2), np.float32) for name in MARKS[kind]})


@pytest.mark.parametrize("kind", MARKS)
def test_kind_is_told_by_names(kind: Kind) -> None:
    assert detect.kind_of(source_of(kind)) is kind


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "token_embd.weight"])
def test_other_forms_of_a_language_model_are_told(name: str) -> None:
    assert detect.kind_of(ArraySource({name: np.ones(2)})) is Kind.LLAMA


def test_optimizer_beside_a_projection_marks_a_trainer() -> None:
    arrays = {"llama_proj.weight": np.ones((2, 2))}
    for beside, kind in ((["epoch"], Kind.PROJECTION), (["epoch", "optimizer"], Kind.TRAINER)):
        assert detect.kind_of(ArraySource(arrays, metadata={"left_alone": beside})) is kind


def test_file_of_this_project_says_so_itself() -> None:
    said = {"format": "minigpt4_jax.projection/1"}
    source = ArraySource({"llama_proj.weight": np.ones((2, 2))}, metadata=said)
    assert detect.kind_of(source) is Kind.OUR_PROJECTION


@pytest.mark.parametrize("option", detect.TAKES)
@pytest.mark.parametrize("kind", MARKS)
def test_file_under_the_wrong_option_is_named_with_the_right_one(kind: Kind, option: str) -> None:
    belongs = {
        Kind.EVA_VIT: ("--vit",),
        Kind.QFORMER: ("--qformer",),
        Kind.BLIP2: ("--vit", "--qformer"),
        Kind.LLAMA: ("--llm", "--delta"),  # told apart by values, not by names
        Kind.PROJECTION: ("--projection",),
        Kind.TRAINER: ("--projection",),
    }.get(kind, ())
    source = source_of(kind)
    if option in belongs:
        assert detect.require_option(source, option) is kind
        return
    with pytest.raises(UserError) as error:
        detect.require_option(source, option)
    message = str(error.value)
    assert f"was given as {option}, but it is {kind}" in message
    assert f"{option} takes {detect.TAKES[option]}" in message
    for right in detect.OPTIONS[kind]:
        assert right in message.partition("Give it with ")[2]


def test_lora_is_named_in_both_spellings() -> None:
    for spelling in ("lora_A.weight", "lora_B.default.weight", "lora_embedding_A"):
        source = ArraySource({f"m.q_proj.{spelling}": np.ones(2), "llama_proj.weight": np.ones(2)})
        with pytest.raises(UserError, match=rf"1 LoRA tensors, such as m\.q_proj\.{spelling}"):
            detect.require_option(source, "--projection")


# --- deltas -----------------------------------------------------------------------------------------------------------


def scaled(factor: float) -> ArraySource:
    """A model whose norms are `factor` times as large."""
    arrays = forms.draw(dtype=np.float32)
    return ArraySource({n: x * factor if "norm" in n else x for n, x in arrays.items()})


def test_model_and_delta_are_told_by_their_norms() -> None:
    for factor in (0.3, 1.0, 2.0):
        detect.require_merged(scaled(factor))
        with pytest.raises(UserError, match="given as --delta, but it is a whole model"):
            detect.require_delta(scaled(factor))
    for factor in (0.0, -0.001, 0.03):
        detect.require_delta(scaled(factor))
        with pytest.raises(UserError, match=r"is a delta, not a model: .* with --llm, and this"):
            detect.require_merged(scaled(factor))


@pytest.mark.parametrize(
    "names",
    [
        ("model.layers.{}.input_layernorm.weight", "model.norm.weight"),
        ("layers.{}.attention_norm.weight", "norm.weight"),
        ("blk.{}.attn_norm.weight", "output_norm.weight"),
    ],
)
def test_first_norm_may_be_near_zero_in_a_trained_model(names: tuple[str, str]) -> None:
    """As in SmolLM2-135M (0.022 at its first norm, 0.39 in the middle, 1.78 at the end) and in any form."""
    layers = {names[0].format(i): np.full(8, x, np.float16) for i, x in enumerate((0.022, 0.39))}
    assert detect.norm_scale(ArraySource(layers | {names[1]: np.full(8, 1.75)})) == 1.75
    assert detect.norm_scale(ArraySource(layers)) == pytest.approx(0.39, abs=1e-3)


def test_scale_is_the_median_so_that_one_large_channel_does_not_hide_a_delta() -> None:
    norm = np.zeros(64, np.float32)
    norm[3] = 9.0
    assert detect.norm_scale(ArraySource({"model.norm.weight": norm})) == 0.0


def test_only_norms_of_three_layers_are_read() -> None:
    arrays = {f"model.layers.{i}.input_layernorm.weight": np.ones(4) for i in range(40)}
    read = []

    class Counting(ArraySource):
        def get(self, name: str) -> np.ndarray:
            read.append(name.split(".")[2])
            return super().get(name)

    detect.norm_scale(Counting(arrays | {"model.embed_tokens.weight": np.ones((4, 4))}))
    assert sorted(read, key=int) == ["0", "20", "39"]


def test_tensors_without_norms_are_no_language_model() -> None:
    with pytest.raises(UserError, match="has no norms of a LLaMA"):
        detect.require_merged(source_of(Kind.EVA_VIT))


# --- which language model ---------------------------------------------------------------------------------------------

LLAMA2 = PRESETS["llama2-7b"].model.llama
VICUNA = PRESETS["vicuna-7b"].model.llama
VICUNA_13B = PRESETS["vicuna-13b"].model.llama


def check(found: LlamaConfig, expected: LlamaConfig) -> tuple[str, ...]:
    return detect.check_language_model(found, expected, where="m")


@pytest.mark.parametrize("model", [LLAMA2, VICUNA, VICUNA_13B])
def test_language_model_of_the_preset_is_taken(model: LlamaConfig) -> None:
    assert check(model, model) == ()


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        (VICUNA_13B, VICUNA, r"m is a 13B model .*width 5120 \(expected 4096\).*has a 7B model"),
        (VICUNA, VICUNA_13B, r"m is a 7B model .*num_layers 32 \(expected 40\).*has a 13B model"),
        (LLAMA2, VICUNA, r"32000 tokens; .* needs 32001\..*trained with Vicuna v0.*gibberish"),
        (VICUNA, LLAMA2, r"32001 tokens; .* needs 32000\..*the mark of Vicuna v0"),
        (PRESETS["smol"].model.llama, LLAMA2, r"m is a 1\d\dM model .*num_kv_heads 3"),
        (dataclasses.replace(LLAMA2, vocab_size=55296), LLAMA2, "Take the language model that"),
    ],
)
def test_other_language_model_is_refused_with_the_reason(
    found: LlamaConfig, expected: LlamaConfig, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check(found, expected)


def test_vicuna_of_the_next_version_is_told_from_v0() -> None:
    v11 = dataclasses.replace(VICUNA, vocab_size=32000)
    with pytest.raises(UserError, match=r"v1\.x separates turns by </s> instead of ###"):
        check(v11, VICUNA)


def test_numbers_that_are_taken_from_the_file_are_said() -> None:
    early = dataclasses.replace(LLAMA2, norm_eps=1e-6, max_positions=2048)
    notes: Any = check(early, LLAMA2)
    assert notes == (
        "norm_eps is 1e-06 in the file and 1e-05 in the preset: the file's is used",
        "max_positions is 2048 in the file and 4096 in the preset: the file's is used",
    )
