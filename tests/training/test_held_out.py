"""training/held_out.py and captions.py: the same samples every time, their loss counted right, captions as it goes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from minigpt4_jax.config import ModelConfig, UserError
from minigpt4_jax.data.datasets import Part
from minigpt4_jax.data.encoding import Encoder
from minigpt4_jax.data.sources import CcSbuAlign
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.minigpt4 import Batch, forward, make_model
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.training.captions import SHEET, make_sheet, read_captions
from minigpt4_jax.training.held_out import make_held_out_batches, pick_samples
from minigpt4_jax.training.loop import make_encoder
from minigpt4_jax.training.metrics import Metrics, read_held_out, read_metrics
from minigpt4_jax.training.vision import make_reader
from tests.training.test_metrics import read_events

ANSWERS = ["red.", "it's green", "blue & <b> yes", "a white square, so", "black, just so"]
"""With their prompts two different lengths, so that counting by hand compiles twice."""


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures, one with a prompt of its own; with batches of four the last one is short."""
    folder = tmp_path_factory.mktemp("held_out")
    (folder / "image").mkdir()
    annotations = []
    for number, (colour, answer) in enumerate(
        zip(["red", "green", "blue", "white", "black"], ANSWERS, strict=True)
    ):
        Image.new("RGB", (28, 28), colour).save(folder / "image" / f"{number}.jpg")
        annotations.append({"image_id": number, "caption": answer})
    annotations[3]["prompt"] = "And this?"
    (folder / "filter_cap.json").write_text(json.dumps(annotations))
    return folder


@pytest.fixture
def encoder(make_config: Any, tmp_path: Path) -> Encoder:
    return make_encoder(make_config(tmp_path), PRESETS["tiny"], byte_tokenizer())


PROMPTS = ("What is this?", "Say it.")


