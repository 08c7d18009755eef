"""What a program uses: load a model, talk about pictures, answer many questions at once.

    from minigpt4_jax import MiniGPT4

    chat = MiniGPT4.load("smol").start_chat()
    chat.add_image("examples/coffee.jpg")
    print(chat.ask("What is this?"))

Not for: arguments and printing (`cli.py`), HTTP (`serving/`), or the device loop (`generation/engine.py`).
Differs from the original, whose only interface is a Gradio page: a `Chat` keeps its own history, so one loaded model
serves any number of them.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from minigpt4_jax.config import UserError
from minigpt4_jax.conversation import Conversation
from minigpt4_jax.data.images import load_image, preprocess
from minigpt4_jax.data.prompts import get_template
from minigpt4_jax.data.tokenizer import Tokenizer, load_tokenizer
from minigpt4_jax.generation.engine import Engine
from minigpt4_jax.generation.requests import Request
from minigpt4_jax.generation.sampling import Sampling
from minigpt4_jax.model_folder import ModelFolder, find_preset, open_folder
from minigpt4_jax.models.layout import DECODE, DISK, convert_layout
from minigpt4_jax.models.minigpt4 import Params, abstract_params
from minigpt4_jax.presets import MAX_SEED, PRESETS, GenerationConfig, Preset

__all__ = ["Chat", "GenerationConfig", "MiniGPT4"]

if TYPE_CHECKING:
    from PIL import Image

    Picture = str | Path | bytes | Image.Image

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, parts done, parts in all)."""


class MiniGPT4:
    """A loaded model. Build one with `MiniGPT4.load`."""

    def __init__(
        self, preset: Preset, params: Params, tokenizer: Tokenizer, *, dtype: Any, context: int
    ) -> None:
        self.preset = preset
        self.tokenizer = tokenizer
        self.context = context
        decode = convert_layout(params, DISK, DECODE, llama=preset.model.llama)
        decode = jax.tree.map(jnp.asarray, decode)
        self._engine = Engine(decode, preset.model, dtype=dtype, context=context, num_slots=8)

    @classmethod
    def load(
        cls,
        name: str = "smol",
        *,
        projection: str | Path | None = None,
        dtype: str = "auto",
        context: int = 1024,
        progress: Progress | None = None,
    ) -> MiniGPT4:
        """Loads a model. The first `load("smol")` fetches and converts its frozen parts into the cache.

        Args:
            name: `smol`, the preset whose weights this project can get by itself, or the model folder that
                `python -m convert` wrote: a path, or a URL such as `gs://bucket/vicuna-7b`.
            projection: a projection file; default: the one in the folder, and for `smol` the one that is shipped.
            dtype: `float32`, `bfloat16`, or `auto`: bfloat16 on an accelerator, float32 on a CPU.
            context: longest prompt plus answer of a conversation, in tokens; a picture takes 16 in `smol`.
            progress: told what is being converted on the first call.

        Raises:
            UserError: no such model, a download that failed, a damaged folder, a projection of another model.
        """
        preset = find_preset(name)
        storage = pick_dtype(dtype)
        # Before minutes of fetching and loading: the wrong file is said at once.
        llama_proj = _load_projection(name, projection, preset)
        params, tokenizer = load_frozen(name, dtype=storage, progress=progress)
        params["llama_proj"] = jax.tree.map(lambda leaf: jnp.asarray(leaf, storage), llama_proj)
        return cls(preset, params, tokenizer, dtype=storage, context=context)

    def start_chat(self, generation: GenerationConfig | None = None) -> Chat:
        """A new conversation; any number may exist side by side. `generation` None is the preset's own."""
        return Chat(self, generation or self.preset.generation)

    def embed_images(self, pictures: Sequence[Picture]) -> Float[np.ndarray, "I T D"]:
        """Embeddings of pictures in the language model's space, float32 `[I, image tokens, width]`."""
        size = self.preset.model.vit.image_size
        pixels = [
            preprocess(
                load_image(picture),
                size=size,
                mean=self.preset.image_mean,
                std=self.preset.image_std,
            )
            for picture in pictures
        ]
        return np.stack(self._engine.encode_images(np.stack(pixels))).astype(np.float32)

    def generate(
        self,
        pictures: Sequence[Picture],
        questions: Sequence[str],
        *,
        generation: GenerationConfig | None = None,
    ) -> list[str]:
        """One answer per (picture, question) pair, decoded together; each is the answer that a chat gives alone.

        With a seed, every row draws by it; without one each row has a seed of its own.

        Raises:
            UserError: the numbers of pictures and questions differ, or a prompt does not fit the context.
        """
        if len(pictures) != len(questions):
            raise UserError(
                f"There are {len(pictures)} pictures and {len(questions)} questions; expected one question each."
            )
        if not pictures:
            return []
        config = generation or self.preset.generation
        chats = [self._conversation() for _ in questions]
        embeds = self.embed_images(pictures)
        prompts = []
        for chat, question, rows in zip(chats, questions, embeds, strict=True):
            chat.add_image(rows)
            prompts.append(chat.ask(question, room=config.max_new_tokens))
        shown, first = list(embeds), chats[0]
        if config.num_beams > 1:
            answers = self._search(prompts, shown, first, config, config.max_new_tokens)
        else:
            requests = [
                _request(prompt, [rows], first, config, seed=pick_seed(config))
                for prompt, rows in zip(prompts, shown, strict=True)
            ]
            answers = [generation.ids for generation in self._engine.generate(requests)]
        return [
            chat.add_answer(_read(chat, ids), ids) for chat, ids in zip(chats, answers, strict=True)
        ]

    def _search(
        self,
        prompts: Sequence[Sequence[int]],
        image_embeds: Sequence[Float[np.ndarray, "_ D"] | None],
        chat: Conversation[Any],
        config: GenerationConfig,
        max_new_tokens: int,
    ) -> list[list[int]]:
        """The best answer to each prompt that beams find; `chat` says what ends an answer and counts as written.

        As in the original a stop string ends no beam: the text behind it is cut off afterwards.
        """
        limited = dataclasses.replace(config, max_new_tokens=max_new_tokens)
        found = self._engine.beam_search(
            [
                _request(prompt, [] if rows is None else [rows], chat, limited, seed=0)
                for prompt, rows in zip(prompts, image_embeds, strict=True)
            ],
            num_beams=config.num_beams,
            length_penalty=config.length_penalty,
        )
        return [hypotheses[0].ids for hypotheses in found]

    def _conversation(self) -> Conversation[Float[np.ndarray, "T D"]]:
        return Conversation(
            get_template(self.preset.template),
            self.tokenizer,
            num_image_tokens=self.preset.model.num_image_tokens,
            context=self.context,
        )


