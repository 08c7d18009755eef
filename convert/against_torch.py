"""Whether a converted model answers as `transformers` does from the very files it was made of, stage by stage.

For: `compare_with_torch` and its table: one picture and one prompt through both, in float32 on the CPU, one side after
the other. It sees what comparing bits cannot: a table that reads the wrong tensor, an eps, a number of heads.
Not for: the bits (`verify.py`), and how a text becomes ids: both sides read the same ones, from the folder's tokenizer.

Every stage starts from the one before it on its own side. So the first broken stage names the fault, and those behind
it follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from convert.settings import ConvertConfig
from convert.torch_side import (
    EMBEDDED,
    LN_VISION,
    LOGITS,
    PROJECTION,
    QFORMER,
    TOWER,
    Stages,
    read_with_torch,
    see_with_torch,
)
from minigpt4_jax.config import UserError
from minigpt4_jax.data.images import load_image, preprocess
from minigpt4_jax.data.prompts import (
    Turn,
    conversation_pieces,
    encode_prompt,
    get_template,
    user_pieces,
)
from minigpt4_jax.data.tokenizer import load_tokenizer
from minigpt4_jax.model_folder import ModelFolder
from minigpt4_jax.models.attention import make_causal_mask
from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.minigpt4 import (
    MiniGPT4,
    abstract_params,
    apply_method,
    make_model,
    make_positions,
)
from minigpt4_jax.presets import Preset

BAR = 1e-4
"""Largest relative difference of two float32 computations that do the same: the bar of all comparisons here."""
NEW_TOKENS = 16
PROMPT = "Describe this image in detail."
PIXELS = "pixels"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the two sides said."""

    stages: dict[str, float]
    """Stage -> largest relative difference, in the order of the computation; see `difference`."""
    agreeing: int
    """Of `NEW_TOKENS` greedy tokens those that are the same, or as likely within the bar."""

    @property
    def broken(self) -> list[str]:
        """Stages beyond the bar; a difference that is no number is beyond it."""
        return [name for name, value in self.stages.items() if not value <= BAR]

    def require_same(self) -> None:
        """Raises `UserError` that names the first broken stage."""
        if self.broken:
            raise UserError(
                f"The converted model does not compute what its sources do: the first stage that differs by more than "
                f"{BAR:g} is {self.broken[0]} ({self.stages[self.broken[0]]:.1e}); what comes behind it follows from "
                "it. Convert it again, and if that does not help, report it with this table."
            )
        if self.agreeing < NEW_TOKENS:
            raise UserError(
                f"Only {self.agreeing} of {NEW_TOKENS} greedy tokens agree, though every stage is within {BAR:g}. "
                "Please report it with this table."
            )

    def print(self, console: Console) -> None:
        """The table."""
        table = Table("stage", "largest relative difference", "bar", "")
        for name, value in self.stages.items():
            table.add_row(
                name, f"{value:.1e}", f"{BAR:g}", "differs" if name in self.broken else "same"
            )
        same = "same" if self.agreeing == NEW_TOKENS else "differs"
        table.add_row("greedy tokens", f"{self.agreeing} of {NEW_TOKENS} agree", "all", same)
        console.print(table)


def compare_with_torch(
    folder: ModelFolder,
    name: str,
    settings: ConvertConfig,
    *,
    picture: Path | None = None,
    prompt: str = PROMPT,
) -> Comparison:
    """Runs one picture and one prompt through transformers and through the folder.

    Memory: the language model once in float32 (27 GB for 7B, 52 GB for 13B) and a tenth more: torch is gone before JAX
    starts, and a delta is added tensor by tensor.

    Args:
        name: the preset it was converted with; sizes and eps of transformers' side come from it and from `settings`.
        settings: where the sources are.
        picture: None: one that is drawn.

    Raises:
        UserError: torch or transformers is missing, a picture or a source cannot be read, or it is in a form that
            transformers does not know.
    """
    preset, converted = settings.resolved(name), folder.preset
    image = _drawn() if picture is None else load_image(picture)
    ids = _prompt_ids(folder, prompt, num_image_tokens=preset.model.num_image_tokens)
    theirs = {PIXELS: _pixels(image, preset)}
    theirs |= see_with_torch(settings, preset.model, theirs[PIXELS])
    layers = _layers(converted.model.llama.num_layers)
    read, answer = read_with_torch(
        settings, ids, theirs[PROJECTION], layers=layers, new_tokens=NEW_TOKENS
    )
    theirs |= read
    ours = {PIXELS: _pixels(image, converted)}
    with (
        jax.default_device(jax.local_devices(backend="cpu")[0]),
        jax.default_matmul_precision("highest"),
    ):
        ours |= _see(folder, ours[PIXELS])
        ours |= _read(folder, [*ids, *answer[:-1]], ours[PROJECTION], layers=layers)
    stages = {stage: difference(ours[stage], value) for stage, value in theirs.items()}
    return Comparison(
        stages=stages, agreeing=_agreeing(ours[LOGITS], theirs[LOGITS], answer, start=len(ids) - 1)
    )


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of a token's numbers relative to the largest of them: `[..., tokens, numbers]`.

    By token, since a few channels and tokens of these models are a thousand times larger than the rest.
    """
    if ours.shape != theirs.shape:
        return float("inf")
    apart = np.abs(ours.astype(np.float64) - theirs).max(-1)
    return float((apart / np.maximum(np.abs(theirs).max(-1), np.finfo(np.float32).tiny)).max())


def _agreeing(ours: np.ndarray, theirs: np.ndarray, answer: list[int], *, start: int) -> int:
    """How many of our likeliest tokens behind `answer`'s beginnings are its next ones, or as likely to transformers."""
    count = 0
    for at, token in enumerate(answer, start=start):
        likely, row = int(ours[0, at].argmax()), theirs[0, at]
        count += bool(likely == token or row[token] - row[likely] <= BAR * np.abs(row).max())
    return count


