"""The mesh, and where every parameter lies on it. The only PartitionSpecs of the project.

For: `make_mesh` and `make_shardings`, for reading a model folder straight into its shards; `rows_sharding` for batches,
`cache_sharding` for decoding; `constrain` and `constrain_rows`, for the activations that the compiler would lay
elsewhere. Not for: moving arrays, nor choosing the sizes of a training run's mesh (`training/placement.py`).

The table has one row per parameter of a block. Every parameter must be met by exactly one row: a new parameter without
a row is an error, and there is no row that catches the rest. It is Megatron's (Shoeybi et al., arXiv 1909.08053, §3) on
the axis `tensor`: the first matmul of a pair is split along its outputs, the second along its inputs, so that one sum
per pair crosses devices; the other axis of a kernel is split over `fsdp` (ZeRO-3). What is small is everywhere. A KV
cache lies where its heads are computed.

Differs from the original, which copies every weight to every GPU (torch DDP).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from minigpt4_jax.config import UserError

AXES = ("data", "fsdp", "tensor")
"""Batch; frozen weights in slices that are gathered for use; matmuls in slices."""

LAYER = "{i}"
"""Stands for the layer's number in the layout `DISK`, and for a leading axis in `TRAIN`."""

_OUT, _IN, _ALL = P("fsdp", "tensor"), P("tensor", "fsdp"), P()


def _attention(where: str, *, biases: str) -> dict[str, P]:
    table = {f"{where}/{name}_proj/kernel": _OUT for name in "qkv"}
    table |= {f"{where}/{name}_proj/bias": P("tensor") for name in "qkv" if name in biases}
    table[f"{where}/o_proj/kernel"] = _IN
    return table | ({f"{where}/o_proj/bias": _ALL} if biases else {})


def _mlp(where: str) -> dict[str, P]:
    return {
        f"{where}/fc1/kernel": _OUT,
        f"{where}/fc1/bias": P("tensor"),
        f"{where}/fc2/kernel": _IN,
        f"{where}/fc2/bias": _ALL,
    }


def _norm(where: str) -> dict[str, P]:
    return {f"{where}/scale": _ALL, f"{where}/bias": _ALL}


RULES: dict[str, P] = {
    "vit/cls_token": _ALL,
    "vit/pos_embed": _ALL,
    "vit/patch_embed/kernel": _ALL,
    "vit/patch_embed/bias": _ALL,
    **_norm("vit/blocks/{i}/norm1"),
    **_attention("vit/blocks/{i}/attn", biases="qv"),
    **_norm("vit/blocks/{i}/norm2"),
    **_mlp("vit/blocks/{i}/mlp"),
    **_norm("ln_vision"),
    "query_tokens": _ALL,
    **_norm("qformer/norm"),
    **_attention("qformer/layer/{i}/attention", biases="qkv"),
    **_norm("qformer/layer/{i}/attention_norm"),
    **_attention("qformer/layer/{i}/cross_attention", biases="qkv"),
    **_norm("qformer/layer/{i}/cross_attention_norm"),
    **_mlp("qformer/layer/{i}/mlp"),
    **_norm("qformer/layer/{i}/mlp_norm"),
    # Trained, and read by the optimizer everywhere: 15 MB at most.
    "llama_proj/kernel": _ALL,
    "llama_proj/bias": _ALL,
    # The vocabulary of Vicuna v0 has 32,001 rows, which nothing divides: both ends are split along the width.
    "llama/embed_tokens/embedding": P(None, ("fsdp", "tensor")),
    "llama/layers/{i}/input_layernorm/scale": _ALL,
    **_attention("llama/layers/{i}/self_attn", biases=""),
    "llama/layers/{i}/post_attention_layernorm/scale": _ALL,
    "llama/layers/{i}/mlp/gate_proj/kernel": _OUT,
    "llama/layers/{i}/mlp/up_proj/kernel": _OUT,
    "llama/layers/{i}/mlp/down_proj/kernel": _IN,
    "llama/norm/scale": _ALL,
    "llama/lm_head/kernel": P(("fsdp", "tensor"), None),
    # The layouts for decoding: fused kernels, interleaved for as many shards as `tensor` has devices
    # (`Layout.shards`), and int8 with one scale per output channel: split where the outputs are.
    "llama/layers/{i}/self_attn/qkv_proj/kernel": _OUT,
    "llama/layers/{i}/self_attn/qkv_proj/kernel_scale": P("tensor"),
    "llama/layers/{i}/mlp/gate_up_proj/kernel": _OUT,
    "llama/layers/{i}/mlp/gate_up_proj/kernel_scale": P("tensor"),
    "llama/layers/{i}/self_attn/o_proj/kernel_scale": _ALL,
    "llama/layers/{i}/mlp/down_proj/kernel_scale": _ALL,
    "llama/lm_head/kernel_scale": _ALL,
    "llama/embed_tokens/embedding_scale": _ALL,
}
"""Path of a parameter (kernels are `[in, out]`) -> its PartitionSpec."""


ROWS = ("data", "fsdp")
"""The axes that a training batch's rows lie over."""
ACTIVATIONS: dict[str, P] = {
    "x": P(ROWS, None, None),
    "q": P(ROWS, None, "tensor", None),
    "k": P(ROWS, None, "tensor", None),
    "v": P(ROWS, None, "tensor", None),
    "x_mid": P(ROWS, None, None),
    "gate": P(ROWS, None, "tensor"),
    "up": P(ROWS, None, "tensor"),
    "logits": P(ROWS, None, None),
}
"""Activation of the language model in training -> its PartitionSpec: the residual stream `x [B, S, D]` before a block
and `x_mid` between its halves; heads `[B, S, N or K, H]`; `[B, S, F]`; and the logits `[B, A, V]`."""


