"""What a model is made of: every size is a field of a frozen dataclass in this file.

For: `ModelConfig` and its parts, and `UserError`. Not for: what a training run is (`train_config.py`), reading either
from YAML (`config_file.py`), the named sizes themselves (`presets.py`) and anything that needs JAX.

The original spreads these over three YAML levels and `from_config` methods that drop keys in silence; here an
unknown key is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

IMAGE_TOKEN_ID = -1
"""The id that stands for one image token in a prompt. No vocabulary has it, so typed text can never become it."""


class UserError(Exception):
    """A problem the user can mend. The message gives the value, what was expected and what to do."""


def require_positive(config: Any, *names: str) -> None:
    """Of the named fields; of all if none is named."""
    for name in names or [each.name for each in fields(config)]:
        value = getattr(config, name)
        if not 0 < value < float("inf"):
            raise UserError(
                f"{type(config).__name__}.{name} is {value!r}; expected a number above 0."
            )


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """Sizes of the image tower (EVA-ViT, or a DINOv2 ViT folded into it)."""

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    norm_eps: float

    def __post_init__(self) -> None:
        require_positive(self)
        if self.image_size % self.patch_size:
            raise UserError(
                f"VitConfig.image_size {self.image_size} is not a multiple of patch_size {self.patch_size}."
            )
        if self.width % self.num_heads:
            raise UserError(
                f"VitConfig.width {self.width} is not a multiple of num_heads {self.num_heads}."
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one picture, the class token not counted."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


@dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """Sizes of the Q-Former; its cross-attention reads tokens of the image tower's width."""

    num_queries: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    cross_attention_every: int
    """2: layers 0, 2, 4... look at the picture, those between only at the queries."""
    norm_eps: float

    def __post_init__(self) -> None:
        require_positive(self)
        if self.width % self.num_heads:
            raise UserError(
                f"QFormerConfig.width {self.width} is not a multiple of num_heads {self.num_heads}."
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    def has_cross_attention(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) looks at the picture."""
        return layer % self.cross_attention_every == 0


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of the language model (LLaMA 1/2, Vicuna, SmolLM2)."""

    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_base: float
    norm_eps: float
    tie_embeddings: bool
    max_positions: int

    def __post_init__(self) -> None:
        require_positive(
            self,
            "vocab_size",
            "width",
            "mlp_width",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "rope_base",
            "norm_eps",
            "max_positions",
        )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"LlamaConfig.num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}; grouped-query attention needs whole groups."
            )
        if self.head_dim % 2:
            raise UserError(
                f"LlamaConfig.head_dim is {self.head_dim}; rotary embeddings need an even number."
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Image tower, Q-Former if it has one, projection and language model.

    Either the Q-Former's outputs are the image tokens, or `patches_per_token` consecutive patches (raster order, class
    token dropped) make one: 4 in the original's models without a Q-Former. The other of the two is None.
    """

    vit: VitConfig
    qformer: QFormerConfig | None
    llama: LlamaConfig
    ln_vision_eps: float
    patches_per_token: int | None

    def __post_init__(self) -> None:
        require_positive(self, "ln_vision_eps")
        if (self.qformer is None) == (self.patches_per_token is None):
            raise UserError(
                f"ModelConfig.qformer is {self.qformer} and patches_per_token {self.patches_per_token}; expected one "
                "of the two and None for the other: image tokens are the Q-Former's queries, or groups of patches."
            )
        if self.patches_per_token is not None:
            require_positive(self, "patches_per_token")
            if self.vit.num_patches % self.patches_per_token:
                raise UserError(
                    f"ModelConfig.patches_per_token {self.patches_per_token} does not divide the "
                    f"{self.vit.num_patches} patches of a {self.vit.image_size}-pixel picture."
                )

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Rows and width of what the frozen image path makes of a picture: query outputs, or patches."""
        if self.qformer is not None:
            return self.qformer.num_queries, self.qformer.width
        return self.vit.num_patches, self.vit.width

    @property
    def num_image_tokens(self) -> int:
        """Image tokens that one picture becomes in the prompt."""
        return self.feature_shape[0] // (self.patches_per_token or 1)

    @property
    def projection_in(self) -> int:
        """Input width of `llama_proj`."""
        return self.feature_shape[1] * (self.patches_per_token or 1)

    @property
    def vision_parts(self) -> tuple[str, ...]:
        """Names of the frozen parameters that make features of pictures."""
        plain = ("vit", "ln_vision")
        return plain if self.qformer is None else (*plain, "query_tokens", "qformer")
