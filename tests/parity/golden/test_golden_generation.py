"""Greedy generation and beam search against the original's, through the engine and the functions that it compiles:
every id, the scores behind it, and every answer that a search found.

The original's id history, which the repetition penalty counts as written, starts differently by what the prompt is
(transformers 4.30): from ids it is the whole left-padded prompt, padding included; from embeddings, as MiniGPT-4
generates, it is one dummy bos, which the output then starts with as well.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from minigpt4_jax.config import IMAGE_TOKEN_ID, ModelConfig
from minigpt4_jax.conversation import Conversation
from minigpt4_jax.data.prompts import LLAMA2, Picture, Special, encode_prompt
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.generation.beam import Answers, BeamRules, beam_step, rank, start_beams
from minigpt4_jax.generation.decode import prefill, read_tokens
from minigpt4_jax.generation.sampling import Sampling, penalize_repetition
from minigpt4_jax.models.layout import DECODE, DISK, convert_layout
from minigpt4_jax.models.minigpt4 import Params, make_model
from tests.engines import answer_all, make_engine, make_request

SCORES: dict[str, Any] = {"atol": 3e-4, "rtol": 1e-4}
BEAM_SCORES: dict[str, Any] = {"atol": 1e-4, "rtol": 0.0}
"""The tolerances of the sets' README."""


def generate(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[np.ndarray],
    image_embeds: Sequence[np.ndarray],
    *,
    seen: Sequence[np.ndarray],
    max_new_tokens: int,
    penalty: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Ids `[B, max_new_tokens]` and the scores they were chosen by `[B, max_new_tokens, V]`, past any eos.

    Args:
        prompts: ids per row, `IMAGE_TOKEN_ID` where a row of `image_embeds` goes.
        seen: ids per row that the penalty counts as written at the start.
    """
    batch, longest = len(prompts), max(map(len, prompts))
    token_ids = np.zeros((batch, longest), np.int32)
    # As many places for pictures as for tokens: one shape, and one compilation, for every mode of a folder.
    images = np.zeros((batch, longest, config.llama.width), np.float32)
    written = np.zeros((batch, config.llama.vocab_size), bool)
    for row in range(batch):
        token_ids[row, : len(prompts[row])] = prompts[row]
        images[row, : len(image_embeds[row])] = image_embeds[row]
        written[row, seen[row]] = True
    places = longest + max_new_tokens
    read, following = compiled(config, places)
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    params = convert_layout(params, DISK, DECODE, llama=config.llama)
    prefix = read(params, token_ids, images, lengths)
    caches = tuple(cache.resize(cache.capacity + max_new_tokens) for cache in prefix.caches)
    tokens, scores, logits = [], [], prefix.logits
    for step in range(max_new_tokens):
        scores.append(penalize_repetition(logits, jnp.asarray(written), penalty=penalty))
        tokens.append(np.asarray(scores[-1]).argmax(-1).astype(np.int32))
        np.put_along_axis(written, tokens[-1][:, None], values=True, axis=1)
        logits, caches = following(params, caches, tokens[-1], lengths + step)
    return np.stack(tokens, axis=1), np.stack(scores, axis=1)


def search(
    params: Params,
    config: ModelConfig,
    prompts: Sequence[np.ndarray],
    image_embeds: Sequence[np.ndarray],
    *,
    seen: Sequence[np.ndarray],
    knobs: dict[str, Any],
    stop: int,
) -> Answers:
    """The answers of a beam search whose history, which penalty and length count, begins with `seen`."""
    batch, longest = len(prompts), max(map(len, prompts))
    token_ids = np.zeros((batch, longest), np.int32)
    images = np.zeros((batch, longest, config.llama.width), np.float32)
    written = np.zeros((batch, config.llama.vocab_size), bool)
    for row in range(batch):
        token_ids[row, : len(prompts[row])] = prompts[row]
        images[row, : len(image_embeds[row])] = image_embeds[row]
        written[row, seen[row]] = True
    (length_before,) = {len(history) for history in seen}
    rules = BeamRules(
        stops=jnp.arange(config.llama.vocab_size) == stop,
        length_penalty=float(knobs.get("length_penalty", 1.0)),
        repetition_penalty=float(knobs.get("repetition_penalty", 1.0)),
        length_before=np.int32(length_before),
    )
    params = convert_layout(params, DISK, DECODE, llama=config.llama)
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    read, start, step, last = compiled_search(config)
    prefix = read(params, token_ids, images, lengths)
    state = start(
        prefix.logits,
        prefix.caches,
        lengths,
        written,
        rules,
        num_beams=knobs["num_beams"],
        places=longest + knobs["max_new_tokens"],
    )
    for _ in range(knobs["max_new_tokens"] - 1):
        state = step(params, state, rules)
    return last(state, rules)


def reader(config: ModelConfig) -> Any:
    model = make_model(config, layout=DECODE, dtype=jnp.float32)
    return jax.jit(functools.partial(prefill, model=model, cache_dtype=jnp.float32))


@functools.cache
def compiled_search(config: ModelConfig) -> tuple[Any, Any, Any, Any]:
    model = make_model(config, layout=DECODE, dtype=jnp.float32)
    return (
        reader(config),
        jax.jit(start_beams, static_argnames=("num_beams", "places")),
        jax.jit(functools.partial(beam_step, model=model)),
        jax.jit(rank),
    )


@functools.cache
def compiled(config: ModelConfig, places: int) -> tuple[Any, Any]:
    model = make_model(config, layout=DECODE, dtype=jnp.float32)
    return reader(config), jax.jit(functools.partial(read_tokens, model=model, places=places))


def finish(tokens: np.ndarray, special: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """What the original returns: padding after each row's eos, no column beyond the longest row; and the lengths."""
    ends = tokens == special["eos"]
    lengths = np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, tokens.shape[1])
    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    filled = np.where(places < lengths[:, None], tokens, special["pad"])
    return filled[:, : lengths.max()], lengths