def hand_loss(folder: Path, encoder: Encoder, params: Any, config: Any) -> tuple[float, int]:
    """Each sample alone, without padding, through the whole model in the layout of the disk; the rest in NumPy."""
    source = CcSbuAlign(folder)
    model = make_model(PRESETS["tiny"].model, layout=DISK, dtype=jax.numpy.float32)
    logits_of = jax.jit(lambda params, batch: forward(params, batch, model=model).logits[0])
    reader = make_reader(config, PRESETS["tiny"])
    total, count = 0.0, 0
    for number in range(len(source)):
        tokens = encoder.encode(source[number], number % 2)
        pixels = reader(source.read_image(number), "x", rng=np.random.default_rng(0))
        batch = Batch(
            token_ids=jax.numpy.asarray(tokens.token_ids[None]),
            attention_mask=jax.numpy.ones((1, len(tokens.token_ids)), bool),
            images=jax.numpy.asarray(pixels[None, None]),
        )
        logits = np.asarray(logits_of(params, batch), np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for place in np.flatnonzero(tokens.loss_mask):
            total -= logprobs[place - 1, tokens.token_ids[place]]
            count += 1
    return total / count, count


def test_the_loss_is_that_of_every_sample_alone_counted_by_its_tokens(
    tmp_path: Path, run: Any, held_out: Path, encoder: Encoder, frozen: Any, make_config: Any
) -> None:
    settings = ("optimizer.max_steps=3", f"held_out.folder={held_out}", "held_out.every=2")
    # The run sees random parts of its pictures; a look does not.
    crop = ("cache_features=false", "data.random_resized_crop=true")
    from_pixels = run(tmp_path / "pixels", *settings, *crop)
    looks = read_held_out(tmp_path / "pixels")
    assert [row["step"] for row in looks] == [0, 2, 3]
    assert len(read_metrics(tmp_path / "pixels")) == 3
    params = {**frozen, "llama_proj": from_pixels}
    loss, targets = hand_loss(held_out, encoder, params, make_config(tmp_path))
    assert (looks[-1]["samples"], looks[-1]["targets"]) == (5, targets)
    np.testing.assert_allclose(looks[-1]["held_out_loss"], loss, rtol=2e-5)
    # Cached features are rounded to float16.
    run(tmp_path / "cached", *settings)
    first = read_held_out(tmp_path / "cached")[0]["held_out_loss"]
    np.testing.assert_allclose(first, looks[0]["held_out_loss"], rtol=1e-3)


def test_looks_are_the_same_after_a_stop_at_any_place(
    tmp_path: Path, run: Any, held_out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (
        "optimizer.max_steps=6", "save_every=3", f"held_out.folder={held_out}", "held_out.every=2",
    )  # fmt: skip
    run(tmp_path / "whole", *settings)
    looks = read_held_out(tmp_path / "whole")
    assert [row["step"] for row in looks] == [0, 2, 4, 6]
    assert len({row["held_out_loss"] for row in looks}) == 4

    real_write, real_look = Metrics.write, Metrics.write_held_out

    def stop_in(name: str, real: Any, at: int) -> None:
        def stopping(self: Any, step: int, **numbers: Any) -> None:
            if step == at:
                raise KeyboardInterrupt
            real(self, step, **numbers)

        with monkeypatch.context() as patch:
            patch.setattr(Metrics, name, stopping)
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path / "stopped", *settings)

    stop_in("write_held_out", real_look, 0)  # before its line was written
    stop_in("write_held_out", real_look, 4)  # behind the checkpoint of step 3
    stop_in("write", real_write, 5)  # the look at 4 was made, and is made again
    stop_in("write_held_out", real_look, 6)  # step 6 is saved, the look at it is not made
    run(tmp_path / "stopped", *settings)
    assert read_held_out(tmp_path / "stopped") == looks


def test_captions_are_asked_with_the_projection_of_the_moment(
    tmp_path: Path, run: Any, held_out: Path
) -> None:
    seen: list[Any] = []

    def caption(projection: Any, pictures: Any, prompts: Any) -> list[str]:
        seen.append((projection, pictures, prompts))
        return [f"<i>{len(seen)}{number}" for number in range(len(pictures))]

    projection = run(
        tmp_path, "optimizer.max_steps=4", f"held_out.folder={held_out}", "held_out.every=2",
        "held_out.captions=3", caption=caption,
    )  # fmt: skip
    kernels = [given["kernel"] for given, _, _ in seen]
    assert len(kernels) == 3
    np.testing.assert_array_equal(kernels[-1], projection["kernel"])
    assert all(np.abs(a - b).max() > 0 for a, b in itertools.pairwise(kernels))
    wanted = [0, 1, 3]
    assert all(
        pictures == [(held_out / "image" / f"{n}.jpg").read_bytes() for n in wanted]
        and prompts == ["What is this?", "Say it.", "And this?"]
        for _, pictures, prompts in seen
    )
    rows = read_captions(tmp_path)
    assert [(row["step"], row["answer"]) for row in rows] == [
        (step, f"<i>{look}{number}") for look, step in enumerate((0, 2, 4), 1) for number in range(3)
    ]  # fmt: skip
    assert [row["truth"] for row in rows[:3]] == [ANSWERS[n] for n in wanted]
    assert rows[2]["prompt"] == "And this?"
    sheet = (tmp_path / SHEET).read_text()
    assert sheet.index("&lt;i&gt;30") < sheet.index("&lt;i&gt;10")
    assert "<i>3" not in sheet
    tags = {value.tag for event in read_events(tmp_path) for value in event.summary.value}
    assert {"held_out/loss", "held_out/0", "held_out/2/text_summary"} <= tags


def test_no_room_for_a_second_copy_ends_the_captions_and_not_the_run(
    tmp_path: Path, run: Any, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = 0

    def caption(projection: Any, pictures: Any, prompts: Any) -> list[str]:
        nonlocal asked
        asked += 1
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    run(
        tmp_path, "optimizer.max_steps=2", f"held_out.folder={held_out}", "held_out.every=1",
        caption=caption,
    )  # fmt: skip
    assert asked == 1
    assert [row["step"] for row in read_held_out(tmp_path)] == [0, 1, 2]
    assert "no captions from here on" in capsys.readouterr().out


def test_the_set_that_is_trained_on_is_refused(tmp_path: Path, run: Any, data_folder: Path) -> None:
    with pytest.raises(UserError, match="on which the run trains"):
        run(tmp_path, f"held_out.folder={data_folder}")


# --- which samples ---


def test_samples_are_spread_over_the_set_and_broken_ones_are_said(
    tmp_path: Path, held_out: Path, encoder: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image").mkdir()
    for file in (held_out / "image").iterdir():
        (tmp_path / "image" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "filter_cap.json").write_text((held_out / "filter_cap.json").read_text())
    (tmp_path / "image" / "1.jpg").write_bytes(b"no picture")
    parts = [Part("a", CcSbuAlign(tmp_path))]
    picked = pick_samples(parts, encoder, prompts=PROMPTS, max_samples=3)
    answers = [picked.part.source[i].exchanges[0].answer for i in range(len(picked.tokens))]
    assert answers == [ANSWERS[0], ANSWERS[3]]
    assert picked.prompts == ["What is this?", "And this?"]
    assert "1 held-out samples are left out. The first: " in capsys.readouterr().out
    (tmp_path / "image" / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="None of 1 held-out samples can be used"):
        pick_samples(parts, encoder, prompts=PROMPTS, max_samples=1)


def test_processes_share_the_rows_of_every_batch(held_out: Path, encoder: Encoder) -> None:
    picked = pick_samples(
        [Part("a", CcSbuAlign(held_out))], encoder, prompts=PROMPTS, max_samples=9
    )

    def make(*share: int) -> list[Any]:
        return make_held_out_batches(
            picked, batch_size=4, length_multiple=16, pictures=None, share=(share[0], share[1])
        )()

    whole = make(0, 1)
    assert [batch["target_mask"].any(axis=1).sum() for batch in whole] == [4, 1]
    shares = [make(0, 2), make(1, 2)]
    for batch, first, second in zip(whole, *shares, strict=True):
        for name, rows in batch.items():
            np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), rows)


def test_a_sheet_without_steps_is_a_page(tiny_config: ModelConfig) -> None:
    assert make_sheet([], []).startswith("<!doctype html>")
