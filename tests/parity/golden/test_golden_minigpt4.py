"""The compositions against the original's: image embeddings, mixed prompts, targets, loss, gradient.

The models are MiniGPT-4 with and without a Q-Former, and MiniGPT-v2 with its LoRA added to the weights (of its
gradients, the projection's).

Samples are laid out by `data/batches.py` from the ids that the original embedded. The original puts a prompt's padding
behind the answer and the answer's before it; ours is all on the right. So rows are compared place by place where the
original's mask is 1. Tolerances are those of the sets' README.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data import batches
from minigpt4_jax.models.layout import DISK, TRAIN, convert_layout
from minigpt4_jax.models.minigpt4 import Batch, Params, apply_method, forward, make_model
from minigpt4_jax.training.loss import cross_entropy_per_sample
from minigpt4_jax.training.state import Projection, TrainBatch
from minigpt4_jax.training.step import answer_logits, loss_fn

VIT: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}
ENCODED: dict[str, Any] = {"atol": 5e-5, "rtol": 0.0}
LOGITS: dict[str, Any] = {"atol": 3e-4, "rtol": 1e-4}
LOSS: dict[str, Any] = {"atol": 5e-5, "rtol": 0.0}
GRADIENTS: dict[str, Any] = {"atol": 5e-5, "rtol": 1e-3}
IGNORED = -100
"""The label that torch's cross-entropy leaves out."""
PLACEHOLDER = "<ImageHere>"


def test_golden_encode_img(golden: Any, encode_case: tuple[str, str]) -> None:
    folder, file = encode_case
    held = golden.arrays(f"{folder}/{file}")
    images = golden.pictures(f"{folder}/{file}")
    config, params = golden.minigpt4(images.shape[1], variant=folder)
    for ours, theirs in (("scale", "ln_vision_weight"), ("bias", "ln_vision_bias")):
        np.testing.assert_array_equal(params["ln_vision"][ours], held[theirs])
    model = make_model(config, layout=DISK, dtype=jnp.float32)
    _, states = apply_method(model, params, "encode_vision", images)
    np.testing.assert_allclose(states["vit.blocks"][-1], held["vit_tokens"], **VIT)
    np.testing.assert_allclose(states["ln_vision"], held["ln_vision"], **ENCODED)
    embeds = apply_method(model, params, "encode_images", images)
    assert embeds.shape[1] == config.num_image_tokens
    np.testing.assert_allclose(embeds, held["inputs_llama"], **ENCODED)
    np.testing.assert_array_equal(held["atts_llama"], np.ones(embeds.shape[:2]))


class ForwardCase:
    """One training forward of the original, laid out by this project."""

    def __init__(self, golden: Any, folder: str, name: str) -> None:
        self.facts = golden.report(f"{folder}/cases.json")[name]
        self.held = golden.arrays(f"{folder}/{name}.npz")
        self.images = golden.pictures(
            f"{folder}/{self.facts.get('image_is_the_one_in', f'{name}.npz')}"
        )
        self.config: ModelConfig
        self.params: Params
        self.config, self.params = golden.minigpt4(self.images.shape[-2], variant=folder)
        if self.images.ndim == 4:
            self.images = self.images[
                :, None
            ]  # [B, pictures of a row, H, W, 3]; `length` says how many are shown
        self.bos = golden.special_ids("llama_mha")["bos"]
        self.counts = self.held["attention_mask"] == 1
        self.prompts = self.read_prompts()
        self.batch = self.lay_out()

    def read_prompts(self) -> list[list[int]]:
        """Per sample the ids of the wrapped prompt, bos in front; sets `self.ignored`, the padding token.

        The record lists what was embedded, call by call: each text segment around a picture, one padding token where
        there are prompts, all answers, the bos of every row; and then what later calls embedded.
        """
        recorded: Iterator[Any] = iter(self.facts["embedded_id_sequences_in_order"])
        texts = self.facts["prompts_given_to_prompt_wrap"]
        rows = len(self.images)
        texts = [texts] * rows if isinstance(texts, str) else texts or [None] * rows
        segments = [
            [[], []] if text is None else [next(recorded)[0] for _ in text.split(PLACEHOLDER)]
            for text in texts
        ]
        answers = self.held["regress_token_ids"]
        padding = set(answers[self.held["regress_atts"] == 0].tolist())
        if texts[0] is not None:
            padding.add(next(recorded))
        assert len(padding) <= 1, f"expected one padding token, the record has {padding}"
        self.ignored = padding
        np.testing.assert_array_equal(next(recorded), answers)
        np.testing.assert_array_equal(next(recorded), np.full((rows, 1), self.bos))
        wrapped = [batches.wrap_images(ids, self.config.num_image_tokens) for ids in segments]
        return [
            batches.limit_prompt(
                [self.bos, *ids],
                num_bos=1,
                max_context_len=self.facts["max_context_len"],
                truncate=True,
                name="prompt",
            )[0]
            for ids in wrapped
        ]

    def lay_out(self) -> batches.Batch:
        examples = []
        for row, prompt in enumerate(self.prompts):
            answer = self.held["regress_token_ids"][row][
                self.held["regress_atts"][row] == 1
            ].tolist()
            assert len(answer) <= self.facts["max_txt_len"]
            examples.append(batches.join_example(prompt, answer, ignored_targets=self.ignored))
        return batches.collate(examples, range(len(examples)), length_multiple=8)

    def train_batch(self, features: Any) -> TrainBatch:
        """`features`: of every picture, `[B * pictures, R, C]`; those of a row follow each other."""
        fields = {name: jnp.asarray(x) for name, x in self.batch.items() if name != "image_index"}
        joined = features.reshape(len(self.images), -1, features.shape[-1])
        return TrainBatch(**fields, features=joined)


