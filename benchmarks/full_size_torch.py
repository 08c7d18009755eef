"""The PyTorch side on a GPU host: `transformers` with random weights of the 7B shape, as its users run it.

    python benchmarks/full_size_torch.py --rows torch_7b_compiled_b1 ...      # what `inference.py` starts

`generate` itself, greedy, in bfloat16: eager with the dynamic cache, and with its static cache, which it compiles by
itself on a GPU (CUDA graphs). A process of its own has the memory to itself; imports no JAX.
"""

from __future__ import annotations

import statistics
import time
import warnings
from typing import Any

import parts
import torch
import transformers
from torch._dynamo.utils import counters

from minigpt4_jax.presets import get_preset

KINDS = {"eager": None, "compiled": "static"}
"""Name in the rows -> `cache_implementation`."""
REPEATS = 5
SIZES = {
    "full": {"preset": "vicuna-7b", "dtype": torch.bfloat16, "context": 512, "steps": 64, "b1": 1, "b8": 8, "b64": 64},
    "tiny": {"preset": "tiny", "dtype": torch.float32, "context": 64, "steps": 4, "b1": 1, "b8": 2, "b64": 3},
}  # fmt: skip
"""The same as in `inference_gpu.py`, which this process cannot import."""


class Clock(transformers.generation.streamers.BaseStreamer):
    """Notes when `generate` hands out the prompt, and then every step's tokens."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with tokens on the host."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to show."""


def make_llama(preset: str, *, dtype: torch.dtype, device: str) -> Any:
    """A model with random weights, made on the device; it never stops by itself."""
    cfg = get_preset(preset).model.llama
    settings = transformers.LlamaConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.width, intermediate_size=cfg.mlp_width,
        num_hidden_layers=cfg.num_layers, num_attention_heads=cfg.num_heads, head_dim=cfg.head_dim,
        num_key_value_heads=cfg.num_kv_heads, max_position_embeddings=cfg.max_positions,
        rms_norm_eps=cfg.norm_eps, tie_word_embeddings=cfg.tie_embeddings,
        eos_token_id=None, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return transformers.LlamaForCausalLM(settings).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def decode_row(model: Any, *, kind: str, batch: int, context: int, steps: int) -> dict[str, Any]:
    """Time of a step, over the last `steps` before a full context."""
    tokens = steps + 8
    vocabulary = model.config.vocab_size
    counters.clear()
    times = []
    for _ in range(2 + REPEATS):  # the first compiles, the second records the graphs
        ids = torch.randint(3, vocabulary, (batch, context - tokens), device=model.device)
        clock = Clock()
        model.generate(
            ids, do_sample=False, max_new_tokens=tokens, streamer=clock, cache_implementation=KINDS[kind],
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        times.append((clock.times[-1] - clock.times[-1 - steps]) / steps)
    times = times[2:]
    step_s = statistics.median(times)
    return {
        "what": f"transformers {kind}, decode, 7B bf16, batch {batch}, context {context}: tokens per s",
        "tokens_per_s": round(batch / step_s, 2),
        "ms": round(1000 * step_s, 4),
        "ms_of_repeats": [round(1000 * min(times), 4), round(1000 * max(times), 4)],
        "compiled_graphs": counters["stats"]["unique_graphs"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    """Measures the rows that are named and prints them, one line each."""
    args = parts.read_part_arguments(__doc__.split("\n\n")[0], rows=None, sizes=list(SIZES))
    warnings.filterwarnings("ignore", module="transformers|torch")
    sizes, end = SIZES[args.sizes], time.monotonic() + args.budget_s
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_llama(sizes["preset"], dtype=sizes["dtype"], device=device)
    for name in args.rows:
        _, _, kind, batch = name.split("_")
        if time.monotonic() > end:
            print(f"{name}: left out, no time is left.", flush=True)
            continue
        start = time.monotonic()
        try:
            row = decode_row(
                model, kind=kind, batch=sizes[batch], context=sizes["context"], steps=sizes["steps"]
            )
        except (
            Exception
        ) as error:  # out of memory, say: the rows behind it are measured all the same
            row = {"what": name, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        row["took_s"] = round(time.monotonic() - start, 1)
        parts.print_row(name, row)


if __name__ == "__main__":
    main()
