"""One set of parameters, four layouts, and the one function that goes between them.

`DISK`: one sub-tree per layer ("0", "1", ...), projections apart. `TRAIN`: every leaf of a repeated block has a
leading layer axis, for `lax.scan`. `DECODE`: one sub-tree per layer, and the LLM's q/k/v and gate/up kernels joined
along their output axis: two matmuls fewer to launch per layer and wider ones. `DECODE_INT8`: the same with the LLM's
kernels as int8, half the bytes that a step reads; the only one from which there is no way back. The original has only
the first, and 8 bits through bitsandbytes, which multiplies outliers apart (arXiv 2208.07339); here nothing is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import jax

from minigpt4_jax.config import LlamaConfig
from minigpt4_jax.models.int8 import namespace, quantise

Params = dict[str, Any]
REPEATED = ("blocks", "layers")
"""Names under which a tower keeps its repeated blocks."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the parameters of the repeated blocks are kept."""

    stacked: bool
    """One leading layer axis instead of one sub-tree per layer (both towers)."""
    fused: bool
    """`qkv_proj` and `gate_up_proj` instead of their parts (the LLM only)."""
    int8: bool
    """What the LLM multiplies with (the layers' kernels, `lm_head` or the tied embedding) as int8 `NAME` beside the
    float32 `NAME_scale`, one per output channel: see `int8.quantise`. An embedding that is only looked up is left."""
    shards: int = 1
    """In so many equal pieces the columns of a fused kernel are cut for tensor parallelism. Piece `t` holds the columns
    `[q_t | k_t | v_t]`, `[gate_t | up_t]`, so that each device has matching heads of all three. 1 on one device. The
    arrays do not tell how they were cut: a wrong number here is not noticed."""

    def __post_init__(self) -> None:
        if self.shards < 1 or (self.shards > 1 and not self.fused):
            raise ValueError(f"shards is {self.shards} in {self}; expected 1, or more where fused.")


DISK = Layout(stacked=False, fused=False, int8=False)
TRAIN = Layout(stacked=True, fused=False, int8=False)
DECODE = Layout(stacked=False, fused=True, int8=False)
DECODE_INT8 = Layout(stacked=False, fused=True, int8=True)

_FUSED = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}


def convert_layout(params: Params, source: Layout, target: Layout, *, llama: LlamaConfig) -> Params:
    """Converts a full tree (`vit`, `llama`, ...) or any part of it between two layouts.

    A part may be one layer, one half of a layer (`self_attn`, `mlp`) or `lm_head` alone, each under its own path, so
    that a model can be streamed. Works on NumPy and JAX arrays alike, keeps the kind of array it finds, and can be
    traced by `jit`. The tree that is passed in is left as it is.

    Values are moved, never computed with: there and back is bit-identical. The exception is `int8`, which rounds.

    Args:
        llama: gives the widths at which fused kernels are split, and whether the embedding is also the LM head.

    Raises:
        ValueError: the tree is not in the layout `source`, a layer is missing, or `source` is int8 and `target` is
            another layout.
    """
    _require_layout(params, source)
    _require_int8(params, source, llama)
    if source.int8 and target != source:
        raise ValueError(
            f"Parameters in {source} cannot become {target}: what int8 rounded away is lost. Load the model again "
            "in the layout that you need."
        )
    plain = params
    if source.stacked:
        plain = _map_repeated(plain, _unstack)
    if (source.fused, source.shards) != (target.fused, target.shards):
        if source.fused:
            plain = _map_layers(plain, lambda layer: _split(layer, llama, source.shards))
        if target.fused:
            plain = _map_layers(plain, lambda layer: _fuse(layer, target.shards))
    if target.int8 and not source.int8:
        plain = _map_multiplied(plain, lambda module, leaf, _: _to_int8(module, leaf), llama)
    if target.stacked:
        plain = _map_repeated(plain, _stack)
    return plain


def _require_layout(tree: Params, layout: Layout, where: str = "") -> None:
    """Without this, a stacked and fused tree said to be plain would come out as it is, and nobody would know."""
    for name, sub in tree.items():
        path = f"{where}{name}"
        if name not in REPEATED:
            if isinstance(sub, dict):
                _require_layout(sub, layout, f"{path}/")
            continue
        if all(key.isdigit() for key in sub) == layout.stacked:
            raise ValueError(f"{path} has the keys {sorted(sub)}; expected those of {layout}.")
        layers = {path: sub} if layout.stacked else {f"{path}/{i}": sub[i] for i in sub}
        for layer_path, layer in layers.items() if name == "layers" else ():
            for part, (joint, names) in _FUSED.items():
                if part not in layer:
                    continue
                found, expected = set(layer[part]), {joint} if layout.fused else set(names)
                if not expected <= found:
                    raise ValueError(
                        f"{layer_path}/{part} has {sorted(found)}; expected {sorted(expected)} in {layout}."
                    )


def _require_int8(params: Params, layout: Layout, llama: LlamaConfig) -> None:
    def check(module: Params, leaf: str, path: str) -> Params:
        if (f"{leaf}_scale" in module) != layout.int8:
            raise ValueError(
                f"{path} has {sorted(module)}; expected {leaf} {'with' if layout.int8 else 'without'} a scale in "
                f"{layout}."
            )
        return module

    _map_multiplied(params, check, llama)


