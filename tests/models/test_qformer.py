"""models/qformer.py against a NumPy Q-Former in float64.

Each mistake that a port can make fails `test_every_layer_equals_the_numpy_qformer`: pre-norm instead of post-norm, the
cross-attention in odd layers (the parameters' names, too), a dropped bias, another GELU, a missing norm of the queries.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.config import QFormerConfig, UserError
from minigpt4_jax.models.qformer import QFormer
from minigpt4_jax.presets import PRESETS

RNG = np.random.default_rng(6)
TOKENS, WIDTH = 7, 32
CONFIG = PRESETS["tiny-qformer"].model.qformer
assert CONFIG is not None


def layer_norm(x: np.ndarray, params: Any, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    return normed * params["scale"] + params["bias"]


def dense(x: np.ndarray, params: Any) -> np.ndarray:
    return x @ params["kernel"] + params["bias"]


def attention(x: np.ndarray, context: np.ndarray, params: Any, *, heads: int) -> np.ndarray:
    """One head at a time, over the rows of `context`."""
    q, k, v = (
        dense(of, params[f"{n}_proj"]) for n, of in zip("qkv", (x, context, context), strict=True)
    )
    size, parts = q.shape[-1] // heads, []
    for n in range(heads):
        part = slice(n * size, (n + 1) * size)
        weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(size))
        parts.append(weights / weights.sum(-1, keepdims=True) @ v[:, part])
    return dense(np.concatenate(parts, -1), params["o_proj"])


def numpy_qformer(
    params: Any, queries: np.ndarray, context: np.ndarray, config: QFormerConfig
) -> list[np.ndarray]:
    """One picture; returns the normalised queries and the queries after every layer."""
    eps, heads = config.norm_eps, config.num_heads
    states = [layer_norm(queries, params["norm"], eps)]
    for i in range(config.num_layers):
        x, layer = states[-1], params["layer"][str(i)]
        y = x + attention(x, x, layer["attention"], heads=heads)
        x = layer_norm(y, layer["attention_norm"], eps)
        if i % 2 == 0:
            y = x + attention(x, context, layer["cross_attention"], heads=heads)
            x = layer_norm(y, layer["cross_attention_norm"], eps)
        y = dense(x, layer["mlp"]["fc1"])
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        y = x + dense(y, layer["mlp"]["fc2"])
        states.append(layer_norm(y, layer["mlp_norm"], eps))
    return states


@pytest.fixture(scope="module")
def params(draw_params: Any) -> Any:
    """`query_tokens`, and `qformer` as the module names it."""
    queries, image = jnp.zeros((1, CONFIG.num_queries, CONFIG.width)), jnp.zeros((1, TOKENS, WIDTH))
    module = QFormer(CONFIG, jnp.float32)
    abstract = jax.eval_shape(
        lambda key: module.init(key, queries, image, image_mask=None)["params"], jax.random.key(0)
    )
    leaf = jax.ShapeDtypeStruct(queries.shape, jnp.float32)
    return draw_params({"query_tokens": leaf, "qformer": abstract})


@pytest.fixture(scope="module")
def image_tokens() -> np.ndarray:
    return RNG.normal(size=(3, TOKENS, WIDTH)).astype(np.float32)


def run(
    params: Any, image_tokens: Any, mask: Any = None, *, config: QFormerConfig = CONFIG
) -> tuple[np.ndarray, np.ndarray]:
    module = QFormer(config, jnp.float32)
    image_mask = None if mask is None else jnp.asarray(mask)
    output, states = jax.jit(module.apply)(
        {"params": params["qformer"]},
        params["query_tokens"],
        jnp.asarray(image_tokens),
        image_mask=image_mask,
    )
    return np.asarray(output), np.asarray(states)


def test_every_layer_equals_the_numpy_qformer(params: Any, image_tokens: np.ndarray) -> None:
    output, states = run(params, image_tokens)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    for number, tokens in enumerate(image_tokens.astype(np.float64)):
        expected = numpy_qformer(wide["qformer"], wide["query_tokens"][0], tokens, CONFIG)
        np.testing.assert_allclose(states[:, number], np.stack(expected), rtol=0, atol=2e-5)
    np.testing.assert_array_equal(output, states[-1])


def test_masked_tokens_are_as_good_as_not_there(params: Any, image_tokens: np.ndarray) -> None:
    mask = np.ones((3, TOKENS), bool)
    mask[:, [2, 5]] = False
    masked, _ = run(params, image_tokens, mask)
    np.testing.assert_allclose(masked, run(params, image_tokens[:, mask[0]])[0], rtol=0, atol=1e-5)
    everything, _ = run(params, image_tokens)
    np.testing.assert_array_equal(run(params, image_tokens, np.ones_like(mask))[0], everything)
    assert (np.abs(masked - everything).max(-1) > 1e-3).all()


def test_pictures_of_a_batch_do_not_see_each_other(params: Any, image_tokens: np.ndarray) -> None:
    together, _ = run(params, image_tokens)
    mask = np.ones((3, TOKENS), bool)
    mask[0, :4] = False  # nor does a mask of one picture reach another
    partly, _ = run(params, image_tokens, mask)
    for number in range(3):
        alone, _ = run(params, image_tokens[number : number + 1])
        np.testing.assert_allclose(together[number], alone[0], rtol=0, atol=1e-5)
        equal = np.allclose(partly[number], alone[0], rtol=0, atol=1e-5)
        assert equal == (number != 0)


def test_the_order_of_image_tokens_does_not_matter_and_that_of_queries_moves_the_outputs(
    params: Any, image_tokens: np.ndarray
) -> None:
    # There are no position embeddings: what tells a patch's place is in its token, what tells a query is its own.
    output, _ = run(params, image_tokens)
    np.testing.assert_allclose(run(params, image_tokens[:, ::-1])[0], output, rtol=0, atol=1e-5)
    turned = {**params, "query_tokens": params["query_tokens"][:, ::-1]}
    np.testing.assert_allclose(run(turned, image_tokens)[0], output[:, ::-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_cross_attention_is_in_every_nth_layer_from_the_first(every: int) -> None:
    config = dataclasses.replace(CONFIG, cross_attention_every=every)
    module = QFormer(config, jnp.float32)
    queries, image = jnp.zeros((1, config.num_queries, config.width)), jnp.zeros((1, TOKENS, WIDTH))
    layers = jax.eval_shape(
        lambda key: module.init(key, queries, image, image_mask=None), jax.random.key(0)
    )["params"]["layer"]
    assert len(layers) == config.num_layers
    with_cross = [i for i in range(config.num_layers) if "cross_attention" in layers[str(i)]]
    assert with_cross == list(range(0, config.num_layers, every))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_queries": 0}, "QFormerConfig.num_queries is 0; expected a number above 0"),
        ({"norm_eps": 0.0}, "QFormerConfig.norm_eps is 0.0"),
        ({"cross_attention_every": 0}, "cross_attention_every is 0"),
        ({"num_heads": 5}, "width 24 is not a multiple of num_heads 5"),
    ],
)
def test_sizes_that_make_no_qformer_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dataclasses.replace(CONFIG, **change)
