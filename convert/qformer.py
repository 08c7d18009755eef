"""Tables for the Q-Former: BLIP-2's own file, and BLIP-2 or InstructBLIP of Hugging Face -> `qformer`, `query_tokens`
and `ln_vision`.

For: `blip2_pretrained_flant5xxl.pth`, the file that MiniGPT-4 reads, and the same weights under Hugging Face's names.
`ln_vision` comes from these files only: without a Q-Former nobody loads it (`eva_vit.plain_ln_vision`).
Not for: the image tower that the Hugging Face files hold as well (`eva_vit.py`), and text beside the queries.

Differs from the original, which loads the file into the whole model with `strict=False` and drops the rest in silence:
here the rest is excused by name. One table serves all files, as they differ only in a few names (`Naming`).
Unverified on the published file: its extras are known from code alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from convert.rules import Excuse, Rule, identity, transpose
from convert.sources import TensorSource
from minigpt4_jax.config import QFormerConfig, UserError

QFORMER_NORM_EPS = 1e-12
"""Of all LayerNorms, in the original's `BertConfig` (not in its file)."""
QFORMER_HEADS = 12
"""Of the published Q-Former; a file does not show it."""
PARTS = ("query_tokens", "ln_vision", "qformer")
"""Sub-trees of the parameters that the table fills."""


@dataclass(frozen=True, kw_only=True)
class Naming:
    """How a kind of file calls the parts of the Q-Former."""

    kind: str
    """For people."""
    layer: str
    """In front of a layer's number."""
    inner: str
    """Between an attention's name and its query, key and value."""
    norm: str
    """The norm of the query tokens."""
    ln_vision: str
    excuses: tuple[Excuse, ...]
    """What else such a file holds."""


def _text_parts(embeddings: str, layer: str) -> tuple[Excuse, ...]:
    text = "reads text, which MiniGPT-4 does not give to the Q-Former"
    return (
        Excuse(f"{embeddings}.word_embeddings.weight", text),
        Excuse(f"{embeddings}.position_embeddings.weight", text),
        Excuse(f"{embeddings}.position_ids", "a buffer: the numbers 0 to 511"),
        Excuse(f"{layer}.{{i}}.intermediate.dense.*", f"the feed-forward that {text}"),
        Excuse(f"{layer}.{{i}}.output.dense.*", f"the feed-forward that {text}"),
        Excuse(f"{layer}.{{i}}.output.LayerNorm.*", f"the feed-forward that {text}"),
    )


_REST_OF_HF = (
    Excuse("vision_model.embeddings.*", "the image tower, which has a table of its own"),
    Excuse("vision_model.encoder.*", "the image tower, which has a table of its own"),
    Excuse("language_projection.*", "leads to BLIP-2's language model; MiniGPT-4 trains its own"),
    Excuse("language_model.*", "BLIP-2's language model; MiniGPT-4 has its own"),
)
_LAVIS_LAYER, _HF_LAYER = "Qformer.bert.encoder.layer", "qformer.encoder.layer"

BLIP2 = Naming(
    kind="blip2_pretrained_flant5xxl.pth",
    layer=_LAVIS_LAYER,
    inner="self",
    norm="Qformer.bert.embeddings.LayerNorm",
    ln_vision="ln_vision",
    excuses=(
        Excuse("t5_proj.*", "leads to BLIP-2's language model; MiniGPT-4 trains its own"),
        *_text_parts("Qformer.bert.embeddings", _LAVIS_LAYER),
        Excuse("Qformer.cls.*", "BERT's head over words, which MiniGPT-4 does not use"),
    ),
)
HF_BLIP2 = Naming(
    kind="BLIP-2 of Hugging Face",
    layer=_HF_LAYER,
    inner="attention",
    norm="qformer.layernorm",
    ln_vision="vision_model.post_layernorm",
    excuses=_REST_OF_HF,
)
HF_INSTRUCTBLIP = Naming(
    kind="InstructBLIP of Hugging Face",
    layer=_HF_LAYER,
    inner="attention",
    norm="qformer.embeddings.layernorm",
    ln_vision="vision_model.post_layernorm",
    excuses=(*_text_parts("qformer.embeddings", _HF_LAYER), *_REST_OF_HF),
)
NAMINGS = (BLIP2, HF_BLIP2, HF_INSTRUCTBLIP)


