"""The schema: every size and every decision is a field of a frozen dataclass in this file.

For: what a model is made of (`ModelConfig`), what a training run is (`TrainConfig`) and reading both from YAML
with `key=value` overrides. Not for: the named sizes themselves (`presets.py`) and anything that needs JAX.

The original spreads these over three YAML levels and `from_config` methods that drop keys in silence; here an
unknown key is an error.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

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
        _require_positive(self, "batch_size", "length_multiple", "max_text_len", "num_threads")
        if not 0 <= self.max_corrupt_share <= 1:
            raise UserError(
                f"data.max_corrupt_share is {self.max_corrupt_share}; expected a share from 0 to 1."
            )
        if self.folder and self.sources:
            raise UserError(
                f"data.folder is {self.folder!r} and data.sources has {', '.join(self.sources)}; expected one of "
                "the two. Write the folder as a source of the kind cc_sbu_align."
            )

    def all_sources(self) -> dict[str, SourceConfig]:
        """The sources, with `folder` written out."""
        if self.folder:
            return {"folder": SourceConfig(kind="cc_sbu_align", path=self.folder)}
        return self.sources


OPTIMIZERS = ("adamw", "muon")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon, linear warm-up and cosine decay (Loshchilov & Hutter, arXiv 1711.05101 and 1608.03983)."""

    name: str = "adamw"
    """`adamw`, as the original, or `muon` (see training/optimizer.py)."""
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
    """Of AdamW; Muon has its own."""

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise UserError(
                f"optimizer.name is {self.name!r}; expected one of {', '.join(OPTIMIZERS)}."
            )
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
    cache_features: bool = True
    """Pictures are encoded once, before training. False: in every step, for sets too large for that."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    licence: str = ""
    """Written into the finished projection's header: the terms of what was trained."""
    attribution: str = ""
    """Written beside it: whose pictures and words it was trained on, as their licences ask."""
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


# --- reading ------------------------------------------------------------------------------------------------------

Schema = TypeVar("Schema")


def load(
    schema: type[Schema], path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()
) -> Schema:
    """Builds `schema` from its defaults, then the YAML file, then `key=value` overrides, the last word winning.

    Args:
        schema: a frozen dataclass; its fields may be dataclasses, `dict[str, Dataclass]`, numbers, strings, `Literal`
            and tuples of plain values (`tuple[Dataclass, ...]` would go through unchecked, so it has no place here).
        path: YAML file, or None for the defaults alone.
        overrides: dotted keys with YAML values, such as `optimizer.max_steps=100` or `data.prompts=[a, b]`.

    Raises:
        UserError: every unknown key (with the closest known one), wrong type and missing value, in one message.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    sources = [(str(path), _read_yaml(path))] if path is not None else []
    sources += [(f"override {text!r}", _read_override(text)) for text in overrides]
    merged = OmegaConf.structured(schema)
    problems = []
    for source, values in sources:
        for key, value in _leaves(values, schema):
            hint = _hint(schema, key)
            if hint is None:
                problems.append(f"{source}: unknown key {key!r}.{_suggest(key, schema)}")
                continue
            try:
                if isinstance(value, bool) and hint in (str, str | None):
                    raise ValueError
                merged = OmegaConf.merge(merged, _nest(key, value))
            except (OmegaConfBaseException, ValueError, TypeError) as error:
                # Only OmegaConf sees an unknown key inside a `dict[str, Dataclass]`.
                detail = f" ({str(error).splitlines()[0]})" if get_origin(hint) is dict else ""
                problems.append(
                    f"{source}: {key} is {value!r}; expected {_type_name(hint)}.{detail}"
                )
    if problems:
        raise UserError("\n".join(problems))
    where = path or "the command line"
    try:
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise UserError(
                "\n".join(
                    f"{where}: {key} is not set and has no default; expected "
                    f"{_type_name(_hint(schema, key))}. Add {key}=... to the command."
                    for key in missing
                )
            )
        return cast(Schema, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from error


def to_yaml(config: object) -> str:
    """The whole configuration as YAML that `load` reads back to an equal one (for `--print-config`)."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        values = OmegaConf.to_container(OmegaConf.load(Path(path)), resolve=False)
    except FileNotFoundError as error:
        raise UserError(f"There is no configuration file {str(path)!r}.") from error
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a list; expected lines of the form `key: value`.")
    return {str(key): value for key, value in values.items()}


def _read_override(text: str) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    key, equals, _ = text.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"{text!r} is not an override; expected key=value, without dashes.")
    try:
        values = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
    except YAMLError as error:
        raise UserError(f"The value in {text!r} is not YAML; quote it. ({error})") from error
    return cast(dict[str, Any], values)


def _leaves(values: dict[Any, Any], schema: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every entry, down to what is not a dataclass of the schema."""
    hints = get_type_hints(schema)
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value and dataclasses.is_dataclass(hints.get(str(name))):
            yield from _leaves(value, hints[str(name)], f"{key}.")
        else:
            yield key, value


def _hint(schema: Any, key: str) -> Any:
    """The type of a dotted key, or None where the schema has no such key."""
    hint = schema
    for name in key.split("."):
        if not dataclasses.is_dataclass(hint):
            return None
        hint = get_type_hints(hint).get(name)
    return hint


def _known_keys(schema: Any, prefix: str = "") -> Iterator[str]:
    for name, hint in get_type_hints(schema).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from _known_keys(hint, f"{prefix}{name}.")


def _suggest(key: str, schema: Any) -> str:
    known = {full: full.rpartition(".")[2] for full in _known_keys(schema)}
    known = {full: name for full, name in known.items() if not key.startswith(f"{full}.")}
    last = key.rpartition(".")[2]
    close = [full for full, name in known.items() if name == last]  # right name, wrong section
    close += difflib.get_close_matches(key, known, n=1)
    names = difflib.get_close_matches(last, known.values(), n=1)
    close += [full for full, name in known.items() if name in names]
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" The keys here are {', '.join(get_type_hints(schema))}."


def _nest(key: str, value: Any) -> Any:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


def _type_name(hint: Any) -> str:
    """A type in the words of somebody who writes YAML."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in names:
        return names[hint]
    if hint is type(None):
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in arguments)
    if origin in (Union, UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is tuple:
        items = [_type_name(argument) for argument in arguments if argument is not ...]
        if ... in arguments:
            return f"a list such as [a, b] whose items are {items[0]}"
        return f"a list of {len(items)}: {', '.join(items)}"
    if origin is dict:
        return f"`name: value` lines whose values are {_type_name(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return "a section with the keys " + ", ".join(get_type_hints(hint))
    return str(hint)
