"""What a set of tensors is, told by its names and a few norms: the checks behind every "this file belongs there".

For: `kind_of`, and the checks that stop a conversion which would run and give gibberish: a file under the wrong
option, an unmerged delta, another language model than the projection was trained for, LoRA.
Not for: opening files (`llama_files.py`, `facts.py`) and not for the tables: whether a file is complete they say.

Differs from the original, which loads anything with `strict=False`: its users learn that a delta was not merged, that
the Vicuna is of another version or that LoRA was dropped from what the model says.
"""

from __future__ import annotations

import re
from collections import Counter
from enum import StrEnum

import numpy as np

from convert.sources import TensorSource
from minigpt4_jax.config import LlamaConfig, UserError


class Kind(StrEnum):
    """What a file or folder can be."""

    EVA_VIT = "the EVA image tower"
    QFORMER = "BLIP-2's Q-Former file (Q-Former, query tokens, ln_vision)"
    BLIP2 = "a BLIP-2 or InstructBLIP model of Hugging Face"
    LLAMA = "a LLaMA-family language model"
    DELTA = "a weight delta of a language model (not a model)"
    PROJECTION = "a MiniGPT-4 projection in the released form"
    TRAINER = (
        "a checkpoint of the original's trainer (a MiniGPT-4 projection, and what training needs)"
    )
    OUR_PROJECTION = "a projection file of this project"
    MINIGPT_V2 = "a MiniGPT-v2 checkpoint (a projection and LoRA weights)"
    MODEL_FOLDER = "a converted model of this project"
    TOKENIZER = "a tokenizer"
    UNKNOWN = "nothing known here"


OPTIONS: dict[Kind, tuple[str, ...]] = {
    Kind.EVA_VIT: ("--vit",),
    Kind.QFORMER: ("--qformer",),
    Kind.BLIP2: ("--vit", "--qformer"),
    Kind.LLAMA: ("--llm",),
    Kind.DELTA: ("--delta",),
    Kind.PROJECTION: ("--projection",),
    Kind.TRAINER: ("--projection",),
    Kind.OUR_PROJECTION: ("--projection",),
    Kind.MINIGPT_V2: (),
    Kind.MODEL_FOLDER: (),
    Kind.TOKENIZER: (),
    Kind.UNKNOWN: (),
}
"""Which options of the converter take it."""

NO_OPTION: dict[Kind, str] = {
    Kind.MINIGPT_V2: "Its projection was trained together with the LoRA weights, so it is of no use without them, and "
    "MiniGPT-v2 is not built here yet. For MiniGPT-4 on Llama-2 take pretrained_minigpt4_llama2_7b.pth.",
    Kind.MODEL_FOLDER: "It is converted already: load it as it is.",
    Kind.TOKENIZER: "It is read from the folder of the language model (--llm).",
    Kind.UNKNOWN: "Check the name, or fetch it again.",
}

TAKES = {
    "--vit": "eva_vit_g.pth, or a BLIP-2 folder of Hugging Face",
    "--qformer": "blip2_pretrained_flant5xxl.pth, or a BLIP-2 folder of Hugging Face",
    "--llm": "a LLaMA, Vicuna or Llama-2: a Hugging Face folder, a folder of Meta's, or a .gguf",
    "--delta": "a Vicuna delta (a Hugging Face folder), beside its base in --llm",
    "--projection": "pretrained_minigpt4*.pth, a checkpoint of the trainer, or a projection of this project",
}

LORA = re.compile(r"\.lora_(embedding_)?[AB]\b")
"""In both spellings: `lora_A.weight` (peft 0.2, the released files) and `lora_A.default.weight` (later)."""
BUFFERS = re.compile(
    r"rotary_emb\.inv_freq$|rope\.freqs$|^Qformer\.bert\.embeddings\.position_ids$"
)
"""What files hold besides parameters; the original's trainer saves the first and the last."""

