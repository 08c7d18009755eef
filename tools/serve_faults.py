"""A real server with the smol model, ill-treated: who leaves, who reads slowly, what breaks, and what is left of it.

    python -m tools.serve_faults [--requests 1000] [--only leaving ...] [--out benchmarks/results/serve_faults.json]

Each part starts a server process of its own (`PARTS`), except that the first three share one. In all of them a request
that nobody disturbed must be answered as it was before the trouble, no slot may stay taken, and the process must live,
or end as it should. The parts that break the engine are in `engine_faults.py`; the last two have a cache folder
that cannot be written (a read-only mount and a full tmpfs, in a user namespace: `unshare`, util-linux).

Not for: limits and refusals (`tests/serving`), memory over time (`serve_soak.py`). Exits with 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import random
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from convert.fetch import cache_folder
from tests.benchmark_scripts import load_script
from tools.bystanders import AT_ONCE, Asking, Row, Wrong, require, statuses
from tools.engine_faults import fault_storm, faults
from tools.rude_clients import Visit, chat_request, crowd

server_process = load_script("server_process")
ServerProcess = server_process.ServerProcess

WRITE_TIMEOUT_S = 3.0
GIVEN_UP_S = 180.0
"""The longest that a server may take to give a slow reader up: the buffers between the two are filled before."""
SMALL_SEGMENT = 536
"""Bytes (RFC 9293's default). Of a loopback's segments of 64 kB Linux buffers 2.6 MB for the sender, a whole answer."""


# --- those who leave, those who are slow ---


def leaving(server: Any, args: argparse.Namespace) -> Row:
    """A third of the requests disconnects somewhere; the others must not notice."""
    asking = Asking(server, seed=args.seed)
    visits = asking.many(args.requests, leaving=1 / 3)
    stayed = [visit for visit in visits if visit.leave == "never"]
    wrong = [v for v in stayed if v.status != 200 or not v.whole or v.error]
    require(not wrong, "requests that stayed and were not answered", wrong[:3])
    hung = [visit for visit in visits if visit.error == "hangs"]
    require(not hung, "requests that hang", hung[:3])
    bad = [visit for visit in visits if visit.status >= 500]
    require(not bad, "5xx", bad[:3])
    points = collections.Counter(visit.leave for visit in visits)
    return {
        "requests": len(visits),
        "left": dict(sorted((k, v) for k, v in points.items() if k != "never")),
        "answered_whole": len(stayed),
        "statuses": statuses(visits),
        "5xx": len(bad),
        **asking.end(),
    }


def slow_reader(server: Any, args: argparse.Namespace) -> Row:
    """A client takes nothing of a large stream: it is given up, and others are answered meanwhile."""
    asking = Asking(server, seed=args.seed)
    body = json.loads(asking.body(0, stream=True))
    body |= {"max_completion_tokens": 600, "min_tokens": 600, "n": 4, "temperature": 1.0, "seed": 1}
    body |= {"logprobs": True, "top_logprobs": 5}
    address = urlsplit(server.url)
    request = chat_request(json.dumps(body).encode(), host=address.hostname, port=address.port)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SMALL_SEGMENT)
        slow.connect((address.hostname, address.port))
        slow.sendall(request)
        status = slow.recv(12).split()[-1].decode()
        start, answered = time.monotonic(), 0
        while server_process.read_metrics(server.url)["slots_used"]:
            require(time.monotonic() < start + GIVEN_UP_S, "not given up after, s", GIVEN_UP_S)
            asking.alone()
            answered += 1
        given_up_s = time.monotonic() - start
        closed, taken = _read_rest(slow)
    require(status == "200", "the slow reader's status", status)
    require(closed == "cut", "what became of the slow reader", closed)
    require(answered > 0, "others that were answered meanwhile", answered)
    return {
        "status": status,
        "write_timeout_s": WRITE_TIMEOUT_S,
        "given_up_after_s": round(given_up_s, 1),
        "others_answered_meanwhile": answered,
        "bytes_that_it_could_still_read": taken,
        **asking.end(),
    }


def _read_rest(connection: socket.socket) -> tuple[str, int]:
    """How a stream ends that was left lying, and the bytes that still came."""
    connection.settimeout(60)
    tail, taken = b"", 0
    try:
        while data := connection.recv(65536):
            tail, taken = (tail + data)[-4096:], taken + len(data)
    except ConnectionResetError:
        return "cut", taken
    except TimeoutError:
        return "hangs", taken
    return ("whole" if b"[DONE]" in tail else "cut"), taken


def half_closed(server: Any, args: argparse.Namespace) -> Row:
    """Clients that close their sending side behind the request: answered or closed, and never a slot kept."""
    asking = Asking(server, seed=args.seed)
    address = urlsplit(server.url)
    ends: collections.Counter[str] = collections.Counter()
    for number in range(20):
        body = asking.body(number, stream=number % 2 == 0)
        with socket.create_connection((address.hostname, address.port), timeout=120) as sock:
            sock.sendall(chat_request(body, host=address.hostname, port=address.port))
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while data := sock.recv(65536):
                answer += data
        status = answer.split()[1].decode() if answer else "closed without an answer"
        ends[status] += 1
    require(not any(end.startswith("5") for end in ends), "5xx", dict(ends))
    return {"requests": 20, "ends": dict(sorted(ends.items())), **asking.end()}


# --- the end, and a cache folder that cannot be written ---


def sigterm(args: argparse.Namespace) -> Row:
    """SIGTERM while streams run: they are finished, new requests are refused, the process ends with 0."""
    with ServerProcess() as server:
        server.wait_until_ready()
        asking = Asking(server, seed=args.seed, max_tokens=64)
        found: list[Visit] = []
        bodies = [(asking.body(n, stream=True), True) for n in range(8)]
        rng = random.Random(0)
        streams = threading.Thread(
            target=lambda: found.extend(
                asyncio.run(crowd(server.url, bodies, ["never"] * 8, at_once=8, rng=rng))
            )
        )
        streams.start()
        running = server_process.wait_until(
            lambda: server_process.read_metrics(server.url)["num_requests_running"] >= 8, limit_s=60
        )
        server.process.send_signal(signal.SIGTERM)
        refused = server_process.wait_until(
            lambda: server_process.status(f"{server.url}/ready") in (0, 503), limit_s=30
        )
        late = asyncio.run(crowd(server.url, bodies[:1], ["never"], at_once=1, rng=rng))
        streams.join()
        code = server.process.wait(timeout=120)
    require(running and refused, "running, then refused", (running, refused))
    require(code == 0, "the exit code", code)
    require(len(found) == len(bodies), "streams that came to an end, expected 8", len(found))
    require(all(v.whole for v in found), "streams under way", [v for v in found if not v.whole][:3])
    require(late[0].status in (0, 503), "a request behind the signal", late[0])
    return {
        "streams_under_way": len(found),
        "finished_whole": sum(visit.whole for visit in found),
        "late_request": late[0].status or "refused",
        "exit_code": code,
    }


def cache(mount: str) -> Callable[[argparse.Namespace], Row]:
    """The server starts and answers with a cache folder like that (`mount` is a shell command; `$0` is the folder)."""

    def part(args: argparse.Namespace) -> Row:
        folder = str(cache_folder().absolute())
        launcher = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', folder]
        # Another context: no program of it is compiled, all would like to be kept.
        with ServerProcess(
            ["context=320", "num_slots=2"], launcher=[*launcher, *server_process.SERVE]
        ) as server:
            took_s = server.wait_until_ready()
            asking = Asking(server, seed=args.seed)
            visits = asking.many(20, leaving=0.0)
            wrong = [v for v in visits if v.status != 200 or not v.whole]
            require(not wrong, "not answered", wrong[:3])
            row = {"requests": 20, "statuses": statuses(visits), **asking.end()}
            return {"ready_after_s": round(took_s, 1), **row, "exit_code": server.stop()}

    return part


READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"'
FULL = 'mount -t tmpfs -o size=64k tmpfs "$0/xla"'

SHARED: dict[str, Callable[[Any, argparse.Namespace], Row]] = {
    "leaving": leaving,
    "slow_reader": slow_reader,
    "half_closed": half_closed,
}
"""Parts on one server, one after the other."""
PARTS: dict[str, Callable[[argparse.Namespace], Row]] = {
    "faults_dispatch": faults("dispatch", 0.01),
    "faults_read": faults("read", 0.01),
    "faults_nan": faults("nan", 0.01),
    "fault_storm": fault_storm,
    "sigterm": sigterm,
    "cache_read_only": cache(READ_ONLY),
    "cache_full": cache(FULL),
}


def run(args: argparse.Namespace) -> dict[str, Row]:
    """The rows of the parts that were asked for; one that went wrong has a `wrong`."""
    rows: dict[str, Row] = {}

    def keep(name: str, part: Callable[[], Row]) -> None:
        start = time.monotonic()
        try:
            row = part()
        except Wrong as wrong:
            row = {"wrong": str(wrong)[:500]}
        rows[name] = {"what": _first_line(name), **row, "took_s": round(time.monotonic() - start)}
        print(f"{name}: {json.dumps(rows[name])}", flush=True)

    wanted = args.only or [*SHARED, *PARTS]
    if set(wanted) & set(SHARED):
        with ServerProcess([f"limits.write_timeout_s={WRITE_TIMEOUT_S}"]) as server:
            server.wait_until_ready()
            for name, shared in SHARED.items():
                if name in wanted:
                    keep(name, lambda shared=shared: shared(server, args))  # type: ignore[misc]  # bound now
            rows[[*rows][-1]]["exit_code"] = server.stop()
    for name, part in PARTS.items():
        if name in wanted:
            keep(name, lambda part=part: part(args))  # type: ignore[misc]  # bound now
    return rows


SAID = {
    "faults_dispatch": "one step in a hundred fails when it is dispatched; the server lives on",
    "faults_read": "one step in a hundred cannot be read; the server lives on",
    "faults_nan": "one token in a hundred has logits that are no numbers; its request fails alone",
    "cache_read_only": "the cache folder is mounted read-only; nothing compiled can be kept",
    "cache_full": "the disk of the compiled programs is full from the start",
}


def _first_line(name: str) -> str:
    if name in SAID:
        return SAID[name]
    function = SHARED.get(name) or PARTS[name]
    return str(function.__doc__).split("\n")[0].rstrip(".")


def main(argv: list[str] | None = None) -> int:
    """Returns 0 when nothing was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=[*SHARED, *PARTS], metavar="PART")
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON")
    args = parser.parse_args(argv)
    rows = run(args)
    wrong = [name for name, row in rows.items() if "wrong" in row]
    if args.out:
        head = {"requests": args.requests, "seed": args.seed, "slots": 8, "at_once": AT_ONCE}
        args.out.write_text(json.dumps({**head, "parts": rows}, indent=1) + "\n")
    print(f"Wrong: {', '.join(wrong)}." if wrong else "Nothing was wrong.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
