"""The schema: every size and every decision is a field of a frozen dataclass in this file.

For: what a model is made of (`ModelConfig`), what a training run is (`TrainConfig`) and reading both from YAML
with `key=value` overrides. Not for: the named sizes themselves (`presets.py`) and anything that needs JAX.

The original spreads these over three YAML levels and `from_config` methods that drop keys in silence; here an
unknown key is an error.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field


IMAGE_TOKEN_ID = -1
"""The id that stands for one image token in a prompt. No vocabulary has it, so typed text can never become it."""


class UserError(Exception):
    """A problem the user can mend. The message gives the value, what was expected and what to do."""


def _require_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
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
        _require_positive(
            self,
            "image_size",
            "patch_size",
            "width",
            "num_layers",
            "num_heads",
            "mlp_width",
            "norm_eps",
        )
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
        _require_positive(
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
    """Image tower, projection and language model.

    `patches_per_token` consecutive patches (raster order, class token dropped) make one image token: 4 in the
    original's models without a Q-Former. The Q-Former's own config joins here when it is built.
    """

    vit: VitConfig
    llama: LlamaConfig
    ln_vision_eps: float
    patches_per_token: int

    def __post_init__(self) -> None:
        _require_positive(self, "ln_vision_eps", "patches_per_token")
        if self.vit.num_patches % self.patches_per_token:
            raise UserError(
                f"ModelConfig.patches_per_token {self.patches_per_token} does not divide the "
                f"{self.vit.num_patches} patches of a {self.vit.image_size}-pixel picture."
            )

    @property
    def num_image_tokens(self) -> int:
        """Image tokens that one picture becomes in the prompt."""
        return self.vit.num_patches // self.patches_per_token

    @property
    def projection_in(self) -> int:
        """Input width of `llama_proj`."""
        return self.vit.width * self.patches_per_token


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads, and in which words the picture is asked about."""

    folder: str = ""
    """A folder in the `cc_sbu_align` format: `filter_cap.json` and `image/{image_id}.jpg`."""
    prompts: tuple[str, ...] = ("What is this?",)
    """One is drawn per sample (seeded by its index) where the annotation brings no prompt of its own."""
    template: str = "chatml"
    batch_size: int = 32
    length_multiple: int = 8
    """Sequences are padded up to a multiple of this, so that a run compiles only a few shapes."""
    max_text_len: int = 160
    """Longest answer in tokens, end symbol included. A longer one is an error that names the sample."""
    seed: int = 42

    def __post_init__(self) -> None:
        _require_positive(self, "batch_size", "length_multiple", "max_text_len")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine decay (Loshchilov & Hutter, arXiv 1711.05101 and 1608.03983)."""

    init_lr: float = 1e-3
    """Learning rate at the end of the warm-up."""
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_steps: int = 100
    max_steps: int = 1000
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _require_positive(self, "init_lr", "max_steps", "eps")
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise UserError(
                f"optimizer.warmup_steps is {self.warmup_steps}; expected 0 to max_steps ({self.max_steps})."
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run of the projection."""

    preset: str = "smol"
    workdir: str = ""
    """Checkpoints, the metrics and the finished projection go here; a run that is started again resumes here."""
    init_projection: str = "ridge"
    """`ridge` (closed form, see training/init.py), `random`, or the path of a projection file."""
    dtype: str = "auto"
    """Storage and compute dtype of the frozen weights: `float32`, `bfloat16`, or `auto` (float32 on a CPU)."""
    feature_cache: str = ""
    """Where the frozen vision features are kept. Empty: `<workdir>/features`."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    save_every: int = 200
    log_every: int = 10
    max_to_keep: int = 2
    seed: int = 42

    def __post_init__(self) -> None:
        _require_positive(self, "save_every", "log_every", "max_to_keep")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(
                f"dtype is {self.dtype!r}; expected one of auto, float32, bfloat16."
            )
