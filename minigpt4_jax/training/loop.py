"""A training run, from features to the finished projection. Reads top to bottom; all side effects of training are here.

Not for: loading the frozen weights and the tokenizer (the entry point hands them in), or the arithmetic (`step.py`).
Differs from the original: a run resumes at the very step and sample where it stopped, not at an epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.checkpoint import TrainCheckpoints
from minigpt4_jax.config import TrainConfig, UserError
from minigpt4_jax.data.batches import Batch
from minigpt4_jax.data.datasets import CcSbuAlign, make_pipeline
from minigpt4_jax.data.images import load_image, preprocess
from minigpt4_jax.data.prompts import get_template
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.models.layout import DISK, TRAIN, convert_layout
from minigpt4_jax.models.minigpt4 import MiniGPT4, Params, make_model
from minigpt4_jax.presets import Preset, get_preset
from minigpt4_jax.training.features import Features, encode_features, fingerprint
from minigpt4_jax.training.init import caption_targets, random_projection, ridge_projection
from minigpt4_jax.training.metrics import Metrics, make_progress
from minigpt4_jax.training.optimizer import make_optimizer, make_schedule
from minigpt4_jax.training.state import Projection, TrainBatch, TrainState, init_state
from minigpt4_jax.training.step import make_train_step

RIDGE_WITHIN, RIDGE_PENALTY = 0.1, 0.01
FEATURE_BATCH = 16
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
    if not config.workdir or not config.data.folder:
        raise UserError(
            f"workdir is {config.workdir!r} and data.folder is {config.data.folder!r}; expected two folders. Set them "
            "in the YAML or append workdir=RUN data.folder=SET to the command."
        )
    preset = get_preset(config.preset)
    workdir = Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    dtype = _frozen_dtype(config.dtype)
    source = CcSbuAlign(config.data.folder)
    features = prepare_features(config, preset, source, params)

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
        make_pipeline(
            source,
            seed=config.data.seed,
            batch_size=config.data.batch_size,
            prompts=config.data.prompts,
            template=get_template(config.data.template),
            tokenizer=tokenizer,
            num_image_tokens=preset.model.num_image_tokens,
            max_text_len=config.data.max_text_len,
            length_multiple=config.data.length_multiple,
            max_positions=preset.model.llama.max_positions,
        ) as batches,
        _stop_on_sigterm(),
    ):
        meta = {"run": _identity(config)}
        state, step = _start_or_resume(
            config, preset, checkpoints, batches, meta, source, features, tokenizer, params, start, tx
        )
        schedule = make_schedule(config.optimizer)
        max_steps = config.optimizer.max_steps
        with Metrics(
            workdir, start_step=step, max_steps=max_steps, log_every=config.log_every
        ) as metrics:
            try:
                while step < max_steps:
                    batch = _to_device(next(batches), features)
                    state, loss = train_step(state, frozen, batch)
                    step += 1
                    value = float(loss)
                    if not np.isfinite(value):
                        raise FloatingPointError(
                            f"The loss of step {step} is {value}. The last checkpoint is untouched; lower optimizer.init_lr."
                        )
                    metrics.write(
                        step,
                        loss=value,
                        learning_rate=float(schedule(step - 1)),
                        samples=config.data.batch_size,
                    )
                    if step % config.save_every == 0 or step == max_steps:
                        checkpoints.save(
                            step, state, data_state=batches.get_state(), meta=meta
                        )
            except KeyboardInterrupt:
                if checkpoints.latest_step != step:
                    checkpoints.save(step, state, data_state=batches.get_state(), meta=meta)
                checkpoints.wait_until_finished()
                raise
    projection: Projection = jax.tree.map(np.asarray, state.projection)
    save_projection(workdir / "projection.safetensors", projection)
    return projection


def prepare_features(
    config: TrainConfig, preset: Preset, source: CcSbuAlign, params: Params
) -> Features:
    """Vision features of every picture of `source`, in the order of `source.image_ids`."""
    paths = [source.image_path(image_id) for image_id in source.image_ids]
    size, mean, std = preset.model.vit.image_size, preset.image_mean, preset.image_std
    key = fingerprint(paths, params, preprocessing=f"square bicubic {size} {mean} {std}")
    model: MiniGPT4 = make_model(preset.model, layout=DISK, dtype=jnp.float32)
    with make_progress() as progress:
        task = progress.add_task("encoding pictures", total=len(paths), numbers="")
        return encode_features(
            paths,
            folder=Path(config.feature_cache or Path(config.workdir) / "features"),
            key=key,
            model=model,
            params=params,
            preprocess=lambda path: preprocess(load_image(path), size=size, mean=mean, std=std),
            batch_size=FEATURE_BATCH,
            advance=lambda count: progress.advance(task, count),
        )


def _start_or_resume(
    config: TrainConfig,
    preset: Preset,
    checkpoints: TrainCheckpoints,
    batches: Any,
    meta: dict[str, Any],
    source: CcSbuAlign,
    features: Features,
    tokenizer: Tokenizer,
    params: Params,
    start: Projection | None,
    tx: Any,
) -> tuple[TrainState, int]:
    shape = (preset.model.projection_in, preset.model.llama.width)
    blank = {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}
    abstract = jax.eval_shape(lambda projection: init_state(projection, tx), blank)
    restored = checkpoints.restore_latest(abstract)
    if restored is not None:
        if restored.meta["run"] != meta["run"]:
            changed = sorted(
                name for name in meta["run"] if restored.meta["run"].get(name) != meta["run"][name]
            )
            raise UserError(
                f"{config.workdir} holds a run with other settings ({', '.join(changed)}). Use another workdir, or "
                "set them back to continue that run."
            )
        batches.set_state(restored.data_state)
        return restored.state, restored.step
    if start is not None:
        projection = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), start)
    else:
        embedding = np.asarray(params["llama"]["embed_tokens"]["embedding"], np.float32)
        if config.init_projection == "ridge":
            rows = {image_id: row for row, image_id in enumerate(source.image_ids)}
            examples = [source[i] for i in range(len(source))]
            projection = ridge_projection(
                preset.model,
                features,
                np.asarray([rows[example.image_id] for example in examples]),
                caption_targets([tokenizer.encode(e.caption) for e in examples], embedding),
                within=RIDGE_WITHIN,
                penalty=RIDGE_PENALTY,
            )
        else:
            projection = random_projection(
                preset.model, jax.random.key(config.seed), embed_std=float(embedding.std())
            )
    return init_state(projection, tx), 0


def _frozen_dtype(name: str) -> Any:
    """bfloat16 on accelerators; float32 on a CPU, where XLA emulates bfloat16 at a fraction of the speed."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _identity(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide a run's numbers; a checkpoint is continued only under the same ones."""
    free = ("workdir", "feature_cache", "save_every", "log_every", "max_to_keep")
    settings = dataclasses.asdict(config)
    flat = {name: value for name, value in settings.items() if name not in free}
    flat["data"] = {**flat["data"], "prompts": list(flat["data"]["prompts"])}
    return flat


def _to_device(batch: Batch, features: Features) -> TrainBatch:
    return TrainBatch(
        token_ids=jnp.asarray(batch["token_ids"]),
        attention_mask=jnp.asarray(batch["attention_mask"]),
        target_positions=jnp.asarray(batch["target_positions"]),
        target_ids=jnp.asarray(batch["target_ids"]),
        target_mask=jnp.asarray(batch["target_mask"]),
        patches=jnp.asarray(features[batch["image_index"]], jnp.float32),
    )


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """SIGTERM stops a run the way Ctrl-C does: the current step is finished and saved."""

    def stop(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: the embedding program owns the signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
