"""serving/metrics.py: what is told comes out under vLLM's names, once, and the page lists exactly what comes out."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from minigpt4_jax.image_cache import ImageCache
from minigpt4_jax.serving.jobs import JobRecord, Load, Observer
from minigpt4_jax.serving.metrics import Metrics

PAGE = Path(__file__).parents[2] / "docs" / "serving_metrics.md"
VLLM = {
    "num_requests_running": "gauge",
    "num_requests_waiting": "gauge",
    "kv_cache_usage_perc": "gauge",
    "prefix_cache_queries": "counter",
    "prefix_cache_hits": "counter",
    "prompt_tokens": "counter",
    "generation_tokens": "counter",
    "request_success": "counter",
    "time_to_first_token_seconds": "histogram",
    "inter_token_latency_seconds": "histogram",
    "request_time_per_output_token_seconds": "histogram",
    "e2e_request_latency_seconds": "histogram",
    "request_queue_time_seconds": "histogram",
    "request_inference_time_seconds": "histogram",
    "request_prefill_time_seconds": "histogram",
    "request_decode_time_seconds": "histogram",
    "request_prompt_tokens": "histogram",
    "request_generation_tokens": "histogram",
    "request_params_n": "histogram",
    "request_params_max_tokens": "histogram",
    "iteration_tokens_total": "histogram",
}
OWN = {
    "slots": "gauge",
    "slots_used": "gauge",
    "engine_stall_seconds": "gauge",
    "engine_faults": "counter",
    "compile_events": "counter",
    "compile_pending": "gauge",
    "slot_leaks": "counter",
    "image_decode_seconds": "histogram",
    "image_cache_hits": "counter",
    "image_cache_misses": "counter",
    "rejected_requests": "counter",
    "http_responses": "counter",
}
PROCESS = {
    "process_resident_memory_bytes": "gauge",
    "process_virtual_memory_bytes": "gauge",
    "process_cpu_seconds": "counter",
    "process_open_fds": "gauge",
    "process_max_fds": "gauge",
    "process_start_time_seconds": "gauge",
}
LOAD = Load(
    waiting=3,
    running=2,
    busy_slots=5,
    num_slots=8,
    cache_usage=0.25,
    stalled_s=1.5,
    programs_left=6,
)
RECORD = JobRecord(
    outcome="stop",
    prompt_tokens=100,
    cached_tokens=60,
    generated_tokens=11,
    n=1,
    max_new_tokens=300,
    queue_s=0.25,
    prefill_s=0.5,
    decode_s=2.0,
    total_s=2.75,
)


def make(load: Callable[[], Load] = lambda: LOAD) -> Metrics:
    return Metrics(
        "smol", load=load, image_cache=ImageCache(1000), compiled=lambda: 7, leaks=lambda: 0
    )


def scrape(metrics: Metrics) -> dict[str, Metric]:
    """The families without our prefix; `_created` belongs to its neighbour."""
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(body.decode())
    return {
        family.name.removeprefix("minigpt4:"): family
        for family in families
        if not family.name.endswith("_created")
    }


def value(metrics: Metrics, name: str, suffix: str = "", **labels: str) -> float:
    """The one sample of a name with (at least) these labels."""
    (found,) = [
        sample.value
        for sample in scrape(metrics)[name].samples
        if sample.name == f"minigpt4:{name}{suffix}" and labels.items() <= sample.labels.items()
    ]
    return found


def test_exactly_these_names_come_out_with_the_kinds_that_vllm_has() -> None:
    found = {name: family.type for name, family in scrape(make()).items()}
    assert found == VLLM | OWN | PROCESS


def test_the_page_names_exactly_what_comes_out() -> None:
    text = PAGE.read_text()
    rows = dict(re.findall(r"^\| `minigpt4:(\w+)` \| (\w+) \|", text, re.MULTILINE))
    assert rows == VLLM | OWN
    assert set(re.findall(r"`(process_\w+)`", text)) == set(PROCESS)


def test_every_sample_of_ours_says_which_model_and_engine() -> None:
    metrics = make()
    metrics.rejected("overloaded")
    metrics.responded("/v1/models", 200)
    samples = [s for family in scrape(metrics).values() for s in family.samples]
    ours = [sample for sample in samples if sample.name.startswith("minigpt4:")]
    assert len(ours) > 300
    assert {(s.labels["model_name"], s.labels["engine"]) for s in ours} == {("smol", "0")}


def test_gauges_are_of_the_moment_of_the_scrape() -> None:
    loads = iter([LOAD, replace(LOAD, waiting=0, busy_slots=0)])
    metrics = make(lambda: next(loads))
    first, second = scrape(metrics), scrape(metrics)
    for name, before, after in (
        ("num_requests_waiting", 3, 0),
        ("num_requests_running", 2, 2),
        ("slots_used", 5, 0),
        ("slots", 8, 8),
        ("kv_cache_usage_perc", 0.25, 0.25),
        ("engine_stall_seconds", 1.5, 1.5),
        ("compile_pending", 6, 6),
    ):
        assert [f[name].samples[0].value for f in (first, second)] == [before, after], name


def test_caches_and_the_compiler_are_read_where_there_are_any() -> None:
    cache = ImageCache(1000)
    metrics = Metrics(
        "smol", load=lambda: LOAD, image_cache=cache, compiled=lambda: 7, leaks=lambda: 2
    )
    cache.put("a", "embedding", num_bytes=1)
    assert [cache.get(key) for key in "aab"] == ["embedding", "embedding", None]
    assert value(metrics, "image_cache_hits", "_total") == 2
    assert value(metrics, "image_cache_misses", "_total") == 1
    assert value(metrics, "compile_events", "_total") == 7
    assert value(metrics, "slot_leaks", "_total") == 2
    without = scrape(Metrics("smol", load=lambda: LOAD))
    assert (VLLM | OWN).keys() - without.keys() == {
        "image_cache_hits",
        "image_cache_misses",
        "compile_events",
        "slot_leaks",
    }


def test_an_answered_request_is_in_every_histogram_with_its_own_numbers() -> None:
    metrics = make()
    metrics.finished(RECORD)
    for name, expected in (
        ("e2e_request_latency_seconds", 2.75),
        ("request_queue_time_seconds", 0.25),
        ("request_prefill_time_seconds", 0.5),
        ("request_decode_time_seconds", 2.0),
        ("request_inference_time_seconds", 2.5),
        ("request_time_per_output_token_seconds", 0.2),  # 2 s for the 10 tokens behind the first
        ("request_prompt_tokens", 100),
        ("request_generation_tokens", 11),
        ("request_params_n", 1),
        ("request_params_max_tokens", 300),
    ):
        assert value(metrics, name, "_sum") == pytest.approx(expected), name
        assert value(metrics, name, "_count") == 1, name
    assert value(metrics, "prompt_tokens", "_total") == 100
    assert value(metrics, "prefix_cache_queries", "_total") == 100
    assert value(metrics, "prefix_cache_hits", "_total") == 60


def test_several_answers_share_the_steps_that_their_tokens_came_in() -> None:
    metrics = make()
    metrics.finished(replace(RECORD, n=2, generated_tokens=22))
    assert value(metrics, "request_time_per_output_token_seconds", "_sum") == pytest.approx(0.2)


@pytest.mark.parametrize("outcome", ["stop", "length", "abort", "timeout", "error"])
def test_every_end_is_counted_under_its_reason_and_begins_at_zero(outcome: str) -> None:
    metrics = make()
    metrics.finished(replace(RECORD, outcome=outcome))
    ended = {
        sample.labels["finished_reason"]: sample.value
        for sample in scrape(metrics)["request_success"].samples
        if sample.name.endswith("_total")
    }
    others = {"stop", "length", "abort", "timeout", "error"} - {outcome}
    assert ended == {outcome: 1.0} | dict.fromkeys(others, 0.0)


def test_what_a_client_gave_up_is_in_no_histogram_of_requests_but_its_prompt_was_read() -> None:
    metrics = make()
    metrics.finished(replace(RECORD, outcome="abort"))
    counts = {
        name: value(metrics, name, "_count") for name, kind in VLLM.items() if kind == "histogram"
    }
    assert set(counts.values()) == {0.0}, counts
    assert value(metrics, "prompt_tokens", "_total") == 100


def test_what_never_had_a_slot_adds_to_its_waiting_and_to_no_prompt_that_was_read() -> None:
    metrics = make()
    waited = {"generated_tokens": 0, "cached_tokens": 0, "prefill_s": None, "decode_s": None}
    metrics.finished(replace(RECORD, outcome="timeout", queue_s=9.0, **waited))
    assert value(metrics, "request_queue_time_seconds", "_sum") == 9.0
    assert value(metrics, "request_prefill_time_seconds", "_count") == 0
    assert value(metrics, "request_inference_time_seconds", "_count") == 0
    assert value(metrics, "prompt_tokens", "_total") == 0


def test_beams_which_tell_no_steps_are_counted_when_they_end() -> None:
    metrics = make()
    metrics.finished(replace(RECORD, prefill_s=None, decode_s=None))
    assert value(metrics, "generation_tokens", "_total") == 11
    assert value(metrics, "prompt_tokens", "_total") == 100
    assert value(metrics, "e2e_request_latency_seconds", "_count") == 1
    metrics.finished(RECORD)
    assert value(metrics, "generation_tokens", "_total") == 11, "its steps told them before"


def test_tokens_are_counted_as_they_come_in_buckets_that_tell_milliseconds_apart() -> None:
    metrics = make()
    metrics.first_token(0.003)
    for seconds in (0.0004, 0.0008, 0.0015, 0.0025, 0.004):
        metrics.next_token(seconds)
    metrics.stepped(5)
    metrics.stepped(2)
    assert value(metrics, "generation_tokens", "_total") == 7
    assert value(metrics, "iteration_tokens_total", "_count") == 2
    assert value(metrics, "time_to_first_token_seconds", "_bucket", le="0.005") == 1
    name = "inter_token_latency_seconds"
    edges = ("0.0005", "0.001", "0.002", "0.003", "0.005")
    assert [value(metrics, name, "_bucket", le=edge) for edge in edges] == [1, 2, 3, 4, 5]


def test_the_edges_of_vllm_are_all_there() -> None:
    ladder = {1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0}
    expected = {
        "time_to_first_token_seconds": {0.001, 0.005, 0.06, 0.75, 7.5, 640.0, 2560.0},
        "inter_token_latency_seconds": {0.01, 0.025, 0.05, 0.075, 0.15, 0.75, 7.5, 80.0},
        "request_time_per_output_token_seconds": {0.01, 0.025, 0.4, 80.0},
        "e2e_request_latency_seconds": {0.3, 0.8, 1.5, 15.0, 1920.0, 7680.0},
        "request_prompt_tokens": ladder,
        "request_params_n": {1.0, 2.0, 5.0, 10.0, 20.0},
        "iteration_tokens_total": {1.0, 8.0, 16.0, 512.0, 16384.0},
    }
    families = scrape(make())
    for name, edges in expected.items():
        found = {float(s.labels["le"]) for s in families[name].samples if "le" in s.labels}
        assert edges <= found, name


def test_refusals_answers_faults_and_pictures_are_counted() -> None:
    metrics = make()
    metrics.faulted()
    metrics.decoded(0.03)
    metrics.rejected("rate_limit_exceeded")
    metrics.rejected("rate_limit_exceeded")
    metrics.responded("/v1/models", 200)
    metrics.responded("/v1/models", 401)
    assert value(metrics, "engine_faults", "_total") == 1
    assert value(metrics, "image_decode_seconds", "_sum") == 0.03
    assert value(metrics, "rejected_requests", "_total", reason="rate_limit_exceeded") == 2
    assert value(metrics, "http_responses", "_total", route="/v1/models", status="401") == 1


def test_a_label_that_holds_anything_is_still_one_label() -> None:
    odd = 'a"b\\c\nd'
    metrics = Metrics(odd, load=lambda: LOAD)
    metrics.rejected(odd)
    assert value(metrics, "rejected_requests", "_total", reason=odd, model_name=odd) == 1


def test_two_servers_in_one_process_know_nothing_of_each_other() -> None:
    one, other = make(), make()
    one.faulted()
    assert value(other, "engine_faults", "_total") == 0
    assert not [family for family in REGISTRY.collect() if family.name.startswith("minigpt4:")]


def test_nothing_is_lost_when_many_threads_count() -> None:
    metrics = make()

    def count() -> None:
        for _ in range(200):
            metrics.next_token(0.001)
            metrics.stepped(3)
            metrics.responded("/v1/models", 200)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        metrics.render()
    for thread in threads:
        thread.join()
    assert value(metrics, "inter_token_latency_seconds", "_count") == 1600
    assert value(metrics, "generation_tokens", "_total") == 4800
    assert value(metrics, "http_responses", "_total", status="200") == 1600


def test_it_is_the_observer_that_the_scheduler_wants() -> None:
    observer: Observer = make()
    observer.first_token(0.1)
    for name in vars(Observer):
        if not name.startswith("_"):
            assert callable(getattr(observer, name)), name
