"""models/minigpt4.py: pictures land in their slots and nowhere else; `forward` is the whole model as one function."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.checkpoint import leaf_names
from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.minigpt4 import (
    HIDDEN,
    Batch,
    MiniGPT4,
    abstract_params,
    forward,
    hidden_names,
    make_model,
    make_positions,
)

X = IMAGE_TOKEN_ID


@pytest.fixture(scope="module")
def model(any_config: ModelConfig) -> MiniGPT4:
    return make_model(any_config, layout=DISK, dtype=jnp.float32)


def embed(model: MiniGPT4, params: Any, token_ids: Any, image_embeds: Any) -> np.ndarray:
    return np.asarray(
        model.apply(
            {"params": params}, jnp.asarray(token_ids, jnp.int32), image_embeds, method="embed_prompt"
        )
    )  # fmt: skip


def image_rows(model: MiniGPT4, batch: int, rows: int) -> jax.Array:
    """Row `r` of sample `b` is filled with `100 * (b + 1) + r`."""
    values = 100.0 * (1 + np.arange(batch)[:, None]) + np.arange(rows)[None]
    filled = np.repeat(values[:, :, None], model.config.llama.width, axis=2)
    return jnp.asarray(filled, jnp.float32)


def test_slots_take_the_rows_in_order_and_text_keeps_its_embedding(
    model: MiniGPT4, any_params: Any
) -> None:
    # Two pictures of two tokens in the first row, in one run and apart in the second; one picture in the third.
    token_ids = [[5, X, X, 6, X, X, 7], [X, 5, X, X, X, 6, 7], [5, 6, 7, 8, 9, X, X]]
    found = embed(model, any_params, token_ids, image_rows(model, 3, 4))
    embedding = np.asarray(any_params["llama"]["embed_tokens"]["embedding"])
    for row, ids in enumerate(token_ids):
        rank = 0
        for place, token in enumerate(ids):
            if token == X:
                np.testing.assert_array_equal(found[row, place], 100.0 * (row + 1) + rank)
                rank += 1
            else:
                np.testing.assert_array_equal(found[row, place], embedding[token])


def test_every_text_id_keeps_its_own_embedding(model: MiniGPT4, any_params: Any) -> None:
    # The placeholder is below zero, where no vocabulary has an id: id 0 and the last id are text like any other.
    vocab = model.config.llama.vocab_size
    found = embed(model, any_params, np.arange(vocab)[None], image_rows(model, 1, 4))
    np.testing.assert_array_equal(found[0], any_params["llama"]["embed_tokens"]["embedding"])
    assert not 0 <= IMAGE_TOKEN_ID < vocab


def test_prompts_of_one_length_compile_once_however_many_pictures_they_show(
    model: MiniGPT4, any_params: Any
) -> None:
    traces = 0

    @jax.jit
    def run(token_ids: jax.Array, rows: jax.Array) -> jax.Array:
        nonlocal traces
        traces += 1
        return model.apply({"params": any_params}, token_ids, rows, method="embed_prompt")

    rows = image_rows(model, 1, 4)
    for ids in ([X, X, X, X, 1, 2], [1, X, X, 2, X, X], [1, 2, 3, 4, 5, 6]):
        np.testing.assert_array_equal(
            run(jnp.asarray([ids]), rows), embed(model, any_params, [ids], rows)
        )
    assert traces == 1


def test_a_prompt_without_pictures_needs_no_rows(model: MiniGPT4, any_params: Any) -> None:
    with_rows = embed(model, any_params, [[1, 2, 3]], image_rows(model, 1, 4))
    np.testing.assert_array_equal(embed(model, any_params, [[1, 2, 3]], None), with_rows)


def test_neighbouring_patches_are_joined_in_raster_order_and_query_outputs_stay_alone(
    model: MiniGPT4, any_params: Any, any_config: ModelConfig
) -> None:
    patches = np.random.default_rng(7).normal(size=(2, *any_config.feature_shape))
    proj = jax.tree.map(np.asarray, any_params["llama_proj"])
    group = 1 if any_config.patches_per_token is None else any_config.patches_per_token
    found = model.apply(
        {"params": {"llama_proj": proj}}, jnp.asarray(patches, jnp.float32), method="project"
    )
    assert found.shape == (2, any_config.num_image_tokens, any_config.llama.width)
    for token in range(any_config.num_image_tokens):
        joined = np.concatenate([patches[:, token * group + i] for i in range(group)], axis=-1)
        expected = joined @ proj["kernel"] + proj["bias"]
        np.testing.assert_allclose(found[:, token], expected, rtol=0, atol=1e-5)


def test_the_class_token_is_normalised_with_the_rest_and_kept_for_the_qformer_alone(
    model: MiniGPT4, any_params: Any, any_config: ModelConfig
) -> None:
    size = any_config.vit.image_size
    images = jnp.asarray(np.random.default_rng(8).normal(size=(1, size, size, 3)), jnp.float32)
    variables = {"params": any_params}
    features, states = model.apply(variables, images, method="encode_vision")
    tokens = states["ln_vision"]
    last = np.asarray(states["vit.blocks"][-1], np.float64)
    centred = last - last.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + any_config.ln_vision_eps)
    norm = jax.tree.map(np.asarray, any_params["ln_vision"])
    expected = normed * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(tokens, expected, rtol=0, atol=1e-5)
    assert features.shape[1:] == any_config.feature_shape
    if any_config.qformer is None:
        np.testing.assert_array_equal(features, tokens[:, 1:])
    else:
        asked, queries = model.apply(variables, tokens, image_mask=None, method="query")
        np.testing.assert_array_equal(features, asked)
        np.testing.assert_array_equal(states["qformer.layer"], queries)
        mask = jnp.ones(tokens.shape[:2], bool).at[:, 0].set(False)
        without, _ = model.apply(variables, tokens, image_mask=mask, method="query")
        assert (np.abs(features - without).max((0, 2)) > 1e-3).all()  # every query sees it
    np.testing.assert_array_equal(
        model.apply(variables, images, method="encode_images"),
        model.apply(variables, features, method="project"),
    )


def test_features_of_several_pictures_in_one_row_become_their_tokens_in_order(
    model: MiniGPT4, any_params: Any, any_config: ModelConfig
) -> None:
    features = np.random.default_rng(7).normal(size=(3, *any_config.feature_shape))
    rows, width = jnp.asarray(features, jnp.float32), any_config.feature_shape[1]
    params = {"params": {"llama_proj": any_params["llama_proj"]}}
    apart = model.apply(params, rows, method="project")
    joined = model.apply(params, rows.reshape(1, -1, width), method="project")
    np.testing.assert_allclose(joined[0], apart.reshape(-1, apart.shape[-1]), rtol=0, atol=1e-5)


# --- forward ---


def make_batch(config: ModelConfig, *, seed: int = 9) -> Batch:
    """Two rows, two pictures each, text before, between and after them."""
    rng = np.random.default_rng(seed)
    slots, size = config.num_image_tokens, config.vit.image_size
    token_ids = rng.integers(0, config.llama.vocab_size, (2, 2 * slots + 9)).astype(np.int32)
    token_ids[:, 2 : 2 + slots] = X
    token_ids[:, 5 + slots : 5 + 2 * slots] = X
    return Batch(
        token_ids=jnp.asarray(token_ids),
        attention_mask=jnp.ones(token_ids.shape, bool),
        images=jnp.asarray(rng.normal(size=(2, 2, size, size, 3)), jnp.float32),
    )


@pytest.fixture(scope="module")
def run(model: MiniGPT4, any_params: Any) -> Any:
    compiled = jax.jit(
        lambda batch: forward(any_params, batch, model=model, capture=hidden_names(model.config))
    )

    def call(batch: Batch) -> SimpleNamespace:
        output = compiled(batch)
        hidden = {name: np.asarray(state) for name, state in output.hidden.items()}
        return SimpleNamespace(logits=np.asarray(output.logits), hidden=hidden)

    return call


def test_hidden_states_come_by_name_with_the_documented_shapes(
    run: Any, any_config: ModelConfig
) -> None:
    batch = make_batch(any_config)
    output = run(batch)
    vit, llama = any_config.vit, any_config.llama
    rows, length = batch.token_ids.shape
    sizes = {
        "L": llama.num_layers, "I": 4, "1+P": 1 + vit.num_patches, "C": vit.width, "D": llama.width,
        "T": any_config.num_image_tokens, "B": rows, "S": length,
    }  # fmt: skip
    assert vit.num_layers == llama.num_layers
    if (qformer := any_config.qformer) is not None:
        sizes |= {"1+L": 1 + qformer.num_layers, "Q": qformer.num_queries, "E": qformer.width}
    missing = {"qformer.layer"} if qformer is None else set()
    assert set(output.hidden) == set(HIDDEN) - missing
    for name in output.hidden:
        meaning = HIDDEN[name]
        letters = meaning[1 : meaning.index("]")].split(", ")
        assert output.hidden[name].shape == tuple(sizes[letter] for letter in letters), name
    assert output.logits.shape == (rows, length, llama.vocab_size)
    assert output.logits.dtype == np.float32


def test_hidden_states_are_the_ones_on_the_way_to_the_logits(
    run: Any, model: MiniGPT4, any_params: Any, any_config: ModelConfig
) -> None:
    batch = make_batch(any_config)
    output = run(batch)
    hidden = output.hidden
    embedding = np.asarray(any_params["llama"]["embed_tokens"]["embedding"])
    np.testing.assert_allclose(hidden["llama.norm"] @ embedding.T, output.logits, rtol=0, atol=1e-4)
    slots = np.asarray(batch.token_ids) == X
    pictures = hidden["image_embeds"].reshape(2, -1, any_config.llama.width)
    np.testing.assert_array_equal(hidden["inputs_embeds"][slots], pictures.reshape(-1, 32))
    np.testing.assert_array_equal(
        hidden["inputs_embeds"][~slots], embedding[np.asarray(batch.token_ids)[~slots]]
    )
    queries = hidden.get("qformer.layer")
    features = hidden["ln_vision"][:, 1:] if queries is None else queries[-1]
    projected = model.apply({"params": any_params}, jnp.asarray(features), method="project")
    np.testing.assert_allclose(projected, hidden["image_embeds"], rtol=0, atol=1e-5)


def test_an_unknown_name_is_refused_with_the_known_ones(
    model: MiniGPT4, any_params: Any, any_config: ModelConfig
) -> None:
    with pytest.raises(ValueError, match=r"\['nonsense'\]; expected any of \['image_embeds'"):
        forward(
            any_params,
            make_batch(any_config),
            model=model,
            capture=("llama.norm", "nonsense"),
        )


def test_nothing_is_captured_unless_asked_for(
    model: MiniGPT4, any_params: Any, any_config: ModelConfig
) -> None:
    captured: list[dict[str, Any]] = []

    def run(batch: Batch) -> jax.Array:
        output = forward(any_params, batch, model=model)
        captured.append(output.hidden)
        return output.logits

    jax.eval_shape(run, make_batch(any_config))
    assert captured == [{}]


@pytest.mark.parametrize("picture", [0, 1])
def test_a_changed_picture_changes_nothing_before_its_first_slot(
    picture: int, run: Any, any_config: ModelConfig
) -> None:
    batch = make_batch(any_config)
    before = run(batch).logits
    changed = batch.replace(images=batch.images.at[0, picture].add(0.5))
    after = run(changed).logits
    slots = any_config.num_image_tokens
    first = 2 if picture == 0 else 5 + slots
    np.testing.assert_array_equal(after[0, :first], before[0, :first])
    assert (np.abs(after[0, first:] - before[0, first:]).max(-1) > 1e-3).all()
    np.testing.assert_array_equal(after[1], before[1])


def test_a_token_changes_nothing_before_it(run: Any, any_config: ModelConfig) -> None:
    batch = make_batch(any_config)
    before = run(batch).logits
    place = batch.token_ids.shape[1] - 2
    after = run(batch.replace(token_ids=batch.token_ids.at[0, place].add(-1))).logits
    np.testing.assert_array_equal(after[0, :place], before[0, :place])
    assert np.abs(after[0, place] - before[0, place]).max() > 1e-3


def test_left_padding_right_padding_and_none_agree(run: Any, any_config: ModelConfig) -> None:
    batch = make_batch(any_config)
    plain = run(batch).logits
    length, pad = batch.token_ids.shape[1], 6
    for left in (0, pad):
        widths = ((0, 0), (left, pad - left))
        padded = batch.replace(
            # Real-looking ids in the padding: what stands there must not matter.
            token_ids=jnp.pad(batch.token_ids, widths, constant_values=3),
            attention_mask=jnp.pad(batch.attention_mask, widths),
        )
        found = run(padded).logits[:, left : left + length]
        np.testing.assert_allclose(found, plain, rtol=0, atol=2e-5)


def test_rows_of_a_batch_do_not_see_each_other(run: Any, any_config: ModelConfig) -> None:
    batch = make_batch(any_config)
    together = run(batch).logits
    for row in range(2):
        alone = run(jax.tree.map(lambda leaf: leaf[row : row + 1], batch)).logits  # noqa: B023
        np.testing.assert_allclose(alone[0], together[row], rtol=0, atol=2e-5)


def test_rows_with_fewer_pictures_ignore_the_padding_pictures(
    run: Any, any_config: ModelConfig
) -> None:
    batch = make_batch(any_config)
    slots = any_config.num_image_tokens
    # Row 0 shows one picture; its second place holds anything.
    token_ids = batch.token_ids.at[0, 5 + slots : 5 + 2 * slots].set(7)
    batch = batch.replace(token_ids=token_ids)
    before = run(batch).logits
    after = run(batch.replace(images=batch.images.at[0, 1].set(1e3))).logits
    np.testing.assert_array_equal(after, before)


def test_positions_count_real_tokens_only() -> None:
    mask = jnp.asarray([[False, False, True, True], [True, True, True, False]])
    np.testing.assert_array_equal(make_positions(mask), [[0, 0, 0, 1], [0, 1, 2, 2]])


# --- the parameter tree ---

TREE = """
vit/cls_token vit/pos_embed vit/patch_embed/kernel vit/patch_embed/bias
vit/blocks/{v}/norm1/scale vit/blocks/{v}/norm1/bias vit/blocks/{v}/norm2/scale vit/blocks/{v}/norm2/bias
vit/blocks/{v}/attn/q_proj/kernel vit/blocks/{v}/attn/q_proj/bias vit/blocks/{v}/attn/k_proj/kernel
vit/blocks/{v}/attn/v_proj/kernel vit/blocks/{v}/attn/v_proj/bias
vit/blocks/{v}/attn/o_proj/kernel vit/blocks/{v}/attn/o_proj/bias
vit/blocks/{v}/mlp/fc1/kernel vit/blocks/{v}/mlp/fc1/bias vit/blocks/{v}/mlp/fc2/kernel vit/blocks/{v}/mlp/fc2/bias
ln_vision/scale ln_vision/bias llama_proj/kernel llama_proj/bias
llama/embed_tokens/embedding llama/norm/scale
llama/layers/{l}/input_layernorm/scale llama/layers/{l}/post_attention_layernorm/scale
llama/layers/{l}/self_attn/q_proj/kernel llama/layers/{l}/self_attn/k_proj/kernel
llama/layers/{l}/self_attn/v_proj/kernel llama/layers/{l}/self_attn/o_proj/kernel
llama/layers/{l}/mlp/gate_proj/kernel llama/layers/{l}/mlp/up_proj/kernel llama/layers/{l}/mlp/down_proj/kernel
"""
QFORMER_TREE = """
query_tokens qformer/norm/scale qformer/norm/bias
qformer/layer/{q}/attention/{p}_proj/kernel qformer/layer/{q}/attention/{p}_proj/bias
qformer/layer/{q}/attention_norm/scale qformer/layer/{q}/attention_norm/bias
qformer/layer/{c}/cross_attention/{p}_proj/kernel qformer/layer/{c}/cross_attention/{p}_proj/bias
qformer/layer/{c}/cross_attention_norm/scale qformer/layer/{c}/cross_attention_norm/bias
qformer/layer/{q}/mlp/fc1/kernel qformer/layer/{q}/mlp/fc1/bias qformer/layer/{q}/mlp/fc2/kernel
qformer/layer/{q}/mlp/fc2/bias qformer/layer/{q}/mlp_norm/scale qformer/layer/{q}/mlp_norm/bias
"""
"""`c`: the layers with cross-attention, 0 and 2 of `tiny-qformer`'s three."""


def expected_names(config: ModelConfig) -> set[str]:
    names = {
        name.format(v=v, l=layer)
        for name in TREE.split()
        for v in range(config.vit.num_layers)
        for layer in range(config.llama.num_layers)
    }
    if config.qformer is None:
        return names
    return names | {
        name.format(q=q, c=c, p=p)
        for name in QFORMER_TREE.split()
        for q in (0, 1, 2)
        for c in (0, 2)
        for p in "qkvo"
    }


@pytest.mark.parametrize("tied", [True, False])
def test_the_parameter_tree_has_exactly_the_agreed_names(
    tied: bool, any_config: ModelConfig
) -> None:
    llama = dataclasses.replace(any_config.llama, tie_embeddings=tied)
    config = dataclasses.replace(any_config, llama=llama)
    names = leaf_names(abstract_params(config))
    head = set() if tied else {"llama/lm_head/kernel"}
    assert set(names) == expected_names(config) | head
    assert {leaf.dtype for leaf in names.values()} == {jnp.dtype("float32")}
    assert names["vit/patch_embed/kernel"].shape == (7, 7, 3, 32)
    assert names["llama_proj/kernel"].shape == (4 * 32 if config.qformer is None else 24, 32)