_KINDS: tuple[tuple[Kind, tuple[str, ...]], ...] = (
    # The first row of which every name is there. A projection may lie among other tensors of a trainer's file.
    (Kind.EVA_VIT, ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight")),
    (Kind.QFORMER, ("query_tokens", "ln_vision.weight")),
    (Kind.BLIP2, ("query_tokens", "vision_model.embeddings.patch_embedding.weight")),
    (Kind.LLAMA, ("model.embed_tokens.weight",)),
    (Kind.LLAMA, ("tok_embeddings.weight",)),
    (Kind.LLAMA, ("token_embd.weight",)),
    (Kind.PROJECTION, ("llama_proj.weight",)),
)

DELTA_BELOW = 0.1
"""The largest median |scale| of a few norms tells a model from a delta. Single norms do not: SmolLM2-135M, measured,
has 1.78 at the end and 0.4 in its middle, but 0.022 at its very first. Fine-tuning at a rate of 2e-5 moves a scale by
a few hundredths at most. The published deltas could not be inspected: unverified on the published file."""
_NORMS = (
    re.compile(r"model\.layers\.(\d+)\.(?:input|post_attention)_layernorm\.weight"),
    re.compile(r"layers\.(\d+)\.(?:attention|ffn)_norm\.weight"),
    re.compile(r"blk\.(\d+)\.(?:attn|ffn)_norm\.weight"),
)
_FINAL_NORMS = ("model.norm.weight", "norm.weight", "output_norm.weight")


def kind_of(source: TensorSource) -> Kind:
    """By names alone; a delta cannot be told from a model that way (`norm_scale` can)."""
    names = set(source.names())
    if str(source.metadata.get("format", "")).startswith("minigpt4_jax.projection"):
        return Kind.OUR_PROJECTION
    if any(LORA.search(name) for name in names):
        return Kind.MINIGPT_V2
    kind = next((kind for kind, marks in _KINDS if names.issuperset(marks)), Kind.UNKNOWN)
    trained = "optimizer" in source.metadata.get("left_alone", ())
    if kind is Kind.PROJECTION and (trained or any(BUFFERS.search(name) for name in names)):
        return Kind.TRAINER
    return kind


def require_option(source: TensorSource, option: str) -> Kind:
    """What a source is, if `option` takes it. Deltas count as language models here, see `require_merged`.

    Raises:
        UserError: it belongs to another option, or to none; the message says what it is and where it goes.
    """
    kind = kind_of(source)
    if option in OPTIONS[kind] or (option, kind) == ("--delta", Kind.LLAMA):
        return kind
    raise UserError(f"{source.describe()} was given as {option}, but {misplaced(source, option)}")


def misplaced(source: TensorSource, option: str) -> str:
    """`it is ...: give it with ...`, the second half of a message about a file that `option` does not take."""
    kind = kind_of(source)
    lora = [name for name in source.names() if LORA.search(name)]
    if lora:
        seen = f"{len(lora)} LoRA tensors, such as {lora[0]}"
    else:
        seen = f"its first tensors: {', '.join(source.names()[:4]) or 'none'}"
    places = " or ".join(OPTIONS[kind])
    advice = f"Give it with {places}." if places else NO_OPTION[kind]
    return f"it is {kind} ({seen}). {advice} {option} takes {TAKES[option]}."


def norm_scale(source: TensorSource) -> float:
    """The largest median |scale| among the final norm and those of the first, middle and last layer (0 to 7 tensors).

    Raises:
        UserError: no norm under a name of LLaMA's.
    """
    names = set(source.names())
    layered = [
        (name, int(m.group(1))) for name in names for p in _NORMS if (m := p.fullmatch(name))
    ]
    layers = sorted({layer for _, layer in layered})
    picked = {layers[0], layers[len(layers) // 2], layers[-1]} if layers else set()
    chosen = [name for name, layer in layered if layer in picked]
    chosen += [name for name in _FINAL_NORMS if name in names]
    if not chosen:
        raise UserError(f"{source.describe()} has no norms of a LLaMA; expected a language model.")
    return max(float(np.median(np.abs(source.get(name).astype(np.float32)))) for name in chosen)


def require_merged(source: TensorSource) -> None:
    """A source given as a model is one. Raises `UserError` for a delta."""
    scale = norm_scale(source)
    if scale < DELTA_BELOW:
        raise UserError(
            f"{source.describe()} is a delta, not a model: its norms scale by {scale:.3g} (a model's by about 1, and "
            f"by {DELTA_BELOW} at least). Give the LLaMA it was made from with --llm, and this with --delta."
        )


def require_delta(source: TensorSource) -> None:
    """A source given as a delta is one. Raises `UserError` for a model."""
    scale = norm_scale(source)
    if scale >= DELTA_BELOW:
        raise UserError(
            f"{source.describe()} was given as --delta, but it is a whole model: its norms scale by {scale:.3g}, those "
            f"of a delta by less than {DELTA_BELOW}. If it is merged already, give it with --llm and leave --delta "
            "out; if base and delta were swapped, swap them."
        )


V0_VOCABULARY = 32001
"""Vicuna v0 has `[PAD]` behind LLaMA's 32000 tokens; v1.1 and later, LLaMA and Llama-2 have not."""
_SOFT = ("norm_eps", "max_positions", "rope_base")
"""Where a file may differ from the preset: its own numbers hold, and are said."""


def check_language_model(
    found: LlamaConfig, expected: LlamaConfig, *, where: str
) -> tuple[str, ...]:
    """Compares a language model with the one that the chosen preset was trained with.

    Args:
        found: read from the file.
        expected: of the preset.
        where: the file, for the message.

    Returns:
        What differs without doing harm, to be shown: numbers that are always taken from the file.

    Raises:
        UserError: another model; the message says which, why it would not work, and what to do.
    """
    sizes = ("width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width")
    differing = [
        f"{key} {getattr(found, key)} (expected {getattr(expected, key)})"
        for key in (*sizes, "tie_embeddings")
        if getattr(found, key) != getattr(expected, key)
    ]
    if differing:
        raise UserError(
            f"{where} is {_model_name(found)}: {', '.join(differing)}. The chosen model has {_model_name(expected)}, "
            "and its projection fits no other. Choose the other preset, or the other language model."
        )
    if found.vocab_size != expected.vocab_size:
        raise UserError(
            f"{where} has {found.vocab_size} tokens; the chosen model needs {expected.vocab_size}. "
            + _vocabulary_advice(found.vocab_size, expected.vocab_size)
        )
    return tuple(
        f"{key} is {getattr(found, key)} in the file and {getattr(expected, key)} in the preset: the file's is used"
        for key in _SOFT
        if getattr(found, key) != getattr(expected, key)
    )


def _vocabulary_advice(found: int, expected: int) -> str:
    if expected == V0_VOCABULARY:
        return (
            "These projections were trained with Vicuna v0, whose mark is the 32001st token. LLaMA itself, Llama-2 and "
            "Vicuna v1.1 or later have 32000: v1.x separates turns by </s> instead of ###, and with this projection "
            "answers are gibberish. Take Vicuna v0: merged, or LLaMA with --delta vicuna-*-delta-v0."
        )
    if found == V0_VOCABULARY:
        return (
            "32001 tokens are the mark of Vicuna v0, which was not what this projection was trained with. Take the "
            "language model of the preset, or the preset of this one."
        )
    return "Take the language model that the projection was trained with."


def _model_name(config: LlamaConfig) -> str:
    """`a 13B (width 5120, 40 layers)`, from the parameters of the blocks."""
    attention = config.width * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    block = attention + 3 * config.width * config.mlp_width
    total = config.num_layers * block + 2 * config.vocab_size * config.width
    size = f"{total / 1e9:.0f}B" if total >= 1e9 else f"{total / 1e6:.0f}M"
    return f"a {size} model (width {config.width}, {config.num_layers} layers)"


def dtypes_of(source: TensorSource) -> dict[str, int]:
    """How many tensors have each dtype."""
    return dict(Counter(str(source.dtype(name)) for name in source.names()))