def _map_repeated(tree: Any, function: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {
        name: function(sub) if name in REPEATED else _map_repeated(sub, function)
        for name, sub in tree.items()
    }


def _map_layers(tree: Any, function: Any) -> Any:
    """Applies `function` to every single LLM layer (`layers`; the image tower's `blocks` are never fused)."""
    if not isinstance(tree, dict):
        return tree
    return {
        name: {i: function(layer) for i, layer in sub.items()}
        if name == "layers"
        else _map_layers(sub, function)
        for name, sub in tree.items()
    }


def _map_multiplied(tree: Params, function: Any, llama: LlamaConfig, where: str = "") -> Params:
    """Applies `function(module, leaf, path)` to whatever the LLM multiplies with: every kernel below `layers`, the LM
    head, and the embedding where it is the LM head too. `leaf` names the matrix in `module`."""
    mapped = {}
    for name, sub in tree.items():
        path = f"{where}{name}"
        tied = name == "embed_tokens" and llama.tie_embeddings
        if isinstance(sub, dict) and tied:
            mapped[name] = function(sub, "embedding", path)
        elif isinstance(sub, dict) and "kernel" in sub:
            ours = name == "lm_head" or "layers" in path.split("/")
            mapped[name] = function(sub, "kernel", path) if ours else sub
        else:
            mapped[name] = (
                _map_multiplied(sub, function, llama, f"{path}/") if isinstance(sub, dict) else sub
            )
    return mapped


def _to_int8(module: Params, leaf: str) -> Params:
    """Kernels are `[in, out]`, embeddings `[out, in]` when they are multiplied with."""
    values, scale = quantise(module[leaf], -2 if leaf == "kernel" else -1)
    return {**module, leaf: values, f"{leaf}_scale": scale}


def _stack(layers: Params) -> Params:
    expected = [str(i) for i in range(len(layers))]
    if sorted(layers, key=int) != expected:
        raise ValueError(f"Layers are named {sorted(layers)}; expected 0 to {len(layers) - 1}.")
    stacked: Params = jax.tree.map(
        lambda *leaves: namespace(leaves[0]).stack(leaves), *[layers[i] for i in expected]
    )
    return stacked


def _unstack(stacked: Params) -> Params:
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(stacked)}
    if len(lengths) != 1:
        raise ValueError(f"Stacked leaves disagree on the number of layers: {sorted(lengths)}.")
    (num_layers,) = lengths
    return {str(i): jax.tree.map(lambda leaf: leaf[i], stacked) for i in range(num_layers)}  # noqa: B023


def fused_widths(llama: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Columns of q, k, v in `qkv_proj` and of gate, up in `gate_up_proj`, by the half of a layer that they are in."""
    kv_width = llama.num_kv_heads * llama.head_dim
    return {
        "self_attn": (llama.num_heads * llama.head_dim, kv_width, kv_width),
        "mlp": (llama.mlp_width, llama.mlp_width),
    }


def split_columns(joint: Any, widths: tuple[int, ...], shards: int) -> list[Any]:
    """The parts of a fused kernel `[..., in, out]`, or of what it gives `[..., out]`, in the order of `widths`."""
    pieces = _cut(joint, shards)
    ends = itertools.accumulate(width // shards for width in widths)
    return [
        pieces[..., end - width // shards : end].reshape(*joint.shape[:-1], width)
        for width, end in zip(widths, ends, strict=True)
    ]


def _join_columns(kernels: list[Any], shards: int) -> Any:
    """The way back from `split_columns`."""
    pieces = [_cut(kernel, shards) for kernel in kernels]
    joint = namespace(kernels[0]).concatenate(pieces, axis=-1)
    return joint.reshape(*kernels[0].shape[:-1], -1)


def _cut(array: Any, shards: int) -> Any:
    """`[..., F]` as `[..., shards, F / shards]`."""
    width = array.shape[-1]
    if width % shards:
        raise ValueError(f"{width} columns cannot be cut into {shards} shards of equal size.")
    return array.reshape(*array.shape[:-1], shards, width // shards)


def _fuse(layer: Params, shards: int) -> Params:
    fused = dict(layer)
    for part, (joint, names) in _FUSED.items():
        if part in layer:
            leaves = dict(layer[part])
            kernels = [leaves.pop(n)["kernel"] for n in names]
            leaves[joint] = {"kernel": _join_columns(kernels, shards)}
            fused[part] = leaves
    return fused


def _split(layer: Params, llama: LlamaConfig, shards: int) -> Params:
    split = dict(layer)
    for part, (joint, names) in _FUSED.items():
        if part not in layer:
            continue
        leaves, widths = dict(layer[part]), fused_widths(llama)[part]
        kernel = leaves.pop(joint)["kernel"]
        if kernel.shape[-1] != sum(widths):
            raise ValueError(f"{joint} has {kernel.shape[-1]} columns; expected {sum(widths)}.")
        for name, columns in zip(names, split_columns(kernel, widths, shards), strict=True):
            leaves[name] = {"kernel": columns}
        split[part] = leaves
    return split
