"""training/loop.py in one process: what moves, what stays, what is refused, and what a signal leaves behind."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from minigpt4_jax.config import LlamaConfig, ModelConfig, UserError
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.training import checkpoints as checkpoints_module
from minigpt4_jax.training import loop, program
from minigpt4_jax.training.checkpoints import TrainCheckpoints
from minigpt4_jax.training.metrics import Metrics, read_metrics
from minigpt4_jax.training.vision import CachedVision
from tests.training.conftest import hold


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(workdir)]


def assert_identical(left: Any, right: Any) -> None:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def latest_step(workdir: Path) -> int | None:
    with TrainCheckpoints(workdir, max_to_keep=2) as checkpoints:
        return checkpoints.latest_step


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, frozen: dict[str, Any], make_config: Any
) -> tuple[list[tuple[int, float]], Any]:
    """Losses and projection of the uninterrupted run."""

    workdir = tmp_path_factory.mktemp("whole")
    projection = loop.train(
        make_config(workdir),
        frozen=hold(frozen),
        tokenizer=byte_tokenizer(),
        start=None,
        save_projection=lambda path, projection: None,
    )
    found = losses(workdir)
    assert [step for step, _ in found] == list(range(1, 11))
    return found, projection


def test_training_moves_the_projection_and_leaves_the_frozen_bits(
    tmp_path: Path, run: Any, frozen: dict[str, Any], tiny_params: Any
) -> None:
    before = jax.tree.map(lambda leaf: np.array(leaf), frozen)
    start = jax.tree.map(jax.numpy.array, tiny_params["llama_proj"])
    projection = run(tmp_path, "init_projection=given.safetensors", start=start)
    assert_identical(frozen, before)
    assert_identical(start, tiny_params["llama_proj"])
    for name in ("kernel", "bias"):
        assert np.abs(projection[name] - start[name]).max() > 1e-3
    # Only the projection, its two moments and the counters are in the checkpoint.
    files = list((tmp_path / "checkpoints").rglob("*"))
    assert (
        sum(file.stat().st_size for file in files if file.is_file()) < 10 * start["kernel"].nbytes
    )
    assert_identical(run.saved, {tmp_path / "projection.safetensors": projection})


def test_training_lowers_the_loss(tmp_path: Path, run: Any) -> None:
    run(tmp_path, "optimizer.max_steps=30", "save_every=30")
    values = [loss for _, loss in losses(tmp_path)]
    assert np.mean(values[-5:]) < np.mean(values[:5]) - 0.5


def test_the_closed_form_start_beats_a_random_one(
    tmp_path: Path, run: Any, frozen: dict[str, Any], tiny_config: ModelConfig
) -> None:
    first = {}
    for start in ("random", "ridge"):
        workdir = tmp_path / start
        # The whole set as one batch; the first loss is from before the first update.
        run(
            workdir,
            f"init_projection={start}",
            "data.batch_size=12",
            "optimizer.max_steps=3",
            frozen={**frozen, "llama": make_reader(frozen["llama"], tiny_config.llama)},
        )
        (_, first[start]), *_ = losses(workdir)
    assert first["ridge"] < first["random"] - 0.1


def make_reader(llama: dict[str, Any], config: LlamaConfig) -> dict[str, Any]:
    """A language model that says the words it was shown: each layer adds half of the mean of all tokens so far.

    (Random layers would garble what an embedding means; that image tokens near the caption's words help is a fact
    about a language model that reads.)
    """
    llama = jax.tree.map(np.array, llama)
    groups = config.num_heads // config.num_kv_heads
    for layer in llama["layers"].values():
        attention = {
            name: np.zeros_like(leaf["kernel"]) for name, leaf in layer["self_attn"].items()
        }
        for kv_head in range(config.num_kv_heads):
            for i in range(config.head_dim):
                dimension = kv_head * config.head_dim + i
                attention["v_proj"][dimension, dimension] = 1.0
                attention["o_proj"][kv_head * groups * config.head_dim + i, dimension] = 4.0
        layer["self_attn"] = {name: {"kernel": kernel} for name, kernel in attention.items()}
        layer["mlp"]["down_proj"]["kernel"][:] = 0
    return llama


def test_what_reading_the_sets_writes_is_written_by_process_0_first(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[str] = []

    @contextlib.contextmanager
    def first(name: str) -> Iterator[None]:
        inside.append(name)
        yield
        inside.remove(name)

    def open_sources(*args: Any, **settings: Any) -> None:
        raise UserError(f"opened inside {inside}")

    monkeypatch.setattr(loop, "first_process_first", first)
    monkeypatch.setattr(loop, "open_sources", open_sources)
    with pytest.raises(UserError, match=r"opened inside \['data'\]"):
        run(tmp_path)


def test_the_same_settings_give_the_same_run(tmp_path: Path, run: Any, whole: Any) -> None:
    projection = run(tmp_path)
    assert losses(tmp_path) == whole[0]
    assert_identical(projection, whole[1])


def test_another_seed_gives_another_run(tmp_path: Path, run: Any, whole: Any) -> None:
    run(tmp_path, "seed=1")
    assert losses(tmp_path)[0] != whole[0][0]


def test_a_finished_run_started_again_trains_nothing(tmp_path: Path, run: Any, whole: Any) -> None:
    run(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text()
    projection = run(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == lines
    assert_identical(projection, whole[1])


def test_what_changes_no_number_may_change_between_runs(
    tmp_path: Path, run: Any, whole: Any
) -> None:
    run(tmp_path, "optimizer.max_steps=10")
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    projection = run(
        moved, "save_every=3", "log_every=1", "max_to_keep=1", f"feature_cache={moved / 'f'}"
    )
    assert losses(moved) == whole[0]
    assert_identical(projection, whole[1])


def test_a_run_goes_on_on_another_mesh(
    tmp_path: Path, run: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Begun on one device, then on four with the frozen weights in halves: the same sums in another order.
    with monkeypatch.context() as patch:
        interrupt(patch, "Metrics.write", step=3, with_signal=signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    projection = run(tmp_path, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=1", "remat=full")
    found, expected = losses(tmp_path), whole[0]
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert found[:3] == expected[:3]
    assert found[3:] != expected[3:]
    np.testing.assert_allclose([x for _, x in found], [x for _, x in expected], rtol=1e-4)
    np.testing.assert_allclose(projection["kernel"], whole[1]["kernel"], rtol=0, atol=1e-3)


# --- refused ---


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.init_lr=0.02", "optimizer.init_lr"),
        ("data.batch_size=2", "data.batch_size"),
        ("data.prompts=['Other?']", "data.prompts"),
        ("seed=7", "seed"),
        ("init_projection=ridge", "init_projection"),
        ("dtype=bfloat16", "dtype"),  # `auto` is float32 here
    ],
)
def test_a_workdir_of_another_run_is_refused_with_the_changed_setting(
    override: str, named: str, run: Any, refused_workdir: Path
) -> None:
    lines = (refused_workdir / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=rf"other settings \({named}\)"):
        run(refused_workdir, "optimizer.max_steps=3", override)
    assert (refused_workdir / "metrics.jsonl").read_text() == lines


@pytest.fixture(scope="module")
def refused_workdir(
    tmp_path_factory: pytest.TempPathFactory, frozen: dict[str, Any], make_config: Any
) -> Path:

    workdir = tmp_path_factory.mktemp("refused")
    loop.train(
        make_config(workdir, "optimizer.max_steps=3"),
        frozen=hold(frozen),
        tokenizer=byte_tokenizer(),
        start=None,
        save_projection=lambda path, projection: None,
    )
    return workdir


def test_another_runs_workdir_is_refused_before_any_picture_is_encoded(
    run: Any, refused_workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def must_not_run(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("pictures were encoded for a run that is refused")

    monkeypatch.setattr(loop, "make_vision", must_not_run)
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        run(refused_workdir, "optimizer.max_steps=3", "seed=7")


def test_another_optimizer_is_named_before_its_state_is_compared(
    run: Any, refused_workdir: Path
) -> None:
    with pytest.raises(UserError, match=r"other settings \(optimizer.name\)"):
        run(refused_workdir, "optimizer.max_steps=3", "optimizer.name=muon")


def test_other_frozen_weights_under_the_same_settings_are_refused(
    run: Any, refused_workdir: Path, frozen: dict[str, Any]
) -> None:
    other = jax.tree.map(np.array, frozen)
    other["llama"]["norm"]["scale"][0] += 1e-3
    with pytest.raises(UserError, match=r"other settings \(frozen_weights\.llama\)"):
        run(refused_workdir, "optimizer.max_steps=3", frozen=other)


def test_another_start_under_the_same_name_is_refused(
    tmp_path: Path, run: Any, tiny_params: Any
) -> None:
    start = jax.tree.map(np.array, tiny_params["llama_proj"])
    settings = ("init_projection=given.safetensors", "optimizer.max_steps=3")
    run(tmp_path, *settings, start=start)
    run(tmp_path, *settings, start=start)
    start["bias"][0] += 1e-3
    with pytest.raises(UserError, match=r"other settings \(start_projection\)"):
        run(tmp_path, *settings, start=start)


@pytest.mark.parametrize("missing", ["workdir", "data.folder"])
def test_a_run_without_its_folders_says_which(missing: str, tmp_path: Path, run: Any) -> None:
    with pytest.raises(UserError, match=r"is ''.*expected two folders"):
        run(tmp_path, f"{missing}=''")


def test_a_loss_that_is_no_number_stops_before_its_update_and_names_the_samples(
    tmp_path: Path, run: Any, whole: Any, monkeypatch: pytest.MonkeyPatch, data_folder: Path
) -> None:
    batches: list[Any] = []
    real = CachedVision.features_of

    def features_of(self: Any, batch: Any) -> jax.Array:
        batches.append(batch)
        factor = np.nan if len(batches) == 8 else 1.0
        return real(self, batch) * factor

    monkeypatch.setattr(CachedVision, "features_of", features_of)
    with pytest.raises(UserError, match=r"step 8 is nan.*Lower optimizer.init_lr") as caught:
        run(tmp_path)
    assert len(batches) in (8, 9)  # read before a save, or when the next step was dispatched
    bad = batches[7]
    pictures = [
        json.loads((data_folder / "filter_cap.json").read_text())["annotations"][i]["image_id"]
        for i in bad["image_index"]
    ]
    record = json.loads((tmp_path / "nonfinite_step_8_process_0.json").read_text())
    assert (record["step"], record["loss"]) == (8, "nan")
    assert {sample["source"] for sample in record["samples"]} == {"folder"}
    assert [sample["index"] for sample in record["samples"]] == bad["sample_index"].tolist()
    for picture, sample in zip(pictures, record["samples"], strict=True):
        assert picture in sample["name"]
        assert picture in str(caught.value)
    assert latest_step(tmp_path) == 4
    assert losses(tmp_path) == whole[0][:7]
    assert run.saved == {}
    monkeypatch.undo()
    projection = run(
        tmp_path
    )  # what was saved is sound: with the picture mended the run ends as it should
    assert losses(tmp_path) == whole[0]
    assert_identical(projection, whole[1])


def test_a_run_goes_on_from_the_step_before_a_damaged_one(
    tmp_path: Path, run: Any, whole: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path)
    damaged = tmp_path / "checkpoints" / "10"
    (damaged / "meta" / "metadata").write_text("{")
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        run(tmp_path, "seed=7")  # another run: refused, and nothing is renamed
    assert damaged.is_dir()
    projection = run(tmp_path)
    # 4, or 8 or the first step after it at which the save of 4 was on disk
    said = re.search(r"kept as (\S+); the run goes on from step (\d+)\.", capsys.readouterr().out)
    assert said is not None
    assert said[1] == f"{damaged}.corrupt"
    assert said[2] in ("4", "8", "9")
    assert losses(tmp_path) == whole[0]
    assert_identical(projection, whole[1])


def test_a_disk_that_refuses_for_a_while_costs_the_run_no_step(
    tmp_path: Path, run: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = checkpoints_module.write_checksums, 0

    def refuse_once(folder: Path, **kind: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, **kind)

    monkeypatch.setattr(checkpoints_module, "write_checksums", refuse_once)
    projection = run(tmp_path)
    assert latest_step(tmp_path) == 10
    assert losses(tmp_path) == whole[0]
    assert_identical(projection, whole[1])


# --- signals ---


def interrupt(
    monkeypatch: pytest.MonkeyPatch, where: str, *, step: int, with_signal: signal.Signals
) -> None:
    """Sends this process a signal while step `step` is at the place `where`."""
    calls = 0

    def wrap(function: Any, *, after: bool) -> Any:
        def wrapped(*args: Any, **settings: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step and not after:
                os.kill(os.getpid(), with_signal)
            result = function(*args, **settings)
            if calls == step and after:
                os.kill(os.getpid(), with_signal)
            return result

        return wrapped

    if where == "next(batches)":
        from minigpt4_jax.data.pipeline import Pipeline

        monkeypatch.setattr(Pipeline, "__next__", wrap(Pipeline.__next__, after=True))
    elif where == "train_step":
        programs = program.TrainPrograms
        monkeypatch.setattr(programs, "__call__", wrap(programs.__call__, after=True))
    elif where == "Metrics.write":
        monkeypatch.setattr(Metrics, "write", wrap(Metrics.write, after=False))
    else:
        assert where == "checkpoints.save"
        save = wrap(TrainCheckpoints.save, after=False)
        monkeypatch.setattr(TrainCheckpoints, "save", save)


def test_signals_save_the_running_step_and_the_run_goes_on_from_it(
    tmp_path: Path, run: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run, stopped at four places by either signal, each time in its second step; then finished.

    The numbers of the second step are written when the third was dispatched: that one is saved then.
    """
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stops = [
        ("next(batches)", signal.SIGINT, 2),
        ("train_step", signal.SIGTERM, 4),
        ("Metrics.write", signal.SIGINT, 7),
    ]
    for where, number, saved in stops:
        with monkeypatch.context() as patch:
            interrupt(patch, where, step=2, with_signal=number)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path, "save_every=100")
        assert latest_step(tmp_path) == saved, where
        assert losses(tmp_path) == whole[0][:saved], where
        assert run.saved == {}
    with monkeypatch.context() as patch:
        interrupt(patch, "checkpoints.save", step=1, with_signal=signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "save_every=8")
    # While step 8 is saved it is too late to say so: one more step is done, and saved.
    assert latest_step(tmp_path) in (8, 9)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    projection = run(tmp_path)
    assert losses(tmp_path) == whole[0]
    assert_identical(projection, whole[1])


def test_a_run_stopped_between_two_gathered_batches_goes_on_with_what_it_had(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("optimizer.accum_grad_iters=2", "save_every=100", "tensorboard=false")
    projection = run(tmp_path / "whole", *settings[:2])
    with monkeypatch.context() as patch:
        interrupt(patch, "Metrics.write", step=2, with_signal=signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", *settings)
    assert latest_step(tmp_path / "stopped") == 3
    # The free setting may change; the numbers do not.
    resumed = run(tmp_path / "stopped", *settings[:2])
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert_identical(resumed, projection)
    rows = read_metrics(tmp_path / "whole")
    assert all(row["grad_norm"] > 0 and row["image_token_std"] > 0 for row in rows)
    assert (tmp_path / "whole" / "tensorboard").is_dir()


def test_a_second_signal_stops_at_once_and_the_last_checkpoint_serves(
    tmp_path: Path, run: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(*args: Any, **settings: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        real = Metrics.write
        patch.setattr(
            Metrics,
            "write",
            lambda self, step, **numbers: (impatient if step == 6 else real)(self, step, **numbers),
        )
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert latest_step(tmp_path) == 4
    run(tmp_path)
    assert losses(tmp_path) == whole[0]
