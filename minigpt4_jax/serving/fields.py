"""The fields of chat and tokenise requests: OpenAI's, the ones of vLLM that mean something here, and their bounds.

For: the models that requests are checked with, and the tables of what is not supported. Not for: reading a request and
what depends on the server's configuration (`protocol.py`), what the fields do to an answer (`dialogue.py`).

Three kinds of fields:

* those of the models, which do what OpenAI and vLLM say they do, or, where their text says so, nothing (`user`,
  `metadata`, `safety_identifier`, `prompt_cache_key`, `image_url.detail`: no answer depends on them);
* those of `UNSUPPORTED`: taken only with the values that mean "off", since with any other the answer would not be what
  was asked for;
* all others, which are refused with the closest name.

null is the same as not given, everywhere but in `messages`. What is not given is the model's own setting, not OpenAI's:
`presets.GenerationConfig`.

Checked against what these send: the openai client 3.54, vLLM's `bench serve` (text before the picture, `ignore_eos`,
`max_completion_tokens`), lmms-eval and VLMEvalKit (`max_tokens`, `temperature`, `n`, `detail`), Open WebUI and
LangChain.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
)

from minigpt4_jax.generation.sampling import TOP_LOGPROBS
from minigpt4_jax.presets import MAX_SEED

MAX_STOPS = 4
MAX_STOP_CHARS = 64
"""Both as in OpenAI's API."""
MAX_BIASES = 1024
MAX_TOKENS = 2**20
"""More than any model's context."""
MAX_PARTS = 1024
"""Of one message."""
MAX_URL_CHARS = 2**25
"""More than the largest picture as a `data:` URL; the body's own bound is usually less."""
MAX_IDS = 65_536
"""To be turned into text at once."""

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),  # there are no tools to call
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": ("in_memory",),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none",),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
    # vLLM's
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": (),
    "echo": (False,),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (),
    "include_stop_str_in_output": (False,),
    "logits_processors": (),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),  # `num_beams` says how many
}
"""Fields that are refused unless they are null or have one of these values, which change nothing."""
UNSUPPORTED_TOKENIZE: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "media_io_kwargs": (),
    "mm_processor_kwargs": ({},),
    "return_token_strs": (False,),
    "tools": ([],),
}


class _Checked(BaseModel):
    """No conversion between types, no unknown fields, no infinities."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )


def _whole(value: Any) -> Any:
    """1.0 is an integer in JSON Schema, and in JavaScript."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _temperature(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 0.01:
        raise ValueError("0 (always the likeliest token) or a number from 0.01 to 2")
    return value


def _top_k(value: int) -> int:
    return max(value, 0)


def _content_kind(value: Any) -> str | None:
    return "text" if isinstance(value, str) else "parts" if isinstance(value, list) else None


def _stop_kind(value: Any) -> str | None:
    if value is None:
        return "none"
    return "one" if isinstance(value, str) else "several" if isinstance(value, list) else None


WHOLE = BeforeValidator(_whole)
Label = Annotated[str, StringConstraints(max_length=512)]
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
TokenKey = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,8})$")]


class ImageUrl(_Checked):
    """Where a picture is."""

    url: Annotated[
        str,
        StringConstraints(min_length=1, max_length=MAX_URL_CHARS),
        Field(json_schema_extra={"format": "uri"}),
    ]
    """`data:image/png;base64,...`; `https://` where the server's configuration allows the host."""
    detail: Literal["auto", "low", "high"] | None = None
    """Changes nothing: every picture is read at the one size that the model knows."""


class TextPart(_Checked):
    """Text of a message. Several of them are joined with line breaks."""

    type: Literal["text"]
    text: str


class ImagePart(_Checked):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


_AnyPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
_TEXT_OR_PARTS = Discriminator(
    _content_kind,
    custom_error_type="content",
    custom_error_message="a string or a list of parts",
)
TextContent = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[
        list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("parts")
    ],
    _TEXT_OR_PARTS,
]
UserContent = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[
        list[_AnyPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("parts")
    ],
    _TEXT_OR_PARTS,
]


class _Message(_Checked):
    name: None = None
    """Would tell the model which of several people speaks; its templates cannot say that."""


class SystemMessage(_Message):
    """What the model is told before the conversation, in place of the template's own sentence."""

    role: Literal["system", "developer"]
    content: TextContent


class UserMessage(_Message):
    """A question, its pictures, or both. The pictures stand before the text, whatever their order here."""

    role: Literal["user"]
    content: UserContent


