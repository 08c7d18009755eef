"""The HTTP application: which routes there are and which guards stand before them.

For: `make_app`, and the routes that only tell something. Not for: chat completions (`chat_route.py`), the guards
(`guards.py`, `bodies.py`), the text of the OpenAPI page (`openapi.py`), sockets and signals (`server.py`).

Differs from the original, whose demo is a Gradio page without an API.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from minigpt4_jax.api import MiniGPT4
from minigpt4_jax.serve_config import ServeConfig
from minigpt4_jax.serving.bodies import BodyGuard, HeaderGuard, take_body
from minigpt4_jax.serving.chat_route import ChatRoute
from minigpt4_jax.serving.dialogue import detokenize, tokenize
from minigpt4_jax.serving.errors import ApiError, unavailable
from minigpt4_jax.serving.guards import (
    Frame,
    HostGuard,
    InFlight,
    KeyGuard,
    PathGuard,
    Refusal,
    Refusals,
    allowed_names,
    no_route,
)
from minigpt4_jax.serving.mailbox import Post
from minigpt4_jax.serving.metrics import Metrics
from minigpt4_jax.serving.openapi import add_routes
from minigpt4_jax.serving.page_files import load_page, page_routes
from minigpt4_jax.serving.pictures import PictureReader
from minigpt4_jax.serving.protocol import parse_detokenize, parse_tokenize
from minigpt4_jax.serving.scheduler import Scheduler

API_VERSION = "1"
"""Of the routes, which is the 1 of `/v1`; not of this software."""
PROBES = ("/health", "/ready")
BODY_PATHS = ("/v1/chat/completions", "/tokenize", "/detokenize")
LARGEST_BODIES = 8
"""So many bodies of `limits.max_body_bytes` may be in memory at a time, before they are read."""
NUM_THREADS = 4
"""For parsing and tokenising: a few, since Python runs one at a time; more than one, since one may be long."""


def make_app(
    config: ServeConfig,
    *,
    model: MiniGPT4,
    scheduler: Scheduler,
    metrics: Metrics,
    keys: Sequence[str],
) -> FastAPI:
    """The application of one server. Its lifespan owns the threads for text and for pictures, not the scheduler.

    Args:
        keys: any of them opens the routes; none opens them to everybody.
    """
    pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="text")
    pictures = PictureReader(model.encoder.prepare, config.pictures, decoded=metrics.decoded)
    posts: list[Post] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        posts.append(Post())
        yield
        pictures.close()
        pool.shutdown(wait=False, cancel_futures=True)

    page = load_page() if config.page else {}
    told = _Told(config, model=model, scheduler=scheduler, metrics=metrics, pool=pool)
    chat = ChatRoute(
        config,
        model=model,
        scheduler=scheduler,
        pictures=pictures,
        pool=pool,
        post=lambda: posts[0],
    )
    app = FastAPI(
        title="minigpt4_jax",
        version=API_VERSION,
        docs_url=None,  # the documentation pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        middleware=_guards(config, keys=keys, page=page, metrics=metrics),
        exception_handlers={HTTPException: _refuse_route},
    )
    add_routes(
        app,
        config,
        {
            "/v1/chat/completions": chat.answer,
            "/v1/models": told.models,
            "/v1/models/{model_id:path}": told.model,
            "/tokenize": told.tokenize,
            "/detokenize": told.detokenize,
            "/health": told.health,
            "/ready": told.ready,
            "/metrics": told.metrics,
        },
        vocab_size=model.tokenizer.vocab_size,
        keyed=bool(keys),
    )
    app.router.routes.extend(page_routes(page))
    return app


def _guards(
    config: ServeConfig, *, keys: Sequence[str], page: dict[str, Any], metrics: Metrics
) -> list[Middleware]:
    """Outermost first."""
    open_paths = (*PROBES, *page)
    limits, access = config.limits, config.access
    known = {*open_paths, *BODY_PATHS, "/v1/models", "/metrics", "/openapi.json"}

    def responded(path: str, status: int) -> None:
        metrics.responded(path if path in known else "other", status)

    names = allowed_names(config.host, loopback=config.loopback, allowed_hosts=access.allowed_hosts)
    cors = Middleware(
        _Cors,
        allow_origins=access.cors_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "x-api-key", "x-request-id", "content-type"],
        expose_headers=["x-request-id", "retry-after", "x-should-retry"],
    )
    return [
        Middleware(Frame, responded=responded),
        *([cors] if access.cors_origins else []),
        Middleware(Refusals, rejected=metrics.rejected),
        Middleware(HeaderGuard, max_bytes=limits.max_header_bytes),
        Middleware(HostGuard, names=names, open_paths=PROBES),
        Middleware(KeyGuard, keys=keys, open_paths=open_paths),
        Middleware(PathGuard),
        Middleware(
            InFlight,
            max_per_caller=limits.max_per_key,
            max_total=2 * limits.max_waiting + config.num_slots,
        ),
        Middleware(
            BodyGuard,
            max_bytes=limits.max_body_bytes,
            max_total_bytes=LARGEST_BODIES * limits.max_body_bytes,
            timeout_s=limits.body_timeout_s,
        ),
    ]


class _Cors(CORSMiddleware):
    """Starlette's, with refusals in the shape of all others; its own are plain text."""

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        allowed = {
            name: value
            for name, value in answer.headers.items()
            if name == "vary" or name.startswith("access-control-")
        }
        said = (
            f"This server does not let a page do that: {bytes(answer.body).decode()}. Expected an origin of "
            "access.cors_origins of its configuration, GET or POST, and the usual headers."
        )
        return Refusal(ApiError(400, said, code="cors_not_allowed"), headers=allowed)


async def _refuse_route(request: Request, error: Exception) -> Response:
    """What the router refuses: no such route, or not with this method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        said = f"This route does not know the method {request.method[:20]!r}; see /openapi.json for those that it does."
        refusal = ApiError(405, said, code="method_not_allowed")
    else:
        refusal = no_route()
    return Refusal(refusal, headers=error.headers)


class _Told:
    """The routes that only tell something."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        model: MiniGPT4,
        scheduler: Scheduler,
        metrics: Metrics,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._config, self._model, self._scheduler = config, model, scheduler
        self._metrics, self._pool = metrics, pool
        self._card = {
            "id": config.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "minigpt4_jax",
            "root": config.name,
            "max_model_len": config.context,
        }

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        state = self._scheduler.state
        if state != "ready":
            wait_s = 2 if state == "starting" else None
            raise unavailable(
                f"The server is {state}; expected to ask again later.", retry_after_s=wait_s
            )
        return JSONResponse({"status": "ready"})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card]})

    async def model(self, request: Request) -> Response:
        if request.path_params["model_id"] != self._config.name:
            raise ApiError(
                404,
                f"There is no such model; expected {self._config.name!r}.",
                param="model",
                code="model_not_found",
            )
        return JSONResponse(self._card)

    async def metrics(self, request: Request) -> Response:
        content, kind = await self._in_thread(self._metrics.render)
        return Response(content, headers={"content-type": kind})

    async def tokenize(self, request: Request) -> Response:
        body = await take_body(request.receive)

        def work() -> dict[str, Any]:
            return tokenize(parse_tokenize(body, self._config), model=self._model)

        return JSONResponse(await self._in_thread(work))

    async def detokenize(self, request: Request) -> Response:
        body = await take_body(request.receive)

        def work() -> dict[str, Any]:
            return detokenize(parse_detokenize(body, self._config), model=self._model)

        return JSONResponse(await self._in_thread(work))

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)
