"""configs/train: the examples hold the numbers that the published models were trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minigpt4_jax.config_file import load
from minigpt4_jax.data.prompts import load_prompts
from minigpt4_jax.presets import get_preset
from minigpt4_jax.train_config import SourceConfig, TrainConfig

FOLDER = Path(__file__).parents[1] / "configs" / "train"
RUNS = {
    "minigpt4_stage1": {"init_lr": 1e-4, "min_lr": 8e-5, "warmup_steps": 5000, "iters_per_epoch": 5000, "epochs": 4},
    "minigpt4_stage2": {"init_lr": 3e-5, "min_lr": 1e-5, "warmup_steps": 200, "iters_per_epoch": 200, "epochs": 5},
}  # fmt: skip
"""The original's `train_configs/minigpt4_{stage1_pretrain,stage2_finetune}.yaml`."""


@pytest.mark.parametrize("name", RUNS)
def test_published_runs_have_the_originals_numbers_and_its_schedule(name: str) -> None:
    optimizer = load(TrainConfig, FOLDER / f"{name}.yaml").optimizer
    published: dict[str, Any] = dict(RUNS[name])
    epochs = published.pop("epochs")
    assert {key: getattr(optimizer, key) for key in published} == published
    assert optimizer.max_steps == epochs * optimizer.iters_per_epoch
    assert optimizer.lr_sched == "linear_warmup_cosine_lr"
    assert (optimizer.name, optimizer.warmup_lr, optimizer.weight_decay) == ("adamw", 1e-6, 0.05)
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert optimizer.accum_grad_iters == 1


def test_published_runs_have_the_originals_words() -> None:
    first = load(TrainConfig, FOLDER / "minigpt4_stage1.yaml").data
    assert (first.prompts, first.end_sym, first.max_text_len) == ((), "\n", 32)
    assert first.batch_size == 4 * 64
    second = load(TrainConfig, FOLDER / "minigpt4_stage2.yaml").data
    assert (len(second.prompts), second.end_sym, second.max_text_len) == (4, "###", 160)
    assert second.batch_size == 12
    for data in (first, second):
        assert (data.template, data.max_context_len) == ("vicuna_v0", 3800)
        assert data.truncate
        assert data.mask_pad_token


def test_published_runs_read_the_originals_sources_as_it_does() -> None:
    first = load(TrainConfig, FOLDER / "minigpt4_stage1.yaml")
    web: dict[str, Any] = {"kind": "tar", "caption_processor": "blip_caption"}
    assert first.data.all_sources() == {
        "laion": SourceConfig(path="laion_dataset", weight=115.0, **web),
        "cc_sbu": SourceConfig(path="cc_sbu_dataset", weight=14.0, **web),
    }
    assert first.init_projection == "random"
    second = load(TrainConfig, FOLDER / "minigpt4_stage2.yaml")
    # The captions of cc_sbu_align are used raw, also in the original.
    assert second.data.all_sources() == {
        "folder": SourceConfig(kind="cc_sbu_align", path="sets/cc_sbu_align")
    }
    assert second.init_projection == f"{first.workdir}/projection.safetensors"
    for run in (first, second):
        assert run.data.random_resized_crop
        assert not run.cache_features
        assert (run.data.num_threads, run.data.seed, run.seed) == (4, 42, 42)


def test_prompts_in_a_file_as_the_original_writes_them_are_the_listed_ones(tmp_path: Path) -> None:
    listed = load(TrainConfig, FOLDER / "minigpt4_stage2.yaml").data.prompts
    file = tmp_path / "alignment.txt"
    file.write_text("".join(f"<Img><ImageHere></Img> {prompt}\n" for prompt in listed))
    assert load_prompts(file) == listed


@pytest.mark.parametrize("name", RUNS)
def test_published_runs_are_of_the_published_model_in_its_own_words(name: str) -> None:
    config = load(TrainConfig, FOLDER / f"{name}.yaml")
    preset = get_preset(Path(config.model).name)  # the folder that its conversion is shown to write
    assert preset.model.qformer is not None
    assert config.data.template == preset.template
    room = preset.model.llama.max_positions - preset.model.num_image_tokens
    assert config.data.max_text_len < room


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.name)
def test_every_configuration_reads_by_itself_in_at_most_45_lines(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert 15 <= len(lines) <= 45
    assert lines[0].startswith("# ")
