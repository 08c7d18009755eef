"""A training run, from features to the finished projection. Reads top to bottom; all side effects of training are here.

Not for: finding the frozen weights and the tokenizer (the entry point hands them in), or the arithmetic (`step.py`).
Differs from the original: a run resumes at the very step and sample where it stopped, not at an epoch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from minigpt4_jax.config import UserError
from minigpt4_jax.data.batches import Batch
from minigpt4_jax.data.datasets import Part, image_offsets, open_sources
from minigpt4_jax.data.encoding import Encoder
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.padding import batch_shapes
from minigpt4_jax.data.pipeline import Pipeline, make_pipeline
from minigpt4_jax.data.prompts import (
    encode_pieces,
    end_symbol_pieces,
    get_template,
    pieces_text,
)
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.model_folder import find_preset
from minigpt4_jax.models.layout import TRAIN
from minigpt4_jax.models.minigpt4 import make_model
from minigpt4_jax.presets import Preset
from minigpt4_jax.sharding import make_shardings, replicated
from minigpt4_jax.train_config import TrainConfig
from minigpt4_jax.training.account import Account
from minigpt4_jax.training.captions import Caption
from minigpt4_jax.training.checkpoints import TrainCheckpoints
from minigpt4_jax.training.distributed import is_first_process
from minigpt4_jax.training.frozen import FrozenWeights
from minigpt4_jax.training.held_out import Evaluate, LossSum, make_eval_step, open_held_out
from minigpt4_jax.training.identity import require_same_run, run_identity, run_prompts
from minigpt4_jax.training.init import caption_targets, random_projection, ridge_projection
from minigpt4_jax.training.metrics import make_progress
from minigpt4_jax.training.optimizer import make_optimizer
from minigpt4_jax.training.placement import agree, batch_share, choose_mesh, place_rows
from minigpt4_jax.training.program import TrainPrograms, abstract_state, start_state
from minigpt4_jax.training.state import Projection, TrainBatch
from minigpt4_jax.training.steps import TakeStep, Watch, run_steps
from minigpt4_jax.training.stopping import stop_after_step
from minigpt4_jax.training.together import first_process_first
from minigpt4_jax.training.utilisation import make_speed
from minigpt4_jax.training.vision import CachedVision, Vision, make_vision

RIDGE_WITHIN, RIDGE_PENALTY = 0.1, 0.01
Save = Callable[[Path, Projection], None]
"""Writes a finished projection; `convert` knows the file format, training does not."""


def train(
    config: TrainConfig,
    *,
    frozen: FrozenWeights,
    tokenizer: Tokenizer,
    start: Projection | None,
    save_projection: Save,
    caption: Caption | None = None,
) -> Projection:
    """Trains the projection and returns it. Called again with the same `workdir`, it goes on where it stopped.

    Args:
        frozen: the frozen parameters (all but `llama_proj`), read when and where they are needed.
        start: the projection to start from when `config.init_projection` names a file (the entry point read it).
        save_projection: called with `<workdir>/projection.safetensors` when the last step is done.
        caption: what the model says of pictures with the projection it is given, for `config.held_out`; None: nothing.

    Raises:
        UserError: no workdir, a broken data folder, a batch that the devices cannot share, or a checkpoint of another
            run in `workdir`.
        Stopped: Ctrl-C or SIGTERM; the step that was running is saved first.
    """
    if not config.workdir or not config.data.all_sources():
        raise UserError(
            f"workdir is {config.workdir!r} and data.folder is {config.data.folder!r}; expected two folders (or "
            "data.sources instead of the second). Set them in the YAML or append workdir=RUN data.folder=SET to the "
            "command."
        )
    preset = find_preset(config.model)
    workdir = Path(config.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    tx = make_optimizer(config.optimizer)
    with (
        Account(workdir) as account,
        TrainCheckpoints(workdir, max_to_keep=config.max_to_keep) as checkpoints,
    ):
        # First of all: minutes of encoding for a run that is then refused would be in vain.
        dtype = _frozen_dtype(config.dtype)
        settled = dataclasses.replace(config, dtype=dtype.name)  # `auto` is another dtype elsewhere
        meta = {"run": run_identity(settled, frozen=frozen.fingerprints(), start=start)}
        require_same_run(config.workdir, (checkpoints.latest_meta() or {}).get("run"), meta["run"])
        mesh, reason = choose_mesh(config, preset.model, dtype=dtype)
        if is_first_process():
            print(reason, flush=True)
        with first_process_first("data"):
            parts = _open_sources(config)
        with first_process_first("features"):
            vision = make_vision(config, preset, parts, frozen, mesh=mesh, dtype=dtype)
        with (
            make_batches(
                config, preset, parts, vision, tokenizer, share=batch_share(mesh)
            ) as batches,
            stop_after_step() as stop,
        ):
            restored = checkpoints.restore_latest(abstract_state(preset.model, tx, mesh=mesh))
            if restored is not None:
                batches.set_state(restored.data_state)
                state, step = restored.state, restored.step
            else:
                projection = start or _initial_projection(
                    config, preset, parts, vision, tokenizer, frozen
                )
                state, step = start_state(agree(projection), tx, mesh=mesh), 0
            take_step, evaluate = _make_step(
                config, preset, frozen, vision=vision, mesh=mesh, dtype=dtype, account=account
            )
            held_out = open_held_out(
                config,
                preset,
                frozen,
                encoder=lambda: make_encoder(config, preset, tokenizer),
                vision=vision,
                mesh=mesh,
                dtype=dtype,
                evaluate=evaluate,
                caption=caption,
            )
            speed = make_speed(
                preset.model,
                batch_size=config.data.batch_size,
                vision=not config.cache_features,
                devices=mesh.size,
            )
            watch = Watch(account, speed, held_out)
            account.begin("step")
            try:
                state, step = run_steps(
                    config, state, step, take_step, batches, checkpoints, parts=parts, meta=meta, stop=stop, watch=watch
                )  # fmt: skip
            finally:
                if is_first_process():
                    print(account.summary(), flush=True)
    trained: Projection = jax.tree.map(np.asarray, state.projection)
    if is_first_process():
        save_projection(workdir / "projection.safetensors", trained)
    return trained


def _open_sources(config: TrainConfig) -> list[Part]:
    with make_progress() as progress:
        task = progress.add_task("indexing shards", total=None, numbers="", visible=False)
        return open_sources(
            config.data,
            progress=lambda done, of: progress.update(task, completed=done, total=of, visible=True),
        )


def _make_step(
    config: TrainConfig,
    preset: Preset,
    frozen: FrozenWeights,
    *,
    vision: Vision,
    mesh: Mesh,
    dtype: Any,
    account: Account,
) -> tuple[TakeStep, Evaluate]:
    """The compiled step and the compiled loss with everything that stays the same during a run.

    A step consumes the state that it is given.
    """
    programs = TrainPrograms(
        preset.model, config.optimizer, mesh=mesh, remat=config.remat, dtype=dtype
    )
    shapes = batch_shapes(config.data)
    with account.spend("compile"), make_progress(quiet=not shapes) as progress:
        task = progress.add_task("compiling", total=len(shapes), numbers="")
        programs.compile_ahead(
            shapes,
            batch_size=config.data.batch_size,
            advance=lambda: progress.advance(task),
        )
    llama = frozen.load(
        ("llama",), layout=TRAIN, dtype=dtype, place=lambda tree: make_shardings(mesh, tree)
    )
    model = make_model(preset.model, layout=TRAIN, dtype=dtype)
    eval_step = jax.jit(make_eval_step(model), out_shardings=replicated(mesh))

    def evaluate(projection: Projection, batch: Batch, seen: Vision) -> LossSum:
        with jax.set_mesh(mesh):
            found: LossSum = eval_step(projection, llama, _to_device(batch, seen, mesh))
            return found

    return lambda state, batch: programs(state, llama, _to_device(batch, vision, mesh)), evaluate


def make_encoder(config: TrainConfig, preset: Preset, tokenizer: Tokenizer) -> Encoder:
    """What makes tokens of words, in the words of `config.data`.

    Raises `UserError` for a pad token that would take the end symbol with it.
    """
    data, template = config.data, get_template(config.data.template)
    end = end_symbol_pieces(data.end_sym, tokenizer) if data.end_sym else template.end_symbol
    ignored = (tokenizer.pad_id,) if data.mask_pad_token else ()
    if set(ignored) & set(encode_pieces(end, tokenizer, num_image_tokens=0)):
        raise UserError(
            f"data.mask_pad_token is true and the tokenizer's pad token is part of the end symbol "
            f"{pieces_text(end)!r}; the model would never learn to stop. Set it to false."
        )
    return Encoder(
        template,
        tokenizer,
        prompts=run_prompts(data) or (None,),
        num_image_tokens=preset.model.num_image_tokens,
        max_text_len=data.max_text_len,
        max_positions=preset.model.llama.max_positions,
        max_context_len=data.max_context_len,
        end_symbol=end,
        ignored_targets=ignored,
        truncate=data.truncate,
    )


def make_batches(
    config: TrainConfig,
    preset: Preset,
    parts: Sequence[Part],
    vision: Vision,
    tokenizer: Tokenizer,
    *,
    share: tuple[int, int] = (0, 1),
) -> Pipeline:
    """The stream of batches over `parts` in the words of `config.data`; says what `truncate` cut.

    Raises `UserError` for texts that do not fit, and as `make_encoder`.
    """
    data, encoder = config.data, make_encoder(config, preset, tokenizer)
    batches = make_pipeline(
        parts,
        encoder,
        seed=data.seed,
        batch_size=data.batch_size,
        length_multiple=data.length_multiple,
        length_buckets=data.length_buckets,
        bucket_window=data.bucket_window,
        process_index=share[0],
        process_count=share[1],
        max_corrupt_share=data.max_corrupt_share,
        pictures=vision.pictures,
        bad_images=vision.bad_images,
        num_threads=data.num_threads,
    )
    in_memory = sum(len(part.source) for part in parts if part.source.in_memory)
    if data.truncate and in_memory:
        print(
            f"data.truncate: {batches.cut_answers} of {in_memory} answers cut to {data.max_text_len} tokens (without "
            f"an end symbol), {encoder.cut_prompts} prompts to {data.max_context_len}.",
            flush=True,
        )
    return batches


def _initial_projection(
    config: TrainConfig,
    preset: Preset,
    parts: Sequence[Part],
    vision: Vision,
    tokenizer: Tokenizer,
    frozen: FrozenWeights,
) -> Projection:
    embedding = np.asarray(frozen.read("llama/embed_tokens/embedding"), np.float32)
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


def _frozen_dtype(name: str) -> Any:
    """bfloat16 on accelerators; float32 on a CPU, where XLA emulates bfloat16 at a fraction of the speed."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _to_device(batch: Batch, vision: Vision, mesh: Mesh) -> TrainBatch:
    return TrainBatch(
        token_ids=place_rows(batch["token_ids"], mesh),
        attention_mask=place_rows(batch["attention_mask"], mesh),
        target_positions=place_rows(batch["target_positions"], mesh),
        target_ids=place_rows(batch["target_ids"], mesh),
        target_mask=place_rows(batch["target_mask"], mesh),
        features=vision.features_of(batch),
    )
