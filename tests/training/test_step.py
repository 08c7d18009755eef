"""training/step.py: the loss is that of the whole model on the answers, its gradient is the projection's alone."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.data.batches import collate, make_example_tokens
from minigpt4_jax.data.prompts import CHATML
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.models.layout import DISK, TRAIN, convert_layout
from minigpt4_jax.models.minigpt4 import Batch, forward, make_model
from minigpt4_jax.train_config import OptimizerConfig
from minigpt4_jax.training import step as step_module
from minigpt4_jax.training.optimizer import make_optimizer
from minigpt4_jax.training.state import TrainBatch, init_state
from minigpt4_jax.training.step import loss_fn, make_train_step

ANSWERS = ["red dot", "a", "green and blue"]


@pytest.fixture(scope="module")
def images(tiny_config: ModelConfig) -> np.ndarray:
    size = tiny_config.vit.image_size
    return np.random.default_rng(22).normal(size=(3, size, size, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def tokens(tiny_config: ModelConfig) -> Any:
    """Three samples of different lengths, in NumPy as the data pipeline makes them."""
    examples = [
        make_example_tokens(
            CHATML,
            byte_tokenizer(),
            prompt="What?",
            answer=answer,
            num_image_tokens=tiny_config.num_image_tokens,
            max_text_len=32,
        )
        for answer in ANSWERS
    ]
    return collate(examples, range(3), length_multiple=8)


@pytest.fixture(scope="module")
def features(tiny_params: Any, tiny_config: ModelConfig, images: np.ndarray) -> jax.Array:
    model = make_model(tiny_config, layout=DISK, dtype=jnp.float32)
    return jax.jit(lambda params, x: model.apply({"params": params}, x, method="encode_vision")[0])(
        tiny_params, images
    )


def to_batch(tokens: Any, features: jax.Array, **changes: Any) -> TrainBatch:
    fields = {name: tokens[name] for name in tokens if name != "image_index"} | changes
    return TrainBatch(**{n: jnp.asarray(field) for n, field in fields.items()}, features=features)


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig) -> Any:
    return make_model(tiny_config, layout=TRAIN, dtype=jnp.float32)


@pytest.fixture(scope="module")
def frozen(tiny_params: Any, tiny_config: ModelConfig) -> Any:
    llama = convert_layout(tiny_params["llama"], DISK, TRAIN, llama=tiny_config.llama)
    return {"llama": llama}


@pytest.fixture(scope="module")
def value_and_grad(model: Any, frozen: Any) -> Any:
    """`(projection, batch) -> (loss, gradient with respect to the projection and to every frozen leaf)`."""

    def loss(projection: Any, frozen: Any, batch: TrainBatch) -> jax.Array:
        value, _ = loss_fn(projection, frozen, batch, model=model)
        return value

    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    return lambda projection, batch: both(projection, frozen, batch)


def test_the_loss_is_that_of_the_whole_model_on_the_answer_tokens(
    tiny_params: Any, tiny_config: ModelConfig, tokens: Any, features: Any, images: Any, value_and_grad: Any
) -> None:  # fmt: skip
    batch = Batch(
        token_ids=jnp.asarray(tokens["token_ids"]),
        attention_mask=jnp.asarray(tokens["attention_mask"]),
        images=jnp.asarray(images[:, None]),
    )
    model = make_model(tiny_config, layout=DISK, dtype=jnp.float32)
    logits = jax.jit(lambda params, batch: forward(params, batch, model=model).logits)(
        tiny_params, batch
    )
    wide = np.asarray(logits, np.float64)
    tokenizer = byte_tokenizer()
    terms = []
    for row, answer in enumerate(ANSWERS):
        expected = [*tokenizer.encode(answer), tokenizer.special("<|im_end|>")]
        end = int(tokens["attention_mask"][row].sum())
        for place, token in enumerate(expected, end - len(expected)):
            assert tokens["token_ids"][row, place] == token
            before = wide[row, place - 1]
            terms.append(np.log(np.exp(before).sum()) - before[token])
    loss, _ = value_and_grad(tiny_params["llama_proj"], to_batch(tokens, features))
    np.testing.assert_allclose(float(loss), np.mean(terms), rtol=1e-5)


def test_prompt_and_padding_are_no_targets(
    tiny_params: Any, tokens: Any, features: Any, value_and_grad: Any
) -> None:
    projection, mask = tiny_params["llama_proj"], tokens["target_mask"]
    before, _ = value_and_grad(projection, to_batch(tokens, features))
    rng = np.random.default_rng(23)
    other_targets = np.where(mask, tokens["target_ids"], rng.integers(0, 262, mask.shape))
    other_places = np.where(mask, tokens["target_positions"], rng.integers(0, 20, mask.shape))
    after, _ = value_and_grad(
        projection,
        to_batch(
            tokens,
            features,
            target_ids=other_targets.astype(np.int32),
            target_positions=other_places.astype(np.int32),
        ),
    )
    assert float(after) == float(before)
    padding = np.where(tokens["attention_mask"], tokens["token_ids"], 77).astype(np.int32)
    after, _ = value_and_grad(projection, to_batch(tokens, features, token_ids=padding))
    assert float(after) == float(before)


def test_each_answer_token_is_predicted_from_what_stands_before_it_only(
    tiny_params: Any, tokens: Any, features: Any, value_and_grad: Any
) -> None:
    # The last token of an answer is a target and never an input of one: changing it changes its own term alone.
    row, end = 0, int(tokens["attention_mask"][0].sum())
    first = np.zeros_like(tokens["target_mask"])
    first[row] = tokens["target_mask"][row] & (tokens["target_positions"][row] < end - 2)
    assert first.sum() == len(ANSWERS[0])
    before, _ = value_and_grad(
        tiny_params["llama_proj"], to_batch(tokens, features, target_mask=first)
    )
    token_ids = tokens["token_ids"].copy()
    token_ids[row, end - 1] = 200
    after, _ = value_and_grad(
        tiny_params["llama_proj"],
        to_batch(tokens, features, target_mask=first, token_ids=token_ids),
    )
    assert float(after) == float(before)


def test_the_gradient_equals_a_finite_difference(
    tiny_params: Any, tokens: Any, features: Any, value_and_grad: Any
) -> None:
    projection, batch = tiny_params["llama_proj"], to_batch(tokens, features)
    _, (grads, _) = value_and_grad(projection, batch)
    rng = np.random.default_rng(24)
    for name in ("kernel", "bias"):
        size = float(jnp.linalg.norm(grads[name]))
        assert size > 1e-2
        noise = rng.normal(size=grads[name].shape).astype(np.float32)
        directions = {
            "along the gradient": np.asarray(grads[name]) / size,
            "anywhere": noise / np.linalg.norm(noise),
        }
        for direction in directions.values():
            step = 1e-2
            ends = [
                value_and_grad({**projection, name: projection[name] + sign * step * direction}, batch)[0]
                for sign in (1, -1)
            ]  # fmt: skip
            slope = (float(ends[0]) - float(ends[1])) / (2 * step)
            expected = float(np.sum(np.asarray(grads[name]) * direction))
            # Central difference in float32: curvature step**2 and rounding 1e-6 / step of a loss of about 6.
            assert slope == pytest.approx(expected, rel=2e-2, abs=5e-4)


def test_a_train_step_changes_the_projection_and_nothing_else(
    tiny_params: Any, tokens: Any, features: Any, model: Any, frozen: Any, value_and_grad: Any
) -> None:
    batch = to_batch(tokens, features)
    _, (_, frozen_grads) = value_and_grad(tiny_params["llama_proj"], batch)
    # The frozen weights do matter to the loss; they stay because the step never asks for their gradient.
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(frozen_grads))
    bytes_before = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(frozen)]
    tx = make_optimizer(OptimizerConfig(init_lr=0.1, warmup_steps=0, max_steps=5))
    projection = jax.tree.map(jnp.copy, tiny_params["llama_proj"])
    state, numbers = jax.jit(make_train_step(model, tx))(init_state(projection, tx), frozen, batch)
    assert [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(frozen)] == bytes_before
    assert jax.tree.map(jnp.shape, state.projection) == jax.tree.map(jnp.shape, projection)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).min()), state.projection, projection)
    assert min(moved.values()) > 0
    assert int(state.step) == 1
    expected, (grads, _) = value_and_grad(projection, batch)
    np.testing.assert_allclose(float(numbers.loss), float(expected), rtol=1e-6)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(grads)])
    np.testing.assert_allclose(float(numbers.grad_norm), np.linalg.norm(flat), rtol=1e-5)
    groups = np.asarray(features).reshape(len(features), -1, projection["kernel"].shape[0])
    image_tokens = groups @ np.asarray(projection["kernel"]) + np.asarray(projection["bias"])
    np.testing.assert_allclose(float(numbers.image_token_std), image_tokens.std(), rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_no_number_moves_nothing_nor_does_any_after_it(
    bad: float, tiny_params: Any, tokens: Any, features: Any, model: Any, frozen: Any
) -> None:
    tx = make_optimizer(OptimizerConfig(init_lr=0.1, warmup_steps=0, max_steps=5))
    step = jax.jit(make_train_step(model, tx))
    state = init_state(jax.tree.map(jnp.copy, tiny_params["llama_proj"]), tx)
    before, _ = step(state, frozen, to_batch(tokens, features))
    broken, numbers = step(before, frozen, to_batch(tokens, features.at[1].set(bad)))
    assert not np.isfinite([float(numbers.loss), float(numbers.grad_norm)]).all()
    # A good batch that was on its way already: its own numbers are good, and still nothing moves.
    later, numbers = step(broken, frozen, to_batch(tokens, features))
    assert np.isfinite(float(numbers.loss))
    for state in (broken, later):
        assert int(state.step) == -2
        same = state._replace(step=before.step)
        for one, other in zip(jax.tree.leaves(same), jax.tree.leaves(before), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_a_gradient_that_is_no_number_moves_nothing_though_the_loss_is_one(
    tiny_params: Any, tokens: Any, features: Any, model: Any, frozen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    def rooted(projection: Any, *args: Any, **settings: Any) -> Any:
        return jnp.sqrt(projection["bias"] * 0).sum(), jnp.ones((1, 1, 1))

    monkeypatch.setattr(step_module, "loss_fn", rooted)
    tx = make_optimizer(OptimizerConfig(init_lr=0.1, warmup_steps=0, max_steps=5))
    before = init_state(jax.tree.map(jnp.copy, tiny_params["llama_proj"]), tx)
    after, numbers = jax.jit(make_train_step(model, tx))(before, frozen, to_batch(tokens, features))
    assert float(numbers.loss) == 0
    assert np.isnan(float(numbers.grad_norm))
    assert int(after.step) == -1
    for name, leaf in before.projection.items():
        np.testing.assert_array_equal(after.projection[name], leaf)


def test_batches_gathered_to_one_update_move_the_projection_as_one_batch_of_all_samples(
    tiny_params: Any, tokens: Any, features: Any, model: Any, frozen: Any
) -> None:
    # An eps so large that a step tells a gradient's size; the parts have 8 + 2 and 15 targets.
    config = OptimizerConfig(init_lr=0.1, warmup_steps=0, max_steps=2, eps=1.0, min_lr=0.1)
    batch = to_batch(tokens, features)

    def train(parts: list[slice], accum_grad_iters: int) -> Any:
        tx = make_optimizer(dataclasses.replace(config, accum_grad_iters=accum_grad_iters))
        step = jax.jit(make_train_step(model, tx))
        state = init_state(jax.tree.map(jnp.copy, tiny_params["llama_proj"]), tx)
        for part in parts:
            state, _ = step(state, frozen, jax.tree.map(operator.itemgetter(part), batch))
        return state.projection

    whole, gathered = train([slice(0, 3)], 1), train([slice(0, 2), slice(2, 3)], 2)
    for name, start in tiny_params["llama_proj"].items():
        moved = np.asarray(whole[name]) - np.asarray(start)
        assert np.abs(moved).max() > 1e-3
        np.testing.assert_allclose(np.asarray(gathered[name]) - np.asarray(start), moved, atol=2e-6)
