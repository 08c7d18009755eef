"""What the quantised forms of the language model cost in quality: `smol` with its real weights, against float32.

    python benchmarks/quantised.py --out benchmarks/results/quantised.json

Not for speed. Every form reads the same ids through a KV cache, as the engine does. The text, `quantised_text.txt`, was
written for this benchmark and lies under the licence of the repository. Measured are

- the perplexity of the text, in windows of 512 tokens (the first token of a window is not predicted);
- the largest and the mean absolute difference of the logits from those of float32 over that text;
- over 32 passages of the text and the 64 tokens with which float32 continues each of them greedily: how often a form
  puts the same token first when it is given float32's tokens before it ("top 1"), and the share of tokens up to the
  first one where it does not ("until the first difference"). Up to there its own greedy answer is float32's.

The original runs its language model in 8 bits through bitsandbytes, on GPUs only; it is no row here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.config import ModelConfig
from minigpt4_jax.loading import load_frozen
from minigpt4_jax.models.attention import make_cache_mask
from minigpt4_jax.models.kv_cache import init_cache
from minigpt4_jax.models.layout import DECODE, DECODE_INT8, DISK, Layout, convert_layout
from minigpt4_jax.models.minigpt4 import MiniGPT4, Params, apply_method, make_model
from minigpt4_jax.presets import PRESETS

TEXT = Path(__file__).with_name("quantised_text.txt")


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to keep and to run the language model."""

    name: str
    layout: Layout
    dtype: Any
    """Of whatever is not int8, and of the computation."""
    cache: Any


FORMS = (
    Form("float32", DECODE, jnp.float32, jnp.float32),
    Form("bfloat16", DECODE, jnp.bfloat16, jnp.bfloat16),
    Form("int8 weights", DECODE_INT8, jnp.float32, jnp.float32),
    Form("int8 KV", DECODE, jnp.float32, jnp.int8),
    Form("int8 weights + int8 KV", DECODE_INT8, jnp.float32, jnp.int8),
    Form("bfloat16 + int8 weights + int8 KV", DECODE_INT8, jnp.bfloat16, jnp.int8),
)
"""The first is what the others are compared with; the last is what an accelerator runs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is read, in tokens."""

    window: int
    prompts: int
    prompt_length: int
    new_tokens: int


REAL = Sizes(window=512, prompts=32, prompt_length=64, new_tokens=64)


def read(
    params: Params, caches: Any, ids: jax.Array, start: jax.Array, *, model: MiniGPT4, length: int
) -> tuple[jax.Array, Any]:
    """Logits `[B, S, V]` behind each of `ids` `[B, S]`, which stand at `start` in the caches, and the caches."""
    positions = start + jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    embeds = apply_method(model, params, "embed_prompt", ids, None)
    hidden, caches, _ = apply_method(
        model,
        params,
        "decode",
        embeds,
        positions=positions,
        mask=make_cache_mask(positions, length),
        caches=caches,
    )
    return apply_method(model, params, "head", hidden), caches


class Reader:
    """One form of the model, over rows of ids of one length."""

    def __init__(self, params: Params, form: Form, config: ModelConfig) -> None:
        """`params` has the language model in the `DISK` layout, as `{"llama": ...}`."""
        converted = convert_layout(params, DISK, form.layout, llama=config.llama)
        if not form.layout.int8:  # its scales stay float32
            converted = jax.tree.map(lambda leaf: jnp.asarray(leaf, form.dtype), converted)
        self.params = jax.tree.map(jnp.asarray, converted)
        self._form, self._llama = form, config.llama
        self._model = make_model(config, layout=form.layout, dtype=form.dtype)
        self._read = jax.jit(read, static_argnames=("model", "length"), donate_argnums=1)

    @property
    def megabytes(self) -> float:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.params)) / 1e6

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """float32 `[B, S, V]` for int32 `[B, S]`, read at once."""
        return np.asarray(self._step(self._caches(ids), ids, start=0, length=ids.shape[1])[0])

    def greedy(self, prompts: np.ndarray, new_tokens: int) -> np.ndarray:
        """The next `new_tokens` ids `[B, N]` of each prompt `[B, S]`, read token by token behind the prompt."""
        prompt_length = prompts.shape[1]
        length = prompt_length + new_tokens
        caches = self._caches(np.zeros((len(prompts), length)))
        logits, caches = self._step(caches, prompts, start=0, length=length)
        tokens = [np.asarray(logits[:, -1:].argmax(-1))]
        for step in range(new_tokens - 1):
            logits, caches = self._step(
                caches, tokens[-1], start=prompt_length + step, length=length
            )
            tokens.append(np.asarray(logits.argmax(-1)))
        return np.concatenate(tokens, axis=1)

    def _caches(self, ids: np.ndarray) -> Any:
        # One place more than is read: see Engine.
        rows, length = ids.shape
        return init_cache(self._llama, rows, capacity=length + 1, dtype=self._form.cache)

    def _step(self, caches: Any, ids: np.ndarray, *, start: int, length: int) -> Any:
        ids = jnp.asarray(ids, jnp.int32)
        return self._read(
            self.params, caches, ids, jnp.asarray(start), model=self._model, length=length
        )


