"""From the `image_url` of a request to a picture that the engine can take, with bytes of unknown origin.

For: what URLs are taken, limits before anything is decoded, and decoding on a few threads with a deadline. Not for:
opening pictures (`data/images.py` alone does that), hosts and addresses (`fetch.py`), or the embeddings' cache.

Memory: PIL keeps 4 bytes a pixel, and hashing takes a copy: a picture of 49 million pixels took 470 MiB for a moment,
and 940 MiB with transparency to lay on white (measured). There are `num_threads` of them at once, and as many again
where some take longer than their time.

Differs from the original, where Gradio decodes whatever PIL knows in the handler of the request.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from minigpt4_jax.config import UserError
from minigpt4_jax.data.images import FORMATS, PictureError, PictureFault, PictureLimits, load_image
from minigpt4_jax.image_cache import Picture, PreparedImage
from minigpt4_jax.serve_config import PicturesConfig
from minigpt4_jax.serving.data_urls import DataUrl, parse_data_url
from minigpt4_jax.serving.errors import (
    ApiError,
    internal,
    invalid,
    overloaded,
    timed_out,
    unavailable,
)
from minigpt4_jax.serving.fetch import Fetcher
from minigpt4_jax.serving.workers import Workers

MAX_PENDING = 64
"""Pictures of all requests that are fetched, wait for a thread or are decoded. One more is answered 429."""
MAX_PENDING_OF_ONE = MAX_PENDING // 2
"""Of one caller (a key, or without keys an address), so that no one fills all of it alone."""
RETRY_AFTER_S = 2

_CODES: dict[PictureFault, str] = {
    "empty": "empty_image_file",
    "too many bytes": "image_file_too_large",
    "too large": "image_too_large",
    "format": "invalid_image_format",
    "damaged": "image_parse_error",
    "samples": "invalid_image_mode",
}
"""OpenAI's words, from the error codes of its Responses API."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PictureSource:
    """A picture as a request names it."""

    url: str
    param: str
    """Where it stands, such as `messages[0].content[1].image_url.url`."""


