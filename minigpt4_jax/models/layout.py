"""One set of parameters, three layouts, and the one function that goes between them.

`DISK`: one sub-tree per layer ("0", "1", ...), projections apart. `TRAIN`: every leaf of a repeated block has a
leading layer axis, for `lax.scan`. `DECODE`: one sub-tree per layer, and the LLM's q/k/v and gate/up kernels joined
along their output axis: two matmuls fewer to launch per layer and wider ones. The original has only the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.config import LlamaConfig

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


DISK = Layout(stacked=False, fused=False)
TRAIN = Layout(stacked=True, fused=False)
DECODE = Layout(stacked=False, fused=True)

_FUSED = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}


def convert_layout(params: Params, source: Layout, target: Layout, *, llama: LlamaConfig) -> Params:
    """Converts a full tree (`vit`, `llama`, ...) or any part of it between two layouts.

    Values are moved, never computed with: there and back is bit-identical. Works on NumPy and JAX arrays alike;
    stacking keeps the kind of array it finds. The tree that is passed in is left as it is.

    Args:
        llama: gives the widths at which fused kernels are split.

    Raises:
        ValueError: the tree is not in the layout `source`, or a layer is missing.
    """
    _require_layout(params, source)
    plain = params
    if source.stacked:
        plain = _map_repeated(plain, _unstack)
    if source.fused and not target.fused:
        plain = _map_layers(plain, lambda layer: _split(layer, llama))
    if target.fused and not source.fused:
        plain = _map_layers(plain, _fuse)
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
                found, expected = set(layer.get(part, {})), {joint} if layout.fused else set(names)
                if not expected <= found:
                    raise ValueError(
                        f"{layer_path}/{part} has {sorted(found)}; expected {sorted(expected)} in {layout}."
                    )


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


def _namespace(leaf: Any) -> Any:
    return np if isinstance(leaf, np.ndarray) else jnp


def _stack(layers: Params) -> Params:
    expected = [str(i) for i in range(len(layers))]
    if sorted(layers, key=int) != expected:
        raise ValueError(f"Layers are named {sorted(layers)}; expected 0 to {len(layers) - 1}.")
    stacked: Params = jax.tree.map(
        lambda *leaves: _namespace(leaves[0]).stack(leaves), *[layers[i] for i in expected]
    )
    return stacked


def _unstack(stacked: Params) -> Params:
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(stacked)}
    if len(lengths) != 1:
        raise ValueError(f"Stacked leaves disagree on the number of layers: {sorted(lengths)}.")
    (num_layers,) = lengths
    return {str(i): jax.tree.map(lambda leaf: leaf[i], stacked) for i in range(num_layers)}  # noqa: B023


def _fuse(layer: Params) -> Params:
    fused = dict(layer)
    for part, (joint, names) in _FUSED.items():
        leaves = dict(layer[part])
        kernels = [leaves.pop(name)["kernel"] for name in names]
        leaves[joint] = {"kernel": _namespace(kernels[0]).concatenate(kernels, axis=-1)}
        fused[part] = leaves
    return fused


def _split(layer: Params, llama: LlamaConfig) -> Params:
    kv_width = llama.num_kv_heads * llama.head_dim
    widths = {
        "self_attn": (llama.num_heads * llama.head_dim, kv_width, kv_width),
        "mlp": (llama.mlp_width, llama.mlp_width),
    }
    split = dict(layer)
    for part, (joint, names) in _FUSED.items():
        leaves = dict(layer[part])
        kernel = leaves.pop(joint)["kernel"]
        if kernel.shape[-1] != sum(widths[part]):
            raise ValueError(
                f"{joint} has {kernel.shape[-1]} columns; expected {sum(widths[part])}."
            )
        start = 0
        for name, width in zip(names, widths[part], strict=True):
            leaves[name] = {"kernel": kernel[..., start : start + width]}
            start += width
        split[part] = leaves
    return split
