"""What the server tells Prometheus at `/metrics`: vLLM's names and meanings under our prefix, and some of our own.

For: counting what the scheduler and the routes report, and the text that is scraped. Not for: deciding anything by
these numbers, and no HTTP. `docs/serving_metrics.md` lists every name; a test compares.

Differs from vLLM (`vllm/v1/metrics`, v0.30), whose dashboards shall work with the prefix exchanged: its smallest bucket
of a time per token is 10 ms and of a request 300 ms, too coarse for a small model or a fast device, so that finer edges
stand before its own; a request that its client gave up is counted and otherwise left out, since its times say nothing
about the server; prompts are counted when a request ends. The original has no metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector

from minigpt4_jax.image_cache import ImageCache
from minigpt4_jax.serving.jobs import JobRecord, Load, Outcome

PREFIX = "minigpt4:"
ENGINE = "0"
"""The label that numbers vLLM's engines; a process of ours has one."""

_FINE_TOKEN_S = (0.0005, 0.001, 0.002, 0.003, 0.005)
_TOKEN_S = (
    *_FINE_TOKEN_S, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0,
)  # fmt: skip
"""From 0.01 on vLLM's."""
_FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
    640.0, 2560.0,
)  # fmt: skip
_FINE_REQUEST_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
_REQUEST_S = (
    *_FINE_REQUEST_S, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
"""From 0.3 on vLLM's."""
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""vLLM's 1-2-5 ladder; the contexts of these models end at 4,096."""
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_NUM_ANSWERS = (1, 2, 5, 10, 20)
_DECODE_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)

_LABELS = ("model_name", "engine")


class Metrics:
    """Counts what a server does. Implements `jobs.Observer`; every method may be called from any thread.

    Nothing is global: two of them in one process know nothing of each other.

    Args:
        model_name: what the API calls the model; a label of every name but `process_*`.
        load: what goes on now; called once for each `render`, on its thread.
        image_cache: whose hits and misses are told; None leaves these names out.
        compiled: how many programs were compiled so far, such as `engine.compiled_programs`; None leaves it out.
        leaks: how often slots were found taken with no request in them, such as `scheduler.leaks`; None leaves it out.
    """

    def __init__(
        self,
        model_name: str,
        *,
        load: Callable[[], Load],
        image_cache: ImageCache | None = None,
        compiled: Callable[[], int] | None = None,
        leaks: Callable[[], int] | None = None,
    ) -> None:
        self._registry = CollectorRegistry()
        self._values = (model_name, ENGINE)
        self._count_requests()
        self._time_requests()
        self._registry.register(
            _Now(self._values, load=load, image_cache=image_cache, compiled=compiled, leaks=leaks)
        )
        # Memory, CPU time and open files of the process, under the names that Prometheus gives them everywhere.
        ProcessCollector(registry=self._registry)

    def _count_requests(self) -> None:
        self._prefix_queries = self._counter(
            "prefix_cache_queries", "Tokens of prompts that were looked for in the slots' caches."
        )
        self._prefix_hits = self._counter(
            "prefix_cache_hits", "Tokens of prompts that were there and not read again."
        )
        self._prompt_tokens = self._counter(
            "prompt_tokens", "Tokens of the prompts that were answered, cached ones too."
        )
        self._generation_tokens = self._counter("generation_tokens", "Tokens that were generated.")
        ended = self._family("request_success", "Requests that are over.", "finished_reason")
        self._ended = {reason: ended.labels(*self._values, reason) for reason in get_args(Outcome)}
        self._faults = self._counter(
            "engine_faults", "How often the engine failed and was made anew."
        )
        self._rejected = self._family(
            "rejected_requests", "Requests that never reached the engine.", "reason"
        )
        self._responses = self._family("http_responses", "Answers over HTTP.", "route", "status")

    def _time_requests(self) -> None:
        request = "Histogram of the seconds of a request "
        self._first_token = self._histogram(
            "time_to_first_token_seconds",
            "Histogram of the seconds from arrival to the first token.",
            _FIRST_TOKEN_S,
        )
        self._next_token = self._histogram(
            "inter_token_latency_seconds", "Histogram of the seconds between two tokens.", _TOKEN_S
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Histogram of the mean seconds per token behind the first, of a request.",
            _TOKEN_S,
        )
        self._total = self._histogram(
            "e2e_request_latency_seconds", request + "from arrival to its end.", _REQUEST_S
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", request + "waiting for a slot.", _REQUEST_S
        )
        self._inference = self._histogram(
            "request_inference_time_seconds", request + "in a slot.", _REQUEST_S
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds",
            request + "from its slot to the first token.",
            _REQUEST_S,
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", request + "from the first to the last token.", _REQUEST_S
        )
        self._prompts = self._histogram(
            "request_prompt_tokens", "Histogram of the tokens of a prompt.", _TOKENS
        )
        self._generated = self._histogram(
            "request_generation_tokens",
            "Histogram of the tokens generated for a request, of all its answers.",
            _TOKENS,
        )
        self._n = self._histogram(
            "request_params_n", "Histogram of the answers that a request asked for.", _NUM_ANSWERS
        )
        self._max_tokens = self._histogram(
            "request_params_max_tokens",
            "Histogram of the most tokens of an answer that a request allowed.",
            _TOKENS,
        )
        self._step_tokens = self._histogram(
            "iteration_tokens_total",
            "Histogram of the tokens that a step of the engine generated.",
            _STEP_TOKENS,
        )
        self._decoding = self._histogram(
            "image_decode_seconds",
            "Histogram of the seconds that decoding a picture took.",
            _DECODE_S,
        )

    def _family(self, name: str, said: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, said, (*_LABELS, *labels), registry=self._registry)

    def _counter(self, name: str, said: str) -> Counter:
        return self._family(name, said).labels(*self._values)

    def _histogram(self, name: str, said: str, buckets: tuple[int | float, ...]) -> Histogram:
        family = Histogram(PREFIX + name, said, _LABELS, buckets=buckets, registry=self._registry)
        return family.labels(*self._values)

    # --- jobs.Observer: on the engine's thread ---

    def first_token(self, seconds: float) -> None:
        """From arrival to the first token of an answer."""
        self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        """Between two tokens of one answer."""
        self._next_token.observe(seconds)

    def stepped(self, num_tokens: int) -> None:
        """One step of the engine gave so many tokens in all."""
        self._generation_tokens.inc(num_tokens)
        self._step_tokens.observe(num_tokens)

    def finished(self, record: JobRecord) -> None:
        """A job is over."""
        self._ended[record.outcome].inc()
        if record.prefill_s is None:  # beams, which come without steps, or nothing at all
            self._generation_tokens.inc(record.generated_tokens)
        if record.prefill_s is not None or record.generated_tokens:
            self._prompt_tokens.inc(record.prompt_tokens)
            self._prefix_queries.inc(record.prompt_tokens)
            self._prefix_hits.inc(record.cached_tokens)
        if record.outcome == "abort":
            return
        self._prompts.observe(record.prompt_tokens)
        self._generated.observe(record.generated_tokens)
        self._n.observe(record.n)
        self._max_tokens.observe(record.max_new_tokens)
        self._total.observe(record.total_s)
        self._queue.observe(record.queue_s)
        if record.prefill_s is None:
            return
        self._prefill.observe(record.prefill_s)
        decode_s = record.decode_s or 0.0
        self._decode.observe(decode_s)
        self._inference.observe(record.prefill_s + decode_s)
        behind_first = record.generated_tokens / record.n - 1
        if behind_first > 0:
            self._per_token.observe(decode_s / behind_first)

    def faulted(self) -> None:
        """The engine failed and was made anew."""
        self._faults.inc()

    # --- the HTTP side ---

    def rejected(self, reason: str) -> None:
        """A request never reached the engine. `reason` is one of few words, such as the `code` of an `ApiError`."""
        self._rejected.labels(*self._values, reason).inc()

    def decoded(self, seconds: float) -> None:
        """A picture was decoded in so many seconds."""
        self._decoding.observe(seconds)

    def responded(self, route: str, status: int) -> None:
        """An answer began. `route` is a path that exists, or one word for all others: never what a client sent, since
        every new label stays in memory."""
        self._responses.labels(*self._values, route, str(status)).inc()

    def render(self) -> tuple[bytes, str]:
        """What a scrape gets, and its content type: the text format 0.0.4, which every Prometheus reads."""
        return generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4


