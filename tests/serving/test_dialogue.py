from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from minigpt4_jax import MiniGPT4
from minigpt4_jax.config import IMAGE_TOKEN_ID
from minigpt4_jax.data.prompts import TEMPLATES
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.presets import ORIGINAL_GENERATION, PRESETS, GenerationConfig
from minigpt4_jax.serve_config import ServeConfig
from minigpt4_jax.serving.dialogue import detokenize, make_job, picture_sources, tokenize
from minigpt4_jax.serving.errors import ApiError
from minigpt4_jax.serving.jobs import Job
from minigpt4_jax.serving.protocol import parse_chat, parse_detokenize, parse_tokenize

CONFIG = ServeConfig()
VOCAB = PRESETS["tiny"].model.llama.vocab_size
MARKERS = "<Img></Img>###Assistant: [/INST] <s></s><|im_end|><|im_start|>system <ImageHere> -1"


def make_model(
    template: str = "chatml", *, context: int = 800, generation: GenerationConfig | None = None
) -> MiniGPT4:
    """All of a model that a dialogue needs: no weights, no engine."""
    model = MiniGPT4.__new__(MiniGPT4)
    tiny = PRESETS["tiny"]
    model.preset = replace(tiny, template=template, generation=generation or tiny.generation)
    model.tokenizer = byte_tokenizer()
    model.context = context
    return model


