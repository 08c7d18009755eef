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
    PRESETS,
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
    for settings in (
        {"max_new_tokens": 1, "temperature": 0.01, "top_k": 1, "top_p": 1e-6, "seed": 0},
        {"temperature": 100.0, "top_k": 2**31 - 1, "top_p": 1.0, "seed": MAX_SEED},
        {"repetition_penalty": 0.5},
        {"num_beams": 10, "length_penalty": -1.0},
        {"num_beams": 1, "temperature": 1.0},
    ):
        GenerationConfig(**settings)  # type: ignore[arg-type]


def test_smol_is_greedy_and_the_published_models_answer_as_in_the_original() -> None:
    assert get_preset("smol").generation == GenerationConfig(
        max_new_tokens=128,
        temperature=0.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        seed=None,
        num_beams=1,
        length_penalty=1.0,
    )
    original = {"max_new_tokens": 300, "temperature": 1.0, "top_k": 50, "top_p": 0.9}
    original |= {"repetition_penalty": 1.05, "seed": None, "num_beams": 1, "length_penalty": 1.0}
    assert dataclasses.asdict(ORIGINAL_GENERATION) == original
    published = [preset for name, preset in PRESETS.items() if name not in ("tiny", "smol")]
    assert published
    assert all(preset.generation == ORIGINAL_GENERATION for preset in published)


def test_the_llama_2_model_has_the_sizes_of_the_published_one() -> None:
    def count(tree: Any) -> int:
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))

    params = abstract_params(get_preset("llama2-7b").model)
    # The original's own numbers: docs and logs name the projection's and the LLM's, the tower's follows from its code.
    assert count(params["llama_proj"]) == 23_072_768
    assert count(params["llama"]) == 6_738_415_616
    assert count(params["vit"]) == 985_894_528
    assert get_preset("llama2-7b").model.num_image_tokens == 64


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="no preset 'huge'; expected one of llama2-7b, smol, tiny"):
        get_preset("huge")
