"""The server under load, on this machine: its share of the bare engine, then requests that come when they come.

    pip install -e ".[serve,smol]"
    python benchmarks/serve_load.py --out benchmarks/results/serve_cpu.json
    python benchmarks/serve_load.py --url http://127.0.0.1:8000 --rate 2 4      # a server that runs already; --key KEY
    python benchmarks/page_tables.py                                           # the tables of the pages

`share_*`: the same questions about the same pictures through HTTP, as many at once as keep all slots full, and straight
through `MiniGPT4.answer_each` in this process, in turns and never at once; both have compiled all that they can before.
The share is the bare seconds over those through HTTP, and the client takes its part of the same cores. Pictures are new
in every round, so that no side finds them in its cache. `load_*`: open loop, Poisson arrivals (`--burstiness` 1) at
shares of what `share_streamed` reached, or at `--rate`; figures by the names of `vllm bench serve`. A server that is
started here may hold all requests of a row at once (`room`): what cannot be answered yet waits and is not refused.

Not for: the engine's own speed (`inference.py`, which needs none of the libraries of a server).
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import io
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import numpy as np
from server_process import CONFIG, ServerProcess, read_json, wait_until_compiled

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = ("coffee.jpg", "flower.jpg")
PICTURE_SIDE = 448
QUESTIONS = (
    "What is this?",
    "Describe this picture.",
    "What colour is it?",
    "Where would you find it?",
    "Name one thing that goes well with it.",
)
ALONE = ("What is a lighthouse for?", "Name three fruits.", "Why is the sky blue?")
"""What is asked without a picture."""
LOAD_SHARES = (0.5, 0.8)
NEEDED = {"httpx2": "httpx2", "PIL": "pillow"}
NEEDED_TO_SERVE = {
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "sse_starlette": "sse-starlette",
    "prometheus_client": "prometheus-client",
}


class Question(NamedTuple):
    """One request: `picture` is JPEG bytes or None."""

    prompt: str
    picture: bytes | None


def require_libraries(*, serve: bool) -> None:
    """Ends the program where a library of the client (or of the server, which is started here) is not installed."""
    wanted = NEEDED | (NEEDED_TO_SERVE if serve else {})
    missing = [said for name, said in wanted.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"Not installed: {', '.join(missing)}. This benchmark starts a server and asks it; run "
            'pip install -e ".[serve,smol]". The rows of the engine alone need none of them: '
            "python benchmarks/inference.py."
        )


def make_questions(count: int, *, pictures: float, seed: int) -> list[Question]:
    """The same for the same numbers: a share of them about a square cut out of one of the examples."""
    from PIL import Image

    opened = [Image.open(EXAMPLES / name).convert("RGB") for name in PICTURES]
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        if rng.random() >= pictures:
            found.append(Question(ALONE[number % len(ALONE)], None))
            continue
        whole = opened[int(rng.integers(len(opened)))]
        side = int(min(whole.size) * rng.uniform(0.5, 1))
        left, top = (int(rng.integers(0, most - side + 1)) for most in whole.size)
        square = whole.crop((left, top, left + side, top + side))
        file = io.BytesIO()
        square.resize((PICTURE_SIDE, PICTURE_SIDE)).save(file, "JPEG", quality=90)
        found.append(Question(QUESTIONS[number % len(QUESTIONS)], file.getvalue()))
    return found


def chat_body(question: Question, *, model: str, max_tokens: int, stream: bool) -> bytes:
    """The request's body: greedy, so that both sides have the same to write."""
    content: list[dict[str, Any]] = []
    if question.picture is not None:
        url = "data:image/jpeg;base64," + base64.b64encode(question.picture).decode()
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": question.prompt})
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_completion_tokens": max_tokens,
        "temperature": 0,
        "stream": stream,
    }
    if stream:
        body["stream_options"] = {"include_usage": True}
    return json.dumps(body).encode()


def room(num_requests: int) -> list[str]:
    """Overrides for a server that takes so many requests of one client at once. Twice as many, since the next one may
    come before the server has put away the one that it has just answered."""
    return [f"limits.max_per_key={2 * num_requests}", f"limits.max_waiting={2 * num_requests}"]


