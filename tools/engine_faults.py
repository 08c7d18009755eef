"""The parts of `serve_faults.py` whose server has an engine that fails: `faulty_server.py` instead of `serve.py`."""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Callable

from minigpt4_jax.exits import ENGINE_FAILED
from tests.benchmark_scripts import load_script
from tools.bystanders import Asking, Row, Wrong, require, statuses
from tools.rude_clients import Visit, crowd

serve_load = load_script("serve_load")
server_process = load_script("server_process")
ServerProcess = server_process.ServerProcess

FAULTY = (sys.executable, "-m", "tools.faulty_server")
MANY_FAULTS = "faults.max_faults=1000000"
"""The server goes on, whatever happens."""


def faults(fault: str, share: float) -> Callable[[argparse.Namespace], Row]:
    """The engine fails in this share of its steps (tokens for `nan`), and the server lives on."""

    def part(args: argparse.Namespace) -> Row:
        count = max(args.requests // 5, 20)
        # It may break the request before the trouble too: the first answer comes from a server that is whole.
        with ServerProcess() as whole:
            whole.wait_until_ready()
            expected = Asking(whole, seed=args.seed).expected
        with ServerProcess([MANY_FAULTS], launcher=[*FAULTY, fault, str(share)]) as server:
            server.wait_until_ready()
            asking = _Stubborn(server, seed=args.seed)
            require(
                asking.expected == expected, "the answer of a server that fails", asking.expected
            )
            visits = asking.many(count, leaving=0.0)
            failed = [v for v in visits if v.status == 500 or v.error.startswith("in the stream")]
            whole_ones = [v for v in visits if v.status == 200 and v.whole and not v.error]
            others = [v for v in visits if v not in failed and v not in whole_ones]
            require(not others, "requests that were neither answered nor failed", others[:3])
            require(
                bool(failed) and bool(whole_ones),
                "failed and whole",
                (len(failed), len(whole_ones)),
            )
            injected = server.said().count("injected by tools")
            metrics = server_process.read_metrics(server.url)
            return {
                "requests": len(visits),
                "answered_whole": len(whole_ones),
                "failed_as_injected": len(failed),
                "statuses": statuses(visits),
                "engine_faults": int(metrics["engine_faults_total"]),
                "told_in_the_log": injected > 0 or fault == "nan",
                **asking.end(),
            }

    return part


class _Stubborn(Asking):
    """Asks again until it is answered: this server fails by design."""

    def alone(self) -> str:
        for _ in range(50):
            try:
                return super().alone()
            except Wrong as wrong:
                last = wrong
        raise last


def fault_storm(args: argparse.Namespace) -> Row:
    """Every step fails: after `faults.max_faults` the server is given up and its process ends, with its own code."""
    with ServerProcess(launcher=[*FAULTY, "dispatch", "1.0"]) as server:
        server.wait_until_ready()
        body = serve_load.chat_body(
            serve_load.Question("Name three fruits.", None),
            model="smol",
            max_tokens=8,
            stream=False,
        )
        seen: list[Visit] = []
        while server.alive and len(seen) < 100 and (not seen or seen[-1].status):
            seen += asyncio.run(
                crowd(server.url, [(body, False)], ["never"], at_once=1, rng=random.Random(0))
            )
        code = server.process.wait(timeout=60)
    require(code == ENGINE_FAILED, f"the exit code, expected {ENGINE_FAILED}", code)
    require(all(v.status in (0, 500, 503) for v in seen), "statuses", statuses(seen))
    return {"exit_code": code, "statuses": statuses(seen)}