@pytest.fixture(scope="module")
def run(golden: Any, forward_case: tuple[str, str]) -> ForwardCase:
    return ForwardCase(golden, *forward_case)


def test_golden_forward_attention_and_prompt_lengths(run: ForwardCase) -> None:
    ours = run.batch["attention_mask"].sum(axis=1)
    np.testing.assert_array_equal(ours, run.counts.sum(axis=1))
    np.testing.assert_array_equal([len(ids) - 1 for ids in run.prompts], run.held["input_lens"])


def test_golden_forward_targets(run: ForwardCase) -> None:
    theirs = run.held["targets"]
    assert (theirs[~run.counts] == IGNORED).all()
    for row, counts in enumerate(run.counts):
        dense = np.full(run.batch["token_ids"].shape[1], IGNORED)
        held = run.batch["target_mask"][row]
        dense[run.batch["target_positions"][row][held] + 1] = run.batch["target_ids"][row][held]
        np.testing.assert_array_equal(dense[: counts.sum()], theirs[row][counts])
        assert (dense[counts.sum() :] == IGNORED).all()


def test_golden_forward_embeddings_and_logits(run: ForwardCase) -> None:
    model = make_model(run.config, layout=DISK, dtype=jnp.float32)
    batch = Batch(
        token_ids=jnp.asarray(run.batch["token_ids"]),
        attention_mask=jnp.asarray(run.batch["attention_mask"]),
        images=run.images,
    )
    output = forward(run.params, batch, model=model, capture=["image_embeds", "inputs_embeds"])
    if "encode_img" in run.held:
        embeds = output.hidden["image_embeds"]
        np.testing.assert_allclose(embeds, run.held["encode_img"], **ENCODED)
    compared = {"inputs_embeds": (output.hidden["inputs_embeds"], ENCODED)}
    if "logits" in run.held:
        compared["logits"] = (output.logits, LOGITS)
    if "cond_embeds" in run.held:  # the wrapped prompt, behind the bos
        for row, counts in enumerate(run.held["cond_atts"] == 1):
            wrapped = output.hidden["inputs_embeds"][row, 1 : 1 + counts.sum()]
            np.testing.assert_allclose(wrapped, run.held["cond_embeds"][row][counts], **ENCODED)
    for name, (ours, tolerance) in compared.items():
        for row, counts in enumerate(run.counts):
            np.testing.assert_allclose(
                ours[row, : counts.sum()],
                run.held[name][row][counts],
                **tolerance,
                err_msg=f"{name}, row {row}",
            )


def test_golden_forward_loss_and_gradient_of_the_projection(run: ForwardCase) -> None:
    model = make_model(run.config, layout=TRAIN, dtype=jnp.float32)
    params = convert_layout(run.params, DISK, TRAIN, llama=run.config.llama)
    pictures = run.images.reshape(-1, *run.images.shape[2:])
    features, _ = apply_method(model, params, "encode_vision", pictures)
    batch = run.train_batch(features)
    frozen = {"llama": params["llama"]}
    length = run.held["targets"].shape[1]

    def losses(projection: Projection) -> Any:
        if run.facts["reduction"] == "mean":
            return loss_fn(projection, frozen, batch, model=model)[0]
        logits, _ = answer_logits(projection, frozen, batch, model=model)
        return cross_entropy_per_sample(logits, batch.target_ids, batch.target_mask, length=length)

    def total(projection: Projection) -> tuple[Any, Any]:
        values = losses(projection)
        return jnp.sum(values), values  # of single losses the set holds the gradient of their sum

    projection = jax.tree.map(jnp.asarray, params["llama_proj"])
    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(projection)
    np.testing.assert_allclose(values, run.held["loss"], **LOSS)
    ours = {
        "grad__llama_proj.weight": gradient["kernel"].T,
        "grad__llama_proj.bias": gradient["bias"],
    }
    theirs = {
        name: x for name, x in run.held.items() if name.startswith("grad__") and "lora" not in name
    }
    assert set(theirs) == set(ours), "only the projection is trained"
    for name, held in theirs.items():
        np.testing.assert_allclose(ours[name], held, **GRADIENTS, err_msg=name)