def negative_log_likelihoods(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Of every token of a row but the first, in float64 nats: `[B, S - 1]`."""
    before = logits[:, :-1].astype(np.float64)
    top = before.max(-1, keepdims=True)
    total = np.log(np.exp(before - top).sum(-1)) + top[..., 0]
    return total - np.take_along_axis(before, ids[:, 1:, None], axis=-1)[..., 0]


def agreement(found: np.ndarray, expected: np.ndarray) -> tuple[float, float]:
    """Shares of equal ids in `[N, A]`: of all, and of those before the first difference of their row."""
    equal = found == expected
    return float(equal.mean()), float(np.logical_and.accumulate(equal, axis=1).mean())


def measure(
    params: Params,
    config: ModelConfig,
    ids: Sequence[int],
    *,
    sizes: Sizes,
    forms: Sequence[Form] = FORMS,
) -> Iterator[dict[str, Any]]:
    """One row per form, the first of which is the reference.

    Args:
        params: the language model in the `DISK` layout, as `{"llama": ...}`, float32.
        ids: of the text; the tokens behind the last whole window are passages for prompts only.
    """
    text = np.asarray(ids, np.int32)
    windows = text[: len(text) // sizes.window * sizes.window].reshape(-1, 1, sizes.window)
    starts = np.linspace(0, len(text) - sizes.prompt_length, sizes.prompts).astype(int)
    prompts = np.stack([text[start : start + sizes.prompt_length] for start in starts])
    reference: list[np.ndarray] = []
    answers = np.zeros((0, 0), np.int32)
    for form in forms:
        reader = Reader(params, form, config)
        if form is forms[0]:
            answers = reader.greedy(prompts, sizes.new_tokens)
        losses, largest, total, count = [], 0.0, 0.0, 0
        for number, window in enumerate(windows):
            logits = reader.logits(window)
            if form is forms[0]:
                reference.append(logits)
            error = np.abs(logits - reference[number])
            largest, total = max(largest, float(error.max())), total + float(error.sum(dtype=float))
            count += error.size
            losses.append(negative_log_likelihoods(logits, window))
        whole = np.concatenate([prompts, answers], axis=1)[:, :-1]
        chosen = [  # few rows at a time: the logits of all of them would be gigabytes
            reader.logits(rows)[:, sizes.prompt_length - 1 :].argmax(-1)
            for rows in np.array_split(whole, max(1, sizes.prompts // 4))
        ]
        top_1, until = agreement(np.concatenate(chosen), answers)
        yield {
            "form": form.name,
            "weights_mb": round(reader.megabytes, 3),
            "perplexity": float(np.exp(np.mean(losses))),
            "top_1": top_1,
            "until_first_difference": until,
            "logit_error_max": largest,
            "logit_error_mean": total / count,
        }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| form | weights, MB | perplexity | top 1 | until the first difference | largest logit error | mean |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['form']} | {row['weights_mb']:.0f} | {row['perplexity']:.3f} | {row['top_1']:.1%} "
        f"| {row['until_first_difference']:.1%} | {row['logit_error_max']:.3f} | {row['logit_error_mean']:.4f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs the benchmark; prints the table and writes the JSON after every row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: not written)")
    args = parser.parse_args()
    frozen, tokenizer = load_frozen("smol")
    ids = tokenizer.encode(TEXT.read_text())
    result: dict[str, Any] = {
        "model": "smol",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0].platform}",
        "jax": jax.__version__,
        "text_tokens": len(ids),
        **dataclasses.asdict(REAL),
        "rows": [],
    }
    config = PRESETS["smol"].model
    for row in measure({"llama": frozen["llama"]}, config, ids, sizes=REAL):
        result["rows"].append(row)
        print(row, flush=True)
        if args.out:
            beside = args.out.with_suffix(".new")
            beside.write_text(json.dumps(result, indent=1) + "\n")
            beside.replace(args.out)
    print(table(result["rows"]))


if __name__ == "__main__":
    main()