class Chat:
    """One conversation with a model: pictures, questions, answers, all remembered."""

    def __init__(self, model: MiniGPT4, generation: GenerationConfig) -> None:
        self._model = model
        self._generation = generation
        self._conversation = model._conversation()
        self.seed = pick_seed(generation)
        """By which answers are drawn: the one that was asked for, or the one that was picked for this conversation."""
        self.last_answer = ""
        """The newest answer, cleaned."""
        self.finish_reason: Literal["", "stop", "length", "cancelled"] = ""
        """Why it ended: by itself, at `max_new_tokens` or the end of the context, or because the caller stopped."""

    def add_image(self, picture: Picture) -> None:
        """Shows a picture; the next question is about it. At any time, any number: all of them stay in view.

        Encoded once, whatever is asked later.

        Raises:
            ContextFull: the conversation has no room for it; nothing was added.
            UserError: it is not a picture.
        """
        self._conversation.add_image(self._model.embed_images([picture])[0])

    def ask(self, question: str) -> str:
        """Asks and returns the whole answer."""
        for _ in self.stream(question):
            pass
        return self.last_answer

    def stream(self, question: str) -> Iterator[str]:
        """Asks and yields the answer in pieces of text as it is written; with beams in one piece, when it is found.

        What was written so far enters the history also when the caller stops early (closes the iterator, or Ctrl-C).

        Raises:
            ContextFull: the question does not fit; nothing was added to the conversation.
        """
        prompt = self._conversation.ask(question)
        answer = self._conversation.answer_stream()
        whole = self._generation.num_beams > 1
        self.finish_reason = "cancelled"
        try:
            for token in self._write(prompt):
                piece = answer.feed(token)
                if piece and not whole:
                    yield piece
                if answer.stopped:
                    break
            reason: Literal["stop", "length"] = "stop" if answer.stopped else "length"
            rest = answer.finish()
            if whole:
                rest = answer.text
            if rest:
                yield rest
            self.finish_reason = reason
        finally:
            self.last_answer = self._conversation.add_answer(answer.text, answer.ids)

    def _write(self, prompt: Sequence[int]) -> Iterator[int]:
        """The ids of the answer to the last question."""
        chat, config = self._conversation, self._generation
        shown = np.concatenate(chat.pictures) if chat.pictures else None
        limit = min(config.max_new_tokens, chat.room)
        if config.num_beams > 1:
            (ids,) = self._model._search([prompt], [shown], chat, config, limit)
            yield from ids
            return
        limited = dataclasses.replace(config, max_new_tokens=limit)
        yield from self._model._engine.stream(
            _request(prompt, chat.pictures, chat, limited, seed=self.seed)
        )


