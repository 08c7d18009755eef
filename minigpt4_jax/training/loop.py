"""A training run, from features to the finished projection. Reads top to bottom; all side effects of training are here.

Not for: loading the frozen weights and the tokenizer (the entry point hands them in), or the arithmetic (`step.py`).
Differs from the original: a run resumes at the very step and sample where it stopped, not at an epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.checkpoint import TrainCheckpoints
from minigpt4_jax.config import TrainConfig, UserError
from minigpt4_jax.data.batches import Batch
from minigpt4_jax.data.datasets import Part, image_offsets, open_sources
from minigpt4_jax.data.encoding import Encoder
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.pipeline import Pipeline, make_pipeline
from minigpt4_jax.data.prompts import get_template
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.models.layout import DISK, TRAIN, convert_layout
from minigpt4_jax.models.minigpt4 import Params, make_model
from minigpt4_jax.presets import Preset, get_preset
from minigpt4_jax.training.init import caption_targets, random_projection, ridge_projection
from minigpt4_jax.training.metrics import Metrics, make_progress
from minigpt4_jax.training.optimizer import make_optimizer, make_schedule
from minigpt4_jax.training.state import Projection, TrainBatch, init_state
from minigpt4_jax.training.step import make_train_step
from minigpt4_jax.training.vision import CachedVision, Vision, make_vision

RIDGE_WITHIN, RIDGE_PENALTY = 0.1, 0.01
FREE_SETTINGS = (
    "workdir", "feature_cache", "licence", "attribution", "save_every", "log_every", "max_to_keep"
)  # fmt: skip
"""Settings that may change when a run is resumed: no number depends on them."""
FREE_DATA_SETTINGS = ("max_corrupt_share", "num_threads")
"""Likewise, inside `data`."""
Save = Callable[[Path, Projection], None]
"""Writes a finished projection; `convert` knows the file format, training does not."""


def train(
    config: TrainConfig,
    *,
    params: Params,
    tokenizer: Tokenizer,
    start: Projection | None,
    save_projection: Save,
) -> Projection:
    """Trains the projection and returns it. Called again with the same `workdir`, it goes on where it stopped.

    Args:
        params: the frozen parameters (`vit`, `ln_vision`, `llama`) in the `DISK` layout, float32.
        start: the projection to start from when `config.init_projection` names a file (the entry point read it).
        save_projection: called with `<workdir>/projection.safetensors` when the last step is done.

    Raises:
        UserError: no workdir, a broken data folder, or a checkpoint of another run in `workdir`.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the step that was running is saved first.
    """
    if not config.workdir or not config.data.all_sources():
        raise UserError(
            f"workdir is {config.workdir!r} and data.folder is {config.data.folder!r}; expected two folders (or "
            "data.sources instead of the second). Set them in the YAML or append workdir=RUN data.folder=SET to the "
            "command."
        )
    preset = get_preset(config.preset)
    workdir = Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    dtype = _frozen_dtype(config.dtype)
    with make_progress() as progress:
        task = progress.add_task("indexing shards", total=None, numbers="", visible=False)
        parts = open_sources(
            config.data,
            progress=lambda done, of: progress.update(task, completed=done, total=of, visible=True),
        )
    vision = make_vision(config, preset, parts, params, dtype=dtype)

    model = make_model(preset.model, layout=TRAIN, dtype=dtype)
    frozen = {
        "llama": jax.tree.map(
            lambda leaf: jnp.asarray(leaf, dtype),
            convert_layout(params["llama"], DISK, TRAIN, llama=preset.model.llama),
        )
    }
    tx = make_optimizer(config.optimizer)
    train_step = jax.jit(make_train_step(model, tx), donate_argnums=0)

    with (
        TrainCheckpoints(workdir, max_to_keep=config.max_to_keep) as checkpoints,
        make_batches(config, preset, parts, vision, tokenizer) as batches,
        _stop_after_step() as stop,
    ):
        meta = {"run": _identity(config)}
        shape = (preset.model.projection_in, preset.model.llama.width)
        blank = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}
        restored = checkpoints.restore_latest(jax.eval_shape(lambda p: init_state(p, tx), blank))
        if restored is not None:
            _require_same_run(config, restored.meta["run"], meta["run"])
            batches.set_state(restored.data_state)
            state, step = restored.state, restored.step
        else:
            projection = start or _initial_projection(
                config, preset, parts, vision, tokenizer, params
            )
            # A copy: the step donates its state, and `start` is the caller's.
            state, step = init_state(jax.tree.map(jnp.array, projection), tx), 0
        schedule = make_schedule(config.optimizer)
        max_steps = config.optimizer.max_steps
        with Metrics(
            workdir, start_step=step, max_steps=max_steps, log_every=config.log_every
        ) as metrics:
            while step < max_steps:
                batch = _to_device(next(batches), vision)
                state, loss = train_step(state, frozen, batch)
                step += 1
                value = float(loss)
                if not np.isfinite(value):
                    raise UserError(
                        f"The loss of step {step} is {value}; expected a number. The last checkpoint is from before "
                        "it. Lower optimizer.init_lr and start in a new workdir."
                    )
                metrics.write(
                    step,
                    loss=value,
                    learning_rate=float(schedule(step - 1)),
                    samples=config.data.batch_size,
                )
                # Read once: a stop that comes too late for this save waits for the next step.
                stopping = stop.requested
                if step % config.save_every == 0 or step == max_steps or stopping:
                    checkpoints.save(step, state, data_state=batches.get_state(), meta=meta)
                if stopping:
                    break
        checkpoints.wait_until_finished()
        if step < max_steps:
            raise KeyboardInterrupt
    trained: Projection = jax.tree.map(np.asarray, state.projection)
    save_projection(workdir / "projection.safetensors", trained)
    return trained


def make_batches(
    config: TrainConfig,
    preset: Preset,
    parts: Sequence[Part],
    vision: Vision,
    tokenizer: Tokenizer,
) -> Pipeline:
    """The stream of batches over `parts` in the words of `config.data`."""
    encoder = Encoder(
        get_template(config.data.template),
        tokenizer,
        prompts=config.data.prompts,
        num_image_tokens=preset.model.num_image_tokens,
        max_text_len=config.data.max_text_len,
        max_positions=preset.model.llama.max_positions,
    )
    return make_pipeline(
        parts,
        encoder,
        seed=config.data.seed,
        batch_size=config.data.batch_size,
        length_multiple=config.data.length_multiple,
        max_corrupt_share=config.data.max_corrupt_share,
        pictures=vision.pictures,
        bad_images=vision.bad_images,
        num_threads=config.data.num_threads,
    )


def _initial_projection(
    config: TrainConfig,
    preset: Preset,
    parts: Sequence[Part],
    vision: Vision,
    tokenizer: Tokenizer,
    params: Params,
) -> Projection:
    embedding = np.asarray(params["llama"]["embed_tokens"]["embedding"], np.float32)
    if config.init_projection == "random":
        key = jax.random.key(config.seed)
        return random_projection(preset.model, key, embed_std=float(embedding.std()))
    assert isinstance(vision, CachedVision)  # TrainConfig sees to it
    rows, captions = [], []
    for part, offset in zip(parts, image_offsets(parts), strict=True):
        for index in range(len(part.source)):
            with contextlib.suppress(SampleFault):  # the stream counts these
                example = part.source[index]
                if offset + example.image_row not in vision.bad_images:
                    rows.append(offset + example.image_row)
                    captions.append(tokenizer.encode(part.process(example.exchanges[0].answer)))
    return ridge_projection(
        preset.model,
        vision.features,
        np.asarray(rows),
        caption_targets(captions, embedding),
        within=RIDGE_WITHIN,
        penalty=RIDGE_PENALTY,
    )


def _require_same_run(config: TrainConfig, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    before, now = dict(_dotted(theirs)), dict(_dotted(ours))
    changed = sorted(name for name in now if before.get(name) != now[name])
    if changed:
        raise UserError(
            f"{config.workdir} holds a run with other settings ({', '.join(changed)}). Use another workdir, or set "
            "them back to continue that run."
        )


def _dotted(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _frozen_dtype(name: str) -> Any:
    """bfloat16 on accelerators; float32 on a CPU, where XLA emulates bfloat16 at a fraction of the speed."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide a run's numbers; a checkpoint is continued only under the same ones."""
    settings = dataclasses.asdict(config)
    flat = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
    data = {name: v for name, v in flat["data"].items() if name not in FREE_DATA_SETTINGS}
    flat["data"] = {**data, "prompts": list(data["prompts"])}
    return flat


def _to_device(batch: Batch, vision: Vision) -> TrainBatch:
    return TrainBatch(
        token_ids=jnp.asarray(batch["token_ids"]),
        attention_mask=jnp.asarray(batch["attention_mask"]),
        target_positions=jnp.asarray(batch["target_positions"]),
        target_ids=jnp.asarray(batch["target_ids"]),
        target_mask=jnp.asarray(batch["target_mask"]),
        patches=vision.patches(batch),
    )


@dataclasses.dataclass
class _Stop:
    """Set by the first Ctrl-C or SIGTERM; the loop looks at it between two steps."""

    requested: bool = False


@contextlib.contextmanager
def _stop_after_step() -> Iterator[_Stop]:
    """Ctrl-C and SIGTERM finish and save the current step; a second one stops at once, back to the last checkpoint."""
    stop = _Stop()

    def handle(signum: int, frame: object) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, handle)
    except ValueError:
        pass  # not in the main thread: the embedding program owns the signals
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
