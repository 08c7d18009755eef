"""The named models: sizes and the conventions that belong to them. YAML picks one by name and holds no sizes.

Not for: where weights come from (`convert/`), nor how they are trained (`configs/`).

Differs from the original, where the settings of an answer are spread over a signature, a demo script and a default
hidden in transformers (top-k 50): here they are the preset's, in one place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from minigpt4_jax.config import LlamaConfig, ModelConfig, QFormerConfig, UserError, VitConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


MAX_SEED = 2**32 - 1


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How answers are written; as it stands greedy and short, which is what `smol` does.

    Raises `UserError` for a number outside its range, for beams with a temperature (they never draw; the original's
    demo does both at once, transformers' beam sampling) and for beams with settings that their search does not know.
    Changing a number never compiles anything, but for the number of beams; going from greedy to drawn answers does,
    once.
    """

    max_new_tokens: int = 128
    """Longest answer, in tokens."""
    min_new_tokens: int = 0
    """Shortest answer, in tokens: no stop token is chosen before."""
    temperature: float = 0.0
    """0 always takes the likeliest token (greedy); 1 draws as the model says; above 1 the unlikely gains."""
    top_k: int = 0
    """Draws only from so many of the likeliest tokens; 0 is off."""
    top_p: float = 1.0
    """Draws only from the likeliest tokens that together reach this probability; 1 is off."""
    min_p: float = 0.0
    """Draws only from tokens that have at least this share of the likeliest one's probability; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that the answer already has become less likely; 1 is off."""
    presence_penalty: float = 0.0
    """Taken once from the logit of each token that the answer already has; 0 is off."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token as often as the answer already has it; 0 is off."""
    num_beams: int = 1
    """Above 1 searches for the most probable answers with so many beams, and gives the best; it then comes whole."""
    length_penalty: float = 1.0
    """With beams: above 0 long answers gain, below 0 short ones; 0 compares the sums of log-probabilities."""
    seed: int | None = None
    """The same seed and conversation give the same answer; None takes a new one for each conversation."""

    def __post_init__(self) -> None:
        checks: tuple[tuple[str, bool, str], ...] = (
            ("max_new_tokens", _is_whole(self.max_new_tokens, 1), "at least 1"),
            (
                "min_new_tokens",
                _is_whole(self.min_new_tokens, 0, self.max_new_tokens),
                f"a whole number from 0 to {self.max_new_tokens}, which is max_new_tokens",
            ),
            (
                "temperature",
                self.temperature == 0 or 0.01 <= self.temperature <= 100,
                "0 (always the likeliest token) or a number from 0.01 to 100",
            ),
            ("top_k", _is_whole(self.top_k, 0), "a whole number above 0, or 0 (off)"),
            ("top_p", 0 < self.top_p <= 1, "a number above 0 and at most 1 (1 is off)"),
            ("min_p", 0 <= self.min_p <= 1, "a number from 0 (off) to 1"),
            (
                "repetition_penalty",
                self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
                "a number above 0 (1.0 is off)",
            ),
            (
                "presence_penalty",
                abs(self.presence_penalty) <= 2,
                "a number from -2 to 2 (0 is off)",
            ),
            (
                "frequency_penalty",
                abs(self.frequency_penalty) <= 2,
                "a number from -2 to 2 (0 is off)",
            ),
            ("num_beams", _is_whole(self.num_beams, 1), "at least 1 (1 is off)"),
            ("length_penalty", math.isfinite(self.length_penalty), "a number"),
            (
                "seed",
                self.seed is None or _is_whole(self.seed, 0, MAX_SEED),
                f"a whole number from 0 to {MAX_SEED}, or none for a new one each time",
            ),
        )
        for name, holds, expected in checks:
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)}; expected {expected}.")
        if self.num_beams > 1 and self.temperature > 0:
            raise UserError(
                f"num_beams is {self.num_beams} and temperature is {self.temperature}; expected temperature 0 with "
                "beams (they search, and draw nothing), or num_beams 1 for drawn answers."
            )
        unknown = [name for name in UNKNOWN_TO_BEAMS if getattr(self, name)]
        if self.num_beams > 1 and unknown:
            raise UserError(
                f"num_beams is {self.num_beams} and {unknown[0]} is {getattr(self, unknown[0])}; expected it off (0) "
                "with beams: their search, which is the original's, does not know it."
            )


UNKNOWN_TO_BEAMS = ("min_new_tokens", "min_p", "presence_penalty", "frequency_penalty")
"""Settings that beams would leave unused; each is off at 0."""


def _is_whole(value: object, least: int, most: int = 2**31 - 1) -> bool:
    return isinstance(value, int) and least <= value <= most


ORIGINAL_GENERATION = GenerationConfig(
    max_new_tokens=300, temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.05
)
"""What the original's chat does unless told otherwise; the top-k is transformers' own default."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model with everything that has to agree with its weights."""

    model: ModelConfig
    template: str
    """Name of the conversation template in `data/prompts.py`."""
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    generation: GenerationConfig
    """How its answers are written unless the caller says otherwise."""


