"""The Q-Former against the original's, layer by layer, with every image token and with some of them masked.

Tolerances are those of the sets' README, in float32 with full matmul precision (set in tests/conftest.py); the original
itself was measured against float64 at 1e-6, and the sets' own check at 4e-6.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from minigpt4_jax.models.layout import DISK
from minigpt4_jax.models.minigpt4 import apply_method, make_model

QFORMER: dict[str, Any] = {"atol": 5e-5, "rtol": 0.0}


def ask(golden: Any, file: str, *, masked: bool) -> tuple[np.ndarray, np.ndarray, Any]:
    """(query outputs, the queries before and after every layer, the file's arrays) of one case."""
    held = golden.arrays(f"qformer/{file}")
    model, conversion = golden.qformer()
    mask = jnp.asarray(held["image_mask"] == 1) if masked else None
    tokens = jnp.asarray(held["image_embeds"])
    module = make_model(model, layout=DISK, dtype=jnp.float32)
    output, states = apply_method(module, conversion.params, "query", tokens, image_mask=mask)
    return np.asarray(output), np.asarray(states), held


def test_golden_qformer_sizes_are_those_of_the_report(golden: Any, qformer_case: str) -> None:
    report = golden.report("qformer/qformer_report.json")
    model, conversion = golden.qformer()
    dims, config = report["dims"], model.qformer
    assert (config.num_layers, config.num_queries) == (dims["layers"], dims["nq"])
    assert (config.width, config.mlp_width) == (dims["hidden"], dims["inter"])
    assert model.vit.width == dims["encoder_width"]
    cross = [i for i in range(config.num_layers) if config.has_cross_attention(i)]
    assert cross == report["cross_attention_layers"]
    # What the original drops as well, and the one buffer that it takes.
    left_out = {name for name, _ in conversion.excused}
    buffers = {name for name in left_out if name.endswith(".position_ids")}
    assert left_out - buffers == set(report["ignored_keys"])


def test_golden_qformer_layers_and_output(golden: Any, qformer_case: str) -> None:
    output, states, held = ask(golden, qformer_case, masked=False)
    assert states.shape == held["hidden_states"].shape
    for number, state in enumerate(states):
        np.testing.assert_allclose(
            state, held["hidden_states"][number], **QFORMER, err_msg=f"state {number}"
        )
    np.testing.assert_allclose(output, held["query_output"], **QFORMER)


def test_golden_qformer_with_masked_image_tokens(golden: Any, qformer_case: str) -> None:
    output, _, held = ask(golden, qformer_case, masked=True)
    assert (held["image_mask"] == 0).any(), "nothing is masked; the test shows nothing"
    np.testing.assert_allclose(output, held["query_output_masked"], **QFORMER)
