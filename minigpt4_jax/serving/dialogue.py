"""From a checked request to what the engine is asked: messages to a conversation, fields to the settings of an answer.

For: `picture_sources`, `make_job`, and the ids of `/tokenize`. Not for: reading requests (`protocol.py`), fetching and
decoding pictures (`pictures.py`), writing answers (`scheduler.py`).

How messages become turns of the model's template:

* The text of the system and developer messages, joined by an empty line, takes the place of the template's own system
  sentence. They stand before all others (`protocol.py` refuses them elsewhere: no template has a place for them).
* Pictures of a user message stand before its text, each in the template's wrapper, whatever their order in `content`:
  that is all the models were trained with. Parts of text are joined with line breaks, as vLLM does.
* User messages in a row stay turns of their own; so does each picture but the last where the template has one picture
  a turn (Vicuna's and Llama-2's, as in the original).
* Assistant messages enter word for word. Unlike in a chat of `MiniGPT4`, which keeps the ids that were generated,
  their text is tokenised again.
* Nothing that is typed is a marker: `<Img>`, `###`, `<|im_end|>`, `<ImageHere>` are encoded as the characters they are.

Nothing is cut to fit: a prompt and its answer that are more than the context are refused with the numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from minigpt4_jax.api import MiniGPT4
from minigpt4_jax.config import UserError
from minigpt4_jax.conversation import ContextFull, Conversation
from minigpt4_jax.presets import UNKNOWN_TO_BEAMS, GenerationConfig
from minigpt4_jax.serving.errors import invalid
from minigpt4_jax.serving.fields import (
    ChatRequest,
    DetokenizeRequest,
    Message,
    TokenizeRequest,
    pictures_of,
    text_of,
)
from minigpt4_jax.serving.jobs import Event, Job
from minigpt4_jax.serving.pictures import PictureSource

SAME_NAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "num_beams",
    "length_penalty",
    "seed",
)
"""Fields of a request that are fields of `GenerationConfig`."""
API_NAMES = {"max_new_tokens": "max_completion_tokens", "min_new_tokens": "min_tokens"}
"""Fields of `GenerationConfig` that the API calls otherwise."""


def picture_sources(request: ChatRequest) -> list[PictureSource]:
    """Where the pictures of a request come from, in the order in which the model sees them."""
    return [
        PictureSource(part.image_url.url, f"messages[{place}].content[{part_place}].image_url.url")
        for place, message in enumerate(request.messages)
        for part_place, part in pictures_of(message).items()
    ]


def make_job(
    request: ChatRequest,
    pictures: Sequence[Any],
    *,
    model: MiniGPT4,
    id: str,
    deadline_s: float,
    emit: Callable[[Event], None],
    salt: Hashable = None,
) -> Job:
    """A job for the scheduler. Tokenises: not for the event loop.

    Args:
        pictures: one for each of `picture_sources`, decoded by the model's `encoder.prepare`.
        deadline_s: on the clock of `time.monotonic`.
        salt: whose request it is: `Job.salt`.

    Raises:
        ApiError: 400: prompt and answer do not fit the context, settings that contradict each other, a token that
            does not exist, messages in an order that the model's template cannot say.
    """
    conversation = _start(request.messages, pictures, model=model)
    prompt = _ask(conversation, request.messages[-1], pictures, most_tokens=request.most_tokens)
    preset = model.preset.generation
    most = request.most_tokens or min(preset.max_new_tokens, conversation.room)
    generation = _settings(request, preset, max_new_tokens=most)
    if request.num_answers > 1 and generation.num_beams == 1 and generation.temperature == 0:
        raise invalid(
            f"n is {request.num_answers} and the temperature 0, which gives the same answer {request.num_answers} "
            "times; expected a temperature above 0, num_beams, or n 1.",
            param="n",
        )
    return Job(
        id=id,
        conversation=conversation,
        prompt=tuple(prompt),
        generation=generation,
        max_new_tokens=most,
        n=request.num_answers,
        logprobs=bool(request.logprobs),
        stop_strings=request.stop_strings,
        logit_bias=_biases(request, vocab_size=model.preset.model.llama.vocab_size),
        deadline_s=deadline_s,
        emit=emit,
        stream=request.streams,
        salt=salt,
    )


def _start(
    messages: Sequence[Message], pictures: Sequence[Any], *, model: MiniGPT4
) -> Conversation[Any]:
    """A conversation with all messages but the last one."""
    told = [text_of(one) for one in messages if one.role in ("system", "developer")]
    conversation = model.start_conversation(system="\n\n".join(told) if told else None)
    remaining = iter(pictures)
    before = ""
    for place, message in enumerate(messages[:-1]):
        if message.role == "user":
            shown = [next(remaining) for _ in pictures_of(message)]
            conversation.recall("user", _question(message), pictures=shown)
        elif message.role == "assistant":
            if before != "user" and not conversation.template.assistant_suffix:
                raise invalid(
                    f"messages[{place}] is of the assistant and does not follow one of the user; expected it to: the "
                    "template of this model can only say answers to a question.",
                    param=f"messages[{place}].role",
                )
            conversation.recall("assistant", text_of(message))
        before = message.role
    return conversation


def _question(message: Message) -> str | None:
    """None where the message is pictures alone."""
    return text_of(message) or (None if pictures_of(message) else "")


def _ask(
    conversation: Conversation[Any],
    message: Message,
    pictures: Sequence[Any],
    *,
    most_tokens: int | None,
) -> list[int]:
    """Asks the last message with the pictures that are left, and returns the prompt."""
    shown = pictures[len(conversation.pictures) :]
    try:
        return conversation.ask(_question(message), room=most_tokens or 1, pictures=shown)
    except ContextFull as full:
        answer = (
            f"{most_tokens} for the answer (max_completion_tokens)"
            if most_tokens
            else "at least 1 for the answer"
        )
        raise invalid(
            f"This model's context is {full.limit} tokens, and this request needs {full.used + full.room}: {full.used} "
            f"in the messages and {answer}. Shorten the messages or the answer.",
            param="messages" if full.used >= full.limit else "max_completion_tokens",
            code="context_length_exceeded",
        ) from None


def _settings(
    request: ChatRequest, preset: GenerationConfig, *, max_new_tokens: int
) -> GenerationConfig:
    """The model's own settings with what the request set."""
    said = {name: value for name in SAME_NAME if (value := getattr(request, name)) is not None}
    least = max_new_tokens if request.ignore_eos else request.min_tokens
    if least is not None:
        said["min_new_tokens"] = least
    if said.get("num_beams", preset.num_beams) > 1:
        # What the model's own settings draw with gives way to a search; what the request says does not.
        off = {name: getattr(GenerationConfig(), name) for name in UNKNOWN_TO_BEAMS}
        said = {"temperature": 0.0, **off, **said}
    try:
        return dataclasses.replace(preset, max_new_tokens=max_new_tokens, **said)
    except UserError as error:
        message = str(error)
        for ours, theirs in API_NAMES.items():
            message = message.replace(ours, theirs)
        raise invalid(message, param=message.split(" ", 1)[0]) from None


