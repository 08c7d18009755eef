"""The language model against Hugging Face's of the original: logits, hidden states, padding and losses.

Positions where the mask is 0 are not compared: the sets' README calls them undefined (transformers 4.30 and 4.31
differ there). Tolerances are those of the README. It has none for hidden states: they get that of the ViT's blocks,
which have their size (measured here: 7e-6).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from minigpt4_jax.models.attention import make_causal_mask
from minigpt4_jax.models.layout import DECODE, DISK, TRAIN, Layout, convert_layout
from minigpt4_jax.models.minigpt4 import apply_method, make_model, make_positions
from minigpt4_jax.training.loss import cross_entropy

HIDDEN: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}
LOGITS: dict[str, Any] = {"atol": 3e-4, "rtol": 1e-4}
LOSS: dict[str, Any] = {"atol": 5e-5, "rtol": 0.0}
IGNORED = -100
"""The label that torch's cross-entropy leaves out."""


def run(
    golden: Any,
    folder: str,
    token_ids: np.ndarray,
    *,
    attention_mask: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    layout: Layout = DISK,
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits, and the hidden states in the order of the sets: embedding, layers, the last one after the final norm."""
    config, params = golden.llama(folder)
    params = convert_layout(params, DISK, layout, llama=config.llama)
    model = make_model(config, layout=layout, dtype=jnp.float32)
    counts = np.ones(token_ids.shape, bool) if attention_mask is None else attention_mask == 1
    if positions is None:
        positions = np.broadcast_to(np.arange(token_ids.shape[1]), token_ids.shape)
    embeds = apply_method(model, params, "embed_prompt", jnp.asarray(token_ids, jnp.int32), None)
    hidden, _, states = apply_method(
        model,
        params,
        "decode",
        embeds,
        positions=jnp.asarray(positions, jnp.int32),
        mask=make_causal_mask(jnp.asarray(counts)),
        caches=None,
    )
    logits = apply_method(model, params, "head", hidden)
    return np.asarray(logits), [np.asarray(x) for x in (embeds, *states[:-1], hidden)]


@pytest.mark.parametrize("layout", [DISK, TRAIN, DECODE], ids=["disk", "train", "decode"])
def test_golden_llama_logits_and_hidden_states(
    golden: Any, llama_folder: str, layout: Layout
) -> None:
    held = golden.arrays(f"{llama_folder}/forward.npz")
    logits, hidden = run(golden, llama_folder, held["input_ids"], layout=layout)
    assert len(hidden) == len(held["hidden_states"])
    for number, (ours, theirs) in enumerate(zip(hidden, held["hidden_states"], strict=True)):
        np.testing.assert_allclose(ours, theirs, **HIDDEN, err_msg=f"hidden state {number}")
    np.testing.assert_allclose(logits, held["logits"], **LOGITS)


def test_golden_llama_padded_logits(golden: Any, padded_case: tuple[str, str]) -> None:
    folder, name = padded_case
    held = golden.arrays(f"{folder}/forward.npz")
    side, _, kind = name.partition("_logits")
    mask = held[f"{side}_attention_mask"]
    positions = None
    if kind == "_cumsum_positions":
        positions = held[f"{side}_position_ids_cumsum"]
        ours = np.asarray(make_positions(jnp.asarray(mask == 1)))
        np.testing.assert_array_equal(ours[mask == 1], positions[mask == 1])
    logits, _ = run(
        golden, folder, held[f"{side}_input_ids"], attention_mask=mask, positions=positions
    )
    np.testing.assert_allclose(logits[mask == 1], held[name][mask == 1], **LOGITS)


def test_golden_llama_losses(golden: Any, llama_folder: str) -> None:
    held = golden.arrays(f"{llama_folder}/forward.npz")
    logits = jnp.asarray(run(golden, llama_folder, held["input_ids"])[0])[:, :-1]
    targets = jnp.asarray(held["labels"][:, 1:], jnp.int32)
    counts = targets != IGNORED
    mean = cross_entropy(logits, targets, counts)
    np.testing.assert_allclose(mean, held["loss_mean"], **LOSS)
    # reduction="none" of the original: a row's sum over ALL its T - 1 places, the ignored ones as zeros.
    rows = [
        cross_entropy(logits[i : i + 1], targets[i : i + 1], counts[i : i + 1]) * counts[i].mean()
        for i in range(len(targets))
    ]
    np.testing.assert_allclose(rows, held["loss_none"], **LOSS)
