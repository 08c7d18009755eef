"""The compiled train step: lowered from shapes and shardings alone, one program for each shape of a batch.

For: the training loop, benchmarks with weights made on the device, and compiling for devices that are not there
(`minigpt4 plan --compile`). Not for: the arithmetic (`step.py`), nor for what lies in the arrays.

Differs from the original, which runs eagerly. Nothing here reads files, pictures or words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.models.layout import DISK, TRAIN, convert_layout
from minigpt4_jax.models.minigpt4 import abstract_params, make_model
from minigpt4_jax.sharding import make_shardings, replicated, rows_sharding
from minigpt4_jax.train_config import OptimizerConfig
from minigpt4_jax.training.optimizer import make_optimizer
from minigpt4_jax.training.state import Projection, TrainBatch, TrainState, init_state
from minigpt4_jax.training.step import Frozen, StepNumbers, make_train_step


def abstract_frozen(config: ModelConfig, *, mesh: Mesh, dtype: DTypeLike) -> Frozen:
    """What a train step is given of the frozen weights: shapes in the layout `TRAIN`, each with its place on the mesh.

    Raises:
        UserError: sizes that the mesh does not divide.
    """
    stacked = jax.eval_shape(
        lambda tree: convert_layout(tree, DISK, TRAIN, llama=config.llama),
        {"llama": abstract_params(config)["llama"]},
    )
    frozen: Frozen = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=place),
        stacked,
        make_shardings(mesh, stacked),
    )
    return frozen


def abstract_state(
    config: ModelConfig, tx: optax.GradientTransformation, *, mesh: Mesh
) -> TrainState:
    """Shapes of a run's state, whole on every device: the projection and its optimizer are 60 MB at most."""
    shape = (config.projection_in, config.llama.width)
    blank = {
        "kernel": jax.ShapeDtypeStruct(shape, jnp.float32),
        "bias": jax.ShapeDtypeStruct(shape[1:], jnp.float32),
    }
    state: TrainState = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        jax.eval_shape(lambda projection: init_state(projection, tx), blank),
    )
    return state


def abstract_batch(
    config: ModelConfig, *, mesh: Mesh, batch_size: int, length: int, targets: int
) -> TrainBatch:
    """Shapes of a batch of the whole run: `batch_size` rows of `length` tokens with room for `targets` answer tokens.

    Rows lie over the axes `data` and `fsdp`, which must divide them.
    """

    def array(shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        return jax.ShapeDtypeStruct((batch_size, *shape), dtype, sharding=rows_sharding(mesh))

    return TrainBatch(
        token_ids=array((length,), jnp.int32),
        attention_mask=array((length,), jnp.bool_),
        target_positions=array((targets,), jnp.int32),
        target_ids=array((targets,), jnp.int32),
        target_mask=array((targets,), jnp.bool_),
        features=array(config.feature_shape, jnp.float32),
    )


def start_state(
    projection: Projection, tx: optax.GradientTransformation, *, mesh: Mesh
) -> TrainState:
    """A fresh state on the mesh, of arrays of its own: the step consumes them, and `projection` is the caller's.

    Every leaf gets its place here: left to itself, jit puts the optimizer's counters on the first device, where a
    restored state finds them on the mesh.
    """
    start = jax.jit(
        lambda tree: init_state(jax.tree.map(jnp.copy, tree), tx), out_shardings=replicated(mesh)
    )
    state: TrainState = start(jax.tree.map(np.asarray, projection))
    return state


def lower_train_step(
    model_config: ModelConfig,
    optimizer_config: OptimizerConfig,
    *,
    mesh: Mesh,
    batch_size: int,
    length: int,
    targets: int,
    remat: str,
    dtype: DTypeLike,
) -> jax.stages.Lowered:
    """The very step that a run takes, from abstract shapes: nothing is allocated, and the devices need not exist.

    `train_step(state, frozen, batch) -> (state, numbers)`, the state donated, on arrays as `abstract_state`,
    `abstract_frozen` and `abstract_batch` describe them.

    Args:
        mesh: with the axes `sharding.AXES`; of devices, or of a topology's.
        batch_size: rows of the whole batch, on all devices together.
        length: tokens of a row, the picture's included.
        targets: places for answer tokens in a row; the LM head runs on these alone.
        remat: `none`, `names` or `full`: see `models.layers.run_blocks`.
        dtype: of the frozen weights and the activations. The projection, the optimizer and the loss are float32.
    """
    tx = make_optimizer(optimizer_config)
    model = make_model(model_config, layout=TRAIN, dtype=dtype, remat=remat)
    step: Any = jax.jit(  # its own type hides `lower`
        make_train_step(model, tx), donate_argnums=0, out_shardings=replicated(mesh)
    )
    batch = abstract_batch(
        model_config, mesh=mesh, batch_size=batch_size, length=length, targets=targets
    )
    with jax.set_mesh(mesh):
        lowered: jax.stages.Lowered = step.lower(
            abstract_state(model_config, tx, mesh=mesh),
            abstract_frozen(model_config, mesh=mesh, dtype=dtype),
            batch,
        )
    return lowered


class TrainPrograms:
    """The train step for batches of any shape; each shape is compiled once, beforehand or when it first comes."""

    def __init__(
        self,
        model_config: ModelConfig,
        optimizer_config: OptimizerConfig,
        *,
        mesh: Mesh,
        remat: str,
        dtype: DTypeLike,
    ) -> None:
        self._lower = functools.partial(
            lower_train_step, model_config, optimizer_config, mesh=mesh, remat=remat, dtype=dtype
        )
        self._compiled: dict[tuple[int, int, int], jax.stages.Compiled] = {}

    def compile(self, *, batch_size: int, length: int, targets: int) -> jax.stages.Compiled:
        """The program for one shape."""
        shape = (batch_size, length, targets)
        if shape not in self._compiled:
            lowered = self._lower(batch_size=batch_size, length=length, targets=targets)
            self._compiled[shape] = lowered.compile()
        return self._compiled[shape]

    def compile_ahead(
        self, shapes: Sequence[tuple[int, int]], *, batch_size: int, advance: Callable[[], None]
    ) -> None:
        """The programs of all (length, targets) that batches will have; `advance` is called after each."""
        for length, targets in shapes:
            self.compile(batch_size=batch_size, length=length, targets=targets)
            advance()

    def __call__(
        self, state: TrainState, frozen: Frozen, batch: TrainBatch
    ) -> tuple[TrainState, StepNumbers]:
        """One step; `state` is consumed."""
        rows, length = batch.token_ids.shape
        program = self.compile(batch_size=rows, length=length, targets=batch.target_ids.shape[1])
        after: tuple[TrainState, StepNumbers] = program(state, frozen, batch)
        return after