class Bare:
    """The model in this process, as the server has it."""

    def __init__(self, config: Path, overrides: Sequence[str], *, max_tokens: int) -> None:
        from minigpt4_jax import MiniGPT4
        from minigpt4_jax.api import GenerationConfig
        from minigpt4_jax.cli_options import set_up_jax
        from minigpt4_jax.config_file import load
        from minigpt4_jax.serve_config import ServeConfig

        set_up_jax()  # what the server has compiled is found on the disk
        served = load(ServeConfig, config, overrides)
        self.model = MiniGPT4.load(
            served.model,
            projection=served.projection or None,
            weights=served.weights,
            cache=served.cache,
            context=served.context,
            num_slots=served.num_slots,
        )
        self.generation = GenerationConfig(max_new_tokens=max_tokens, temperature=0.0)
        self.model.engine.compile_core()
        self.model.engine.compile_rest()

    def answer(self, questions: Sequence[Question]) -> tuple[float, list[str], int]:
        """Seconds, answers, and their tokens."""
        from minigpt4_jax.api import Ask

        start = time.perf_counter()
        asks = (
            Ask(key=n, images=() if q.picture is None else (q.picture,), prompt=q.prompt)
            for n, q in enumerate(questions)
        )
        found = dict(self.model.answer_each(asks, generation=self.generation))
        seconds = time.perf_counter() - start
        answers = [found[number][0] for number in range(len(questions))]
        return seconds, [answer.text for answer in answers], sum(len(a.ids) for a in answers)


class Bench:
    """What the rows share: the server, how it is asked, and the bare model where there is one."""

    def __init__(self, url: str, args: argparse.Namespace, *, bare: Bare | None) -> None:
        self.url, self.args, self.bare = url, args, bare
        self.model_name: str = read_json(f"{url}/v1/models", key=args.key)["data"][0]["id"]
        self.rate: float | None = None
        """Requests a second that the slots could answer, once `share_streamed` has run."""

    def bodies(self, questions: Sequence[Question], *, stream: bool) -> list[bytes]:
        return [
            chat_body(q, model=self.model_name, max_tokens=self.args.max_tokens, stream=stream)
            for q in questions
        ]

    def over_http(
        self, questions: Sequence[Question], *, stream: bool
    ) -> tuple[float, list[str], int]:
        """As `Bare.answer`. Ends the program where a request was not answered: shares would mean nothing."""
        import serve_client

        bodies = self.bodies(questions, stream=stream)
        at_once = 2 * self.bare.model.engine.num_slots if self.bare else 1
        start = time.perf_counter()
        samples = serve_client.run(
            self.url,
            lambda client: serve_client.closed_loop(client, bodies, at_once=at_once),
            key=self.args.key,
        )
        seconds = time.perf_counter() - start
        errors = sorted({sample.error for sample in samples if sample.error})
        if errors:
            raise SystemExit(f"Requests were not answered: {', '.join(errors)}. Nothing is shown.")
        return seconds, [s.text for s in samples], sum(s.output_tokens for s in samples)

    def share(self, *, stream: bool) -> dict[str, Any]:
        """The server's share of the bare engine's throughput, in turns."""
        bare = self.bare
        assert bare is not None
        args, rounds = self.args, []
        self.over_http(self.questions(-1), stream=stream)  # its connections, threads and pages
        bare.answer(self.questions(-1))
        for number in range(args.rounds):
            questions = self.questions(number)
            sides: list[tuple[str, Callable[[], tuple[float, list[str], int]]]] = [
                ("bare", lambda asked=questions: bare.answer(asked)),  # type: ignore[misc]  # a default binds it now
                ("http", lambda asked=questions: self.over_http(asked, stream=stream)),  # type: ignore[misc]  # as above
            ]
            found = {name: call() for name, call in sides[:: 1 if number % 2 == 0 else -1]}
            rounds.append(found)
        shares = [one["bare"][0] / one["http"][0] for one in rounds]
        same = [
            a == b for one in rounds for a, b in zip(one["bare"][1], one["http"][1], strict=True)
        ]
        middle = {side: statistics.median(one[side][0] for one in rounds) for side in rounds[0]}
        tokens = statistics.median(one["bare"][2] for one in rounds)
        if stream:
            self.rate = args.num_requests / middle["http"]
        return {
            "what": f"the server's share of the bare engine, {'streamed' if stream else 'whole'} answers",
            "share": round(statistics.median(shares), 3),
            "share_of_rounds": [round(min(shares), 3), round(max(shares), 3)],
            "requests_per_s": {k: round(args.num_requests / s, 3) for k, s in middle.items()},
            "tokens_per_s": {k: round(tokens / s, 1) for k, s in middle.items()},
            "same_answers": f"{sum(same)} of {len(same)}",
            "num_requests": args.num_requests,
            "rounds": len(rounds),
            "load_after": round(os.getloadavg()[0], 2),
        }

    def load(self, number: int, *, rate: float, said: str) -> dict[str, Any]:
        """Open loop at so many requests a second; `number` is the round, for pictures of its own."""
        import serve_client

        args = self.args
        bodies = self.bodies(self.questions(number), stream=True)
        times = serve_client.arrivals(
            len(bodies), rate=rate, burstiness=args.burstiness, seed=args.seed
        )
        samples = serve_client.run(
            self.url,
            lambda client: serve_client.open_loop(client, bodies, times),
            key=args.key,
        )
        found = serve_client.figures(
            samples, ttft_slo_ms=args.ttft_slo_ms, tpot_slo_ms=args.tpot_slo_ms
        )
        return {
            "what": said,
            "request_rate": round(rate, 3),
            **found,
            "load_after": round(os.getloadavg()[0], 2),
        }

    def questions(self, number: int) -> list[Question]:
        """Of a round; other pictures in every round."""
        args = self.args
        seed = 1000 * args.seed + number + 1
        return make_questions(args.num_requests, pictures=args.pictures, seed=seed)


