"""The arithmetic of one train step in FLOPs: what the model asks for, and what the program does.

For: `step_flops`, the numerator of model-FLOP utilisation. Not for: time and memory (`estimate.py`). Never from a
compiler's cost analysis, which counts the body of a scan once.

Only the projection is trained, so a frozen product costs its forward (2 FLOPs a parameter and token) and the gradient
of its input (2 more); where the weights are trained too, as most published utilisations have it, there are 6.
"""

from __future__ import annotations

from dataclasses import dataclass

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.parameters import layer_kernels


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """FLOPs of one step on all devices together; the parts are forward and backward."""

    layers: float
    """Matrices of the language model's layers: forward, and the gradient of their inputs."""
    attention: float
    """Scores and the mixing of values, half of the square: what lies above the diagonal is no work of the model."""
    head: float
    """The LM head, at the targets only."""
    projection: float
    """Forward, and the gradient of its weights."""
    vision: float
    """Forward of the image tower and the Q-Former; 0 with cached features."""
    again: float
    """What the program computes above that: whole squares of scores, again what `remat` did not keep, and the image
    tower again on every further device of `tensor`."""

    @property
    def model(self) -> float:
        """The numerator of model-FLOP utilisation."""
        return self.layers + self.attention + self.head + self.projection + self.vision

    @property
    def hardware(self) -> float:
        """With what is computed again."""
        return self.model + self.again


def step_flops(
    model: ModelConfig,
    *,
    batch_size: int,
    length: int,
    targets: int,
    vision: bool,
    remat: str,
    tensor: int = 1,
) -> StepFlops:
    """FLOPs of one step; the arguments are those of `train_memory`. A multiplication and an addition count as two.

    Args:
        tensor: devices along this axis: each of them encodes the same pictures, with the whole tower.
    """
    llama = model.llama
    tokens = batch_size * length
    forward = 2.0 * tokens * llama.num_layers * layer_kernels(llama)
    # Scores and values are two products; backward has two for each of them.
    square = 4.0 * tokens * length * llama.num_layers * llama.num_heads * llama.head_dim
    proj_tokens = batch_size * model.num_image_tokens
    # Again: the scores, or all of the layer but the down projection, whose output no gradient asks for.
    again = {
        "none": 0.0,
        "names": square / 2,
        "full": square
        + 2.0 * tokens * llama.num_layers * (layer_kernels(llama) - llama.mlp_width * llama.width),
    }[remat]
    pictures = batch_size * vision_flops(model) if vision else 0.0
    return StepFlops(
        layers=2 * forward,
        attention=1.5 * square,
        head=4.0 * batch_size * targets * llama.vocab_size * llama.width,
        projection=4.0 * proj_tokens * model.projection_in * llama.width,
        vision=pictures,
        again=1.5 * square + again + (tensor - 1) * pictures,
    )


def vision_flops(model: ModelConfig) -> float:
    """Of the forward pass of one picture, up to the features that the projection reads."""
    vit, qformer = model.vit, model.qformer
    tokens = 1 + vit.num_patches
    per_token = 4 * vit.width**2 + 2 * vit.width * vit.mlp_width + 2 * tokens * vit.width
    total = 2.0 * vit.num_layers * tokens * per_token
    total += 2.0 * vit.num_patches * 3 * vit.patch_size**2 * vit.width
    if qformer is None:
        return total
    queries, width = qformer.num_queries, qformer.width
    for layer in range(qformer.num_layers):
        total += 2.0 * queries * (4 * width**2 + 2 * width * qformer.mlp_width)
        total += 4.0 * queries * queries * width
        if qformer.has_cross_attention(layer):
            total += 4.0 * queries * width**2 + 4.0 * tokens * vit.width * width
            total += 4.0 * queries * tokens * width
    return total
