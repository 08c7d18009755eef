"""The named models: sizes and the conventions that belong to them. YAML picks one by name and holds no sizes.

Not for: where weights come from (`convert/`), nor how they are trained (`configs/`).
"""

from __future__ import annotations

from dataclasses import dataclass

from minigpt4_jax.config import LlamaConfig, ModelConfig, UserError, VitConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A model with everything that has to agree with its weights."""

    model: ModelConfig
    template: str
    """Name of the conversation template in `data/prompts.py`."""
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


PRESETS: dict[str, Preset] = {
    # Random weights, seconds to run: unit tests and CI.
    "tiny": Preset(
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
    ),
}


def get_preset(name: str) -> Preset:
    """Looks a preset up. Raises `UserError` with the known names."""
    if name not in PRESETS:
        raise UserError(
            f"There is no preset {name!r}; expected one of {', '.join(sorted(PRESETS))}."
        )
    return PRESETS[name]
