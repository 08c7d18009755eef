"""EVA-ViT-g and the Q-Former at full size against transformers' BLIP-2 modules: one picture, random weights, float32.

    python benchmarks/blip2_parity.py [--out FILE.json]

Published weights are not needed to see that the two compute the same: both get random ones, ours through the strict
tables for Hugging Face's names. Prints the largest difference of every stage, relative to the stage's largest value.
Needs the `parity` extra and about 10 GB of memory: torch answers first and is gone before JAX starts. Not for: speed,
and the original's own numbers (`tests/parity/golden`). Weights are drawn so that every part moves the result:
transformers' own random ones are nearly zero, so a mistake would hide.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from convert.eva_vit import HF_VIT_EXCUSES, hf_vit_config, hf_vit_rules
from convert.qformer import PARTS, naming_of, qformer_config, qformer_excuses, qformer_rules
from convert.rules import Tree, convert
from convert.sources import ArraySource
from minigpt4_jax.config import ModelConfig
from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.minigpt4 import abstract_params, apply_method, make_model
from minigpt4_jax.presets import get_preset

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

Kind = Literal["blip_2", "instructblip"]
Stages = dict[str, np.ndarray]
OUT = Path(__file__).parent / "results" / "blip2_parity.json"


def make_torch(config: ModelConfig, kind: Kind) -> tuple[Module, Module, Tensor]:
    """transformers' image tower and Q-Former in the sizes of `config`, and query tokens, all random."""
    import torch
    from transformers import models

    vit, qformer = config.vit, config.qformer
    assert qformer is not None
    module = getattr(models, kind)
    name = {"blip_2": "Blip2", "instructblip": "InstructBlip"}[kind]
    sizes = {"hidden_act": "gelu", "attn_implementation": "eager"}
    vision_config = getattr(module, f"{name}VisionConfig")(
        hidden_size=vit.width,
        intermediate_size=vit.mlp_width,
        num_hidden_layers=vit.num_layers,
        num_attention_heads=vit.num_heads,
        image_size=vit.image_size,
        patch_size=vit.patch_size,
        layer_norm_eps=vit.norm_eps,
        **sizes,
    )
    qformer_config = getattr(module, f"{name}QFormerConfig")(
        hidden_size=qformer.width,
        intermediate_size=qformer.mlp_width,
        num_hidden_layers=qformer.num_layers,
        num_attention_heads=qformer.num_heads,
        cross_attention_frequency=qformer.cross_attention_every,
        encoder_hidden_size=vit.width,
        layer_norm_eps=qformer.norm_eps,
        **sizes,
    )
    with torch.device("meta"):
        vision = getattr(module, f"{name}VisionModel")(vision_config)
        queries = getattr(module, f"{name}QFormerModel")(qformer_config)
    vision.post_layernorm.eps = config.ln_vision_eps  # transformers takes that of the blocks
    generator = torch.Generator().manual_seed(20231)
    for part in (vision, queries):
        part.to_empty(device="cpu")
        part.eval()
        _draw(part, generator)
    tokens = torch.randn((1, qformer.num_queries, qformer.width), generator=generator)
    return vision, queries, tokens


def _draw(module: Module, generator: Any) -> None:
    """Kernels keep the variance of what passes through them, norms scale by about 1, biases are not zero."""
    import torch

    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.normal_(generator=generator)
            if weight.ndim in (2, 4):
                weight.mul_(weight[0].numel() ** -0.5)
            elif "norm" in name.lower() and name.endswith("weight"):
                weight.mul_(0.2).add_(1)
            else:
                weight.mul_(0.2)
            if name.endswith("qkv.bias"):
                weight.view(3, -1)[1] = 0  # EVA's keys have none


def run_torch(
    vision: Module, queries: Module, tokens: Tensor, pixels: np.ndarray, *, kind: Kind
) -> Stages:
    """Every stage by the names of `HIDDEN`. `pixels`: `[I, H, W, 3]`."""
    import torch

    with torch.no_grad():
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        seen = vision(pixel_values=images, output_hidden_states=True)
        asked = queries(
            **({"input_ids": None} if kind == "instructblip" else {}),
            query_embeds=tokens.expand(len(pixels), -1, -1),
            encoder_hidden_states=seen.last_hidden_state,
            output_hidden_states=True,
        )
    return {
        "vit.blocks": np.stack([state.numpy() for state in seen.hidden_states[1:]]),
        "ln_vision": seen.last_hidden_state.numpy(),
        "qformer.layer": np.stack([state.numpy() for state in asked.hidden_states]),
        "features": asked.last_hidden_state.numpy(),
    }


def convert_torch(vision: Module, queries: Module, tokens: Tensor, *, config: ModelConfig) -> Tree:
    """torch's tensors, uncopied, through the tables for Hugging Face's names: the image path's parameters."""
    tensors = {f"vision_model.{name}": x for name, x in vision.state_dict().items()}
    tensors |= {f"qformer.{name}": x for name, x in queries.state_dict().items()}
    source = ArraySource(
        {"query_tokens": tokens.numpy()} | {n: x.numpy() for n, x in tensors.items()}
    )
    vit, naming = config.vit, naming_of(source)
    qformer = config.qformer
    assert qformer is not None
    found = hf_vit_config(source, grid=vit.grid, num_layers=vit.num_layers, num_heads=vit.num_heads)
    assert (found, qformer_config(source, num_heads=qformer.num_heads)) == (vit, qformer)
    abstract = abstract_params(config)
    tower = convert(
        source, hf_vit_rules(vit), excuses=HF_VIT_EXCUSES, target=abstract["vit"]
    ).params
    rest = convert(
        source,
        qformer_rules(qformer, naming),
        excuses=qformer_excuses(naming),
        target={part: abstract[part] for part in PARTS},
    )
    return {"vit": tower, **rest.params}


def run_ours(params: Tree, pixels: np.ndarray, *, config: ModelConfig) -> Stages:
    """The same stages of this project."""
    model = make_model(config, layout=DISK, dtype=jnp.float32)
    encode = jax.jit(lambda params, x: apply_method(model, params, "encode_vision", x))
    features, states = encode(params, pixels)
    return {name: np.asarray(x) for name, x in {**states, "features": features}.items()}


def differences(ours: Stages, theirs: Stages) -> dict[str, float]:
    """Per stage the largest difference over its layers, each relative to the layer's largest value."""
    assert set(ours) == set(theirs)
    found = {}
    for name, expected in theirs.items():
        layers = (
            zip(ours[name], expected, strict=True)
            if expected.ndim == 4
            else [(ours[name], expected)]
        )
        found[name] = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in layers)
    return found


def compare(config: ModelConfig, *, kind: Kind) -> dict[str, float]:
    """Builds, runs and converts torch's modules, drops them, runs ours, and compares; see `differences`."""
    size = config.vit.image_size
    pixels = np.random.default_rng(0).normal(size=(1, size, size, 3)).astype(np.float32)
    modules = make_torch(config, kind)
    theirs = run_torch(*modules, pixels, kind=kind)
    params = convert_torch(*modules, config=config)
    del modules  # as large as ours
    return differences(run_ours(params, pixels, config=config), theirs)


def main() -> None:
    """Runs the comparison at full size; prints the rows and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_default_matmul_precision", "highest")
    import torch
    import transformers

    start = time.perf_counter()
    found = compare(get_preset("vicuna-7b").model, kind="blip_2")
    for name, value in found.items():
        print(f"{name:15} {value:.2e}")
    report = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - start, 1),
        "largest_relative_difference": found,
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
