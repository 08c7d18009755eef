"""The rows of `train.py` on a GPU host: both stages at 7B and 13B shapes with random weights, the step of `train.py`.

    python benchmarks/train_gpu.py --rows stage1_7b_cached_256 ...      # started by `train.py`, a row at a time

Weights are made on the device (`full_size.py`); batches are full rows without padding, so that a sample is a sample.
`cached` trains from vision features, `pictures` encodes normalised pictures with the frozen tower and Q-Former before
each step, both as the trainer does. Speed is set against the multiplications that the step cannot do without
(`minigpt4_jax.estimate`, the activation-only count): as a share of a large bfloat16 matmul in the same process, and of
the card's data sheet. Imports nothing of the package that reads data or files.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parts
from ceilings import matmul_flop_per_s
from full_size import abstract_params_in, random_params, tree_bytes
from parts import Spec

from minigpt4_jax import estimate, hardware
from minigpt4_jax.gpu_memory import take_gpu_memory
from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.minigpt4 import Params, apply_method, make_model
from minigpt4_jax.presets import get_preset
from minigpt4_jax.sharding import make_mesh, replicated
from minigpt4_jax.train_config import OptimizerConfig
from minigpt4_jax.training.optimizer import make_optimizer
from minigpt4_jax.training.program import abstract_frozen, lower_train_step, start_state
from minigpt4_jax.training.state import TrainBatch

REPEATS = 5
REMAT = "names"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is."""

    models: dict[str, str]
    """Name in the rows -> preset."""
    dtype: str
    stages: dict[str, tuple[int, int]]
    """Stage -> tokens of a row, and how many of them are answer. Stage 1: bos, 32 of the picture, 32 of the caption.
    Stage 2: a prompt of `alignment.txt` around the picture, 160 of the answer."""
    batches: dict[str, int]
    """Name in the rows -> rows of a batch: 256 is stage 1's on four GPUs, 64 each; 12 is stage 2's."""
    steps: int
    """Steps in one timing."""
    matmul: int


FULL = Sizes(
    models={"7b": "vicuna-7b", "13b": "vicuna-13b"},
    dtype="bfloat16",
    stages={"stage1": (65, 32), "stage2": (224, 160)},
    batches={"256": 256, "64": 64, "12": 12},
    steps=4,
    matmul=8192,
)
TINY = Sizes(
    models={"7b": "tiny-qformer", "13b": "tiny-qformer"},
    dtype="float32",
    stages={"stage1": (12, 4), "stage2": (20, 8)},
    batches={"256": 4, "64": 2, "12": 3},
    steps=2,
    matmul=64,
)
"""For tests: every row in seconds on a CPU."""
SIZES = {"full": FULL, "tiny": TINY}


class Trainer:
    """One step, compiled, and everything it needs on the device."""

    def __init__(self, sizes: Sizes, *, model: str, stage: str, batch: str) -> None:
        self.config = get_preset(sizes.models[model]).model
        self.dtype = jnp.dtype(sizes.dtype)
        self.rows = sizes.batches[batch]
        self.length, self.targets = sizes.stages[stage]
        self.mesh = make_mesh(devices=jax.devices()[:1])
        optimizer = OptimizerConfig(init_lr=1e-6, min_lr=1e-6, warmup_steps=0)
        self.program = lower_train_step(
            self.config, optimizer, mesh=self.mesh, batch_size=self.rows, length=self.length,
            targets=self.targets, remat=REMAT, dtype=self.dtype,
        ).compile()  # fmt: skip
        llama = abstract_frozen(self.config, mesh=self.mesh, dtype=self.dtype)
        self.frozen: Params = self._placed(random_params(llama))
        disk = abstract_params_in(self.config, DISK, self.dtype)
        vision = {name: disk[name] for name in self.config.vision_parts}
        self.vision: Params = random_params(vision, seed=1)
        wide = abstract_params_in(self.config, DISK, jnp.float32)["llama_proj"]
        projection = random_params({"llama_proj": wide}, seed=2)["llama_proj"]
        self.state = start_state(projection, make_optimizer(optimizer), mesh=self.mesh)
        tower = make_model(self.config, layout=DISK, dtype=self.dtype)
        self.encode = jax.jit(lambda params, x: apply_method(tower, params, "encode_vision", x)[0])
        rng = np.random.default_rng(0)
        size = self.config.vit.image_size
        self.pictures = jnp.asarray(rng.normal(size=(self.rows, size, size, 3)), jnp.float32)
        self.features = jnp.asarray(
            rng.normal(size=(self.rows, *self.config.feature_shape)), jnp.float32
        )

    def _placed(self, tree: Any) -> Any:
        return jax.device_put(tree, replicated(self.mesh))

    def batch(self, features: jax.Array) -> TrainBatch:
        """Random ids behind the picture's places; the last `targets` of a row are its answer."""
        ids = np.random.default_rng(1).integers(
            3, self.config.llama.vocab_size, (self.rows, self.length), np.int32
        )
        ids[:, 1 : 1 + self.config.num_image_tokens] = -1
        answer = np.arange(self.length - self.targets, self.length, dtype=np.int32)
        places = np.broadcast_to(answer, (self.rows, self.targets))
        batch = TrainBatch(
            token_ids=ids,
            attention_mask=np.ones(ids.shape, bool),
            target_positions=places - 1,
            target_ids=np.take_along_axis(ids, places, axis=1),
            target_mask=np.ones(places.shape, bool),
            features=features,
        )
        placed: TrainBatch = self._placed(batch)
        return placed

    def run(self, steps: int, *, pictures: bool) -> float:
        """Takes so many steps; returns the loss of the last one, which waits for all of them."""
        batch = self.batch(self.features)
        for _ in range(steps):
            if pictures:
                features = self.encode(self.vision, self.pictures).astype(jnp.float32)
                batch = batch._replace(features=self._placed(features))
            self.state, numbers = self.program(self.state, self.frozen, batch)
        return float(numbers.loss)


