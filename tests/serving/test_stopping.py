"""How a server ends when something is in its way: nobody reads what it says, a thread is dead or does not end."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml

from minigpt4_jax import MiniGPT4, cli, cli_serve
from minigpt4_jax.exits import ENGINE_FAILED, INTERRUPTED
from minigpt4_jax.serve_config import FaultsConfig, ServeConfig
from minigpt4_jax.serving import server as server_module
from minigpt4_jax.serving.scheduler import JOIN_S
from minigpt4_jax.serving.server import LAST_WORDS_S
from tests.serving.fakes import Bench, FakeModel, running
from tests.serving.running import LIMIT_S, held_stream, read_until, run_server, wait_until

MANIFEST = Path(__file__).parents[2] / "deploy" / "serve" / "kubernetes.yaml"


@pytest.fixture(scope="module")
def model(make_model: Callable[..., MiniGPT4]) -> MiniGPT4:
    return make_model(num_slots=1)


def config(**fields: Any) -> ServeConfig:
    return ServeConfig(model="tiny", port=0, context=128, num_slots=1, **fields)


# --- the thread of the engine ---


def end_thread(*args: Any) -> None:
    raise SystemExit


@pytest.mark.parametrize("place", ["idle", "step"])
def test_a_thread_that_dies_of_anything_breaks_the_server(place: str) -> None:
    bench = Bench(FakeModel(), real_time=True)
    if place == "idle":
        bench.scheduler._await_work = end_thread  # type: ignore[method-assign,assignment]
    bench.engine.on_step = end_thread
    with running(bench) as scheduler:
        heard = bench.submit("a")[1] if place == "step" else None
        wait_until(lambda: bool(bench.fatal))
        assert scheduler.state == "broken"
    assert bench.fatal == ["the engine's thread failed (SystemExit)"]
    assert heard is None or heard.status == 500


def test_a_thread_that_is_gone_without_a_word_is_noticed() -> None:
    bench = Bench(FakeModel(), faults=FaultsConfig(stall_s=0.1), real_time=True)
    bench.scheduler._await_work = lambda: False  # type: ignore[method-assign]
    with running(bench):
        wait_until(lambda: bool(bench.fatal))
    assert bench.fatal == ["the engine's thread is gone"]


# --- signals ---


def test_a_signal_stops_a_server_that_nobody_listens_to(model: MiniGPT4) -> None:
    with run_server(model, config()) as running:

        def say(text: str) -> None:
            raise BrokenPipeError(32, "Broken pipe")

        running.server._say = say
        running.stop()
        wait_until(lambda: running.codes != [])
    assert running.codes == [0]


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_what_nobody_reads_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Broken())
    cli_serve._say("Stopping.")


def test_closing_holds_up_no_second_signal(model: MiniGPT4) -> None:
    with run_server(model, config()) as running:
        scheduler = running.server.scheduler
        close, closes, ends = scheduler.close, threading.Event(), threading.Event()
        in_time: list[bool] = []

        def hang() -> None:
            closes.set()
            in_time.append(ends.wait(LIMIT_S / 4))

        scheduler.close = hang  # type: ignore[method-assign]
        running.stop()
        assert closes.wait(LIMIT_S)
        assert running.codes == []
        running.stop()
        wait_until(lambda: running.codes != [])
        ends.set()
        wait_until(lambda: in_time != [])
        close()
    assert running.codes == [INTERRUPTED]
    assert in_time == [True]  # the signal came through while it hung


def test_a_stop_ends_before_it_is_killed() -> None:
    """By `terminationGracePeriodSeconds` of the manifest."""
    pod = next(yaml.safe_load_all(MANIFEST.read_text()))["spec"]["template"]["spec"]
    longest_s = FaultsConfig().drain_s + LAST_WORDS_S + JOIN_S
    assert longest_s + 10 <= pod["terminationGracePeriodSeconds"]


# --- the process ---


@pytest.mark.parametrize("code", [0, INTERRUPTED])
def test_the_command_ends_its_process_whatever_threads_are_left(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(Exception):
        pass

    def end(code: int) -> NoReturn:
        raise Ended(code)

    monkeypatch.setattr(cli_serve, "set_up_jax", lambda: None)
    monkeypatch.setattr(cli_serve, "_set_up_log", lambda: None)
    monkeypatch.setattr(cli_serve, "end_process", end)
    monkeypatch.setattr(server_module, "serve", lambda *args, **settings: code)
    with pytest.raises(Ended) as ended:
        cli.main(["serve"])
    assert ended.value.args == (code,)


# --- signals, and an engine that is given up ---


def test_stopping_lets_answers_finish_and_refuses_new_ones(model: MiniGPT4) -> None:
    with run_server(model, config()) as running, held_stream(running, model) as (connection, held):
        running.stop()
        wait_until(lambda: running.server.scheduler.state == "draining")
        status, _, body = running.ask("GET", "/ready")
        assert (status, body["error"]["code"]) == (503, "service_unavailable")
        assert running.ask("GET", "/health")[0] == 200
        status, headers, body = running.chat()
        assert (status, headers["retry-after"]) == (503, "10")
        assert body["error"]["code"] == "service_unavailable"
        held.go_on()
        assert read_until(connection, b"[DONE]")
    assert running.codes == [0]


def test_what_is_not_answered_in_time_ends_with_an_error_event(model: MiniGPT4) -> None:
    faults = FaultsConfig(drain_s=0.1)
    with (
        run_server(model, config(faults=faults)) as running,
        held_stream(running, model) as (connection, held),
    ):
        running.stop()
        body = read_until(connection, b"service_unavailable")
        assert b"[DONE]" not in body
        held.go_on()
    assert running.codes == [0]


def test_a_second_signal_ends_at_once(model: MiniGPT4) -> None:
    with run_server(model, config()) as running, held_stream(running, model) as (_, held):
        running.stop()
        wait_until(lambda: running.server.scheduler.state == "draining")
        running.stop()
        wait_until(lambda: running.codes != [])
        held.go_on()
        running.server.scheduler.close()
    assert running.codes == [INTERRUPTED]


def test_an_engine_that_is_given_up_ends_the_server_with_its_own_code(model: MiniGPT4) -> None:
    faults = FaultsConfig(max_faults=1)
    with run_server(model, config(faults=faults)) as running:
        dispatch = model.engine._dispatch

        def broken() -> Any:
            raise RuntimeError("the device is gone, at 0x7f00")

        model.engine._dispatch = broken  # type: ignore[method-assign]
        status, _, body = running.chat()
        assert (status, body["error"]["code"]) == (500, "internal_error")
        assert "0x7f00" not in json.dumps(body)
        assert running.ask("GET", "/ready")[0] == 200  # one fault is mended
        assert running.chat()[0] == 500
        wait_until(lambda: running.codes != [])
        running.server.scheduler.close()
        model.engine._dispatch = dispatch  # type: ignore[method-assign]
    assert running.codes == [ENGINE_FAILED]