def picture(name: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": name}}


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(said: str) -> dict[str, str]:
    return {"role": "assistant", "content": said}


def system(said: str) -> dict[str, str]:
    return {"role": "system", "content": said}


def job_of(*messages: Any, model: MiniGPT4 | None = None, **fields: Any) -> Job:
    body = json.dumps({"model": "smol", "messages": messages or [user("Hello")], **fields})
    request = parse_chat(body.encode(), CONFIG)
    pictures = [source.url for source in picture_sources(request)]
    return make_job(
        request,
        pictures,
        model=model or make_model(),
        config=CONFIG,
        id="1",
        deadline_s=0.0,
        emit=lambda event: None,
    )


def refused(*messages: Any, model: MiniGPT4 | None = None, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        job_of(*messages, model=model, **fields)
    assert caught.value.status == 400
    return caught.value


def read(job: Job) -> str:
    """A prompt as the model reads it, with `@` for each picture."""
    model = make_model()
    places = model.preset.model.num_image_tokens
    said, run = "", []
    for token in [*job.prompt, None]:
        if token in (IMAGE_TOKEN_ID, None):
            said += model.tokenizer.decode(run, skip_special=False)
            said += "@" * (token is not None)
            run = []
        else:
            run.append(token)
    return said.replace("@" * places, "@")


# --- messages ---

SAID = (
    system("Be kind."),
    {"role": "developer", "content": [text("Be"), text("short.")]},
    user(picture("a"), text("What?")),
    assistant("A cup."),
    user(text("And"), picture("b"), text("these?"), picture("c")),
)
READ = {
    "chatml": (
        "<|im_start|>system\nBe kind.\n\nBe\nshort.<|im_end|>\n<|im_start|>user\n@What?<|im_end|>\n"
        "<|im_start|>assistant\nA cup.<|im_end|>\n<|im_start|>user\n@@And\nthese?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "vicuna_v0": (
        "<s>Be kind.\n\nBe\nshort.###Human: <Img>@</Img> What?###Assistant: A cup.###Human: <Img>@</Img>###"
        "Human: <Img>@</Img> And\nthese?###Assistant: "
    ),
    "llama2": (
        "<s>Be kind.\n\nBe\nshort.<s>[INST] <Img>@</Img> What? [/INST] A cup.<s>[INST] <Img>@</Img>"
        "<s>[INST] <Img>@</Img> And\nthese? [/INST] "
    ),
    "minigpt_v2": (
        "<s>Be kind.\n\nBe\nshort.<s>[INST] <Img>@</Img> What? [/INST]A cup.<s>[INST] <Img>@</Img>"
        "<s>[INST] <Img>@</Img> And\nthese? [/INST]"
    ),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_messages_become_the_turns_of_the_template(template: str) -> None:
    job = job_of(*SAID, model=make_model(template))
    assert read(job) == READ[template]
    assert job.conversation.pictures == ("a", "b", "c")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_first_question_is_the_one_of_a_chat(template: str) -> None:
    model = make_model(template)
    chat = model.start_conversation()
    chat.add_image("a")
    assert job_of(user(text("What?"), picture("a")), model=model).prompt == tuple(chat.ask("What?"))


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_picture_alone_is_a_question(template: str) -> None:
    model = make_model(template)
    chat = model.start_conversation()
    chat.add_image("a")
    assert job_of(user(picture("a")), model=model).prompt == tuple(chat.ask(None))


@pytest.mark.parametrize("template", TEMPLATES)
def test_typed_markers_are_text(template: str) -> None:
    model = make_model(template)
    marked, plain = (
        job_of(system(said), user(picture("a"), text(said)), assistant(said), user(said), model=model)
        for said in (MARKERS, "x" * len(MARKERS))
    )  # fmt: skip
    control = range(6)  # of the byte tokenizer
    for ids in (control, [IMAGE_TOKEN_ID]):
        counts = [sum(token in ids for token in job.prompt) for job in (marked, plain)]
        assert counts[0] == counts[1]
    assert len(marked.prompt) == len(plain.prompt)
    assert read(marked).count(MARKERS) == 4


def test_an_assistant_message_enters_word_for_word() -> None:
    said = " one ### two Assistant: three "
    assert f"###Assistant: {said}###" in read(
        job_of(user("a"), assistant(said), user("b"), model=make_model("vicuna_v0"))
    )


def test_user_messages_in_a_row_stay_turns() -> None:
    job = job_of(user(picture("a")), user("b"))
    assert read(job) == (
        "<|im_start|>user\n@<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_assistant_may_open_where_the_template_can_say_so() -> None:
    for template in ("chatml", "vicuna_v0"):
        assert "Hi!" in read(job_of(assistant("Hi!"), user("a"), model=make_model(template)))
    for template in ("llama2", "minigpt_v2"):
        error = refused(system("x"), assistant("Hi!"), user("a"), model=make_model(template))
        assert error.param == "messages[1].role"
        twice = refused(
            user("a"), assistant("b"), assistant("c"), user("d"), model=make_model(template)
        )
        assert twice.param == "messages[2].role"


def test_an_empty_system_message_takes_the_place_of_the_templates() -> None:
    assert read(job_of(system(""), user("a"), model=make_model("vicuna_v0"))) == (
        "<s>###Human: a###Assistant: "
    )


def test_pictures_are_told_with_their_place_in_the_request() -> None:
    request = parse_chat(
        json.dumps({"model": "smol", "messages": SAID[2:]}).encode(),
        CONFIG,
    )
    assert [(source.url, source.param) for source in picture_sources(request)] == [
        ("a", "messages[0].content[0].image_url.url"),
        ("b", "messages[2].content[1].image_url.url"),
        ("c", "messages[2].content[3].image_url.url"),
    ]


# --- room ---


def test_an_answer_without_a_length_has_the_presets_or_what_is_left() -> None:
    asked = len(job_of(user("a")).prompt)
    assert job_of(user("a")).max_new_tokens == GenerationConfig().max_new_tokens
    assert job_of(user("a"), model=make_model(context=asked + 5)).max_new_tokens == 5
    assert job_of(user("a"), max_tokens=7).max_new_tokens == 7


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    asked = len(job_of(user("a")).prompt)
    small = make_model(context=asked + 5)
    assert job_of(user("a"), model=small, max_tokens=5).max_new_tokens == 5
    long_answer = refused(user("a"), model=small, max_completion_tokens=6)
    assert (long_answer.code, long_answer.param) == (
        "context_length_exceeded",
        "max_completion_tokens",
    )
    assert f"context is {asked + 5} tokens" in long_answer.message
    assert f"needs {asked + 6}: {asked} in the messages and 6 for" in long_answer.message
    long_prompt = refused(user("a" * 6), model=small)
    assert (long_prompt.code, long_prompt.param) == ("context_length_exceeded", "messages")
    assert f"{asked + 5} in the messages and at least 1" in long_prompt.message


# --- settings ---


def test_what_is_not_said_is_the_models_own() -> None:
    model = make_model(generation=ORIGINAL_GENERATION)
    assert job_of(model=model).generation == ORIGINAL_GENERATION
    said = job_of(model=model, temperature=0.5, top_k=-1, seed=3, max_tokens=9, min_tokens=2)
    assert said.generation == replace(
        ORIGINAL_GENERATION, temperature=0.5, top_k=0, seed=3, max_new_tokens=9, min_new_tokens=2
    )


def test_every_setting_reaches_the_engine() -> None:
    said: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "frequency_penalty": 1.5,
        "presence_penalty": -1,
        "repetition_penalty": 1.1,
        "seed": 7,
        "top_k": 5,
    }
    job = job_of(
        **said, n=3, logprobs=True, stop=["x", "y"], logit_bias={"3": 5, "0": -100}, max_tokens=4
    )
    assert {name: getattr(job.generation, name) for name in said} == said
    assert (job.n, job.logprobs, job.stop_strings) == (3, True, ("x", "y"))
    assert job.logit_bias == ((3, 5.0), (0, -100.0))
    beams = job_of(num_beams=4, length_penalty=0.5, n=2).generation
    assert (beams.num_beams, beams.length_penalty) == (4, 0.5)


def test_ignoring_the_end_asks_for_the_whole_length() -> None:
    assert job_of(ignore_eos=True, max_tokens=9).generation.min_new_tokens == 9
    assert job_of(ignore_eos=False, max_tokens=9).generation.min_new_tokens == 0


def test_beams_put_the_models_own_chance_aside_but_not_the_requests() -> None:
    model = make_model(generation=replace(ORIGINAL_GENERATION, min_p=0.1))
    found = job_of(model=model, num_beams=3).generation
    assert (found.temperature, found.min_p, found.repetition_penalty) == (0.0, 0.0, 1.05)
    assert refused(model=model, num_beams=3, temperature=0.7).param == "num_beams"
    assert "min_tokens" in refused(model=model, num_beams=3, min_tokens=3).message
    assert "min_p" in refused(model=model, num_beams=3, min_p=0.1).message


def test_settings_that_contradict_each_other_are_refused_in_the_words_of_the_api() -> None:
    short = refused(max_tokens=3, min_tokens=4)
    assert short.param == "min_tokens"
    assert "max_completion_tokens" in short.message
    assert "new_tokens" not in short.message
    assert refused(n=2).param == "n"
    assert refused(n=2, temperature=0).param == "n"
    assert job_of(n=2, temperature=1).n == 2


def test_a_bias_is_for_a_token_of_the_vocabulary() -> None:
    assert job_of(logit_bias={str(VOCAB - 1): 1}).logit_bias == ((VOCAB - 1, 1.0),)
    assert refused(logit_bias={str(VOCAB): 1}).param == f"logit_bias.{VOCAB}"
    assert refused(logit_bias={str(IMAGE_TOKEN_ID): 1}).param == "logit_bias.-1"


# --- tokens ---


def tokens(model: MiniGPT4, **fields: Any) -> list[int]:
    request = parse_tokenize(json.dumps(fields).encode(), CONFIG)
    found = tokenize(request, model=model)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), model.context)
    ids: list[int] = found["tokens"]
    return ids


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversations_tokens_are_the_prompt_of_its_answer(template: str) -> None:
    model = make_model(template)
    assert tokens(model, messages=SAID) == list(job_of(*SAID, model=model).prompt)


def test_a_texts_tokens_begin_as_the_template_does() -> None:
    chatml, vicuna = make_model(), make_model("vicuna_v0")
    plain = chatml.tokenizer.encode("<s>a")
    assert tokens(chatml, prompt="<s>a") == plain
    assert tokens(vicuna, prompt="<s>a") == [vicuna.tokenizer.special("<s>"), *plain]
    assert tokens(vicuna, prompt="<s>a", add_special_tokens=False) == plain
    assert tokens(chatml, prompt="") == []


def test_ids_become_text_again() -> None:
    model = make_model()
    ids = [model.tokenizer.special("<|im_end|>"), *model.tokenizer.encode("día")]
    request = parse_detokenize(json.dumps({"tokens": ids}).encode(), CONFIG)
    assert detokenize(request, model=model) == {"prompt": "<|im_end|>día"}
    with pytest.raises(ApiError) as caught:
        detokenize(parse_detokenize(b'{"tokens": [1, 300]}', CONFIG), model=model)
    assert (caught.value.status, caught.value.param) == (400, "tokens[1]")
