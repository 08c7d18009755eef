"""configs/train: the examples hold the settings that the published models were trained with, line by line."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax.config_file import load
from minigpt4_jax.data.padding import batch_shapes
from minigpt4_jax.data.prompts import get_template, load_prompts
from minigpt4_jax.presets import get_preset
from minigpt4_jax.train_config import MeshConfig, OptimizerConfig, SourceConfig, TrainConfig
from minigpt4_jax.training.optimizer import make_schedule

FOLDER = Path(__file__).parents[1] / "configs" / "train"
Lines = dict[str, Any]

RUN: Lines = {
    "run.lr_sched": "linear_warmup_cosine_lr", "run.warmup_lr": 1e-6, "run.weight_decay": 0.05, "run.seed": 42,
    "run.num_workers": 4, "run.accum_grad_iters": 1,
}  # fmt: skip
STAGE_1: Lines = RUN | {
    "datasets.laion.batch_size": 64, "datasets.laion.sample_ratio": 115,
    "datasets.cc_sbu.batch_size": 64, "datasets.cc_sbu.sample_ratio": 14,
    "datasets.laion.text_processor": "blip_caption", "datasets.cc_sbu.text_processor": "blip_caption",
    "model.prompt_path": None, "model.max_txt_len": 32, "model.end_sym": "\n",
    "run.init_lr": 1e-4, "run.min_lr": 8e-5, "run.warmup_steps": 5000, "run.iters_per_epoch": 5000, "run.max_epoch": 4,
}  # fmt: skip
ALIGNMENT = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
"""The original's `prompts/alignment.txt`, without the `<Img><ImageHere></Img> ` in front of each."""
STAGE_2: Lines = RUN | {
    "datasets.cc_sbu_align.batch_size": 12, "model.prompt_path": ALIGNMENT, "model.max_txt_len": 160,
    "run.init_lr": 3e-5, "run.min_lr": 1e-5, "run.warmup_steps": 200, "run.iters_per_epoch": 200, "run.max_epoch": 5,
}  # fmt: skip
VICUNA: Lines = {"model.model_type": "pretrain_vicuna0", "model.has_qformer": True}
LLAMA2: Lines = {"model.model_type": "pretrain_llama2", "model.has_qformer": False}
PUBLISHED: dict[str, Lines] = {
    "minigpt4_stage1": STAGE_1 | VICUNA,
    "minigpt4_llama2_stage1": STAGE_1 | LLAMA2,
    "minigpt4_stage2": STAGE_2
    | VICUNA
    | {"model.prompt_template": "###Human: {} ###Assistant: ", "model.end_sym": "###"},
    "minigpt4_llama2_stage2": STAGE_2
    | LLAMA2
    | {"model.prompt_template": "[INST] {} [/INST] ", "model.end_sym": "</s>"},
}
"""The original's `train_configs/NAME_{pretrain,finetune}.yaml` at commit d94738a, with the defaults they rely on."""
GPUS = {"stage1": 4, "stage2": 1}
"""On which the published models were trained: the batch sizes above are of each."""
FAMILIES = {"vicuna_v0": "pretrain_vicuna0", "llama2": "pretrain_llama2"}
"""Template -> the original's `model_type`."""


@functools.cache
def read(name: str) -> TrainConfig:
    return load(TrainConfig, FOLDER / f"{name}.yaml")


def gpus(config: TrainConfig) -> int:
    return GPUS[config.workdir.rpartition("_")[2]]


def published_preset(config: TrainConfig) -> Any:
    """Of the folder that the conversion of the published weights is shown to write."""
    return get_preset(Path(config.model).name)


def train_template(config: TrainConfig) -> str:
    template = get_template(config.data.template)
    return f"{template.train_prefix[0]}{{}}{template.train_suffix[0]}"


def source(config: TrainConfig, name: str) -> SourceConfig:
    return config.data.all_sources()[name]


