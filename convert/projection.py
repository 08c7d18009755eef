"""The trained part: the `llama_proj` tree, its released PyTorch form, and the file that this project ships.

For: reading `llama_proj.weight` / `llama_proj.bias` from any source, and writing them with what one has to know about
them (model, frozen parts, licence, training). Our file is a safetensors file that keeps the released names and the
PyTorch layout `[out, in]`, so it can be read without this project.
Not for: MiniGPT-v2, whose checkpoints are refused by their LoRA weights, and a fine-tuned `ln_vision` (its tensors stop
the conversion by name).

Differs from the original, which saves a pickle of 45 MB with the optimizer, and finds out that a projection belongs to
another language model by a stack trace from torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError

from convert.detect import LORA, misplaced
from convert.pth import write_pth
from convert.replacing import replacing
from convert.rules import Array, Excuse, Rule, Tree, convert, identity, transpose
from convert.sources import TensorSource, open_source
from minigpt4_jax.config import LlamaConfig, ModelConfig, QFormerConfig, UserError, VitConfig

FORMAT = "minigpt4_jax.projection/1"
WEIGHT, BIAS = "llama_proj.weight", "llama_proj.bias"

RULES = (
    Rule("kernel", (WEIGHT,), transpose),
    Rule("bias", (BIAS,), identity),
)
EXCUSES = (
    Excuse("Qformer.bert.embeddings.position_ids", "a buffer: the numbers 0 to 511"),
    Excuse(
        "llama_model.model.layers.{i}.self_attn.rotary_emb.inv_freq",
        "a buffer that the original's trainer saves; the rotation is computed from the rope base",
    ),
)

FITS = {
    (768, 4096): "Vicuna-7B behind the Q-Former",
    (768, 5120): "Vicuna-13B behind the Q-Former",
    (5632, 4096): "Llama-2-7B without a Q-Former (MiniGPT-4 Llama-2, MiniGPT-v2)",
    (6144, 576): "SmolLM2-135M with 16 patches per token (the smol preset)",
    (1536, 576): "SmolLM2-135M with 4 patches per token",
}
"""(in, out) of the projections that are known, and what each belongs to."""

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, kw_only=True)
class ProjectionInfo:
    """What a projection file says about itself."""

    config: ModelConfig
    licence: str
    attribution: str
    """Whose pictures and words it was trained on, as their licences ask."""
    frozen_parts: Mapping[str, str]
    """Name of each frozen part it was trained behind -> SHA-256 of its file."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Anything JSON can hold: steps, data, scores."""

    def facts(self) -> dict[str, Any]:
        """All but `config`, as the manifest of a model folder keeps it."""
        return {
            "licence": self.licence,
            "attribution": self.attribution,
            "frozen_parts": dict(self.frozen_parts),
            "training": dict(self.training),
        }


def read_projection(
    path: Path, config: ModelConfig, *, dtype: Any = np.float32, excuses: Sequence[Excuse] = ()
) -> tuple[Tree, ProjectionInfo | None]:
    """Reads a projection in any form and checks that it fits the model.

    Args:
        path: our `.safetensors`, or a released `.pth`.
        config: the model it is for.
        dtype: of the arrays returned; None keeps the file's.
        excuses: for tensors of the file that are known here to be left out, besides the buffers of the trainer.

    Returns:
        `{"kernel": [projection_in, width], "bias": [width]}` and what the file says about itself (None for a released
        file).

    Raises:
        UserError: another model's projection, a damaged file, or tensors that are no projection.
    """
    source = open_source(path)
    require_fit(source, config)
    info = _info_of(source)
    if info is not None:
        differences = _differences(info.config, config)
        if differences:
            raise UserError(
                f"{source.describe()} was trained for a model that differs: {'; '.join(differences)}. "
                "Use the projection of this model, or train one."
            )
        expected, found = source.metadata["sha256"], _hash(source.get(WEIGHT), source.get(BIAS))
        if expected != found:
            raise UserError(
                f"The weights in {source.describe()} have SHA-256 {found}; its header says {expected}. The file is "
                "damaged or was edited; fetch it again."
            )
    target = {
        "kernel": np.empty((config.projection_in, config.llama.width)),
        "bias": np.empty(config.llama.width),
    }
    excused = (*EXCUSES, *excuses)
    return convert(source, RULES, excuses=excused, target=target, dtype=dtype).params, info