class _Now(Collector):
    """What is asked for at the moment of a scrape."""

    def __init__(
        self,
        values: tuple[str, str],
        *,
        load: Callable[[], Load],
        image_cache: ImageCache | None,
        compiled: Callable[[], int] | None,
        leaks: Callable[[], int] | None,
    ) -> None:
        self._values, self._load = values, load
        self._image_cache, self._compiled, self._leaks = image_cache, compiled, leaks

    def describe(self) -> list[Metric]:
        """Nothing: the scheduler may not exist yet when the metrics are made."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        load = self._load()
        yield self._gauge("num_requests_running", "Requests under way.", load.running)
        yield self._gauge("num_requests_waiting", "Requests without a slot.", load.waiting)
        yield self._gauge(
            "kv_cache_usage_perc",
            "Share of the KV cache that holds what is being answered, 0 to 1.",
            load.cache_usage,
        )
        yield self._gauge("slots_used", "Slots that an answer is written in.", load.busy_slots)
        yield self._gauge("slots", "Slots that there are.", load.num_slots)
        yield self._gauge(
            "engine_stall_seconds",
            "Seconds since the engine finished a step, while there is work; else 0.",
            load.stalled_s,
        )
        yield self._gauge(
            "compile_pending",
            "Sizes of programs that wait for being compiled beside the requests.",
            load.programs_left,
        )
        if self._image_cache is not None:
            yield self._counter(
                "image_cache_hits", "Pictures that were not encoded again.", self._image_cache.hits
            )
            yield self._counter(
                "image_cache_misses", "Pictures that were encoded.", self._image_cache.misses
            )
        if self._compiled is not None:
            yield self._counter("compile_events", "Programs that were compiled.", self._compiled())
        if self._leaks is not None:
            yield self._counter(
                "slot_leaks",
                "How often slots were found taken with no request in them.",
                self._leaks(),
            )

    def _gauge(self, name: str, said: str, value: int | float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, said, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def _counter(self, name: str, said: str, value: int | float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, said, labels=_LABELS)
        family.add_metric(self._values, value)
        return family
