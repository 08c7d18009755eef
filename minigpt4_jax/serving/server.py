"""One server process: the socket, uvicorn, signals, and how it ends.

For: `serve`, which `minigpt4 serve` calls, and `Server`, which tests and benchmarks run in a thread. Not for: routes
(`app.py`), nor where a model comes from: the caller brings a function that loads one.

The end: SIGTERM or SIGINT drains (503 for new requests, `/ready` says so, what is under way may finish within
`faults.drain_s`, then it fails with 503) and exits with 0; a second signal ends at once. An engine that is given up
ends the process with `ENGINE_FAILED`, for a supervisor to start it anew.

Differs from uvicorn's own main, which knows nothing of a queue to be drained, and from the original's demo, which ends
in the middle of an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from minigpt4_jax.api import MiniGPT4
from minigpt4_jax.config import UserError
from minigpt4_jax.exits import ENGINE_FAILED, INTERRUPTED
from minigpt4_jax.serve_config import ServeConfig
from minigpt4_jax.serving.app import make_app
from minigpt4_jax.serving.connections import make_connection, room_for_connections
from minigpt4_jax.serving.keys import check_exposure, load_keys
from minigpt4_jax.serving.metrics import Metrics
from minigpt4_jax.serving.scheduler import Scheduler

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 65
"""An idle connection is kept for so long: longer than the 60 s of common proxies, so that it is they who close."""
LAST_WORDS_S = 5
"""After draining: for the last bytes to reach clients that read slowly."""
BACKLOG = 512
LOOK_S = 0.1
"""How often the start looks whether the scheduler is ready; only the message waits for it."""
Progress = Callable[[int, int], None]
"""Called with (programs compiled, programs in all), on another thread."""


def serve(
    config: ServeConfig,
    *,
    load_model: Callable[[], MiniGPT4],
    say: Callable[[str], None],
    progress: Progress | None = None,
) -> int:
    """Serves until a signal or a fault ends it, and returns the exit code.

    Args:
        load_model: called once keys and port are known to be good.
        say: gets the address, and how long it took to be ready.

    Raises:
        UserError: no key where one is needed, a port that is taken, or a model that cannot be loaded.
    """
    keys = load_keys(config.access, os.environ)
    check_exposure(config, keys)
    began_s = time.monotonic()
    with bind(config.host, config.port) as listener:
        server = Server(
            config,
            model=load_model(),
            listener=listener,
            keys=keys,
            say=say,
            progress=progress,
            began_s=began_s,
        )
        return server.run()


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address that does not listen yet. Raises `UserError` where that cannot be."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise UserError(
            f"host is {host!r}, which is no address and has none; expected one of this machine's, such as 127.0.0.1 or "
            "0.0.0.0 (all)."
        ) from error
    if host == "localhost":  # one socket has one family, and clients that try only one try IPv4
        found.sort(key=lambda each: each[0] != socket.AF_INET)
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UserError(_why_not_bound(error, host, port)) from error
    return listener


def _why_not_bound(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port is {port}, which another program listens on at {host}; expected a free one. Choose another with "
            "port=8001, or port=0 for any free one."
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port is {port}, which this user may not listen on; expected one from 1024 to 65535, or 0."
    return (
        f"host is {host!r}, which cannot be listened on ({os.strerror(error.errno or 0)}); expected an address of this "
        "machine, such as 127.0.0.1 or 0.0.0.0 (all)."
    )


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `Server`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One server around a loaded model.

    Args:
        listener: a bound socket, which the caller closes.
        keys: any of them opens the routes; none opens them to everybody.
        began_s: when the start began, on the clock of `time.monotonic`; None is now.
    """

    def __init__(
        self,
        config: ServeConfig,
        *,
        model: MiniGPT4,
        listener: socket.socket,
        keys: tuple[str, ...] = (),
        say: Callable[[str], None] = log.info,
        progress: Progress | None = None,
        began_s: float | None = None,
    ) -> None:
        self.config = config
        self._listener, self._say, self._progress = listener, say, progress
        self._began_s = time.monotonic() if began_s is None else began_s
        self.metrics = Metrics(
            config.name,
            load=lambda: self.scheduler.load(),
            image_cache=model.image_cache,
            compiled=lambda: model.engine.compiled_programs,
            leaks=lambda: self.scheduler.leaks,
        )
        self.scheduler = Scheduler(
            model,
            max_waiting=config.limits.max_waiting,
            beside=config.compile_beside,
            faults=config.faults,
            observer=self.metrics,
            on_fatal=self._on_fatal,
        )
        self.app = make_app(
            config, model=model, scheduler=self.scheduler, metrics=self.metrics, keys=keys
        )
        self._uvicorn = _Uvicorn(self._uvicorn_config())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._at_once = asyncio.Event()
        self._stopping = False
        self._code = 0

    def _uvicorn_config(self) -> uvicorn.Config:
        limits = self.config.limits
        return uvicorn.Config(
            self.app,
            http=make_connection(
                max_connections=room_for_connections(limits.max_connections),
                header_timeout_s=limits.body_timeout_s,
                write_timeout_s=limits.write_timeout_s,
            ),
            ws="none",
            lifespan="off",  # `_run` does it: uvicorn logs a traceback for one that a second signal cuts off
            log_config=None,
            access_log=False,  # guards.Frame writes one, with the request's id and without its query
            proxy_headers=False,  # else a client names its own address
            server_header=False,
            h11_max_incomplete_event_size=limits.max_header_bytes,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=LAST_WORDS_S,
            backlog=BACKLOG,
        )

    @property
    def address(self) -> str:
        """Such as `http://127.0.0.1:8000`."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def run(self) -> int:
        """Serves until it is stopped and returns the exit code. On the main thread it handles signals."""
        return asyncio.run(self._run())

    def stop(self) -> None:
        """As a signal: the first call drains, the second ends at once. From any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
                self._loop.call_soon_threadsafe(self._stop)

    async def _run(self) -> int:
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._stop)
        self.scheduler.start(progress=self._progress)
        self._say(f"Listening at {self.address}; compiling what requests need.")
        announcing = self._loop.create_task(self._announce())
        try:
            async with self.app.router.lifespan_context(self.app):
                await self._uvicorn.serve([self._listener])
        finally:
            announcing.cancel()
            if self._code == 0:  # else its thread may hang, or somebody asked to end at once
                await self._close()
        return self._code

    async def _close(self) -> None:
        """Closes the scheduler in a thread of its own; a second signal waits for it no longer."""
        assert self._loop is not None
        loop, closed = self._loop, self._at_once

        def close() -> None:
            self.scheduler.close()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waited
                loop.call_soon_threadsafe(closed.set)

        threading.Thread(target=close, name="close", daemon=True).start()
        await closed.wait()

    async def _announce(self) -> None:
        while self.scheduler.state == "starting":
            await asyncio.sleep(LOOK_S)
        if self.scheduler.state == "ready":
            took_s = time.monotonic() - self._began_s
            page = f"; chat at {self.address}" if self.config.page else ""
            self._say(f"Ready in {took_s:.1f} s: {self.address}/v1{page}")

    def _stop(self) -> None:
        # Acts before it speaks, which may fail or wait: nobody reads it any more.
        if self._stopping:
            self._code = self._code or INTERRUPTED
            self._uvicorn.should_exit = self._uvicorn.force_exit = True
            self._at_once.set()
            self._say("Stopping at once.")
            return
        self._stopping = True
        # Not a thread of the loop's executor: that one would be waited for by a second signal too.
        threading.Thread(target=self._drain, name="drain", daemon=True).start()
        self._say(
            f"Stopping: what is being answered may take {self.config.faults.drain_s:g} s more. A second signal ends "
            "it at once."
        )

    def _drain(self) -> None:
        if not self.scheduler.drain(self.config.faults.drain_s):
            log.warning("not all was answered within %g s", self.config.faults.drain_s)
        self._uvicorn.should_exit = True

    def _on_fatal(self, reason: str) -> None:
        """On the engine's or the watchdog's thread; what waits has been answered with an error."""
        log.critical("the engine is given up: %s", reason)
        self._code = ENGINE_FAILED
        self._uvicorn.should_exit = True