def recorded_prompts(held: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The prompts of `generation.npz` without their padding."""
    ids, mask = held["prompt_input_ids"], held["prompt_attention_mask"] == 1
    return [row[counts] for row, counts in zip(ids, mask, strict=True)]


def test_golden_llama_greedy_ids_and_scores(golden: Any, greedy_case: tuple[str, str]) -> None:
    folder, case = greedy_case
    held = golden.arrays(f"{folder}/generation.npz")
    knobs = golden.report(f"{folder}/report.json")["generation"]["cases"][case]
    special = golden.special_ids(folder)
    config, params = golden.llama(folder)
    prompts = recorded_prompts(held)
    padded = held["prompt_input_ids"]
    images = [np.zeros((0, config.llama.width), np.float32)] * len(prompts)
    seen, start = list(padded), padded
    if case.startswith("embeds__"):
        # The prompt comes as embeddings: every place is one that an embedding is scattered into.
        table = params["llama"]["embed_tokens"]["embedding"]
        images = [table[prompt] for prompt in prompts]
        prompts = [np.full(len(prompt), IMAGE_TOKEN_ID) for prompt in prompts]
        start = np.full((len(prompts), 1), special["bos"])
        seen = list(start)
    tokens, scores = generate(
        params,
        config,
        prompts,
        images,
        seen=seen,
        max_new_tokens=knobs["max_new_tokens"],
        penalty=knobs.get("repetition_penalty", 1.0),
    )
    answers, lengths = finish(tokens, special)
    np.testing.assert_array_equal(
        np.concatenate([start, answers], axis=1), held[f"{case}__sequences"]
    )
    if f"{case}__first_step_scores" in held:
        np.testing.assert_allclose(scores[:, 0], held[f"{case}__first_step_scores"], **SCORES)
    if f"{case}__step_top2" in held:
        best = -np.sort(-scores, axis=-1)[:, :, :2]
        for row, length in enumerate(lengths):  # what a row goes on to after its eos is nobody's
            theirs = held[f"{case}__step_top2"][row, :length]
            np.testing.assert_allclose(best[row, :length], theirs, **SCORES, err_msg=f"row {row}")


def test_golden_llama_engine_answers_like_the_original(
    golden: Any, plain_greedy_case: tuple[str, str]
) -> None:
    folder, case = plain_greedy_case
    held = golden.arrays(f"{folder}/generation.npz")
    knobs = golden.report(f"{folder}/report.json")["generation"]["cases"][case]
    special = golden.special_ids(folder)
    config, params = golden.llama(folder)
    context = held["prompt_input_ids"].shape[1] + knobs["max_new_tokens"]
    engine = make_engine(params, config, context=context)
    answers = answer_all(
        engine,
        [(prompt, None) for prompt in recorded_prompts(held)],
        steps=knobs["max_new_tokens"],
        stop_tokens={special["eos"]},
    )
    written = held[f"{case}__sequences"]
    start = written.shape[1] - max(map(len, answers))
    for answer, row in zip(answers, written[:, start:], strict=True):
        filled = [*answer, *[special["pad"]] * (len(row) - len(answer))]
        np.testing.assert_array_equal(filled, row)


def fill(ids: Sequence[int], length: int, special: dict[str, int]) -> list[int]:
    return [*ids, *[special["pad"]] * (length - len(ids))]


def test_golden_llama_every_answer_of_a_beam_search(
    golden: Any, beam_case: tuple[str, str]
) -> None:
    folder, case = beam_case
    held = golden.arrays(f"{folder}/generation.npz")
    knobs = golden.report(f"{folder}/report.json")["generation"]["cases"][case]
    special = golden.special_ids(folder)
    config, params = golden.llama(folder)
    prompts = recorded_prompts(held)
    images = [np.zeros((0, config.llama.width), np.float32)] * len(prompts)
    start = held["prompt_input_ids"]
    if case.startswith("embeds__"):
        table = params["llama"]["embed_tokens"]["embedding"]
        images = [table[prompt] for prompt in prompts]
        prompts = [np.full(len(prompt), IMAGE_TOKEN_ID) for prompt in prompts]
        start = np.full((len(prompts), 1), special["bos"])
    found = search(
        params, config, prompts, images, seen=list(start), knobs=knobs, stop=special["eos"]
    )
    kept = knobs.get("num_return_sequences", 1)
    sequences = held[f"{case}__sequences"].reshape(len(prompts), kept, -1)
    scores = held[f"{case}__sequences_scores"].reshape(len(prompts), kept)
    np.testing.assert_allclose(found.scores[:, :kept], scores, **BEAM_SCORES)
    for row, begun in enumerate(start):
        for place in range(kept):
            ids = np.asarray(found.token_ids)[row, place, : found.lengths[row, place]]
            ours = fill([*begun, *ids], sequences.shape[2], special)
            np.testing.assert_array_equal(ours, sequences[row, place], err_msg=f"{row}, {place}")
    if case.startswith("embeds__"):
        longest = max(map(len, prompts)) + knobs["max_new_tokens"]
        penalty = float(knobs.get("repetition_penalty", 1.0))
        answers = make_engine(params, config, context=longest).beam_search(
            [
                make_request(
                    prompt,
                    steps=knobs["max_new_tokens"],
                    stop_tokens={special["eos"]},
                    written=[special["bos"]],
                    sampling=Sampling(repetition_penalty=penalty),
                )
                for prompt in zip(prompts, images, strict=True)
            ],
            num_beams=knobs["num_beams"],
            length_penalty=float(knobs.get("length_penalty", 1.0)),
        )
        for row, hypotheses in enumerate(answers):
            for place, (ids, score) in enumerate(hypotheses[:kept]):
                ours = fill([special["bos"], *ids], sequences.shape[2], special)
                np.testing.assert_array_equal(ours, sequences[row, place])
                np.testing.assert_allclose(score, scores[row, place], **BEAM_SCORES)


def test_golden_minigpt4_batch_answers(golden: Any, answer_case: tuple[str, str, str]) -> None:
    """Texts and pictures to ids, ids to answers, through the engine, greedy and with beams.

    The original's least length (1) is no setting here: from embeddings it never holds an immediate end back.
    """
    folder, file, case = answer_case
    held, record = (
        golden.arrays(f"{folder}/{file}.npz"),
        golden.report(f"{folder}/cases.json")[file],
    )
    knobs = record["cases"][case]["kwargs_reaching_llama_generate"]
    special, tokenizer = golden.special_ids("llama_mha"), golden.tokenizer("llama_mha")
    pictures = golden.pictures(f"{folder}/{file}.npz")
    config, params = golden.minigpt4(pictures.shape[1], variant=folder)
    prompts = [read_text(text, tokenizer, config.num_image_tokens) for text in record["texts"]]
    table = params["llama"]["embed_tokens"]["embedding"]
    for prompt, row, counts in zip(
        prompts, held["inputs_embeds"], held["attention_mask"], strict=True
    ):
        np.testing.assert_array_equal(prompt, read_ids(row[counts == 1], table))
    longest = max(map(len, prompts)) + knobs["max_new_tokens"]
    engine = make_engine(params, config, context=longest)
    requests = [
        make_request(
            prompt,
            steps=knobs["max_new_tokens"],
            stop_tokens={special["eos"]},
            written=[special["bos"]],
            sampling=Sampling(repetition_penalty=float(knobs["repetition_penalty"])),
        )
        for prompt in zip(prompts, engine.encode_images(np.asarray(pictures)), strict=True)
    ]
    if knobs["num_beams"] > 1:
        found = engine.beam_search(
            requests,
            num_beams=knobs["num_beams"],
            length_penalty=float(knobs["length_penalty"]),
        )
        answers = [hypotheses[0].ids for hypotheses in found]
    else:
        answers = [generation.ids for generation in engine.generate(requests)]
    output_ids = held[f"{case}__output_ids"]
    assert 1 + max(map(len, answers)) == output_ids.shape[1]
    for ids, row in zip(answers, output_ids, strict=True):
        ours = fill([special["bos"], *ids], len(row), special)
        np.testing.assert_array_equal(ours, row)
    said = [read_answer(ids, tokenizer) for ids in answers]
    assert said == record["cases"][case]["answers"]


def read_text(text: str, tokenizer: Tokenizer, num_image_tokens: int) -> list[int]:
    """The ids of a prompt that the original was given as one string with marks in it."""
    pieces: list[Any] = []
    for part in re.split(r"(<s>|<ImageHere>)", text):
        marks = {"<s>": Special("<s>"), "<ImageHere>": Picture()}
        pieces.append(marks.get(part, part))
    return encode_prompt(LLAMA2, pieces, tokenizer=tokenizer, num_image_tokens=num_image_tokens)


def read_answer(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """As a conversation reads it. The original leaves its pad token, the word `$$`, out of answers; here it is kept."""
    chat: Conversation[None] = Conversation(LLAMA2, tokenizer, num_image_tokens=1, context=10_000)
    chat.ask("?")
    stream = chat.answer_stream()
    for token in ids:
        if token != tokenizer.pad_id:
            stream.feed(token)
    stream.finish()
    return chat.add_answer(stream.text)


def read_ids(embeds: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The ids whose embeddings a prompt is made of; what no id has came out of a picture."""
    ids = {row.tobytes(): number for number, row in reversed(list(enumerate(table)))}
    return np.asarray([ids.get(row.tobytes(), IMAGE_TOKEN_ID) for row in embeds])
