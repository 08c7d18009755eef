"""training/program.py on eight simulated devices: every mesh gives the run of one device, and what it should cost."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.checkpoint import leaf_names
from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.models import llama as llama_module
from minigpt4_jax.models.layout import TRAIN
from minigpt4_jax.models.minigpt4 import abstract_params, make_model
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.sharding import make_mesh, make_shardings
from minigpt4_jax.train_config import OptimizerConfig
from minigpt4_jax.training import program, step
from minigpt4_jax.training.frozen import FrozenArrays
from minigpt4_jax.training.optimizer import make_optimizer
from minigpt4_jax.training.placement import place_rows
from minigpt4_jax.training.program import TrainPrograms, lower_train_step, start_state
from minigpt4_jax.training.state import TrainBatch
from minigpt4_jax.training.step import loss_fn
from tests.engines import counted_compiles

TINY = PRESETS["tiny-qformer"].model
ROWS, LENGTH, TARGETS = 8, 24, 8
MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


@pytest.fixture(scope="module")
def params(draw_params: Callable[[Any], Any]) -> Any:
    abstract = abstract_params(TINY)
    return draw_params({name: abstract[name] for name in ("llama", "llama_proj")})


@pytest.fixture(scope="module")
def batches() -> list[TrainBatch]:
    """Four: rows of different lengths, a picture at a different place in each, some targets that do not count."""
    rng = np.random.default_rng(6)
    made = []
    for _ in range(4):
        token_ids = rng.integers(0, TINY.llama.vocab_size, (ROWS, LENGTH)).astype(np.int32)
        for row in range(ROWS):
            token_ids[row, 1 + row % 3 :][: TINY.num_image_tokens] = IMAGE_TOKEN_ID
        lengths = rng.integers(14, LENGTH, ROWS)
        made.append(
            TrainBatch(
                token_ids=token_ids,
                attention_mask=np.arange(LENGTH)[None] < lengths[:, None],
                target_positions=rng.integers(8, 14, (ROWS, TARGETS)).astype(np.int32),
                target_ids=rng.integers(0, TINY.llama.vocab_size, (ROWS, TARGETS)).astype(np.int32),
                target_mask=rng.random((ROWS, TARGETS)) < rng.random((ROWS, 1)),
                features=rng.normal(size=(ROWS, *TINY.feature_shape)).astype(np.float32),
            )
        )
    return made


class Run:
    """A few steps as the loop takes them; with the programs of another run of the same sizes, if there is one."""

    def __init__(
        self,
        params: Any,
        optimizer: OptimizerConfig,
        *,
        remat: str,
        programs: TrainPrograms | None = None,
        **sizes: int,
    ) -> None:
        self.mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
        held = FrozenArrays(params, llama=TINY.llama)
        self.frozen = held.load(
            ("llama",),
            layout=TRAIN,
            dtype=jnp.float32,
            place=functools.partial(make_shardings, self.mesh),
        )
        self.programs = programs or TrainPrograms(
            TINY, optimizer, mesh=self.mesh, remat=remat, dtype=jnp.float32
        )
        self.state = start_state(params["llama_proj"], make_optimizer(optimizer), mesh=self.mesh)
        self.losses: list[float] = []

    def take(self, batch: TrainBatch) -> None:
        self.state, numbers = self.programs(self.state, self.frozen, place_rows(batch, self.mesh))
        self.losses.append(float(numbers.loss))

    @property
    def projection(self) -> Any:
        return jax.tree.map(np.asarray, self.state.projection)


ADAM = OptimizerConfig(init_lr=0.03, min_lr=0.03, warmup_steps=0, max_steps=4, eps=1e-2)
"""With an `eps` far above the rounding of a gradient (1e-7): an update follows its size, no steeper than `init_lr /
eps` = 3. (Adam's first step goes by the sign alone otherwise, and rounding could turn one.)"""


@pytest.fixture(scope="module")
def alone(params: Any, batches: list[TrainBatch]) -> Run:
    run = Run(params, ADAM, remat="none", data=1)
    for batch in batches:
        run.take(batch)
    return run


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_gives_the_losses_and_the_projection_of_one_device(
    sizes: dict[str, int], params: Any, batches: list[TrainBatch], alone: Run
) -> None:
    run = Run(params, ADAM, remat="names", **sizes)
    for batch in batches:
        run.take(batch)
    # The same sums in another order: over rows (data, fsdp) and within products (tensor), in float32.
    np.testing.assert_allclose(run.losses, alone.losses, rtol=5e-6)
    assert len(set(np.round(alone.losses, 2))) == len(
        batches
    )  # losses of different batches differ by far more
    for name, start in params["llama_proj"].items():
        moved = np.abs(alone.projection[name] - start).max()
        assert moved > 0.05
        np.testing.assert_allclose(
            run.projection[name], alone.projection[name], rtol=0, atol=1e-4 * moved
        )


def test_a_fresh_state_lies_whole_on_every_device_counters_too(params: Any) -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    state = start_state(params["llama_proj"], make_optimizer(ADAM), mesh=mesh)
    for leaf in jax.tree.leaves(state):
        assert leaf.sharding.is_fully_replicated
        assert leaf.sharding.device_set == set(jax.devices())


def test_what_is_computed_again_comes_out_the_same(
    params: Any, batches: list[TrainBatch], alone: Run
) -> None:
    run = Run(params, ADAM, remat="full", data=1)  # `names` is what the meshes have
    for batch in batches:
        run.take(batch)
    np.testing.assert_allclose(run.losses, alone.losses, rtol=5e-6)
    np.testing.assert_allclose(
        run.projection["kernel"], alone.projection["kernel"], rtol=0, atol=2e-5
    )


def test_four_batches_of_two_move_the_projection_as_one_of_eight(
    params: Any, batches: list[TrainBatch], alone: Run
) -> None:
    batch = batches[0]
    gathered = dataclasses.replace(ADAM, accum_grad_iters=4)
    whole = Run(params, ADAM, remat="none", programs=alone.programs, data=1)
    whole.take(batch)
    parts = Run(params, gathered, remat="names", data=2)
    for first in range(0, ROWS, 2):
        parts.take(jax.tree.map(lambda leaf, at=first: leaf[at : at + 2], batch))
    counts = batch.target_mask.reshape(4, -1).sum(1)
    assert len(set(counts)) > 1  # a mean of the four means would be another gradient
    for name, start in params["llama_proj"].items():
        moved = whole.projection[name] - start
        assert np.abs(moved).max() > 0.01
        np.testing.assert_allclose(parts.projection[name] - start, moved, rtol=0, atol=3e-6)


def test_under_fsdp_a_device_holds_its_share_of_every_leaf_that_is_split(params: Any) -> None:
    frozen = Run(params, ADAM, remat="names", fsdp=8).frozen
    whole = []
    for path, leaf in leaf_names(frozen).items():
        sizes = {shard.data.nbytes for shard in leaf.addressable_shards}
        assert len(leaf.addressable_shards) == 8
        if sizes == {leaf.nbytes}:
            whole.append(path)
        else:
            assert sizes == {leaf.nbytes // 8}, path
    assert all(path.endswith("norm/scale") for path in whole), whole
    assert len(whole) == 3


def test_shapes_that_were_compiled_ahead_are_not_compiled_again(
    params: Any, batches: list[TrainBatch], alone: Run
) -> None:
    run = Run(params, ADAM, remat="none", programs=alone.programs, data=1)
    done: list[int] = []
    shapes = [(LENGTH, TARGETS), (16, TARGETS)]
    run.programs.compile_ahead(shapes, batch_size=ROWS, advance=lambda: done.append(1))
    assert len(done) == 2
    short = batches[0]._replace(
        token_ids=batches[0].token_ids[:, :16], attention_mask=batches[0].attention_mask[:, :16]
    )
    with counted_compiles() as compiled:
        run.take(batches[0])
        run.take(short)
    assert compiled == []


# --- what the compiler makes of it ------------------------------------------------------------------------------------

WIDE = dataclasses.replace(
    TINY,
    llama=dataclasses.replace(
        TINY.llama,
        width=192,
        num_layers=6,
        num_heads=8,
        num_kv_heads=8,
        head_dim=32,
        mlp_width=448,
        vocab_size=656,
        tie_embeddings=False,
    ),
)
"""Large enough for activations to weigh, with sizes that tell every kernel from every activation."""
SHAPE = {"batch_size": 16, "length": 40, "targets": 14}


def compiled(remat: str = "names", **sizes: int) -> Any:
    mesh = make_mesh(**sizes, devices=jax.devices()[: math.prod(sizes.values())])
    lowered = lower_train_step(
        WIDE, OptimizerConfig(), mesh=mesh, remat=remat, dtype=jnp.float32, **SHAPE
    )
    return lowered.compile()


@functools.cache
def compiled_once(remat: str, *sizes: tuple[str, int]) -> Any:
    return compiled(remat, **dict(sizes))


def temporaries(program: Any) -> int:
    return int(program.memory_analysis().temp_size_in_bytes)


def frozen_gradients(program: Any) -> set[tuple[int, ...]]:
    """Shapes of frozen kernels that some matrix product of the program has as its result."""
    abstract = program_frozen(WIDE)
    kernels = {
        tuple(sorted(leaf.shape[-2:])) for leaf in jax.tree.leaves(abstract) if len(leaf.shape) > 1
    }
    found = set()
    for dims in re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", program.as_text()):
        shape = tuple(sorted(int(size) for size in dims.split(",") if int(size) > 1))
        if shape in kernels:
            found.add(shape)
    return found


def program_frozen(config: ModelConfig) -> Any:
    return program.abstract_frozen(config, mesh=make_mesh(data=8), dtype=jnp.float32)


@pytest.mark.parametrize(
    ("remat", "sizes"),
    [("none", ("data", 1)), ("names", ("data", 1)), ("full", ("data", 1)), ("names", ("fsdp", 8))],
)
def test_no_product_of_the_step_has_the_shape_of_a_frozen_kernels_gradient(
    remat: str, sizes: tuple[str, int]
) -> None:
    found = compiled_once(remat, sizes)
    assert len(re.findall(r" dot\(", found.as_text())) > 10
    assert frozen_gradients(found) == set()


def test_the_search_for_frozen_gradients_finds_them_where_they_are() -> None:
    model = make_model(WIDE, layout=TRAIN, dtype=jnp.float32, remat="names")
    mesh = make_mesh(data=1, devices=jax.devices()[:1])

    def all_gradients(projection: Any, frozen: Any, batch: TrainBatch) -> Any:
        def loss(projection: Any, frozen: Any) -> Any:
            return loss_fn(projection, frozen, batch, model=model)[0]

        return jax.grad(loss, argnums=(0, 1))(projection, frozen)

    state = program.abstract_state(WIDE, make_optimizer(OptimizerConfig()), mesh=mesh)
    frozen = program.abstract_frozen(WIDE, mesh=mesh, dtype=jnp.float32)
    batch = program.abstract_batch(WIDE, mesh=mesh, **SHAPE)
    wrong = jax.jit(all_gradients).lower(state.projection, frozen, batch).compile()
    assert len(frozen_gradients(wrong)) >= 2


@pytest.fixture
def unconstrained(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`compiled` of a model whose activations lie where the compiler likes."""

    def compile_without(**sizes: int) -> Any:
        with monkeypatch.context() as patch:
            for module in (llama_module, step):
                patch.setattr(module, "constrain_rows", lambda x, name: x)
            return compiled(**sizes)

    return compile_without


def test_constraints_on_activations_save_memory_under_fsdp(
    unconstrained: Callable[..., Any],
) -> None:
    ours, plain = compiled_once("names", ("fsdp", 8)), unconstrained(fsdp=8)
    assert temporaries(ours) < 0.5 * temporaries(plain)
    # No more than its eighth of the rows, one layer's gathered weights and the same again for what is at work.
    leaves = leaf_names(program_frozen(WIDE)).items()
    layer = sum(math.prod(leaf.shape[1:]) * 4 for path, leaf in leaves if "/layers/" in path)
    assert temporaries(ours) < 2 * (kept_by_hand() / 8 + layer)


def kept_by_hand() -> int:
    """Bytes of what the layers keep for the backward pass: their inputs and `models.layers.KEPT`, of every token."""
    llama, tokens = WIDE.llama, SHAPE["batch_size"] * SHAPE["length"]
    kept = 2 * llama.width + 3 * llama.num_heads * llama.head_dim + 2 * llama.mlp_width
    return kept * tokens * llama.num_layers * 4


def test_fsdp_gathers_each_kernel_once_a_pass_and_moves_no_batch() -> None:
    text = compiled_once("names", ("fsdp", 8)).as_text()
    moved = re.findall(r"= \w+\[([\d,]+)\]\S* (all-\w+)[-a-z]*\(", text)
    gathered = [tuple(map(int, dims.split(","))) for dims, kind in moved if kind == "all-gather"]
    assert (
        len(gathered) == 2 * 7 + 2
    )  # the layers' kernels in both passes, the embedding's rows, the head
    rows = SHAPE["batch_size"]
    assert [shape for shape in gathered if shape[0] == rows and len(shape) > 2][1:] == []


def kept_by_the_forward_pass(remat: str) -> Counter[tuple[int, ...]]:
    """Shapes of what the scan over the layers hands to the backward pass, of one layer."""
    model = make_model(WIDE, layout=TRAIN, dtype=jnp.float32, remat=remat)
    mesh = make_mesh(data=8)
    state = program.abstract_state(WIDE, make_optimizer(OptimizerConfig()), mesh=mesh)
    batch = program.abstract_batch(WIDE, mesh=mesh, **SHAPE)
    jaxpr = jax.make_jaxpr(jax.grad(lambda *trees: loss_fn(*trees, model=model)[0]))(
        state.projection, program_frozen(WIDE), batch
    )
    forward = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    stacked = [var for var in forward.outvars if var.aval.shape[:1] == (WIDE.llama.num_layers,)]
    used = {id(var) for eqn in jaxpr.eqns for var in eqn.invars}
    return Counter(var.aval.shape[1:] for var in stacked if id(var) in used)


def test_names_keeps_the_input_of_a_layer_and_where_its_nonlinearities_begin() -> None:
    llama, rows = WIDE.llama, (SHAPE["batch_size"], SHAPE["length"])
    stream = (*rows, llama.width)
    heads, half = (*rows, llama.num_heads, llama.head_dim), (*rows, llama.mlp_width)
    assert kept_by_the_forward_pass("names") == {stream: 2, heads: 3, half: 2}
    assert kept_by_the_forward_pass("full") == {stream: 1}


def test_remat_keeps_less_the_more_it_computes_again() -> None:
    none, names, full = (
        temporaries(compiled_once(remat, ("data", 1))) for remat in ("none", "names", "full")
    )
    assert full < 0.7 * names < 0.7 * 0.7 * none
    assert kept_by_hand() <= names < 1.5 * kept_by_hand()  # and the layer at work
