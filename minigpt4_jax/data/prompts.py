"""How a conversation is written down for a language model: templates as data, rendered to token ids.

For: the prompt formats (`CHATML`, `VICUNA_V0`, `LLAMA2`, `MINIGPT_V2`) and turning turns, questions and pictures into
ids in which `IMAGE_TOKEN_ID` marks the places of image embeddings. Not for: keeping a dialogue (`conversation.py`),
padding or targets (`batches.py`).

Differs from the original, which builds one string and splits it at the text `<ImageHere>`: here a prompt is a list of
pieces, so that nothing a user types can become a picture or a control token. The strings are the original's; what
lies between two pictures or control tokens is tokenised on its own, as there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from minigpt4_jax.config import IMAGE_TOKEN_ID, UserError
from minigpt4_jax.data.tokenizer import Tokenizer

IMAGE_MARK = "<ImageHere>"
"""How a picture is shown in `pieces_text` and marked in the original's prompt files. Never looked for in typed text."""


@dataclass(frozen=True)
class Special:
    """A control token, by its spelling."""

    name: str


@dataclass(frozen=True)
class Picture:
    """The place of one picture: `num_image_tokens` placeholders."""


@dataclass(frozen=True)
class Generated:
    """An answer as the model wrote it: its ids enter the prompt unchanged; `text` is for people."""

    ids: tuple[int, ...]
    text: str


Piece = str | Special | Picture | Generated


@dataclass(frozen=True, kw_only=True)
class Template:
    """A prompt format. Every field is data: nothing in the code asks for a template's name."""

    name: str
    bos: str | None
    """Control token in front of everything, in chat and in training. The repetition penalty counts it as written."""
    system: str | None
    """System text of a conversation unless the caller gives another. Training prompts have none."""
    system_prefix: tuple[Piece, ...]
    system_suffix: tuple[Piece, ...]
    user_prefix: tuple[Piece, ...]
    user_suffix: tuple[Piece, ...]
    assistant_prefix: tuple[Piece, ...]
    """Also ends a prompt that asks for an answer."""
    assistant_suffix: tuple[Piece, ...]
    image_before: str
    image_after: str
    image_join: str
    """Between a picture and the question about it."""
    images_share_turn: bool
    """Pictures sent one after the other share a turn; the original opens a new turn for each."""
    train_prefix: tuple[Piece, ...]
    train_suffix: tuple[Piece, ...]
    """Around the instruction in training; the original writes it a little differently from its chat."""
    end_symbol: tuple[Piece, ...]
    """After each answer in training; the model learns to stop with it."""
    stop_tokens: tuple[str, ...]
    """Control tokens that end an answer."""
    stop_strings: tuple[str, ...]
    """Texts that end an answer and do not belong to it."""
    answer_after: str | None
    """An answer is what follows the last such text (the model may repeat its own role)."""
    reuse_answer_ids: bool
    """Answers stay in the history as the ids that were generated; if false, their text is tokenised again with the
    text around it, as the original does."""


CHATML = Template(
    name="chatml",
    bos=None,  # `<|im_start|>` opens every turn, so the first one is the bos
    system=None,
    system_prefix=(Special("<|im_start|>"), "system\n"),
    system_suffix=(Special("<|im_end|>"), "\n"),
    user_prefix=(Special("<|im_start|>"), "user\n"),
    user_suffix=(Special("<|im_end|>"), "\n"),
    assistant_prefix=(Special("<|im_start|>"), "assistant\n"),
    assistant_suffix=(Special("<|im_end|>"), "\n"),
    image_before="",
    image_after="",
    image_join="",
    images_share_turn=True,
    train_prefix=(Special("<|im_start|>"), "user\n"),
    train_suffix=(Special("<|im_end|>"), "\n", Special("<|im_start|>"), "assistant\n"),
    end_symbol=(Special("<|im_end|>"),),
    stop_tokens=("<|im_end|>", "<|endoftext|>"),
    stop_strings=(),
    answer_after=None,
    reuse_answer_ids=True,
)

_SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)