def train_row(sizes: Sizes, *, model: str, stage: str, source: str, batch: str) -> dict[str, Any]:
    """Steps one after the other, as the trainer takes them: nothing of the host between two."""
    flop_per_s = matmul_flop_per_s(sizes.matmul, jnp.dtype(sizes.dtype), repeats=REPEATS)
    trainer = Trainer(sizes, model=model, stage=stage, batch=batch)
    pictures = source == "pictures"
    trainer.run(1, pictures=pictures)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        loss = trainer.run(sizes.steps, pictures=pictures)
        times.append((time.perf_counter() - start) / sizes.steps)
    if not np.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}: nothing was measured")
    step_s = statistics.median(times)
    flops = estimate.step_flops(
        trainer.config, batch_size=trainer.rows, length=trainer.length, targets=trainer.targets,
        vision=pictures, remat=REMAT,
    ).model  # fmt: skip
    sheet = hardware.find_device(jax.devices()[0].device_kind)
    memory = trainer.program.memory_analysis()
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "what": f"{stage}, {model.upper()}, {source}, {trainer.rows} x {trainer.length} tokens: samples per s",
        "samples_per_s": round(trainer.rows / step_s, 2),
        "ms": round(1000 * step_s, 3),
        "ms_of_repeats": [round(1000 * min(times), 3), round(1000 * max(times), 3)],
        "flop": flops,
        "flop_per_s": flop_per_s,
        "share_of_peak": _share(flops, flop_per_s, step_s),
        "utilisation": _share(flops, sheet.flops_per_s, step_s) if sheet else None,
        "peak_bytes": stats.get("peak_bytes_in_use", 0),
        "frozen_bytes": tree_bytes(trainer.frozen),
        "temp_bytes": memory.temp_size_in_bytes,
    }


def _share(amount: float, per_s: float, seconds: float) -> float:
    return float(f"{amount / per_s / seconds:.3g}")


def _row(model: str, stage: str, source: str, batch: str) -> tuple[str, Spec]:
    name = f"{stage}_{model}_{source}_{batch}"
    measure = functools.partial(train_row, model=model, stage=stage, source=source, batch=batch)
    return name, Spec(part=name, seconds=75, script="train_gpu.py", measure=measure)


def _torch(model: str, stage: str, batch: str) -> tuple[str, Spec]:
    name = f"torch_{stage}_{model}_{batch}"
    return name, Spec(part=name, seconds=90, script="train_torch.py", measure=None)


ROWS: dict[str, Spec] = dict(
    [
        _row("7b", "stage1", "cached", "256"), _row("13b", "stage1", "cached", "256"),
        _row("7b", "stage1", "pictures", "256"), _row("13b", "stage1", "pictures", "256"),
        _row("13b", "stage2", "cached", "12"), _torch("7b", "stage1", "64"),
        _row("7b", "stage1", "cached", "64"), _row("13b", "stage2", "pictures", "12"),
        _torch("13b", "stage1", "64"), _row("13b", "stage1", "cached", "64"),
        _row("7b", "stage2", "cached", "12"), _torch("13b", "stage2", "12"),
    ]
)  # fmt: skip
"""In the order of their value."""


def main() -> None:
    """Measures the rows that are named and prints them, one line each."""
    args = parts.read_part_arguments(__doc__.split("\n\n")[0], rows=list(ROWS), sizes=list(SIZES))
    take_gpu_memory()
    for name, row in parts.measure_rows(ROWS, args.rows, SIZES[args.sizes], budget_s=args.budget_s):
        parts.print_row(name, row)


if __name__ == "__main__":
    main()
