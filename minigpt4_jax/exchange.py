"""What devices send each other during a train step, in bytes.

For: `step_exchange`, by the sizes of model and mesh. Not for: how long it takes (`estimate.py`), and not for batches,
which come from the hosts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.parameters import count_parameters


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Bytes that one device takes in from others during a step."""

    fsdp: float
    """Weights gathered for the forward pass and again for the backward pass."""
    tensor: float
    """Sums of the residual stream, twice a layer in each direction, and of the logits."""
    gradient: float
    """The projection's, over `data` and `fsdp`."""

    @property
    def total(self) -> float:
        return self.fsdp + self.tensor + self.gradient


def step_exchange(
    model: ModelConfig,
    *,
    mesh: Mapping[str, int],
    batch_size: int,
    length: int,
    targets: int,
    dtype_bytes: int,
) -> Exchange:
    """Exchange of one step; the arguments are those of `estimate.train_memory`. Sums and gathers go round in a ring.

    The image tower has no part in it: it is whole on every device (`training/vision.py`).
    """
    llama, counts = model.llama, count_parameters(model)
    fsdp, tensor = mesh["fsdp"], mesh["tensor"]
    rows = -(-batch_size // (mesh["data"] * fsdp))
    gathers = 2 * counts["llama"].split * dtype_bytes / tensor
    stream = rows * length * llama.width * dtype_bytes
    summed = 4 * llama.num_layers * stream + rows * targets * llama.vocab_size * 4
    copies = mesh["data"] * fsdp
    return Exchange(
        fsdp=gathers * (fsdp - 1) / fsdp,
        tensor=summed * 2 * (tensor - 1) / tensor,
        gradient=counts["llama_proj"].total * 4 * 2 * (copies - 1) / copies,
    )