_EVA_VIT_G = VitConfig(
    image_size=224,
    patch_size=14,
    width=1408,
    num_layers=39,
    num_heads=16,
    mlp_width=6144,
    norm_eps=1e-6,
)
"""EVA ViT-g/14 without its last block, as BLIP-2 and MiniGPT-4 use it."""
_QFORMER = QFormerConfig(
    num_queries=32,
    width=768,
    num_layers=12,
    num_heads=12,
    mlp_width=3072,
    cross_attention_every=2,
    norm_eps=1e-12,
)
"""BERT-base with cross-attention, of BLIP-2."""
_VICUNA_7B = LlamaConfig(
    vocab_size=32001,
    width=4096,
    mlp_width=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rope_base=10000.0,
    norm_eps=1e-6,
    tie_embeddings=False,
    max_positions=2048,
)


def _vicuna(llama: LlamaConfig) -> Preset:
    """The published models on a Vicuna v0."""
    return Preset(
        model=ModelConfig(
            vit=_EVA_VIT_G,
            qformer=_QFORMER,
            llama=llama,
            ln_vision_eps=1e-5,
            patches_per_token=None,
        ),
        template="vicuna_v0",
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        generation=ORIGINAL_GENERATION,
    )


_TINY = Preset(
    model=ModelConfig(
        vit=VitConfig(
            image_size=28,
            patch_size=7,
            width=32,
            num_layers=2,
            num_heads=4,
            mlp_width=48,
            norm_eps=1e-6,
        ),
        qformer=None,
        llama=LlamaConfig(
            vocab_size=384,
            width=32,
            mlp_width=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            rope_base=10000.0,
            norm_eps=1e-5,
            tie_embeddings=True,
            max_positions=256,
        ),
        ln_vision_eps=1e-6,
        patches_per_token=4,
    ),
    template="chatml",
    image_mean=IMAGENET_MEAN,
    image_std=IMAGENET_STD,
    generation=GenerationConfig(),
)
"""Random weights, seconds to run: unit tests and CI."""

PRESETS: dict[str, Preset] = {
    "tiny": _TINY,
    "tiny-qformer": replace(
        _TINY,
        model=replace(
            _TINY.model,
            qformer=QFormerConfig(
                num_queries=5,
                width=24,
                num_layers=3,
                num_heads=3,
                mlp_width=40,
                cross_attention_every=2,
                norm_eps=1e-12,
            ),
            patches_per_token=None,
        ),
    ),
    # DINOv2 ViT-S/14 and SmolLM2-135M-Instruct. Sixteen patches (one row of the grid) make a token: 16 tokens and a
    # 3.5 M projection cost half the compute of 64 tokens and 0.9 M, on a model meant for laptops.
    "smol": Preset(
        model=ModelConfig(
            vit=VitConfig(
                image_size=224,
                patch_size=14,
                width=384,
                num_layers=12,
                num_heads=6,
                mlp_width=1536,
                norm_eps=1e-6,
            ),
            qformer=None,
            llama=LlamaConfig(
                vocab_size=49152,
                width=576,
                mlp_width=1536,
                num_layers=30,
                num_heads=9,
                num_kv_heads=3,
                head_dim=64,
                rope_base=100000.0,
                norm_eps=1e-5,
                tie_embeddings=True,
                max_positions=8192,
            ),
            ln_vision_eps=1e-6,
            patches_per_token=16,
        ),
        template="chatml",
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        generation=GenerationConfig(),
    ),
    # The published models; their weights are for the user to convert. Llama-2: no Q-Former, Llama-2-chat 7B.
    "llama2-7b": Preset(
        model=ModelConfig(
            vit=_EVA_VIT_G,
            qformer=None,
            llama=replace(_VICUNA_7B, vocab_size=32000, norm_eps=1e-5, max_positions=4096),
            ln_vision_eps=1e-5,
            patches_per_token=4,
        ),
        template="llama2",
        image_mean=CLIP_MEAN,
        image_std=CLIP_STD,
        generation=ORIGINAL_GENERATION,
    ),
    # Behind the Q-Former, 32 image tokens; Vicuna v0, which has one row more than LLaMA's vocabulary.
    "vicuna-7b": _vicuna(_VICUNA_7B),
    "vicuna-13b": _vicuna(
        replace(
            _VICUNA_7B, width=5120, mlp_width=13824, num_layers=40, num_heads=40, num_kv_heads=40
        )
    ),
}


def get_preset(name: str) -> Preset:
    """Looks a preset up. Raises `UserError` with the known names."""
    if name not in PRESETS:
        raise UserError(
            f"There is no preset {name!r}; expected one of {', '.join(sorted(PRESETS))}."
        )
    return PRESETS[name]
