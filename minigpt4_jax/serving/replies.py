"""From the events of a job to what goes out: OpenAI's chat completion, whole or in chunks.

For: the JSON of an answer. Not for: its framing as server-sent events and `[DONE]`, status codes (`app.py`).

A stream is, in this order: for each answer a chunk with the role and empty content; chunks with text; for each answer
as it ends a chunk with `finish_reason` and an empty delta; and, if asked for, a chunk without choices that has the
numbers of tokens. A failure in the middle is one `{"error": ...}`, and nothing comes after it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from minigpt4_jax.config import IMAGE_TOKEN_ID
from minigpt4_jax.data.tokenizer import Tokenizer
from minigpt4_jax.serving.errors import ApiError
from minigpt4_jax.serving.fields import ChatRequest
from minigpt4_jax.serving.jobs import Done, Ended, Event, Failed, Job, Piece, Started, Token

VERY_UNLIKELY = -9999.0
"""OpenAI's stand-in for a log-probability that JSON cannot write."""


@dataclass
class _Choice:
    """One answer so far."""

    text: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str | None = None


class ChatReply:
    """What one request is answered with. Feed it every event of the job, in order.

    Args:
        request: what was asked.
        job: whose events these are.
        model_name: what the API calls the model.
        fingerprint: of the weights: the same seed gives the same answer as long as it is the same.
        created: when the answer was begun, in seconds since 1970.
        tokenizer: that names tokens where log-probabilities were asked for.
    """

    def __init__(
        self,
        request: ChatRequest,
        job: Job,
        *,
        model_name: str,
        fingerprint: str,
        created: int,
        tokenizer: Tokenizer,
    ) -> None:
        # Not the request itself: its pictures are megabytes of text, and the answer may take minutes.
        self._usage_chunk, self._top = request.usage_chunk, request.top_logprobs or 0
        self._job, self._tokenizer = job, tokenizer
        self._head = {
            "id": job.id if job.id.startswith("chatcmpl-") else f"chatcmpl-{job.id}",
            "created": created,
            "model": model_name,
            "system_fingerprint": fingerprint,
        }
        self._choices = [_Choice() for _ in range(job.n)]
        self._cached_tokens = 0
        self._error: ApiError | None = None
        self._done = False

    def feed(self, event: Event) -> list[dict[str, Any]]:
        """Takes the next event and returns the chunks of a stream that it is told by."""
        match event:
            case Started(cached_tokens):
                self._cached_tokens = cached_tokens
                role = {"role": "assistant", "content": ""}
                return [self._chunk(index, role) for index in range(self._job.n)]
            case Piece(index, text, num_tokens, tokens):
                choice = self._choices[index]
                choice.num_tokens = num_tokens
                told = [self._token(token) for token in tokens]
                choice.text.append(text)
                choice.logprobs += told
                return [self._chunk(index, {"content": text}, told)] if text or told else []
            case Ended(index, reason, num_tokens):
                choice = self._choices[index]
                choice.num_tokens, choice.finish_reason = num_tokens, reason
                return [self._chunk(index, {}, finish_reason=reason)]
            case Failed(error):
                self._error = error
                return [error.body()]
            case Done():
                self._done = True
                if not self._usage_chunk:
                    return []
                return [self._frame("chat.completion.chunk", [], usage=self.usage())]

    def result(self) -> dict[str, Any]:
        """The whole completion, after `Done`.

        Raises:
            ApiError: the job failed.
            ValueError: it is not over.
        """
        if self._error is not None:
            raise self._error
        if not self._done:
            raise ValueError("The job is not over; expected every event up to Done to be fed.")
        choices = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": "".join(choice.text),
                    "refusal": None,
                },
                "logprobs": self._logprobs(choice.logprobs),
                "finish_reason": choice.finish_reason,
            }
            for index, choice in enumerate(self._choices)
        ]
        return self._frame("chat.completion", choices, usage=self.usage())

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens. A stop token counts, as does what a stop string cut off."""
        written = sum(choice.num_tokens for choice in self._choices)
        prompt = self._job.prompt
        return {
            "prompt_tokens": len(prompt),
            "completion_tokens": written,
            "total_tokens": len(prompt) + written,
            "prompt_tokens_details": {
                "cached_tokens": self._cached_tokens,
                "image_tokens": sum(token == IMAGE_TOKEN_ID for token in prompt),
            },
        }

    def _frame(self, kind: str, choices: list[Any], **fields: Any) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices, **fields}

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        logprobs: Sequence[dict[str, Any]] = (),
        *,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self._usage_chunk else {}
        return self._frame("chat.completion.chunk", [choice], **usage)

    def _logprobs(self, told: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
        return {"content": list(told), "refusal": None} if self._job.logprobs else None

    def _token(self, token: Token) -> dict[str, Any]:
        likeliest = token.logprobs.top[: self._top]
        return {
            **self._named(token.id, token.logprobs.chosen),
            "top_logprobs": [self._named(other, logprob) for other, logprob in likeliest],
        }

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        """A token with its bytes: a part of a character is shown as U+FFFD, and only its bytes tell it."""
        data = self._tokenizer.token_bytes(token_id)
        if data is None:
            token = self._tokenizer.token_name(token_id) or ""
        else:
            token = data.decode("utf-8", errors="replace")
        return {
            "token": token,
            "logprob": logprob if math.isfinite(logprob) else VERY_UNLIKELY,
            "bytes": None if data is None else list(data),
        }