VICUNA_V0 = Template(
    name="vicuna_v0",
    bos="<s>",
    system=_SYSTEM,
    system_prefix=(),
    system_suffix=("###",),
    user_prefix=("Human: ",),
    user_suffix=("###",),
    assistant_prefix=("Assistant: ",),
    assistant_suffix=("###",),
    image_before="<Img>",
    image_after="</Img>",
    image_join=" ",
    images_share_turn=False,
    train_prefix=("###Human: ",),
    train_suffix=(" ###Assistant: ",),
    end_symbol=("###",),
    stop_tokens=("</s>",),
    stop_strings=("###",),
    answer_after="Assistant:",
    reuse_answer_ids=False,
)

# The control token `<s>` opens every user turn besides the bos in front: two of them, as the weights were used.
LLAMA2 = Template(
    name="llama2",
    bos="<s>",
    system=_SYSTEM,
    system_prefix=(),
    system_suffix=(),
    user_prefix=(Special("<s>"), "[INST] "),
    user_suffix=(),
    assistant_prefix=(" [/INST] ",),
    assistant_suffix=(),
    image_before="<Img>",
    image_after="</Img>",
    image_join=" ",
    images_share_turn=False,
    train_prefix=("[INST] ",),
    train_suffix=(" [/INST] ",),
    end_symbol=(Special("</s>"),),
    stop_tokens=("</s>",),
    stop_strings=(
        "###",
    ),  # the original's chat stops and cleans every template as it does Vicuna's
    answer_after="Assistant:",
    reuse_answer_ids=False,
)

# No system sentence, so two bos in a row at the start; and no space behind the role, so answers join it directly.
MINIGPT_V2 = replace(
    LLAMA2,
    name="minigpt_v2",
    system=None,
    assistant_prefix=(" [/INST]",),
    train_suffix=(" [/INST]",),
)

TEMPLATES: dict[str, Template] = {t.name: t for t in (CHATML, VICUNA_V0, LLAMA2, MINIGPT_V2)}


def get_template(name: str) -> Template:
    """Looks a template up. Raises `UserError` with the known names."""
    if name not in TEMPLATES:
        raise UserError(
            f"There is no prompt template {name!r}; expected one of {', '.join(sorted(TEMPLATES))}."
        )
    return TEMPLATES[name]


@dataclass(frozen=True)
class Turn:
    """One message: who speaks, and pieces without the role's own text around them."""

    role: Literal["user", "assistant"]
    pieces: tuple[Piece, ...]


def user_pieces(
    template: Template, question: str | None, *, num_pictures: int = 0
) -> tuple[Piece, ...]:
    """The inside of a user turn: pictures, each in the template's wrapper, then the question (None: not asked yet)."""
    pieces: list[Piece] = []
    for _ in range(num_pictures):
        pieces += [template.image_before, Picture(), template.image_after]
    if question is not None:
        pieces += [template.image_join if num_pictures else "", question]
    return tuple(piece for piece in pieces if piece != "")


def conversation_pieces(
    template: Template, turns: Iterable[Turn], *, system: str | None, open_answer: bool = True
) -> list[Piece]:
    """A whole dialogue, without the bos. `system` None leaves the system part out (pass `template.system` for the
    template's own); `open_answer` ends with the assistant's role, ready for generation."""
    pieces: list[Piece] = []
    if system is not None:
        pieces += [*template.system_prefix, system, *template.system_suffix]
    for turn in turns:
        if turn.role == "user":
            pieces += [*template.user_prefix, *turn.pieces, *template.user_suffix]
        else:
            pieces += [*template.assistant_prefix, *turn.pieces, *template.assistant_suffix]
    if open_answer:
        pieces += template.assistant_prefix
    return pieces


