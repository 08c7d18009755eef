"""Chat requests over HTTP with a clock: one, many by a schedule, many as fast as they are answered; and their figures.

For: `serve_load.py`. Not for: what is asked (`serve_load.py`), the server (`server_process.py`). Needs httpx2, NumPy.

Names and meanings are those of `vllm bench serve` (vllm/benchmarks/serve.py): TTFT from sending a request to the first
text, ITL between two chunks with text, TPOT the mean time per token behind the first, E2EL to the last text. A chunk
may hold several tokens: text is shown when it can be (UTF-8, stop strings). An empty answer's text is its end.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpx2
import numpy as np

PERCENTILES = (90, 95, 99)
TIMEOUT_S = 600.0


@dataclasses.dataclass
class Sample:
    """One request and what came of it. Times in seconds on the clock of `time.perf_counter`."""

    sent_s: float = 0.0
    late_s: float = 0.0
    """Behind the schedule: what the client itself could not keep up with."""
    text_s: list[float] = dataclasses.field(default_factory=list)
    """When each chunk with text came."""
    ended_s: float = 0.0
    text: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    error: str = ""
    """Empty where it was answered; else the status, or the name of what was raised."""

    @property
    def ttft_s(self) -> float:
        return self.text_s[0] - self.sent_s

    @property
    def e2el_s(self) -> float:
        return self.text_s[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """None for an answer of one token."""
        behind = self.output_tokens - 1
        return (self.e2el_s - self.ttft_s) / behind if behind > 0 else None


class Client:
    """Asks one server. Use it inside `async with`.

    Args:
        url: such as `http://127.0.0.1:8000`.
        key: sent as a Bearer token, where there is one.
    """

    def __init__(self, url: str, *, key: str = "") -> None:
        headers = {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._http = httpx2.AsyncClient(
            base_url=url,
            headers=headers,
            timeout=TIMEOUT_S,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=64),
            trust_env=False,  # no proxy stands between this client and what it measures
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._http.aclose()

    async def ask(self, body: bytes) -> Sample:
        """Sends a chat request and reads the whole answer, streamed or not."""
        sample = Sample(sent_s=time.perf_counter())
        try:
            async with self._http.stream("POST", "/v1/chat/completions", content=body) as response:
                if response.status_code != 200:
                    await response.aread()
                    sample.error = str(response.status_code)
                elif response.headers["content-type"].startswith("text/event-stream"):
                    await _read_stream(response, sample)
                else:
                    _take_whole(json.loads(await response.aread()), sample)
        except httpx2.HTTPError as error:
            sample.error = type(error).__name__
        sample.ended_s = time.perf_counter()
        sample.text_s = sample.text_s or [sample.ended_s]
        return sample


async def _read_stream(response: Any, sample: Sample) -> None:
    done = False
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            done = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            sample.error = f"in the stream: {chunk['error'].get('code')}"
            return
        for choice in chunk.get("choices", ()):
            text = choice["delta"].get("content")
            if text:
                sample.text_s.append(time.perf_counter())
                sample.text += text
        _take_usage(chunk, sample)
    if not done:
        sample.error = "no [DONE]"


def _take_whole(body: dict[str, Any], sample: Sample) -> None:
    sample.text = body["choices"][0]["message"]["content"]
    sample.text_s.append(time.perf_counter())
    _take_usage(body, sample)


def _take_usage(body: dict[str, Any], sample: Sample) -> None:
    if body.get("usage"):
        sample.input_tokens = body["usage"]["prompt_tokens"]
        sample.output_tokens = body["usage"]["completion_tokens"]


def arrivals(count: int, *, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start, rising: gamma-distributed gaps of the mean `1 / rate`.

    Args:
        rate: requests a second.
        burstiness: the shape; 1 is a Poisson process, less comes in bursts, more is more even.
    """
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), count)
    return np.cumsum(gaps).tolist()


