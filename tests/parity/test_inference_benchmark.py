"""benchmarks/inference.py where it needs torch, at tiny size: every row of a CPU, and `transformers` as on a GPU."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from tests.benchmark_scripts import load_script

measuring = load_script("measuring")
load_script("smol_torch")
cpu = load_script("inference_cpu")
full_size_torch = load_script("full_size_torch")
gpu = load_script("inference_gpu")


@pytest.fixture(scope="module")
def bench(tiny_config: ModelConfig, draw_params: Any) -> Any:
    """Six questions of the tiny model, about a picture each. Its tower is made a little wider for `Dinov2Model`, whose
    mlp is a whole multiple of its width."""
    from minigpt4_jax.models.minigpt4 import abstract_params

    vit = dataclasses.replace(tiny_config.vit, mlp_width=2 * tiny_config.vit.width)
    config = dataclasses.replace(tiny_config, vit=vit)
    rng = np.random.default_rng(0)
    slots = [IMAGE_TOKEN_ID] * config.num_image_tokens
    size = config.vit.image_size
    return cpu.Bench(
        cpu.Work(
            config=config,
            params=draw_params(abstract_params(config)),
            images=rng.normal(size=(6, size, size, 3)).astype(np.float32),
            prompts=[[1, *slots, *rng.integers(3, 300, 3 + i).tolist()] for i in range(6)],
            text=rng.integers(3, 300, 200).tolist(),
            stop_tokens=tuple(range(20, 36)),
            max_new_tokens=12,
            context=96,
            prefill=(20, 40),
            decode_steps=3,
            said="random ids",
        )
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Beside other tests, torch's second thread mostly waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def few_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few settings of the captions, and nothing that compiles for a minute."""
    monkeypatch.setattr(cpu, "STEP_SETTINGS", cpu.CACHES)
    monkeypatch.setattr(cpu, "OUR_SLOTS", (4,))
    monkeypatch.setattr(cpu, "THEIR_BATCHES", (4,))


@pytest.mark.parametrize("name", [name for name in cpu.ROWS if name != "captions_64"])
def test_every_row_runs_at_tiny_size_and_both_sides_agree(bench: Any, name: str) -> None:
    row = dataclasses.replace(cpu.ROWS[name](bench), round_s=0.0)
    found = json.loads(json.dumps(measuring.measure(row, 1)))
    assert found["ratio"] > 0
    assert found["difference"] <= measuring.TOLERANCE
    assert set(found["ms"]) == {"ours", *row.theirs}


def test_the_captions_of_both_sides_are_the_same_and_of_different_lengths(bench: Any) -> None:
    row = cpu.ROWS["captions_64"](bench)
    assert set(measuring.measure(row, 1)["ms"]) == {"ours", *row.theirs}
    facts = row.facts
    assert facts["equal"] == facts["answers"] == 6
    assert facts["tokens"]["ours"] == facts["tokens"]["theirs"]
    shortest, _, longest = facts["answer_tokens"]
    assert shortest < longest <= 12
    assert set(facts["tried_s"]) == {"4 slots", "dynamic, batch 4", "static, batch 4"}


def test_a_prompt_never_begins_as_the_one_before_did(bench: Any) -> None:
    # A free slot continues from what it holds: the second prompt would be timed as if nothing had to be read.
    first, second = bench.prompt(40), bench.prompt(40)
    assert len(first) == len(second) == 40
    assert first[0] != second[0]


def test_answers_may_part_only_where_both_tokens_are_likely() -> None:
    def top(number: int, before: Any) -> list[int]:
        assert (number, list(before)) == (1, [5])
        return [6, 7, -1]

    found = cpu.compare_answers([[1, 2], [5, 6]], [[1, 2], [5, 7, 8]], top=top)
    assert found == {"answers": 2, "equal": 1, "tokens": {"ours": 4, "theirs": 5}}
    assert cpu.compare_answers([[], [5]], [[], [5, 7]], top=top)["equal"] == 1
    with pytest.raises(SystemExit, match="Answer 1 parts at token 1: ours 9, theirs 6"):
        cpu.compare_answers([[], [5, 9]], [[], [5, 6]], top=top)


@pytest.mark.parametrize("kind", full_size_torch.KINDS)
def test_transformers_is_timed_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    # On a CPU its static cache compiles nothing.
    monkeypatch.setattr(full_size_torch, "REPEATS", 1)
    sizes = full_size_torch.SIZES["tiny"]
    model = full_size_torch.make_llama(sizes["preset"], dtype=sizes["dtype"], device="cpu")
    row = full_size_torch.decode_row(
        model, kind=kind, batch=sizes["b64"], context=sizes["context"], steps=sizes["steps"]
    )
    row = json.loads(json.dumps(row))
    assert row["ms"] > 0
    assert row["tokens_per_s"] == pytest.approx(1000 * sizes["b64"] / row["ms"], rel=1e-2)
    assert row["compiled_graphs"] == 0


def test_both_sides_of_a_gpu_host_have_the_same_sizes() -> None:
    host = load_script("gpu_host")
    for name, sizes in full_size_torch.SIZES.items():
        ours = host.SIZES[name]
        assert (sizes["context"], sizes["steps"]) == (ours.context, ours.steps)
        assert {batch: sizes[batch] for batch in ours.batches} == ours.batches
        assert str(sizes["dtype"]) == f"torch.{ours.dtype}"
    assert full_size_torch.SIZES["full"]["preset"] == host.FULL.models["7b"]
    asked = {tuple(name.split("_")[2:]) for name, spec in gpu.ROWS.items() if spec.measure is None}
    assert asked == {(kind, batch) for kind in full_size_torch.KINDS for batch in host.FULL.batches}