OURS: dict[str, Callable[[TrainConfig], Any]] = {
    "run.lr_sched": lambda config: config.optimizer.lr_sched,
    "run.init_lr": lambda config: config.optimizer.init_lr,
    "run.min_lr": lambda config: config.optimizer.min_lr,
    "run.warmup_lr": lambda config: config.optimizer.warmup_lr,
    "run.warmup_steps": lambda config: config.optimizer.warmup_steps,
    "run.weight_decay": lambda config: config.optimizer.weight_decay,
    "run.iters_per_epoch": lambda config: config.optimizer.iters_per_epoch,
    "run.max_epoch": lambda config: config.optimizer.max_steps / config.optimizer.iters_per_epoch,
    "run.accum_grad_iters": lambda config: config.optimizer.accum_grad_iters,
    "run.seed": lambda config: config.seed if config.seed == config.data.seed else None,
    "run.num_workers": lambda config: config.data.num_threads,
    "datasets.laion.batch_size": lambda config: config.data.batch_size / gpus(config),
    "datasets.cc_sbu.batch_size": lambda config: config.data.batch_size / gpus(config),
    "datasets.cc_sbu_align.batch_size": lambda config: config.data.batch_size / gpus(config),
    "datasets.laion.sample_ratio": lambda config: source(config, "laion").weight,
    "datasets.cc_sbu.sample_ratio": lambda config: source(config, "cc_sbu").weight,
    "datasets.laion.text_processor": lambda config: source(config, "laion").caption_processor,
    "datasets.cc_sbu.text_processor": lambda config: source(config, "cc_sbu").caption_processor,
    "model.prompt_path": lambda config: config.data.prompts or None,
    "model.prompt_template": train_template,
    "model.max_txt_len": lambda config: config.data.max_text_len,
    "model.end_sym": lambda config: config.data.end_sym,
    "model.model_type": lambda config: FAMILIES[config.data.template],
    "model.has_qformer": lambda config: published_preset(config).model.qformer is not None,
}
"""The original's line -> what our settings say about it."""


@pytest.mark.parametrize(
    ("name", "line"), [(name, line) for name, lines in PUBLISHED.items() for line in lines]
)
def test_a_published_run_keeps_every_line_of_the_originals_file(name: str, line: str) -> None:
    assert OURS[line](read(name)) == PUBLISHED[name][line]


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_the_originals_file_does_not_say_is_torchs_default_and_this_projects_adamw(
    name: str,
) -> None:
    lines = PUBLISHED[name]
    said = {
        key: lines[f"run.{key}"]
        for key in (
            "lr_sched", "init_lr", "min_lr", "warmup_lr", "warmup_steps", "iters_per_epoch", "weight_decay"
        )
    }  # fmt: skip
    steps = lines["run.max_epoch"] * lines["run.iters_per_epoch"]
    torch = {"name": "adamw", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}
    expected = OptimizerConfig(**said, **torch, max_steps=steps, accum_grad_iters=1)
    assert read(name).optimizer == expected