def run(bench: Bench, results: measuring.Results) -> None:
    """All rows that are missing, each kept as soon as it is there."""
    args = bench.args
    shares = ["share_streamed", "share_whole"] if bench.bare else []
    rates = {f"load_{rate:g}": rate for rate in args.rate or ()}
    loads = list(rates) or [f"load_{share:.0%}".rstrip("%") for share in LOAD_SHARES]
    order = [*shares, *loads]
    for name in shares:
        if results.missing(name):
            row = bench.share(stream=name == "share_streamed")
            results.add(name, row, order=order)
            print(f"{name}: {row['share']:.3f} {row['share_of_rounds']} {row['tokens_per_s']}")
    for name in loads:
        if not results.missing(name):
            continue
        if rates:
            rate, said = rates[name], f"{rates[name]:g} requests/s"
        else:
            share = int(name.removeprefix("load_")) / 100
            full = bench.rate or results.rows["share_streamed"]["requests_per_s"]["http"]
            rate, said = share * full, f"{share:.0%} of what it can answer"
        row = bench.load(args.rounds + loads.index(name), rate=rate, said=said)
        results.add(name, row, order=order)
        print(f"{name}: {json.dumps(row)}", flush=True)


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("overrides", nargs="*", help="key=value of the server's configuration")
    parser.add_argument("--config", type=Path, default=CONFIG, help="of the server")
    parser.add_argument("--url", help="of a server that runs already; then without its share")
    parser.add_argument("--key", default="", help="an API key of the server")
    parser.add_argument("--rate", type=float, nargs="+", help="requests per second")
    parser.add_argument("--burstiness", type=float, default=1.0, help="1: Poisson; less: bursts")
    parser.add_argument("--num-requests", type=int, default=64, help="in a round, and at a rate")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--pictures", type=float, default=0.75, help="share with a picture")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ttft-slo-ms", type=float, default=2000)
    parser.add_argument("--tpot-slo-ms", type=float, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    if args.url and not args.rate:
        parser.error("--url needs --rate: only beside the bare engine it is known what is much.")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Starts what is missing, measures and writes."""
    args = read_arguments(arguments)
    require_libraries(serve=not args.url)
    gpu = measuring.gpu_name()
    if gpu:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.4")  # of each of the two processes
    else:
        measuring.use_two_threads()
    names = ("httpx2",) if args.url else ("httpx2", "fastapi", "uvicorn")
    settings = ("burstiness", "num_requests", "max_tokens", "pictures", "rounds", "seed")
    head = {
        "hardware": measuring.hardware()
        | ({} if gpu else {"threads": measuring.THREADS})
        | {name: version(name) for name in names},
        "overrides": args.overrides,
        **{name: getattr(args, name) for name in (*settings, "ttft_slo_ms", "tpot_slo_ms")},
    }
    results = measuring.Results(args.out, head)
    if args.url:
        wait_until_compiled(args.url, key=args.key)
        return run(Bench(args.url.rstrip("/"), args, bare=None), results)
    overrides = ["compile_beside=all", *room(args.num_requests), *args.overrides]
    with ServerProcess(overrides, config=args.config) as server:
        server.wait_until_ready()
        wait_until_compiled(server.url, key=args.key)
        bare = Bare(args.config, args.overrides, max_tokens=args.max_tokens)
        run(Bench(server.url, args, bare=bare), results)
        code = server.stop()
    if code:
        sys.exit(f"The server ended with code {code}; expected 0 after SIGTERM.")
    return None


if __name__ == "__main__":
    main()
