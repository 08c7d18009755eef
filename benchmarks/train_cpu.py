"""The train step of the smol model beside PyTorch, in float32 on two threads of one CPU: the rows of `train.py`.

Both sides have the same weights and the same inputs, run in one process and take turns, round after round; before a row
is timed, its numbers must agree. A round calls each side once untimed (the other side emptied the caches) and then for
about a second; its value is the median of those calls. Reported are the medians over the rounds and
ratio = torch time / our time: above 1 we are faster.

Ours is the step of `train.py`; theirs (`smol_torch.py`) is `transformers` as it comes, without `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from measuring import TOLERANCE, Row, require_agreement, whole_call

from convert.projection import read_projection
from minigpt4_jax.loading import load_frozen, shipped_projection
from minigpt4_jax.models.layout import DISK, TRAIN, convert_layout
from minigpt4_jax.models.minigpt4 import Params, apply_method, make_model
from minigpt4_jax.presets import get_preset
from minigpt4_jax.sharding import make_mesh, replicated
from minigpt4_jax.train_config import OptimizerConfig, TrainConfig
from minigpt4_jax.training.optimizer import make_optimizer
from minigpt4_jax.training.program import lower_train_step, start_state
from minigpt4_jax.training.state import TrainBatch

PRESET = get_preset("smol")


def load_params() -> Params:
    """The smol weights, float32, in the layout `DISK`."""
    frozen, _ = load_frozen("smol")
    return {**frozen, "llama_proj": read_projection(shipped_projection("smol"), PRESET.model)[0]}


def train_row(params: Params, length: int, num_targets: int) -> Row:
    """One AdamW step of the projection, 16 rows of `length` tokens without padding, the last `num_targets` count.

    Agreement: the losses of three steps, of which the later ones depend on the gradient and on the optimizer.
    """
    from smol_torch import LlamaTwin

    config = PRESET.model
    # So small a rate that the third loss is no chaos: Adam's first steps have one length for every weight.
    optimizer = OptimizerConfig(init_lr=1e-6, min_lr=1e-6, warmup_steps=0)
    rng = np.random.default_rng(length)
    ids = rng.integers(0, config.llama.vocab_size, (16, length), np.int32)
    ids[:, : config.num_image_tokens] = -1
    places = np.broadcast_to(
        np.arange(length - num_targets, length, dtype=np.int32), (16, num_targets)
    )
    tower = make_model(config, layout=DISK, dtype=jnp.float32)
    encode = jax.jit(lambda params, x: apply_method(tower, params, "encode_vision", x)[0])
    size = config.vit.image_size
    images = np.random.default_rng(0).normal(size=(8, size, size, 3)).astype(np.float32)
    vision = {name: params[name] for name in config.vision_parts}
    batch = {
        "token_ids": ids,
        "attention_mask": np.ones(ids.shape, bool),
        "target_positions": places - 1,
        "target_ids": np.take_along_axis(ids, places, axis=1),
        "target_mask": np.ones(places.shape, bool),
        "features": np.tile(np.asarray(encode(vision, images)), (2, 1, 1)),
    }
    mesh = make_mesh(devices=jax.devices()[:1])
    train_step = lower_train_step(
        config, optimizer, mesh=mesh, batch_size=len(ids), length=length, targets=num_targets,
        remat=TrainConfig().remat, dtype=jnp.float32,
    ).compile()  # fmt: skip
    llama = convert_layout({"llama": params["llama"]}, DISK, TRAIN, llama=config.llama)
    frozen = jax.device_put(llama, replicated(mesh))
    on_device = jax.device_put(TrainBatch(**batch), replicated(mesh))
    state = start_state(params["llama_proj"], make_optimizer(optimizer), mesh=mesh)

    def our_step() -> float:
        nonlocal state
        state, numbers = train_step(state, frozen, on_device)
        return float(numbers.loss)

    their_step = LlamaTwin(params, config).train_step(params["llama_proj"], batch, optimizer)
    losses = [(our_step(), their_step()) for _ in range(3)]
    ours, theirs = zip(*losses, strict=True)
    if not max(theirs) - min(theirs) > 3 * TOLERANCE * max(theirs):
        raise SystemExit(f"train step: the losses {theirs} hardly move, so they show nothing.")
    return Row(
        what=f"train step, batch 16 x {length} tokens, {num_targets} targets each: ms",
        units=1,
        difference=require_agreement("train step", ours, theirs),
        ours=whole_call(our_step),
        theirs={"adamw": whole_call(their_step)},
    )


ROWS: dict[str, Callable[[Params], Row]] = {
    "train_36": lambda params: train_row(params, 36, 8),
    "train_96": lambda params: train_row(params, 96, 64),
}
