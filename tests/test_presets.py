"""minigpt4_jax.presets: the settings of an answer and their ranges, and the sizes of the published models."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.models.minigpt4 import abstract_params
from minigpt4_jax.presets import (
    MAX_SEED,
    ORIGINAL_GENERATION,
    GenerationConfig,
    get_preset,
)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"temperature": -1.0}, r"temperature is -1.0; expected 0 \(always the likeliest token\) or a number"),
        ({"temperature": 1e-5}, "temperature is 1e-05; expected 0"),
        ({"temperature": 1e6}, "temperature is 1000000.0; expected .* to 100"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1; expected a whole number above 0, or 0"),
        ({"top_k": 2**31}, "top_k is 2147483648"),
        ({"top_p": 0.0}, "top_p is 0.0; expected a number above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1; expected a whole number from 0 to 128"),
        ({"max_new_tokens": 5, "min_new_tokens": 6}, "min_new_tokens is 6; expected .* to 5, which is max_new"),
        ({"min_p": -0.1}, r"min_p is -0.1; expected a number from 0 \(off\) to 1"),
        ({"min_p": math.nan}, "min_p is nan"),
        ({"presence_penalty": 2.1}, r"presence_penalty is 2.1; expected a number from -2 to 2 \(0 is off\)"),
        ({"frequency_penalty": math.nan}, "frequency_penalty is nan; expected a number from -2 to 2"),
        ({"num_beams": 2, "min_p": 0.1}, "num_beams is 2 and min_p is 0.1; expected it off"),
        ({"num_beams": 2, "min_new_tokens": 1}, "num_beams is 2 and min_new_tokens is 1"),
        ({"num_beams": 2, "presence_penalty": 1.0}, "num_beams is 2 and presence_penalty is 1.0"),
        ({"num_beams": 2, "frequency_penalty": -1.0}, "num_beams is 2 and frequency_penalty is -1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; expected a number above 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"repetition_penalty": math.nan}, "repetition_penalty is nan"),
        ({"num_beams": 0}, r"num_beams is 0; expected at least 1 \(1 is off\)"),
        ({"length_penalty": math.inf}, "length_penalty is inf; expected a number"),
        ({"num_beams": 3, "temperature": 0.5}, "num_beams is 3 and temperature is 0.5; expected temperature 0 with"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0 to 4294967295, or none"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)  # fmt: skip
def test_settings_without_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        GenerationConfig(**settings)


def test_the_ends_of_every_range_are_settings() -> None:
    ends: tuple[dict[str, Any], ...] = (
        {"max_new_tokens": 1, "temperature": 0.01, "top_k": 1, "top_p": 1e-6, "seed": 0},
        {"temperature": 100.0, "top_k": 2**31 - 1, "top_p": 1.0, "seed": MAX_SEED},
        {"repetition_penalty": 0.5},
        {"num_beams": 10, "length_penalty": -1.0},
        {"num_beams": 1, "temperature": 1.0},
        {"max_new_tokens": 7, "min_new_tokens": 7, "min_p": 1.0},
        {"presence_penalty": -2.0, "frequency_penalty": 2.0},
    )
    for settings in ends:
        GenerationConfig(**settings)


def test_smol_is_greedy_and_the_published_models_answer_as_in_the_original() -> None:
    off: dict[str, Any] = {
        "min_new_tokens": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0
    }  # fmt: skip
    assert get_preset("smol").generation == GenerationConfig(
        max_new_tokens=128,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        seed=None,
        num_beams=1,
        length_penalty=1.0,
        **off,
    )
    original = {"max_new_tokens": 300, "temperature": 1.0, "top_k": 50, "top_p": 0.9}
    original |= {"repetition_penalty": 1.05, "seed": None, "num_beams": 1, "length_penalty": 1.0}
    original |= off
    assert dataclasses.asdict(ORIGINAL_GENERATION) == original
    assert all(get_preset(name).generation == ORIGINAL_GENERATION for name in PUBLISHED)


COMMON = {"vit": 985_894_528, "ln_vision": 2 * 1408}
QFORMER = {"qformer": 105_137_664, "query_tokens": 24_576}
PUBLISHED: dict[str, tuple[int, dict[str, int]]] = {
    "llama2-7b": (64, COMMON | {"llama": 6_738_415_616, "llama_proj": 23_072_768}),
    "vicuna-7b": (32, COMMON | QFORMER | {"llama": 6_738_423_808, "llama_proj": 3_149_824}),
    "vicuna-13b": (32, COMMON | QFORMER | {"llama": 13_015_874_560, "llama_proj": 3_937_280}),
}
"""Image tokens, and parameters of each part. Docs and logs of the original name the projections' and the language
models' numbers, those of the tower and the Q-Former follow from its code."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_as_many_parameters_as_the_original(name: str) -> None:
    model = get_preset(name).model
    image_tokens, counts = PUBLISHED[name]
    found = {
        part: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for part, tree in abstract_params(model).items()
    }
    assert found == counts
    assert model.num_image_tokens == image_tokens


def test_the_published_models_have_the_constants_that_no_shape_shows() -> None:
    seven, thirteen, llama2 = (
        get_preset(name) for name in ("vicuna-7b", "vicuna-13b", "llama2-7b")
    )
    for preset in (seven, thirteen, llama2):
        llama = preset.model.llama
        assert (llama.head_dim, llama.rope_base, llama.tie_embeddings) == (128, 10_000.0, False)
        assert (preset.model.vit.norm_eps, preset.model.ln_vision_eps) == (1e-6, 1e-5)
        assert (preset.model.vit.image_size, preset.model.vit.num_heads) == (224, 16)
    for vicuna in (seven, thirteen):
        assert vicuna.template == "vicuna_v0"
        llama, qformer = vicuna.model.llama, vicuna.model.qformer
        assert (llama.vocab_size, llama.norm_eps, llama.max_positions) == (32_001, 1e-6, 2048)
        assert qformer is not None
        assert (qformer.num_heads, qformer.cross_attention_every, qformer.norm_eps) == (
            12,
            2,
            1e-12,
        )
    llama = llama2.model.llama
    assert llama2.template == "llama2"
    assert (llama.vocab_size, llama.norm_eps, llama.max_positions) == (32_000, 1e-5, 4096)


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        UserError,
        match=r"no preset 'huge'; expected one of llama2-7b, smol, tiny, tiny-qf.*, vicuna-7b",
    ):
        get_preset("huge")