class PictureReader:
    """Reads the pictures of requests. For one event loop; `prepare` and `decoded` are called on threads.

    Args:
        prepare: `ImageEncoder.prepare`: gets an upright RGB picture.
        config: the limits.
        decoded: is told the seconds that a picture took from its bytes to the end of `prepare`, also of one refused.
        fetcher: for pictures of other hosts; None: as `config` says.

    Raises `UserError` for a configuration that cannot work.
    """

    def __init__(
        self,
        prepare: Callable[[Picture], PreparedImage],
        config: PicturesConfig,
        *,
        decoded: Callable[[float], None],
        fetcher: Fetcher | None = None,
    ) -> None:
        if unknown := set(config.formats) - set(FORMATS):
            raise UserError(
                f"pictures.formats has {', '.join(sorted(unknown))}; expected some of {', '.join(FORMATS)}."
            )
        if config.fetch_plain_http and not config.fetch_hosts:
            raise UserError(
                "pictures.fetch_plain_http is set and pictures.fetch_hosts is empty: expected hosts to fetch from. "
                "Name some, or leave both out."
            )
        self._prepare, self._config, self._decoded = prepare, config, decoded
        self._limits = PictureLimits(
            max_bytes=config.max_bytes,
            max_pixels=config.max_pixels,
            max_side=config.max_side,
            formats=config.formats,
        )
        self._fetcher = fetcher or (Fetcher(config) if config.fetch_hosts else None)
        self._expected = f"data:image/png;base64,... with one of {', '.join(config.formats)}"
        if self._fetcher is not None:
            self._expected += f", or {' or '.join(f'{each}://' for each in self._fetcher.schemes)} from an allowed host"
        self._workers = Workers(config.num_threads, name="decode")
        self._pending: Counter[str] = Counter()

    async def read(
        self, sources: Sequence[PictureSource], *, caller: str = ""
    ) -> list[PreparedImage]:
        """The pictures, in the order of `sources`. `caller` says whose they are, where there is more than one.

        Raises:
            ApiError: 400 with the `param` of the first bad one; 408 when decoding took longer than `decode_timeout_s`;
                429 when too many pictures wait, or these have waited so long; 503 behind `close`.
        """
        self._admit(sources, caller)
        found = [self._check(source) for source in sources]
        self._pending[caller] += len(sources)
        try:
            async with asyncio.TaskGroup() as group:  # a fault of one ends the others
                fetching = [
                    group.create_task(self._fetch(source, data))
                    for source, data in zip(sources, found, strict=True)
                ]
            payloads = [task.result() for task in fetching]
            # What stands behind one that could not be fetched is not worth its decoding.
            outcomes = await self._decode_all(_before_error(sources, payloads))
        finally:
            self._pending[caller] -= len(sources)
            if not self._pending[caller]:
                del self._pending[caller]
        prepared = []
        for outcome in (*outcomes, *payloads[len(outcomes) :]):
            if isinstance(outcome, ApiError):
                raise outcome
            if isinstance(outcome, PreparedImage):
                prepared.append(outcome)
        return prepared

    def close(self) -> None:
        """Drops what waits, and waits for nobody."""
        self._workers.close()
        if self._fetcher is not None:
            self._fetcher.close()

    def _admit(self, sources: Sequence[PictureSource], caller: str) -> None:
        if self._workers.closed:
            raise unavailable("The server is stopping.")
        most = self._config.max_count
        if len(sources) > most:
            raise invalid(
                f"The request has {len(sources)} pictures; expected at most {most}, those of earlier turns too. Leave "
                "some out.",
                param=sources[most].param,
                code="too_many_images",
            )
        for pending, bound, whose in (
            (self._pending[caller], MAX_PENDING_OF_ONE, " of this key or address"),
            (self._pending.total(), MAX_PENDING, ""),
        ):
            if pending and pending + len(sources) > bound:
                raise overloaded(
                    f"Too many pictures{whose} wait to be decoded; ask again later.",
                    retry_after_s=RETRY_AFTER_S,
                )

    def _check(self, source: PictureSource) -> DataUrl | None:
        """What can be told without reading a picture, in no time whatever its length. None: it must be fetched."""
        found = re.match(r"([a-zA-Z][a-zA-Z0-9+.-]{0,30}):", source.url)
        scheme = found[1].lower() if found else ""
        if scheme == "data":
            return parse_data_url(source.url, param=source.param, max_bytes=self._limits.max_bytes)
        if self._fetcher is not None and scheme in self._fetcher.schemes:
            return None
        if scheme in ("http", "https"):
            said = f"This server fetches no pictures from {scheme}: addresses."
        elif scheme:
            said = f"Pictures are not taken from {scheme}: addresses."
        else:
            said = "The picture's address begins with no scheme."
        raise invalid(
            f"{said} Expected {self._expected}.", param=source.param, code="invalid_image_url"
        )

    async def _fetch(
        self, source: PictureSource, data: DataUrl | None
    ) -> DataUrl | bytes | ApiError:
        if data is not None:
            return data
        assert self._fetcher is not None  # see _check
        try:
            return await self._fetcher.fetch(source.url, param=source.param)
        except ApiError as error:
            return error

    async def _decode_all(
        self, pictures: Sequence[tuple[PictureSource, DataUrl | bytes]]
    ) -> list[PreparedImage | ApiError]:
        if not pictures:
            return []
        limit_s = self._config.decode_timeout_s
        futures = [
            self._workers.submit(functools.partial(self._decode, source, payload))
            for source, payload in pictures
        ]
        try:
            await asyncio.wait([asyncio.wrap_future(each) for each in futures], timeout=limit_s)
        except asyncio.CancelledError:
            # The client has left. What waits is dropped; what runs must not keep its thread for ever.
            for future in futures:
                if not future.cancel() and not future.done():
                    asyncio.get_running_loop().call_later(limit_s, self._workers.give_up, future)
            raise
        return [self._outcome(future) for future in futures]

    def _outcome(self, future: Future[PreparedImage | ApiError]) -> PreparedImage | ApiError:
        if self._workers.give_up(future):
            _log.warning("A picture takes too long to decode; its thread was given up.")
            return timed_out(
                f"The pictures took longer than {self._config.decode_timeout_s:g} s to decode. Send smaller ones."
            )
        if future.cancelled():
            return overloaded(
                f"The pictures waited {self._config.decode_timeout_s:g} s for others to be decoded; ask again later.",
                retry_after_s=RETRY_AFTER_S,
            )
        return future.result()

    def _decode(self, source: PictureSource, payload: DataUrl | bytes) -> PreparedImage | ApiError:
        """On a thread. Returns errors: one that is raised would keep the pixels alive in its traceback."""
        started = time.perf_counter()
        try:
            data = payload if isinstance(payload, bytes) else payload.decode()
            return self._prepare(load_image(data, limits=self._limits))
        except ApiError as error:
            return error.with_traceback(None)
        except PictureError as error:
            _log.info("%s was refused: %s", source.param, error)
            return invalid(
                f"Cannot open the picture: {error.plain}",
                param=source.param,
                code=_CODES[error.fault],
            )
        except Exception:  # ours, or a library's in a place where none is expected: the client gets a fixed sentence
            _log.exception("%s could not be prepared.", source.param)
            return internal()
        finally:
            self._decoded(time.perf_counter() - started)


def _before_error(
    sources: Sequence[PictureSource], payloads: Sequence[DataUrl | bytes | ApiError]
) -> list[tuple[PictureSource, DataUrl | bytes]]:
    whole: list[tuple[PictureSource, DataUrl | bytes]] = []
    for source, payload in zip(sources, payloads, strict=True):
        if isinstance(payload, ApiError):
            break
        whole.append((source, payload))
    return whole