def make_mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `data * fsdp * tensor` devices, neighbours along `tensor`.

    On several hosts, the axis `data` crosses them where it can (its size is a multiple of their number), and nothing
    else does: it is the only axis over which a training step exchanges little.

    Args:
        devices: default: all of the program's.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (data, fsdp, tensor)
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise UserError(
            f"The mesh is data={data} x fsdp={fsdp} x tensor={tensor}, {math.prod(sizes)} devices; expected "
            f"{len(devices)}, as many as there are. Change one of the sizes."
        )
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    hosts = len({device.process_index for device in devices})
    if hosts == 1 or data % hosts:
        return jax.make_mesh(sizes, AXES, devices=devices, axis_types=types)
    within, between = (data // hosts, fsdp, tensor), (hosts, 1, 1)
    grid = mesh_utils.create_hybrid_device_mesh(within, between, devices, process_is_granule=True)
    return Mesh(grid, AXES, axis_types=types)


def make_shardings(mesh: Mesh | AbstractMesh, params: Any) -> Any:
    """A tree like `params` of `NamedSharding`, by the table.

    Args:
        mesh: from `make_mesh`, or an abstract one.
        params: tree of anything with a `.shape`, in any layout or a part of it.

    Raises:
        ValueError: parameters that no row meets, or more than one.
        UserError: sizes that the mesh does not divide; all of them are listed.
    """
    leaves = dict(_paths(params))
    found = {path: match_rule(path) for path in leaves}
    stray = sorted(path for path, rules in found.items() if len(rules) != 1)
    if stray:
        raise ValueError(f"Expected one row of sharding.RULES for each of {stray}.")
    specs = {path: _spec(path, rules[0]) for path, rules in found.items()}
    uneven = [
        f"{path} {list(leaves[path].shape)} over {spec}"
        for path, spec in specs.items()
        if not _divides(mesh, spec, leaves[path].shape)
    ]
    if uneven:
        raise UserError(
            f"The mesh {dict(mesh.shape)} does not divide {'; '.join(uneven)}. Expected axes that divide every size; "
            "choose smaller ones."
        )
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: NamedSharding(mesh, specs["/".join(key.key for key in keys)]), params
    )


def cache_sharding(mesh: Mesh | AbstractMesh, *, num_kv_heads: int) -> NamedSharding:
    """For every array of a KV cache, `[B, K, ...]`: its kv heads over `tensor`, rows and places whole.

    Raises:
        UserError: `tensor` does not divide the kv heads.
    """
    devices = mesh.shape["tensor"]
    if num_kv_heads % devices:
        fitting = [n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]
        raise UserError(
            f"The mesh has tensor={devices} and the language model {num_kv_heads} kv heads; expected a divisor of "
            f"these for tensor: {', '.join(map(str, fitting))}."
        )
    return NamedSharding(mesh, P(None, "tensor"))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """For what every device holds whole: logits, tokens, and the state of a decode step but for its cache."""
    return NamedSharding(mesh, P())


def one_for_each_device(devices: Sequence[jax.Device]) -> tuple[NamedSharding, NamedSharding]:
    """For one number of each device, `[devices]`, side by side, and for what is made of them, whole everywhere."""
    mesh = Mesh(devices, ("device",))
    return NamedSharding(mesh, P("device")), NamedSharding(mesh, P())


def rows_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """For the arrays of a training batch, `[B, ...]`: rows over `data` and `fsdp`, the same on all of `tensor`."""
    return NamedSharding(mesh, P(ROWS))


def constrain_rows(x: jax.Array, name: str) -> jax.Array:
    """An activation of training, `[B, ...]`: its rows where the batch's are, its heads or columns where their weights
    are split.

    Without this the compiler keeps the weights of fsdp where they are and moves the activations, whole batches of them.
    Does nothing unless the function is traced under `jax.set_mesh(mesh)`.

    Args:
        name: a row of `ACTIVATIONS`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, ACTIVATIONS[name])
    return constrained


def constrain(x: jax.Array) -> jax.Array:
    """An activation `[..., D]` whose width stays whole on every device; how its rows lie is left to the compiler.

    For both ends of the residual stream: the embedding and the LM head are split along the width, and without this the
    whole stream is, with three exchanges for each matmul pair instead of one sum. Does nothing unless the function is
    traced under `jax.set_mesh(mesh)`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = P(*[P.UNCONSTRAINED] * (x.ndim - 1), None)
    constrained: jax.Array = jax.lax.with_sharding_constraint(x, spec)
    return constrained


def match_rule(path: str) -> list[str]:
    """The rows of the table that meet a parameter, in any layout; one, where all is well."""
    return _ROWS.get(_NUMBER.sub(f"/{LAYER}/", path, count=1), [])


_NUMBER = re.compile(r"/\d+/")
_ROWS: dict[str, list[str]] = {}
"""What a parameter may be called, with and without a layer's number -> the rows that say so."""
for _rule in RULES:
    for _name in {_rule, _rule.replace(f"/{LAYER}", "")}:
        _ROWS.setdefault(_name, []).append(_rule)


def _spec(path: str, rule: str) -> P:
    stacked = LAYER in rule and not _NUMBER.search(path)
    return P(None, *RULES[rule]) if stacked and RULES[rule] else RULES[rule]


def _divides(mesh: Mesh | AbstractMesh, spec: P, shape: Sequence[int]) -> bool:
    for size, axes in zip(shape, spec, strict=False):
        names = (axes,) if isinstance(axes, str) else axes or ()
        if size % math.prod(mesh.shape[name] for name in names):
            return False
    return True


def _paths(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, leaf in tree.items():
        if isinstance(leaf, Mapping):
            yield from _paths(leaf, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", leaf
