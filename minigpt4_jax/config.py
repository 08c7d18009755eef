"""The schema: every size and every decision is a field of a frozen dataclass in this file.

For: what a model is made of (`ModelConfig`) and what a training run is (`TrainConfig`). Not for: reading them from YAML
(`config_file.py`), the named sizes themselves (`presets.py`) and anything that needs JAX.

The original spreads these over three YAML levels and `from_config` methods that drop keys in silence; here an
unknown key is an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

IMAGE_TOKEN_ID = -1
"""The id that stands for one image token in a prompt. No vocabulary has it, so typed text can never become it."""


class UserError(Exception):
    """A problem the user can mend. The message gives the value, what was expected and what to do."""


def _require_positive(config: Any, *names: str) -> None:
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
        _require_positive(self)
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
        _require_positive(self)
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
        _require_positive(self, "ln_vision_eps")
        if (self.qformer is None) == (self.patches_per_token is None):
            raise UserError(
                f"ModelConfig.qformer is {self.qformer} and patches_per_token {self.patches_per_token}; expected one "
                "of the two and None for the other: image tokens are the Q-Former's queries, or groups of patches."
            )
        if self.patches_per_token is not None:
            _require_positive(self, "patches_per_token")
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


PROMPTS = ("What is this?",)
SOURCE_KINDS = ("cc_sbu_align", "jsonl", "tar", "array_record", "tfds")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of the sources that a run mixes."""

    kind: str
    """`cc_sbu_align` (a folder), `jsonl` (a file of one's own), `tar` (webdataset shards), `array_record`, `tfds`."""
    path: str
    """The folder or file; for tars also a pattern such as `laion/*.tar`."""
    weight: float = 1.0
    """A source of weight 115 beside one of 14 gives 115 of every 129 samples, exactly."""
    caption_processor: str = "none"
    """`none`, or `blip_caption` for web captions, as the original reads them."""
    index: str = ""
    """Of tars: where their index is kept. Empty: in their folder."""

    def __post_init__(self) -> None:
        _require_positive(self, "weight")
        if self.kind not in SOURCE_KINDS:
            raise UserError(
                f"The kind of a source is {self.kind!r}; expected one of {', '.join(SOURCE_KINDS)}."
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads, and in which words the picture is asked about."""

    folder: str = ""
    """Short for one source: a folder in the `cc_sbu_align` format (`filter_cap.json` and `image/{image_id}.jpg`)."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """By name; give these or `folder`."""
    max_corrupt_share: float = 0.01
    """A corrupt sample is replaced and counted; when more of a source than this share is corrupt, the run stops."""
    random_resized_crop: bool = False
    """A random part of each picture, as the released v1 weights were trained (see data/pixels.py)."""
    num_threads: int = 1
    """Threads that make batches ahead; more where pictures are decoded during training."""
    prompts: tuple[str, ...] = PROMPTS
    """One is drawn per sample (seeded by its index) where the annotation brings no prompt of its own. An empty list is
    the original's first stage: no prompt, not even the template's, only bos, picture and caption."""
    prompt_path: str = ""
    """A file of prompts instead, one a line, as the original's `prompts/alignment.txt`."""
    template: str = "chatml"
    end_sym: str = ""
    """After every answer: a control token by its spelling, or text. Empty: the template's own."""
    batch_size: int = 32
    length_multiple: int = 8
    """Sequences are padded up to a multiple of this, so that a run compiles only a few shapes."""
    max_text_len: int = 160
    """Longest answer in tokens, end symbol included. A longer one is an error that names the sample."""
    max_context_len: int = 3800
    """Longest prompt in tokens, its picture included, bos not. A longer one is an error that shows it."""
    truncate: bool = False
    """Cut what is too long on its right instead, as the original does; the run says how much. A cut answer has no end
    symbol, a cut prompt can lose its picture."""
    mask_pad_token: bool = False
    """The tokenizer's pad token counts nothing in the loss even inside an answer: the original does so with `$$`."""
    seed: int = 42

    def __post_init__(self) -> None:
        _require_positive(
            self, "batch_size", "length_multiple", "max_text_len", "max_context_len", "num_threads"
        )
        if not 0 <= self.max_corrupt_share <= 1:
            raise UserError(
                f"data.max_corrupt_share is {self.max_corrupt_share}; expected a share from 0 to 1."
            )
        if self.folder and self.sources:
            raise UserError(
                f"data.folder is {self.folder!r} and data.sources has {', '.join(self.sources)}; expected one of "
                "the two. Write the folder as a source of the kind cc_sbu_align."
            )
        if self.prompt_path and self.prompts != PROMPTS:
            raise UserError(
                f"data.prompt_path is {self.prompt_path!r} and data.prompts is {list(self.prompts)}; expected one of "
                "the two. Remove the other."
            )

    def all_sources(self) -> dict[str, SourceConfig]:
        """The sources, with `folder` written out."""
        if self.folder:
            return {"folder": SourceConfig(kind="cc_sbu_align", path=self.folder)}
        return self.sources


OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon (training/optimizer.py), and how the learning rate goes. One step is one batch.

    The defaults are the sane forms; docs/differences.md says which values give the original's, quirk for quirk.
    """

    name: str = "adamw"
    """`adamw`, as the original, or `muon` (see training/optimizer.py)."""
    lr_sched: Literal[
        "warmup_cosine", "warmup_step", "linear_warmup_cosine_lr", "linear_warmup_step_lr"
    ] = "warmup_cosine"
    """The first two warm up once and start to fall where the warm-up ends; the last two are the original's."""
    init_lr: float = 1e-3
    """Learning rate at the end of the warm-up."""
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    """Learning rate of the first step. Below 0: `init_lr`, so that there is no warm-up."""
    warmup_steps: int = 100
    max_steps: int = 1000
    """Batches in the whole run: the original's `max_epoch * iters_per_epoch`."""
    iters_per_epoch: int = 0
    """Steps that count as an epoch where a schedule or the original's accumulation asks for one. 0: the whole run."""
    lr_decay_rate: float = 1.0
    """What the `step` schedules multiply the rate with after each epoch."""
    accum_grad_iters: int = 1
    """Batches per update of the projection."""
    accum_grads: Literal["mean", "sum"] = "mean"
    """`mean`: over all counted tokens of these batches, as if they were one. `sum`: of the batches' own means, counted
    within an epoch, what is left over kept for the next: as the original."""
    weight_decay: float = 0.05
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    """Of AdamW; Muon has its own."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise UserError(
                f"optimizer.name is {self.name!r}; expected one of {', '.join(OPTIMIZERS)}."
            )
        _require_positive(self, "init_lr", "max_steps", "eps", "lr_decay_rate", "accum_grad_iters")
        original = self.lr_sched.startswith("linear_")  # its runs may end within the warm-up
        if not 0 <= self.warmup_steps <= (self.warmup_steps if original else self.max_steps):
            raise UserError(
                f"optimizer.warmup_steps is {self.warmup_steps}; expected 0 to max_steps ({self.max_steps})."
            )
        if self.iters_per_epoch < 0:
            raise UserError(
                f"optimizer.iters_per_epoch is {self.iters_per_epoch}; expected the steps of an epoch, or 0."
            )
        if self.accum_grads == "mean" and self.max_steps % self.accum_grad_iters:
            raise UserError(
                f"optimizer.max_steps is {self.max_steps} and accum_grad_iters {self.accum_grad_iters}; expected a "
                "multiple of it: the last batches would be read and never used."
            )
        if self.accum_grads == "sum" and self.accum_grad_iters > self.epoch_steps:
            raise UserError(
                f"optimizer.accum_grad_iters is {self.accum_grad_iters} in epochs of {self.epoch_steps} steps; with "
                "accum_grads=sum no update would ever be made. Use mean, or longer epochs."
            )

    @property
    def epoch_steps(self) -> int:
        """Batches in an epoch."""
        return self.iters_per_epoch or self.max_steps


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
    cache_features: bool = True
    """Pictures are encoded once, before training. False: in every step, for sets too large for that."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    licence: str = ""
    """Written into the finished projection's header: the terms of what was trained."""
    attribution: str = ""
    """Written beside it: whose pictures and words it was trained on, as their licences ask."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard events to `<workdir>/tensorboard` (the `tensorboard` extra)."""
    save_every: int = 200
    log_every: int = 10
    max_to_keep: int = 2
    seed: int = 42

    def __post_init__(self) -> None:
        _require_positive(self, "save_every", "log_every", "max_to_keep")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise UserError(f"dtype is {self.dtype!r}; expected one of auto, float32, bfloat16.")
        if self.data.random_resized_crop and self.cache_features:
            raise UserError(
                "data.random_resized_crop is true with cache_features true; expected one view per picture in a cache. "
                "Set cache_features=false, or leave the crop out."
            )
        if self.init_projection == "ridge" and not self.cache_features:
            raise UserError(
                "init_projection is 'ridge' with cache_features false; expected random or a file: the closed form "
                "needs the features of all pictures. Set init_projection=random."
            )
