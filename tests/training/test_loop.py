"""training/loop.py in one process: what moves, what stays, what is refused, and what a signal leaves behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from minigpt4_jax.config import IMAGE_TOKEN_ID, LlamaConfig, ModelConfig, UserError
from minigpt4_jax.data.datasets import open_sources
from minigpt4_jax.data.tokenizer import Tokenizer, byte_tokenizer
from minigpt4_jax.presets import get_preset
from minigpt4_jax.training import loop
from minigpt4_jax.training.checkpoints import TrainCheckpoints
from minigpt4_jax.training.features import Encoded
from minigpt4_jax.training.metrics import read_metrics
from minigpt4_jax.training.vision import CachedVision


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
    from minigpt4_jax.data.tokenizer import byte_tokenizer

    workdir = tmp_path_factory.mktemp("whole")
    projection = loop.train(
        make_config(workdir),
        params=frozen,
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


# --- refused ---


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("optimizer.init_lr=0.02", "optimizer.init_lr"),
        ("data.batch_size=2", "data.batch_size"),
        ("data.prompts=['Other?']", "data.prompts"),
        ("seed=7", "seed"),
        ("init_projection=ridge", "init_projection"),
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
    from minigpt4_jax.data.tokenizer import byte_tokenizer

    workdir = tmp_path_factory.mktemp("refused")
    loop.train(
        make_config(workdir, "optimizer.max_steps=3"),
        params=frozen,
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
    with pytest.raises(UserError, match=r"other settings \(frozen_weights\)"):
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


def test_a_loss_that_is_no_number_stops_before_anything_is_saved(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.make_train_step

    def make_broken(*args: Any) -> Any:
        step = real(*args)

        def train_step(state: Any, frozen: Any, batch: Any) -> Any:
            after, numbers = step(state, frozen, batch)
            loss = jax.numpy.where(after.step < 8, numbers.loss, jax.numpy.nan)
            return after, numbers._replace(loss=loss)

        return train_step

    monkeypatch.setattr(loop, "make_train_step", make_broken)
    with pytest.raises(UserError, match=r"step 8 is nan.*Lower optimizer.init_lr"):
        run(tmp_path)
    assert latest_step(tmp_path) == 4
    assert [step for step, _ in losses(tmp_path)] == list(range(1, 8))
    assert run.saved == {}


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
        real = jax.jit

        def jit(function: Any, **settings: Any) -> Any:
            compiled = real(function, **settings)
            is_step = getattr(function, "__name__", "") == "train_step"
            return wrap(compiled, after=True) if is_step else compiled

        monkeypatch.setattr(loop.jax, "jit", jit)
    elif where == "Metrics.write":
        monkeypatch.setattr(loop.Metrics, "write", wrap(loop.Metrics.write, after=False))
    else:
        assert where == "checkpoints.save"
        save = wrap(TrainCheckpoints.save, after=False)
        monkeypatch.setattr(TrainCheckpoints, "save", save)


def test_signals_save_the_running_step_and_the_run_goes_on_from_it(
    tmp_path: Path, run: Any, whole: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run, stopped at four places by either signal, each time in its second step; then finished."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    stops = [
        ("next(batches)", signal.SIGINT),
        ("train_step", signal.SIGTERM),
        ("Metrics.write", signal.SIGINT),
    ]
    for count, (where, number) in enumerate(stops, 1):
        with monkeypatch.context() as patch:
            interrupt(patch, where, step=2, with_signal=number)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path, "save_every=100")
        assert latest_step(tmp_path) == 2 * count, where
        assert losses(tmp_path) == whole[0][: 2 * count], where
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
    settings = ("optimizer.accum_grad_iters=2", "save_every=100", "tensorboard=true")
    projection = run(tmp_path / "whole", *settings)
    with monkeypatch.context() as patch:
        interrupt(patch, "Metrics.write", step=3, with_signal=signal.SIGINT)
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
        real = loop.Metrics.write
        patch.setattr(
            loop.Metrics,
            "write",
            lambda self, step, **numbers: (impatient if step == 6 else real)(self, step, **numbers),
        )
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert latest_step(tmp_path) == 4
    run(tmp_path)
    assert losses(tmp_path) == whole[0]


# --- words ---


@pytest.fixture
def batches_of(make_config: Any, tmp_path: Path) -> Any:
    """`batches_of("key=value", ...)`: the first batch of the set in the words of these settings."""
    vision = CachedVision(Encoded(np.zeros((0, 1, 1), np.float16), {}))  # words alone

    def call(*overrides: str, tokenizer: Tokenizer | None = None) -> Any:
        config = make_config(tmp_path, *overrides)
        parts = open_sources(config.data, progress=lambda done, of: None)
        with loop.make_batches(
            config, get_preset("tiny"), parts, vision, tokenizer or byte_tokenizer()
        ) as batches:
            return next(batches)

    return call


def first_row(batch: Any) -> list[int]:
    return batch["token_ids"][0][batch["attention_mask"][0]].tolist()


def first_answer(batch: Any) -> list[int]:
    return batch["target_ids"][0][batch["target_mask"][0]].tolist()


def test_no_prompt_at_all_is_bos_picture_caption_and_end_symbol(
    batches_of: Any, tiny_config: ModelConfig
) -> None:
    tokenizer = byte_tokenizer()
    settings = ("data.prompts=[]", "data.template=vicuna_v0")
    batch = batches_of(*settings, r'data.end_sym="\n"')
    picture = [IMAGE_TOKEN_ID] * tiny_config.num_image_tokens
    answer = first_answer(batch)
    assert first_row(batch) == [tokenizer.special("<s>"), *picture, *answer]
    assert tokenizer.decode(answer).endswith("\n")
    assert tokenizer.decode(first_answer(batches_of(*settings))).endswith("###")
    control = first_answer(batches_of(*settings, "data.end_sym=</s>"))
    assert control[-1] == tokenizer.special("</s>")


def test_a_prompt_file_asks_its_questions(batches_of: Any, tmp_path: Path) -> None:
    file = tmp_path / "alignment.txt"
    file.write_text("<Img><ImageHere></Img> Describe it.\n")
    # The list must be at its default: two sources of prompts are a contradiction.
    batch = batches_of("data.prompts=['What is this?']", f"data.prompt_path={file}")
    asked = byte_tokenizer().decode([i for i in first_row(batch) if i != IMAGE_TOKEN_ID])
    assert "Describe it." in asked
    with pytest.raises(UserError, match=r"data.prompts is \['Who\?'\]; expected one of the two"):
        batches_of("data.prompts=['Who?']", f"data.prompt_path={file}")


def test_what_is_too_long_is_cut_only_when_told_to_and_counted(
    batches_of: Any, capsys: pytest.CaptureFixture[str], tiny_config: ModelConfig
) -> None:
    prompts = "data.prompts=['Is it?', 'What in the world is this?']"
    # Captions have 7 to 10 letters, one token each; the two of 7 fit with their end symbol.
    for limit in ("data.max_text_len=8", "data.max_context_len=30"):
        with pytest.raises(UserError, match=limit.partition("=")[0]):
            batches_of(prompts, limit)
    assert capsys.readouterr().out == ""
    longest = tiny_config.num_image_tokens + len("user\nassistant\nIs it?\n") + 3
    batch = batches_of(
        prompts, "data.truncate=true", "data.max_text_len=8", f"data.max_context_len={longest}"
    )
    assert capsys.readouterr().out == (
        "data.truncate: 10 of 12 answers cut to 8 tokens (without an end symbol), 1 prompts to "
        f"{longest}.\n"
    )
    assert batch["target_mask"].sum(axis=1).max() == 8


def test_the_pad_token_can_be_left_out_of_the_loss_unless_it_is_the_end_symbol(
    batches_of: Any,
) -> None:
    # The byte tokenizer pads with <|im_end|>, which ChatML also ends with.
    with pytest.raises(UserError, match=r"part of the end symbol '<\|im_end\|>'"):
        batches_of("data.mask_pad_token=true")
    # One whose pad token is an ordinary piece, as the original's `$$` is: here the letter e.
    tokenizer = Tokenizer(byte_tokenizer()._backend, bos_token=None, eos_token=None, pad_token="e")
    whole = batches_of(tokenizer=tokenizer)
    masked = batches_of("data.mask_pad_token=true", tokenizer=tokenizer)
    np.testing.assert_array_equal(masked["token_ids"], whole["token_ids"])
    answers = [whole["target_ids"][row][mask] for row, mask in enumerate(whole["target_mask"])]
    left = [masked["target_ids"][row][mask] for row, mask in enumerate(masked["target_mask"])]
    assert any(tokenizer.pad_id in answer for answer in answers)
    for answer, rest in zip(answers, left, strict=True):
        assert rest.tolist() == [i for i in answer.tolist() if i != tokenizer.pad_id]
