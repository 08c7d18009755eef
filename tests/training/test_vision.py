"""training/vision.py and a run over a corpus with planted faults: pixels as good as the cache, exact at every step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig, UserError
from minigpt4_jax.config_file import load
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.train_config import TrainConfig
from minigpt4_jax.training import loop
from minigpt4_jax.training.checkpoints import TrainCheckpoints
from minigpt4_jax.training.metrics import read_metrics
from tests.planted import HTML, Planted, plant
from tests.training.conftest import ONE_DEVICE, hold

STEPS, BATCH = 6, 8
"""48 samples of a corpus of 25: nearly two passes."""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))


Train = Callable[..., Path]


@pytest.fixture(scope="module")
def train(planted: Planted, frozen: dict[str, Any]) -> Train:
    """`train(workdir, "key=value", ...)`: a run over the planted tars; returns its folder."""

    def run(workdir: Path, *overrides: str, params: Any = frozen) -> Path:
        settings = [
            "model=tiny", f"workdir={workdir}", "init_projection=random", "cache_features=false",
            f"data.sources.web.path={planted.folder}", "data.sources.web.kind=tar",
            "data.sources.web.caption_processor=blip_caption", "data.max_corrupt_share=0.5",
            f"data.batch_size={BATCH}", "data.length_multiple=32", "optimizer.init_lr=0.01",
            f"optimizer.max_steps={STEPS}", "optimizer.warmup_steps=2", "save_every=1", "max_to_keep=100", *ONE_DEVICE,
        ]  # fmt: skip
        loop.train(
            load(TrainConfig, None, [*settings, *overrides]),
            frozen=hold(params),
            tokenizer=byte_tokenizer(),
            start=None,
            save_projection=lambda path, projection: np.savez(
                path.with_suffix(".npz"), **projection
            ),
        )
        return workdir

    return run


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(workdir)]


def data_state(workdir: Path, step: int) -> Any:
    """What the checkpoint of a step says about the stream."""
    return json.loads((workdir / "checkpoints" / str(step) / "data_state" / "metadata").read_text())


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run, with crops; each save is waited for, so that every step has one."""
    with pytest.MonkeyPatch.context() as patch:
        wait = TrainCheckpoints.wait_until_finished
        patch.setattr(TrainCheckpoints, "busy", property(lambda self: bool(wait(self))))
        return train(tmp_path_factory.mktemp("whole"), "data.random_resized_crop=true")


def test_faults_of_a_run_are_counted_as_planted(whole: Path, planted: Planted) -> None:
    web = data_state(whole, STEPS)["sources"]["web"]
    found = {reason: len(samples) for reason, samples in web["faults"].items()}
    assert found == planted.read_faults
    assert web["size"] == len(planted.captions) + sum(planted.read_faults.values())
    assert web["drawn"] == STEPS * BATCH
    assert np.isfinite([loss for _, loss in losses(whole)]).all()


@pytest.mark.parametrize("step", range(1, STEPS))
def test_from_any_step_losses_and_counts_go_on_as_if_nothing_had_happened(
    step: int, whole: Path, train: Train, tmp_path: Path
) -> None:
    for done in range(1, step + 1):
        shutil.copytree(whole / "checkpoints" / str(done), tmp_path / "checkpoints" / str(done))
    shutil.copy(whole / "metrics.jsonl", tmp_path)
    resumed = train(tmp_path, "data.random_resized_crop=true", "data.num_threads=2")
    assert losses(resumed) == losses(whole)
    assert data_state(resumed, STEPS) == data_state(whole, STEPS)
    with np.load(resumed / "projection.npz") as left, np.load(whole / "projection.npz") as right:
        for name in ("kernel", "bias"):
            assert left[name].tobytes() == right[name].tobytes()


def test_pixels_give_the_losses_of_the_cache_up_to_its_float16(
    train: Train, tmp_path: Path, planted: Planted, any_config: ModelConfig, any_params: Any
) -> None:
    (name,) = (name for name, preset in PRESETS.items() if preset.model == any_config)
    params = {part: tree for part, tree in any_params.items() if part != "llama_proj"}
    pixels = losses(train(tmp_path / "pixels", f"model={name}", params=params))
    cached = losses(
        train(tmp_path / "cached", f"model={name}", "cache_features=true", params=params)
    )
    assert [step for step, _ in pixels] == [step for step, _ in cached]
    # Features are rounded to 11 bits, and the run adds the differences up.
    np.testing.assert_allclose([x for _, x in pixels], [x for _, x in cached], rtol=2e-3)
    web = data_state(tmp_path / "cached", STEPS)["sources"]["web"]
    assert {why: len(samples) for why, samples in web["faults"].items()} == planted.read_faults


def test_crops_change_what_is_seen(train: Train, whole: Path, tmp_path: Path) -> None:
    plain = train(tmp_path, "optimizer.max_steps=2", "optimizer.warmup_steps=1")
    assert losses(plain)[0] != losses(whole)[0]


def test_too_many_corrupt_samples_stop_the_run(train: Train, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source 'web' are corrupt .*data\.max_corrupt_share"):
        train(tmp_path, "data.max_corrupt_share=0.01")


def test_two_sources_of_two_kinds_train_together(
    train: Train, tmp_path: Path, data_folder: Path
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(data_folder / "image" / "red-full.jpg", own / "a.jpg")
    (own / "bad.jpg").write_bytes(HTML)
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}] * 2
    lines = [
        {"image": "a.jpg", "text": "all red"},
        {"image": "a.jpg", "conversations": talk},
        {"image": "bad.jpg", "text": "a page"},
    ]
    (own / "set.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sources = ["data.sources.own.kind=jsonl", f"data.sources.own.path={own / 'set.jsonl'}"]
    workdir = train(tmp_path / "run", *sources, "data.sources.web.weight=2")
    state = data_state(workdir, STEPS)["sources"]
    assert (state["web"]["drawn"], state["own"]["drawn"]) == (32, 16)
    assert state["own"]["faults"] == {"HTML instead of an image": [2]}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cache_features=true", "data.random_resized_crop=true"], "expected one view per picture"),
        (["init_projection=ridge"], "expected random or a file"),
        (["data.folder=x"], "expected one of the two"),
        (
            ["data.sources.web.kind=tars"],
            "kind of a source is 'tars'; expected one of cc_sbu_align",
        ),
        (["data.sources.web.weight=0"], "SourceConfig.weight is 0.0"),
        (["data.max_corrupt_share=2"], "expected a share from 0 to 1"),
        (["data.sources.web.caption_processor=blip"], "no caption processor 'blip'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    overrides: list[str], said: str, train: Train, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        train(tmp_path, *overrides)