def training_pieces(template: Template, question: str | None) -> list[Piece]:
    """The prompt of one training sample with one picture, without the bos.

    With a question: the template's training form around the wrapped picture and the question. None is the original's
    first stage: the bare picture, not even its wrapper.
    """
    if question is None:
        return [Picture()]
    inside = user_pieces(template, question, num_pictures=1)
    return [*template.train_prefix, *inside, *template.train_suffix]


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Neighbouring texts become one, so that they are tokenised together; empty ones go."""
    joined: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece != "":
            joined.append(piece)
    return joined


def encode_pieces(
    pieces: Iterable[Piece], tokenizer: Tokenizer, *, num_image_tokens: int
) -> list[int]:
    """Token ids; each picture becomes `num_image_tokens` times `IMAGE_TOKEN_ID`. Adds no bos.

    Each run of text between pictures, control tokens and generated ids is tokenised on its own. Raises `UserError`
    when the tokenizer lacks a control token that the template names.
    """
    ids: list[int] = []
    for piece in _joined(pieces):
        match piece:
            case str():
                ids += tokenizer.encode(piece)
            case Special(name):
                ids.append(tokenizer.special(name))
            case Picture():
                ids += [IMAGE_TOKEN_ID] * num_image_tokens
            case Generated(generated_ids):
                ids += generated_ids
    return ids


def encode_prompt(
    template: Template, pieces: Iterable[Piece], *, tokenizer: Tokenizer, num_image_tokens: int
) -> list[int]:
    """`encode_pieces` with the template's bos in front."""
    bos = [] if template.bos is None else [tokenizer.special(template.bos)]
    return bos + encode_pieces(pieces, tokenizer, num_image_tokens=num_image_tokens)


def encode_answer(
    template: Template,
    answer: str,
    *,
    tokenizer: Tokenizer,
    end_symbol: tuple[Piece, ...] | None = None,
) -> list[int]:
    """Ids of a training answer and its end symbol (the template's, or `end_symbol`), text tokenised together."""
    end = template.end_symbol if end_symbol is None else end_symbol
    return encode_pieces([answer, *end], tokenizer, num_image_tokens=0)


def end_symbol_pieces(text: str, tokenizer: Tokenizer) -> tuple[Piece, ...]:
    """An end symbol from a configuration: a control token by its spelling (`</s>`), or plain text (`###`).

    The original puts the text behind the answer, where its tokenizer finds control tokens by itself.
    """
    return (Special(text),) if tokenizer.is_special(text) else (text,)


def pieces_text(pieces: Iterable[Piece]) -> str:
    """A prompt for people to read: control tokens by name, pictures as `<ImageHere>`."""
    text = ""
    for piece in pieces:
        match piece:
            case str():
                text += piece
            case Special(name):
                text += name
            case Picture():
                text += IMAGE_MARK
            case Generated(_, generated_text):
                text += generated_text
    return text


def clean_answer(template: Template, text: str) -> str:
    """The answer inside raw generated text: cut at the first stop string, after the last repeated role, stripped."""
    for stop in template.stop_strings:
        text = text.split(stop, 1)[0]
    if template.answer_after is not None:
        text = text.rsplit(template.answer_after, 1)[-1]
    return text.strip()


def load_prompts(path: str | Path) -> tuple[str, ...]:
    """Reads questions for training, one a line; empty lines are skipped.

    The original's files (`alignment.txt`) write `<Img><ImageHere></Img> ` before each question: that is taken off,
    since the template puts the picture there. Raises `UserError` for a missing file, no question at all, or a line
    that has the mark anywhere else.
    """
    file = Path(path)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompt file {file} cannot be read ({error}).") from error
    opening = f"<Img>{IMAGE_MARK}</Img>"
    prompts: list[str] = []
    for number, line in enumerate(lines, start=1):
        prompt = line.strip().removeprefix(opening).strip()
        if IMAGE_MARK in prompt:
            raise UserError(
                f"Line {number} of {file} is {line!r}; expected a question, with {opening} at its start or not at all."
            )
        if prompt:
            prompts.append(prompt)
    if not prompts:
        raise UserError(
            f"The prompt file {file} has no question in it; expected at least one line."
        )
    return tuple(prompts)


def check_template(template: Template, tokenizer: Tokenizer) -> None:
    """Raises `UserError` unless the tokenizer has every control token that the template names."""
    names = [] if template.bos is None else [template.bos]
    names += template.stop_tokens
    fields: Sequence[tuple[Piece, ...]] = (
        template.system_prefix, template.system_suffix, template.user_prefix, template.user_suffix,
        template.assistant_prefix, template.assistant_suffix, template.train_prefix, template.train_suffix,
        template.end_symbol,
    )  # fmt: skip
    names += [piece.name for field in fields for piece in field if isinstance(piece, Special)]
    for name in names:
        tokenizer.special(name)