def write_projection(
    path: Path, projection: Tree, *, info: ProjectionInfo, dtype: str = "float32"
) -> None:
    """Writes the project's projection file; it appears whole or not at all.

    Args:
        projection: `{"kernel": [in, out], "bias": [out]}`.
        dtype: of the file: float32, float16 or bfloat16.

    Raises:
        UserError: shapes that are not the model's, values that the dtype cannot hold.
    """
    from safetensors.numpy import save_file

    if dtype not in DTYPES:
        raise UserError(f"The dtype is {dtype!r}; expected one of {', '.join(DTYPES)}.")
    released = to_released(projection)
    expected = (info.config.llama.width, info.config.projection_in)
    if released[WEIGHT].shape != expected or released[BIAS].shape != expected[:1]:
        raise UserError(
            f"The projection is {list(projection['kernel'].shape)} with a bias {list(projection['bias'].shape)}; the "
            f"model has {[*reversed(expected)]} and {[expected[0]]}."
        )
    with np.errstate(over="ignore"):  # reported below
        arrays = {
            name: np.ascontiguousarray(x.astype(DTYPES[dtype])) for name, x in released.items()
        }
    for name, x in arrays.items():
        if not np.isfinite(x).all():
            raise UserError(
                f"{name} has values that are not finite as {dtype}; expected numbers. Train again, or write float32."
            )
    metadata = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(info.config)),
        **{key: x if isinstance(x, str) else json.dumps(x) for key, x in info.facts().items()},
        "sha256": _hash(arrays[WEIGHT], arrays[BIAS]),
    }
    with replacing(path, failures=(OSError, SafetensorError)) as partial:
        save_file(arrays, partial, metadata=metadata)


def write_released(path: Path, projection: Tree) -> None:
    """Writes `{"model": {llama_proj.*}}` in float32, a PyTorch file as the original's `ckpt:` reads it.

    Raises:
        UserError: the file cannot be written.
    """
    model = {name: x.astype(np.float32) for name, x in to_released(projection).items()}
    write_pth(path, {"model": model})


def to_released(projection: Tree) -> dict[str, Array]:
    """The tree -> names and layout of the PyTorch original."""
    return {
        WEIGHT: np.ascontiguousarray(np.asarray(projection["kernel"]).T),
        BIAS: np.asarray(projection["bias"]),
    }


def require_fit(source: TensorSource, config: ModelConfig) -> None:
    """A source is a projection, and the model's. Nothing is read but names and shapes.

    Raises:
        UserError: it is something else (MiniGPT-v2 with its LoRA, for one), or the projection of another model.
    """
    where = source.describe()
    if any(LORA.search(name) for name in source.names()):
        raise UserError(f"{where} is no projection alone: {misplaced(source, '--projection')}")
    if WEIGHT not in source.names() or len(source.shape(WEIGHT)) != 2:
        raise UserError(f"{where} holds no matrix {WEIGHT!r}: {misplaced(source, '--projection')}")
    have = (source.shape(WEIGHT)[1], source.shape(WEIGHT)[0])
    want = (config.projection_in, config.llama.width)
    if have != want:
        raise UserError(
            f"{where} projects {have[0]} -> {have[1]} and fits {FITS.get(have, 'no model known here')}. The chosen "
            f"model needs {want[0]} -> {want[1]}: {FITS.get(want, 'its own projection')}. Choose the other model, or "
            "its projection."
        )


def _info_of(source: TensorSource) -> ProjectionInfo | None:
    meta = source.metadata
    if "format" not in meta or not str(meta["format"]).startswith("minigpt4_jax"):
        return None
    if meta["format"] != FORMAT:
        raise UserError(
            f"{source.describe()} has the format {meta['format']!r}; this version reads {FORMAT!r}. Update it."
        )
    try:
        sizes = json.loads(meta["config"])
        # Files from before there was a Q-Former do not name one (the shipped smol projection): their models have none.
        qformer = sizes.get("qformer")
        parts = {
            "vit": VitConfig(**sizes["vit"]),
            "qformer": None if qformer is None else QFormerConfig(**qformer),
            "llama": LlamaConfig(**sizes["llama"]),
        }
        config = ModelConfig(**sizes | parts)
        return ProjectionInfo(
            config=config,
            licence=meta["licence"],
            attribution=meta["attribution"],
            frozen_parts=json.loads(meta["frozen_parts"]),
            training=json.loads(meta["training"]),
        )
    except (KeyError, TypeError, ValueError, UserError) as error:
        raise UserError(
            f"The header of {source.describe()} cannot be read ({error!r}); expected the fields of {FORMAT!r}. "
            "Fetch the file again."
        ) from error


def _differences(theirs: ModelConfig, ours: ModelConfig) -> list[str]:
    """Fields that differ, as `llama.width is 64, the model has 32`."""

    def flat(config: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for f in dataclasses.fields(config):
            value = getattr(config, f.name)
            if dataclasses.is_dataclass(value):
                yield from flat(value, f"{prefix}{f.name}.")
            else:
                yield prefix + f.name, value

    have, want = dict(flat(theirs, "")), dict(flat(ours, ""))
    return [
        f"{k} is {have.get(k)}, the model has {want.get(k)}"
        for k in have | want  # with a Q-Former there are fields that a model without does not have
        if have.get(k) != want.get(k)
    ]


def _hash(*arrays: Array) -> str:
    digest = hashlib.sha256()
    for x in arrays:
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()