def _biases(request: ChatRequest, *, vocab_size: int) -> tuple[tuple[int, float], ...]:
    biases = tuple((int(token), float(bias)) for token, bias in (request.logit_bias or {}).items())
    for token, _ in biases:
        if token >= vocab_size:
            raise invalid(
                f"logit_bias has the token {token}; expected 0 to {vocab_size - 1}, those of the vocabulary.",
                param=f"logit_bias.{token}",
            )
    return biases


def tokenize(request: TokenizeRequest, *, model: MiniGPT4) -> dict[str, Any]:
    """The body of `/tokenize`, as vLLM's. A picture is as many -1 as it takes places.

    Raises:
        ApiError: 400: a conversation that is longer than the context.
    """
    if request.messages is None:
        ids = model.tokenizer.encode(request.prompt or "")
        bos = model.start_conversation().template.bos
        if bos is not None and request.add_special_tokens is not False:
            ids = [model.tokenizer.special(bos), *ids]
    else:
        unseen = [None for message in request.messages for _ in pictures_of(message)]
        conversation = _start(request.messages, unseen, model=model)
        ids = _ask(conversation, request.messages[-1], unseen, most_tokens=None)
    return {"count": len(ids), "max_model_len": model.context, "tokens": ids}


def detokenize(request: DetokenizeRequest, *, model: MiniGPT4) -> dict[str, Any]:
    """The body of `/detokenize`, as vLLM's: control tokens are spelled out.

    Raises:
        ApiError: 400: an id that the vocabulary lacks.
    """
    for place, token in enumerate(request.tokens):
        if token >= model.tokenizer.vocab_size:
            raise invalid(
                f"tokens[{place}] is {token}; expected 0 to {model.tokenizer.vocab_size - 1}, those of the vocabulary.",
                param=f"tokens[{place}]",
            )
    return {"prompt": model.tokenizer.decode(request.tokens, skip_special=False)}