@pytest.mark.parametrize(
    ("stage", "before", "after"), [("stage1", 9.998e-5, 9.707e-5), ("stage2", 2.9855e-5, 2.809e-5)]
)
@pytest.mark.parametrize("family", ["minigpt4", "minigpt4_llama2"])
def test_the_learning_rate_jumps_where_the_warm_up_ends(
    family: str, stage: str, before: float, after: float
) -> None:
    optimizer = read(f"{family}_{stage}").optimizer
    schedule = make_schedule(optimizer)
    end = optimizer.warmup_steps
    assert float(schedule(0)) == optimizer.warmup_lr
    assert float(schedule(end - 1)) == pytest.approx(before, rel=1e-4)
    assert float(schedule(end)) == pytest.approx(after, rel=1e-4)
    assert float(schedule(optimizer.max_steps - 1)) == pytest.approx(optimizer.min_lr, rel=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_read_the_originals_sources_as_it_does(name: str) -> None:
    run = read(name)
    web: dict[str, Any] = {"kind": "tar", "caption_processor": "blip_caption"}
    sources = {
        "stage1": {
            "laion": SourceConfig(path="laion_dataset", weight=115.0, **web),
            "cc_sbu": SourceConfig(path="cc_sbu_dataset", weight=14.0, **web),
        },
        # The captions of cc_sbu_align are used raw, also in the original.
        "stage2": {"folder": SourceConfig(kind="cc_sbu_align", path="sets/cc_sbu_align")},
    }
    assert run.data.all_sources() == sources[name.rpartition("_")[2]]
    assert run.data.random_resized_crop  # as the released v1 weights were trained
    assert not run.cache_features
    # Whatever comes one after the other in the order makes a batch.
    assert run.data.bucket_window == 1
    assert run.data.truncate
    assert run.data.mask_pad_token
    assert run.data.max_context_len == 3800


@pytest.mark.parametrize("family", ["minigpt4", "minigpt4_llama2"])
def test_the_second_stage_starts_from_what_the_first_one_writes(family: str) -> None:
    first, second = (read(f"{family}_{stage}") for stage in ("stage1", "stage2"))
    assert first.init_projection == "random"
    assert second.init_projection == f"{first.workdir}/projection.safetensors"
    assert first.workdir != second.workdir
    assert first.model == second.model


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_13b_is_the_vicuna_files_with_what_their_comment_appends(stage: str) -> None:
    file = FOLDER / f"minigpt4_{stage}.yaml"
    comment = [line for line in file.read_text().splitlines() if line.startswith("#   ")]
    overrides = " ".join(line.lstrip("# ") for line in comment).split()
    small, large = read(file.stem), load(TrainConfig, file, overrides)
    assert (large.data, large.optimizer) == (small.data, small.optimizer)
    assert published_preset(large) == get_preset("vicuna-13b")
    assert small.workdir != large.workdir
    if stage == "stage2":
        assert large.init_projection == "runs/minigpt4_13b_stage1/projection.safetensors"


def test_prompts_in_a_file_as_the_original_writes_them_are_the_listed_ones(tmp_path: Path) -> None:
    file = tmp_path / "alignment.txt"
    file.write_text("".join(f"<Img><ImageHere></Img> {prompt}\n" for prompt in ALIGNMENT))
    assert load_prompts(file) == ALIGNMENT


@pytest.mark.parametrize("name", [*PUBLISHED, "tpu_pod", "cluster"])
def test_runs_of_the_published_models_speak_their_words_and_have_room_for_the_longest(
    name: str,
) -> None:
    config = read(name)
    preset = published_preset(config)
    assert config.data.template == preset.template
    shapes = batch_shapes(config.data)
    assert 3 <= len(shapes) <= 4
    longest, targets = shapes[-1]
    assert targets == config.data.max_text_len
    assert longest <= preset.model.llama.max_positions
    rest = longest - preset.model.num_image_tokens - config.data.max_text_len
    if config.data.prompts:
        # The longest of the four has 54 characters and the template around it 29 at most.
        assert rest >= 1 + 45
    else:
        assert rest == 1  # bos


@pytest.mark.parametrize("name", ["tpu_pod", "cluster"])
def test_runs_at_scale_choose_their_mesh_and_need_no_machines_name(name: str) -> None:
    config = read(name)
    published = read("minigpt4_stage1")
    assert config.mesh == MeshConfig()
    assert config.distributed.coordinator == ""
    assert config.dtype == "bfloat16"
    assert config.data.all_sources() == published.data.all_sources()
    assert config.data.batch_size == published.data.batch_size
    assert config.data.bucket_window > 1
    assert config.optimizer.lr_sched == "warmup_cosine"
    for rate in ("init_lr", "min_lr", "warmup_steps", "max_steps"):
        assert getattr(config.optimizer, rate) == getattr(published.optimizer, rate)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.name)
def test_every_configuration_reads_by_itself_in_at_most_45_lines(file: Path) -> None:
    read(file.stem)
    lines = file.read_text().splitlines()
    assert 15 <= len(lines) <= 45
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("# ")
