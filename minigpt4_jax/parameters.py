"""How many numbers each part of a model has, and how many of them one device holds under a mesh.

For: `count_parameters`, from the sizes alone. Not for: the arrays (`models/`), nor which of them is split where: that
is the table in `sharding.py`, and a test compares the two for every preset.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minigpt4_jax.config import LlamaConfig, ModelConfig, QFormerConfig, VitConfig


@dataclass(frozen=True, kw_only=True)
class Count:
    """Parameters of one part, by how the table of `sharding.py` splits them."""

    split: int = 0
    """Over `fsdp` and `tensor`: kernels, both ends of the language model."""
    columns: int = 0
    """Over `tensor`: biases of what is split along its outputs."""
    whole: int = 0
    """On every device."""

    @property
    def total(self) -> int:
        return self.split + self.columns + self.whole

    def on_device(self, mesh: Mapping[str, int]) -> int:
        """Of a mesh with the sizes `fsdp` and `tensor`; `data` splits no parameter."""
        fsdp, tensor = mesh["fsdp"], mesh["tensor"]
        return self.split // (fsdp * tensor) + self.columns // tensor + self.whole


def count_parameters(model: ModelConfig) -> dict[str, Count]:
    """By the names that the tree of parameters has at its top."""
    counts = {
        "vit": _vit(model.vit),
        "ln_vision": Count(whole=2 * model.vit.width),
        "llama_proj": Count(whole=(model.projection_in + 1) * model.llama.width),
        "llama": _llama(model.llama),
    }
    if model.qformer is not None:
        counts["query_tokens"] = Count(whole=model.qformer.num_queries * model.qformer.width)
        counts["qformer"] = _qformer(model.qformer, model.vit.width)
    return counts


def layer_kernels(llama: LlamaConfig) -> int:
    """Numbers in the matrices of one layer: q, k, v, o, gate, up, down."""
    heads = (2 * llama.num_heads + 2 * llama.num_kv_heads) * llama.head_dim
    return llama.width * (heads + 3 * llama.mlp_width)


def _llama(llama: LlamaConfig) -> Count:
    ends = 1 if llama.tie_embeddings else 2
    return Count(
        split=llama.num_layers * layer_kernels(llama) + ends * llama.vocab_size * llama.width,
        whole=(2 * llama.num_layers + 1) * llama.width,
    )


def _vit(vit: VitConfig) -> Count:
    width, mlp = vit.width, vit.mlp_width
    patch = (3 * vit.patch_size**2 + 1) * width
    positions = (1 + vit.num_patches) * width
    return Count(
        split=vit.num_layers * (4 * width * width + 2 * width * mlp),
        columns=vit.num_layers * (2 * width + mlp),  # q, v, fc1
        whole=patch + width + positions + vit.num_layers * 6 * width,  # two norms, o, fc2
    )


def _qformer(qformer: QFormerConfig, context: int) -> Count:
    """`context`: width of what the cross-attention reads."""
    width, mlp, layers = qformer.width, qformer.mlp_width, qformer.num_layers
    crossing = sum(qformer.has_cross_attention(layer) for layer in range(layers))
    self_kernels, cross_kernels = 4 * width * width, 2 * width * width + 2 * width * context
    return Count(
        split=layers * (self_kernels + 2 * width * mlp) + crossing * cross_kernels,
        columns=layers * (3 * width + mlp) + crossing * 3 * width,
        whole=2 * width + layers * 6 * width + crossing * 3 * width,
    )
