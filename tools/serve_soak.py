"""A real server with the smol model under mixed load for half an hour: does it keep anything that it should give back?

    python -m tools.serve_soak [--minutes 30] [--out benchmarks/results/serve_soak.json]

Requests with and without pictures, streamed or not, more at once than there are slots; a quarter of them leaves
somewhere (`rude_clients.py`). Every ten seconds the process is looked at: resident memory, open files, threads, slots.
The pictures come back after `QUESTIONS` requests: the cache of embeddings, which may grow to 256 MB, is filled during
the warm-up, in which also the programs are compiled that the requests want; neither is a part of the slope. Exits with
1 where a request that stayed was not answered, a slot stayed taken, or memory grew by more than `MAX_SLOPE`.

Not for: single faults (`serve_faults.py`), speed (`benchmarks/serve_load.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import http.client
import itertools
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmark_scripts import load_script
from tools.bystanders import statuses
from tools.rude_clients import LEAVES, Leave, Visit, visit

measuring = load_script("measuring")
serve_load = load_script("serve_load")
server_process = load_script("server_process")

AT_ONCE = 12
LEAVING = 0.25
QUESTIONS = 400
LOOK_S = 10.0
WARM_UP = 1 / 3
"""Of the time: pools and caches that fill. The slope is of what comes behind it."""
MAX_SLOPE = 1.0
"""MB per minute behind the warm-up."""
MAX_TOKENS = 32
IDLE_S = 60.0
END_S = 60.0
"""How long a server that answers no more may take to end."""


def look(server: Any, began_s: float) -> dict[str, Any]:
    """What the process holds at this moment; memory in MB. Raises `OSError` or `HTTPException` where it has ended."""
    metrics = server_process.read_metrics(server.url)
    folder = Path("/proc") / str(server.process.pid)
    state = dict(
        line.split(":", 1) for line in (folder / "status").read_text().splitlines() if ":" in line
    )
    if "VmRSS" not in state:
        raise ProcessLookupError(f"the process {server.process.pid} holds no memory any more")
    return {
        "at_s": round(time.monotonic() - began_s, 1),
        "rss_mb": round(int(state["VmRSS"].split()[0]) / 1024, 1),
        "threads": int(state["Threads"]),
        "open_files": len(list((folder / "fd").iterdir())),
        "slots_used": int(metrics["slots_used"]),
        "waiting": int(metrics["num_requests_waiting"]),
        "requests": int(metrics["request_success_total"]),
        "programs": int(metrics["compile_events_total"]),
    }


async def load(url: str, *, go_on: Callable[[], bool], seed: int) -> list[Visit]:
    """Visits as long as `go_on` says so; those under way are finished."""
    rng = random.Random(seed)
    questions = serve_load.make_questions(QUESTIONS, pictures=0.5, seed=seed)
    found: list[Visit] = []
    numbers = itertools.count()

    async def worker() -> None:
        while go_on():
            question = questions[next(numbers) % QUESTIONS]
            stream = rng.random() < 0.5
            leave: Leave = rng.choice(LEAVES) if rng.random() < LEAVING else "never"
            body = serve_load.chat_body(
                question, model="smol", max_tokens=MAX_TOKENS, stream=stream
            )
            found.append(await visit(url, body, leave=leave, stream=stream, rng=rng))

    await asyncio.gather(*(worker() for _ in range(AT_ONCE)))
    return found


def slope_mb_per_minute(samples: list[dict[str, Any]]) -> float:
    """Of a line through resident memory behind the warm-up."""
    warm = [s for s in samples if s["at_s"] >= WARM_UP * samples[-1]["at_s"]]
    minutes = [sample["at_s"] / 60 for sample in warm]
    return float(np.polyfit(minutes, [sample["rss_mb"] for sample in warm], 1)[0])


def soak(server: Any, *, minutes: float, seed: int) -> dict[str, Any]:
    """Loads, looks, waits until all have left, and says what is left; or what went `wrong` where the server ends."""
    began_s, over = time.monotonic(), threading.Event()
    until_s = began_s + 60 * minutes
    visits: list[Visit] = []

    def go_on() -> bool:
        return not over.is_set() and time.monotonic() < until_s

    loading = threading.Thread(
        target=lambda: visits.extend(asyncio.run(load(server.url, go_on=go_on, seed=seed)))
    )
    loading.start()
    samples = []
    try:
        while loading.is_alive():
            samples.append(look(server, began_s))
            print(json.dumps(samples[-1]), flush=True)
            loading.join(LOOK_S)
        server_process.wait_until(
            lambda: server_process.read_metrics(server.url)["slots_used"] == 0, limit_s=IDLE_S
        )
        metrics, last = server_process.read_metrics(server.url), look(server, began_s)
    except (OSError, http.client.HTTPException) as error:
        return {"wrong": _why(server, error), "samples": samples}
    finally:
        over.set()
        loading.join()
    if not visits:
        return {"wrong": "no request was sent; the load failed, see above", "samples": samples}
    stayed = [visit for visit in visits if visit.leave == "never"]
    answered = [visit for visit in stayed if visit.whole and not visit.error]
    errors = collections.Counter(v.error or str(v.status) for v in stayed if v not in answered)
    return {
        "requests": len(visits),
        "left": len(visits) - len(stayed),
        "stayed": len(stayed),
        "answered_whole": len(answered),
        "not_answered": dict(errors),
        "statuses": statuses(visits),
        "leaked_slots": int(metrics["slots_used"] + metrics.get("slot_leaks_total", 0)),
        "engine_faults": int(metrics["engine_faults_total"]),
        "rss_slope_mb_per_minute": round(slope_mb_per_minute(samples), 3),
        "first": samples[0],
        "after_warm_up": next(
            sample for sample in samples if sample["at_s"] >= WARM_UP * samples[-1]["at_s"]
        ),
        "last": last,
        "samples": samples,
    }


def _why(server: Any, error: Exception) -> str:
    """Why the server did not answer."""
    try:
        return f"the server ended with code {server.process.wait(timeout=END_S)}"
    except subprocess.TimeoutExpired:
        return f"the server runs and does not answer: {error!r}"


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value of the server's configuration")
    args = parser.parse_args(argv)
    hardware = measuring.hardware()
    with server_process.ServerProcess(args.overrides) as server:
        server.wait_until_ready()
        found = soak(server, minutes=args.minutes, seed=args.seed)
        found["exit_code"] = server.process.poll() if "wrong" in found else server.stop()
    if args.out:
        head = {"hardware": hardware, "minutes": args.minutes, "seed": args.seed}
        args.out.write_text(json.dumps({**head, **found}, indent=1) + "\n")
    print(json.dumps({k: v for k, v in found.items() if k != "samples"}, indent=1))
    wrong = (
        "wrong" in found
        or found["leaked_slots"]
        or found["not_answered"]
        or found["exit_code"]
        or found["rss_slope_mb_per_minute"] > MAX_SLOPE
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