async def open_loop(
    client: Client, bodies: Sequence[bytes], times: Sequence[float]
) -> list[Sample]:
    """Sends each at its time, answered or not what was sent before."""
    start = time.perf_counter()

    async def one(body: bytes, at: float) -> Sample:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        late = time.perf_counter() - start - at
        sample = await client.ask(body)
        sample.late_s = late
        return sample

    return list(
        await asyncio.gather(*(one(body, at) for body, at in zip(bodies, times, strict=True)))
    )


async def closed_loop(client: Client, bodies: Sequence[bytes], *, at_once: int) -> list[Sample]:
    """Keeps so many under way until all are answered; in the order of `bodies`."""
    samples: list[Sample] = [Sample()] * len(bodies)
    numbers = iter(range(len(bodies)))

    async def worker() -> None:
        for number in numbers:
            samples[number] = await client.ask(bodies[number])

    await asyncio.gather(*(worker() for _ in range(at_once)))
    return samples


def run(
    url: str, work: Callable[[Client], Awaitable[list[Sample]]], *, key: str = ""
) -> list[Sample]:
    """`work` with a client, in an event loop of its own."""

    async def inside() -> list[Sample]:
        async with Client(url, key=key) as client:
            return await work(client)

    return asyncio.run(inside())


def figures(samples: Sequence[Sample], *, ttft_slo_ms: float, tpot_slo_ms: float) -> dict[str, Any]:
    """What `vllm bench serve` saves, by its names, of what was answered; and what was not, by error."""
    answered = [sample for sample in samples if not sample.error]
    errors = collections.Counter(sample.error for sample in samples if sample.error)
    duration = max(s.ended_s for s in samples) - min(s.sent_s for s in samples)
    output = sum(sample.output_tokens for sample in answered)
    tokens_in = sum(sample.input_tokens for sample in answered)
    good = [s for s in answered if _meets(s, ttft_slo_ms / 1000, tpot_slo_ms / 1000)]
    return {
        "duration": round(duration, 3),
        "completed": len(answered),
        "failed": len(samples) - len(answered),
        "errors": dict(sorted(errors.items())),
        "total_input_tokens": tokens_in,
        "total_output_tokens": output,
        "request_throughput": round(len(answered) / duration, 3),
        "request_goodput": round(len(good) / duration, 3),
        "goodput_share": round(len(good) / len(samples), 3),
        "output_throughput": round(output / duration, 2),
        "total_token_throughput": round((output + tokens_in) / duration, 2),
        "max_concurrent_requests": _most_at_once(samples),
        "max_client_lateness_ms": round(1000 * max(s.late_s for s in samples), 2),
        **_spread("ttft_ms", [s.ttft_s for s in answered]),
        **_spread("tpot_ms", [t for s in answered if (t := s.tpot_s) is not None]),
        **_spread("itl_ms", [float(gap) for s in answered for gap in np.diff(s.text_s)]),
        **_spread("e2el_ms", [s.e2el_s for s in answered]),
    }


def _meets(sample: Sample, ttft_slo_s: float, tpot_slo_s: float) -> bool:
    return sample.ttft_s <= ttft_slo_s and (sample.tpot_s or 0.0) <= tpot_slo_s


def _most_at_once(samples: Sequence[Sample]) -> int:
    changes = sorted([(s.sent_s, 1) for s in samples] + [(s.ended_s, -1) for s in samples])
    return int(max(np.cumsum([change for _, change in changes])))


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean, median, standard deviation and percentiles in milliseconds; None where there is nothing."""
    keys = ["mean", "median", "std", *(f"p{percent}" for percent in PERCENTILES)]
    if not seconds:
        return {f"{key}_{name}": None for key in keys}
    ms = 1000 * np.asarray(seconds)
    values = [ms.mean(), np.median(ms), ms.std(), *np.percentile(ms, PERCENTILES)]
    return {f"{key}_{name}": round(float(v), 2) for key, v in zip(keys, values, strict=True)}