def _read(chat: Conversation[Any], ids: Sequence[int]) -> str:
    stream = chat.answer_stream()
    for token in ids:
        stream.feed(token)
        if stream.stopped:
            break
    stream.finish()
    return stream.text


def pick_seed(generation: GenerationConfig) -> int:
    """The seed of one conversation: the one that was set, or a new one."""
    return secrets.randbelow(MAX_SEED + 1) if generation.seed is None else generation.seed


def _request(
    prompt: Sequence[int],
    image_embeds: Sequence[Any],
    chat: Conversation[Any],
    generation: GenerationConfig,
    *,
    seed: int,
) -> Request:
    """`chat` says what ends an answer and what counts as written."""
    return Request(
        prompt=prompt,
        image_embeds=image_embeds,
        max_new_tokens=generation.max_new_tokens,
        stop_tokens=chat.stop_ids,
        written=chat.written_ids,
        sampling=Sampling(
            repetition_penalty=generation.repetition_penalty,
            temperature=generation.temperature,
            top_k=generation.top_k,
            top_p=generation.top_p,
            seed=seed,
        ),
    )


def pick_dtype(name: str) -> Any:
    """`auto` is bfloat16 on an accelerator and float32 on a CPU, where XLA emulates bfloat16."""
    if name not in ("auto", "float32", "bfloat16"):
        raise UserError(f"dtype is {name!r}; expected one of auto, float32, bfloat16.")
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def shipped_projection(name: str) -> Path:
    """The projection that comes with the package. Raises `UserError` where there is none."""
    path = Path(__file__).parent / "assets" / f"{name}_projection.safetensors"
    if not path.is_file():
        raise UserError(
            f"The package ships no projection for {name!r}. For a published model convert its weights (`python -m "
            f"convert {name} --help`) and give the folder; otherwise train a projection (train.py) and pass its file."
        )
    return path


def _load_projection(name: str, projection: str | Path | None, preset: Preset) -> Params:
    """`llama_proj`: from a file, from the model folder, or the one that is shipped for a preset."""
    from convert.projection import read_projection

    if projection is not None or name in PRESETS:
        path = Path(projection) if projection is not None else shipped_projection(name)
        return read_projection(path, preset.model)[0]
    folder = open_folder(name)
    if "llama_proj/kernel" not in folder.names():
        raise UserError(
            f"The model folder {name} holds no projection. Train one (train.py) and pass its file."
        )
    part: Params = folder.load({"llama_proj": abstract_params(preset.model)["llama_proj"]})
    llama_proj: Params = part["llama_proj"]
    return llama_proj


def load_frozen(
    name: str, *, dtype: Any = None, progress: Progress | None = None
) -> tuple[Params, Tokenizer]:
    """The frozen parts (all but `llama_proj`; `DISK` layout) and the tokenizer of a model, as `MiniGPT4.load` takes it.

    Args:
        dtype: of the arrays; None: as they are stored, which is float32 for `smol`.

    Raises:
        UserError: the preset has no weights that can be fetched, fetching or converting them failed, or the folder is
            damaged.
    """
    if name in PRESETS and name != "smol":
        raise UserError(
            f"There are no weights to fetch for the preset {name!r}: convert the published ones (`python -m convert "
            f"{name} --help`) and give the folder."
        )
    folder = _folder_of(name, progress=progress)
    abstract = abstract_params(folder.preset.model)
    frozen = {part: tree for part, tree in abstract.items() if part != "llama_proj"}
    try:
        folder.require_whole()
        tokenizer = load_tokenizer(folder.path)
        return folder.load(frozen, dtype=dtype), tokenizer
    except UserError as error:
        if name != "smol":
            raise
        raise UserError(
            f"{error}\nThese files were made from the fetched ones. Remove the folder {folder.path} and run the "
            "command again: it is made anew."
        ) from error


def frozen_parts(name: str) -> dict[str, str]:
    """Which files the frozen parts of a model came from: part -> SHA-256. Empty for a preset with random weights."""
    if name in PRESETS and name != "smol":
        return {}
    sums = _folder_of(name).fingerprints()
    return {part: digest for part, digest in sums.items() if part != "llama_proj"}


def _folder_of(name: str, *, progress: Progress | None = None) -> ModelFolder:
    if name == "smol":
        from convert.smol import prepare_smol

        return ModelFolder(prepare_smol(progress))
    return open_folder(name)