class AssistantMessage(_Message):
    """An answer of earlier."""

    role: Literal["assistant"]
    content: TextContent
    # What the openai client's messages have beside: they come back with the history.
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[None], Field(max_length=0)] | None = None
    annotations: Annotated[list[None], Field(max_length=0)] | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Checked):
    """What a stream has beside the answer."""

    include_usage: bool | None = None
    """One more chunk at the end with the numbers of tokens, and `usage: null` in the others."""
    include_obfuscation: Literal[False] | None = None
    """Chunks are never padded."""
    continuous_usage_stats: Literal[False] | None = None


class ChatRequest(_Checked):
    """A chat completion to create. Fields that are not given are the model's own settings."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=512)]
    """The name that `/v1/models` tells."""
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    """The conversation so far: system messages first, a user message last."""
    stream: bool | None = None
    """Send the answer as it is written, as server-sent events."""
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS), WHOLE] | None = None
    """Longest answer. Prompt and answer have to fit the model's context together."""
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS), WHOLE] | None = None
    """The older name of `max_completion_tokens`."""
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS), WHOLE] | None = None
    """No stop token is chosen before so many others; a stop string still ends the answer."""
    ignore_eos: bool | None = None
    """The same as `min_tokens` with the longest answer's length."""
    n: Annotated[int, Field(ge=1), WHOLE] | None = None
    """Answers; more than one needs a temperature above 0, or as many beams."""
    stop: Annotated[
        Annotated[Stop, Tag("one")]
        | Annotated[list[Stop], Field(max_length=MAX_STOPS), Tag("several")]
        | Annotated[None, Tag("none")],
        Discriminator(
            _stop_kind,
            custom_error_type="stop",
            custom_error_message="a string or a list of up to 4 strings",
        ),
    ] = None
    """Texts that end the answer and do not belong to it."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED), WHOLE] | None = None
    """The same request with the same seed gives the same answer; answer `i` of `n` draws by `seed + i`."""
    temperature: (
        Annotated[
            float,
            Field(
                ge=0,
                le=2,
                json_schema_extra={"anyOf": [{"const": 0}, {"minimum": 0.01, "maximum": 2}]},
            ),
            BeforeValidator(_temperature),
        ]
        | None
    ) = None
    """0 always takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1), WHOLE, AfterValidator(_top_k)] | None = None
    """Draw only from so many of the likeliest tokens; 0 and -1 are off."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Draw only from tokens with at least this share of the likeliest one's probability."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Above 1, tokens that the answer already has become less likely."""
    logit_bias: (
        Annotated[
            dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    """Token ids, as strings, and what is added to their logits."""
    logprobs: bool | None = None
    """Also tell how likely each token was."""
    top_logprobs: Annotated[int, Field(ge=0, le=TOP_LOGPROBS), WHOLE] | None = None
    """Also tell so many of the likeliest tokens in each place. Only with `logprobs`."""
    num_beams: Annotated[int, Field(ge=1), WHOLE] | None = None
    """Search with so many beams; no stream, no log-probabilities and nothing drawn then."""
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    """With beams: above 0 long answers gain, below 0 short ones."""
    user: Label | None = None
    """Changes nothing."""
    safety_identifier: Label | None = None
    """Changes nothing."""
    prompt_cache_key: Label | None = None
    """Changes nothing: what can be reused is found without it."""
    metadata: (
        Annotated[
            dict[Annotated[str, StringConstraints(max_length=64)], Label], Field(max_length=16)
        ]
        | None
    ) = None
    """Changes nothing, and is not kept."""

    @property
    def streams(self) -> bool:
        """Whether the answer goes out as it is written."""
        return bool(self.stream)

    @property
    def usage_chunk(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def num_answers(self) -> int:
        """`n`, or 1."""
        return self.n or 1

    @property
    def most_tokens(self) -> int | None:
        """Longest answer, where one is asked for."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class TokenizeRequest(_Checked):
    """A text, or a conversation, to be told the token ids of. As in vLLM."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = None
    prompt: str | None = None
    """Plain text: no marker in it has a meaning."""
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)] | None = None
    """A conversation as in a chat request. Its pictures are not looked at."""
    add_special_tokens: bool | None = None
    """Put the template's first token before a prompt. Not given: yes. A conversation has it in any case."""


class DetokenizeRequest(_Checked):
    """Token ids to be told the text of. As in vLLM."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = None
    tokens: Annotated[
        list[Annotated[int, Field(ge=0), WHOLE]], Field(max_length=MAX_IDS, fail_fast=True)
    ]


def text_of(message: SystemMessage | UserMessage | AssistantMessage) -> str:
    """The text of a message, its parts joined with line breaks."""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content if isinstance(part, TextPart))


def pictures_of(message: SystemMessage | UserMessage | AssistantMessage) -> dict[int, ImagePart]:
    """The pictures of a message by their place among its parts."""
    if isinstance(message.content, str):
        return {}
    parts = enumerate(message.content)
    return {place: part for place, part in parts if isinstance(part, ImagePart)}