def _drawn() -> Image.Image:
    """A picture with slopes, an edge and noise, always the same."""
    y, x = np.mgrid[0:240, 0:320]
    noise = np.random.default_rng(4).integers(0, 60, (240, 320))
    colours = np.stack([x * 195 // 320 + noise, y * 195 // 240, (x > y) * 180 + noise], axis=-1)
    return Image.fromarray(colours.astype(np.uint8))


def _pixels(image: Image.Image, preset: Preset) -> np.ndarray:
    size = preset.model.vit.image_size
    return preprocess(image, size=size, mean=preset.image_mean, std=preset.image_std)[None]


def _prompt_ids(folder: ModelFolder, prompt: str, *, num_image_tokens: int) -> list[int]:
    """A conversation's first question about one picture, as `minigpt4 chat` writes it."""
    template = get_template(folder.preset.template)
    turn = Turn("user", user_pieces(template, prompt, num_pictures=1))
    return encode_prompt(
        template,
        conversation_pieces(template, [turn], system=template.system),
        tokenizer=load_tokenizer(folder.path),
        num_image_tokens=num_image_tokens,
    )


def _layers(count: int) -> dict[str, int]:
    """First, middle and last layer by the name of their stage."""
    return {f"language model, layer {i + 1}": i for i in sorted({0, count // 2, count - 1})}


def _load(folder: ModelFolder, parts: tuple[str, ...]) -> tuple[MiniGPT4, Any]:
    """The model, and parts of the folder as float32, not stacked: that takes the largest leaf twice."""
    config = folder.preset.model
    abstract = {part: abstract_params(config)[part] for part in parts}
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    params = folder.load(abstract, shardings=cpu, dtype=jnp.float32)
    return make_model(config, layout=DISK, dtype=jnp.float32), params


def _see(folder: ModelFolder, pixels: np.ndarray) -> Stages:
    parts = (*folder.preset.model.vision_parts, "llama_proj")
    model, params = _load(folder, parts)

    @jax.jit
    def see(params: Any, images: Any) -> Stages:
        features, states = apply_method(model, params, "encode_vision", images)
        found = {TOWER: states["vit.blocks"], LN_VISION: states["ln_vision"]}
        if model.config.qformer is not None:
            found[QFORMER] = features
        return found | {PROJECTION: apply_method(model, params, "project", features)}

    return {name: np.asarray(x) for name, x in see(params, pixels).items()}


def _read(
    folder: ModelFolder, ids: list[int], picture: np.ndarray, *, layers: dict[str, int]
) -> Stages:
    model, params = _load(folder, ("llama",))

    @jax.jit
    def read(params: Any, ids: Any, picture: Any) -> Stages:
        real = jnp.ones(ids.shape, bool)
        embeds = apply_method(model, params, "embed_prompt", ids, picture)
        hidden, _, states = apply_method(
            model,
            params,
            "decode",
            embeds,
            positions=make_positions(real),
            mask=make_causal_mask(real),
            caches=None,
        )
        found = {EMBEDDED: embeds} | {name: states[number] for name, number in layers.items()}
        return found | {LOGITS: apply_method(model, params, "head", hidden)}

    found = read(params, jnp.asarray([ids], jnp.int32), picture)
    return {name: np.asarray(x) for name, x in found.items()}
