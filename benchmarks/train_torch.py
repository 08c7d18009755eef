"""The PyTorch side of `train_gpu.py`: one step of the projection through a frozen `transformers` LLaMA.

    python benchmarks/train_torch.py --rows torch_stage1_7b_64 ...      # what `train.py` starts

As its users write it: bfloat16 weights without gradients, the projection in float32, `inputs_embeds`, the LM head on
the answer only, AdamW. From vision features; without checkpointing, so that it computes nothing twice. A process of its
own has the memory to itself; imports no JAX.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import full_size_torch
import parts
import torch
import transformers

from minigpt4_jax.presets import get_preset

REPEATS = 5
STEPS = {"full": 4, "tiny": 2}
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "7b": "vicuna-7b", "13b": "vicuna-13b", "dtype": torch.bfloat16,
        "stage1": (65, 32), "stage2": (224, 160), "64": 64, "12": 12,
    },
    "tiny": {
        "7b": "tiny-qformer", "13b": "tiny-qformer", "dtype": torch.float32,
        "stage1": (12, 4), "stage2": (20, 8), "64": 2, "12": 3,
    },
}  # fmt: skip
"""The same as in `train_gpu.py`, which this process cannot import."""


def make_step(
    preset: str, *, dtype: torch.dtype, device: str, rows: int, length: int, targets: int
) -> Callable[[], torch.Tensor]:
    """A call that takes one step and returns its loss, on the device."""
    config = get_preset(preset).model
    llama = full_size_torch.make_llama(preset, dtype=dtype, device=device)
    images, (places, _) = config.num_image_tokens, config.feature_shape
    project = torch.nn.Linear(config.projection_in, config.llama.width, device=device)
    adamw = torch.optim.AdamW(project.parameters(), lr=1e-6, fused=device == "cuda")
    features = torch.randn(rows, images, config.projection_in, device=device)
    assert images * config.projection_in == places * config.feature_shape[1]
    ids = torch.randint(3, config.llama.vocab_size, (rows, length), device=device)
    answer = ids[:, length - targets :]

    def step() -> torch.Tensor:
        with torch.no_grad():
            embeds = llama.model.embed_tokens(ids)
        joined = torch.cat(
            [embeds[:, :1], project(features).to(dtype), embeds[:, 1 + images :]], dim=1
        )
        hidden = llama.model(inputs_embeds=joined, use_cache=False).last_hidden_state
        logits = llama.lm_head(hidden[:, length - targets - 1 : -1]).float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answer.flatten())
        adamw.zero_grad(set_to_none=True)
        loss.backward()
        adamw.step()
        return loss.detach()

    return step


def train_row(name: str, sizes: dict[str, Any], *, steps: int) -> dict[str, Any]:
    """Steps one after the other, waiting for the last."""
    _, stage, model, batch = name.split("_")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (length, targets), rows = sizes[stage], sizes[batch]
    step = make_step(
        sizes[model], dtype=sizes["dtype"], device=device, rows=rows, length=length, targets=targets
    )
    times = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        for _ in range(steps):
            loss = step()
        if not float(loss) < float("inf"):
            raise FloatingPointError(f"the loss is {float(loss)}: nothing was measured")
        times.append((time.perf_counter() - start) / steps)
    step_s = statistics.median(times[1:])
    return {
        "what": f"transformers, {stage}, {model.upper()}, cached, {rows} x {length} tokens: samples per s",
        "samples_per_s": round(rows / step_s, 2),
        "ms": round(1000 * step_s, 3),
        "ms_of_repeats": [round(1000 * min(times[1:]), 3), round(1000 * max(times[1:]), 3)],
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Measures the rows that are named and prints them, one line each."""
    args = parts.read_part_arguments(__doc__.split("\n\n")[0], rows=None, sizes=list(SIZES))
    warnings.filterwarnings("ignore", module="transformers|torch")
    rows = {
        name: parts.Spec(
            part=name,
            seconds=30,
            script="train_torch.py",
            measure=lambda sizes, name=name: train_row(name, sizes, steps=STEPS[args.sizes]),
        )
        for name in args.rows
    }
    for name, row in parts.measure_rows(rows, args.rows, SIZES[args.sizes], budget_s=args.budget_s):
        parts.print_row(name, row)


if __name__ == "__main__":
    main()