def naming_of(source: TensorSource) -> Naming:
    """The naming of a file, told by the norm of its query tokens.

    Raises:
        UserError: it is none of the known ones.
    """
    names = set(source.names())
    found = [naming for naming in NAMINGS if f"{naming.norm}.weight" in names]
    if len(found) != 1:
        known = "; ".join(f"{naming.norm}.weight ({naming.kind})" for naming in NAMINGS)
        raise UserError(
            f"{source.describe()} holds {len(found)} Q-Formers by the names of their first norm; expected exactly "
            f"one of {known}. Give the file that holds the Q-Former."
        )
    return found[0]


def qformer_config(source: TensorSource, *, num_heads: int) -> QFormerConfig:
    """Sizes that the file shows, joined with those that it cannot show.

    Args:
        num_heads: `QFORMER_HEADS` in the published files.

    Raises:
        UserError: no Q-Former, or cross-attention in layers that no step of `cross_attention_every` gives.
    """
    naming = naming_of(source)
    layers = _layers_with(source, naming, "attention.output.dense.weight")
    cross = _layers_with(source, naming, "crossattention.output.dense.weight")
    fc1 = f"{naming.layer}.0.intermediate_query.dense.weight"
    missing = [name for name in ("query_tokens", fc1) if name not in source.names()]
    every = cross[1] - cross[0] if len(cross) > 1 else len(layers)
    if missing or not layers or cross != list(range(0, len(layers), every or 1)):
        raise UserError(
            f"{source.describe()} has the Q-Former's layers {layers}, cross-attention in {cross}"
            f"{''.join(f', no {name}' for name in missing)}; expected layers from 0, cross-attention in every n-th "
            f"from 0, query_tokens and {fc1}, as in {naming.kind}. The file is damaged or is another model's."
        )
    _, num_queries, width = source.shape("query_tokens")
    return QFormerConfig(
        num_queries=num_queries,
        width=width,
        num_layers=len(layers),
        num_heads=num_heads,
        mlp_width=source.shape(fc1)[0],
        cross_attention_every=every,
        norm_eps=QFORMER_NORM_EPS,
    )


def _layers_with(source: TensorSource, naming: Naming, tensor: str) -> list[int]:
    pattern = re.compile(rf"{re.escape(naming.layer)}\.(\d+)\.{re.escape(tensor)}")
    found = (pattern.fullmatch(name) for name in source.names())
    return sorted(int(match[1]) for match in found if match)


def qformer_rules(config: QFormerConfig, naming: Naming) -> tuple[Rule, ...]:
    """The names of a kind of file -> the trees in `PARTS`."""
    every_layer = ("{i}",)
    cross_layers = tuple(
        str(i) for i in range(config.num_layers) if config.has_cross_attention(i)
    )  # rows of their own: `{i}` stands for all layers
    return (
        Rule("query_tokens", ("query_tokens",), identity),
        *_norm("ln_vision", naming.ln_vision),
        *_norm("qformer/norm", naming.norm),
        *(r for i in every_layer for r in _attention("attention", "attention", i, naming)),
        *(
            r
            for i in cross_layers
            for r in _attention("cross_attention", "crossattention", i, naming)
        ),
        *_dense("qformer/layer/{i}/mlp/fc1", f"{naming.layer}.{{i}}.intermediate_query.dense"),
        *_dense("qformer/layer/{i}/mlp/fc2", f"{naming.layer}.{{i}}.output_query.dense"),
        *_norm("qformer/layer/{i}/mlp_norm", f"{naming.layer}.{{i}}.output_query.LayerNorm"),
    )


def qformer_excuses(naming: Naming) -> tuple[Excuse, ...]:
    """What such a file holds beyond the Q-Former's queries and `ln_vision`."""
    return naming.excuses


def _attention(ours: str, theirs: str, layer: str, naming: Naming) -> tuple[Rule, ...]:
    target, name = f"qformer/layer/{layer}/{ours}", f"{naming.layer}.{layer}.{theirs}"
    return (
        *_dense(f"{target}/q_proj", f"{name}.{naming.inner}.query"),
        *_dense(f"{target}/k_proj", f"{name}.{naming.inner}.key"),
        *_dense(f"{target}/v_proj", f"{name}.{naming.inner}.value"),
        *_dense(f"{target}/o_proj", f"{name}.output.dense"),
        *_norm(f"{target}_norm", f"{name}.output.LayerNorm"),
    )


def _dense(target: str, name: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{target}/kernel", (f"{name}.weight",), transpose),
        Rule(f"{target}/bias", (f"{name}.bias",), identity),
    )


def _norm(target: str, name: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{target}/scale", (f"{name}.weight",), identity),
        Rule(f"{target}/bias", (f"{name}.bias",), identity),
    )
