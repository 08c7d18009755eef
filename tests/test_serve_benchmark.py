"""benchmarks/serve_load.py and what it stands on: the clock of its client, its figures, its tables, its refusals."""

from __future__ import annotations

import asyncio
import base64
import http.server
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from minigpt4_jax.checksums import write_checksums
from minigpt4_jax.config_file import load as load_config
from minigpt4_jax.data.tokenizer import byte_tokenizer
from minigpt4_jax.presets import PRESETS
from minigpt4_jax.serve_config import ServeConfig
from tests.benchmark_scripts import FOLDER, load_script
from tests.tiny_folder import write_folder
from tests.tiny_model import make_frozen, write_tiny_projection

client = load_script("serve_client")
serve_load = load_script("serve_load")
server_process = load_script("server_process")
tables = load_script("page_tables")


# Plain loops cost XLA 0.4 of the time for the tiny model's programs; newer ones know no other way, nor the flag.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false" if jax.__version_info__[:2] == (0, 10) else ""
)


def chunk(text: str | None = None, **more: Any) -> str:
    """An SSE event, with a delta or without."""
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}}]
    return f"data: {json.dumps({'choices': choices, **more})}\n\n"


USAGE = {"prompt_tokens": 30, "completion_tokens": 4, "total_tokens": 34}
WHOLE_STREAM = [
    'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}\n\n',
    ": ping\n\n",
    chunk("A c"),
    chunk("up."),
    'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n',
    chunk(usage=USAGE),
    "data: [DONE]\n\n",
]


def ask_scripted(
    status: int, pieces: list[str], *, kind: str = "text/event-stream", cut: bool = False
) -> Any:
    """What the client makes of an answer that is sent in these pieces; `cut` leaves the connection in its middle."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = next(
            int(line.split(":")[1]) for line in head.split("\r\n") if "content-length" in line
        )
        await reader.readexactly(length)
        writer.write(
            f"HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ntransfer-encoding: chunked\r\n\r\n".encode()
        )
        for piece in pieces:
            data = piece.encode()
            writer.write(b"%x\r\n%s\r\n" % (len(data), data))
            await writer.drain()
        if not cut:
            writer.write(b"0\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    async def both() -> Any:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            async with client.Client(f"http://127.0.0.1:{port}") as asking:
                return await asking.ask(b"{}")

    return asyncio.run(both())


def test_the_clock_runs_from_sending_to_the_first_and_the_last_text() -> None:
    sample = ask_scripted(200, WHOLE_STREAM)
    assert sample.error == ""
    assert (sample.text, sample.input_tokens, sample.output_tokens) == ("A cup.", 30, 4)
    assert len(sample.text_s) == 2, "a role, a ping, an end and the usage are no text"
    assert sample.sent_s < sample.text_s[0] <= sample.text_s[1] <= sample.ended_s


def test_an_answer_that_is_not_streamed_is_read_whole() -> None:
    body = {"choices": [{"message": {"content": "A cup."}}], "usage": USAGE}
    sample = ask_scripted(200, [json.dumps(body)], kind="application/json")
    assert (sample.error, sample.text, sample.output_tokens) == ("", "A cup.", 4)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda: ask_scripted(429, ['{"error": {}}'], kind="application/json"), "429"),
        (lambda: ask_scripted(200, WHOLE_STREAM[:-1]), "no [DONE]"),
        (lambda: ask_scripted(200, WHOLE_STREAM[:3], cut=True), "RemoteProtocolError"),
        (
            lambda: ask_scripted(
                200, [chunk("A"), 'data: {"error": {"code": "internal_error"}}\n\n']
            ),
            "in the stream: internal_error",
        ),
    ],
    ids=["refused", "not ended", "cut", "failed"],
)
def test_what_is_not_a_whole_answer_is_an_error_with_its_name(
    answer: Callable[[], Any], error: str
) -> None:
    assert answer().error == error


def test_arrivals_have_the_rate_and_the_burstiness_and_are_the_same_again() -> None:
    even, poisson, bursts = (
        np.diff(client.arrivals(20_000, rate=4.0, burstiness=b, seed=1)) for b in (100.0, 1.0, 0.25)
    )
    for gaps, burstiness in ((even, 100.0), (poisson, 1.0), (bursts, 0.25)):
        assert gaps.mean() == pytest.approx(1 / 4, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
    assert client.arrivals(9, rate=2.0, burstiness=1.0, seed=3) == client.arrivals(
        9, rate=2.0, burstiness=1.0, seed=3
    )


class Noting:
    """A client that answers when it is told to, and notes how many it holds."""

    def __init__(self) -> None:
        self.held, self.most = 0, 0

    async def ask(self, body: bytes) -> Any:
        self.held += 1
        self.most = max(self.most, self.held)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        self.held -= 1
        return client.Sample(text=body.decode())


def test_a_closed_loop_keeps_so_many_under_way_and_the_order() -> None:
    noting = Noting()
    bodies = [str(number).encode() for number in range(20)]
    samples = asyncio.run(client.closed_loop(noting, bodies, at_once=3))
    assert [sample.text for sample in samples] == [body.decode() for body in bodies]
    assert noting.most == 3


def test_an_open_loop_waits_for_nobody() -> None:
    class Stuck(Noting):
        async def ask(self, body: bytes) -> Any:
            self.held += 1
            while self.held < 5:  # nobody is answered before all were asked
                await asyncio.sleep(0)
            return client.Sample()

    samples = asyncio.run(
        asyncio.wait_for(client.open_loop(Stuck(), [b""] * 5, [0.0, 0.0, 0.001, 0.002, 0.002]), 30)
    )
    assert len(samples) == 5
    assert all(sample.late_s >= 0 for sample in samples)


def sample(sent: float, text: list[float], tokens: int, error: str = "") -> Any:
    return client.Sample(
        sent_s=sent,
        text_s=text,
        ended_s=(text or [sent + 1])[-1],
        output_tokens=tokens,
        input_tokens=10,
        error=error,
    )


def test_the_figures_are_those_of_vllm_bench_serve() -> None:
    samples = [
        sample(0.0, [0.1, 0.2, 0.5], 5),  # TTFT 100, TPOT 100, E2EL 500
        sample(1.0, [1.3, 1.5], 3),  # 300, 100, 500
        sample(1.2, [2.0], 1),  # 800, none, 800
        sample(1.5, [], 0, "429"),
    ]
    found = client.figures(samples, ttft_slo_ms=300.5, tpot_slo_ms=100.5)
    assert found["duration"] == 2.5
    assert (found["completed"], found["failed"], found["errors"]) == (3, 1, {"429": 1})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 9)
    assert found["request_throughput"] == 1.2
    assert found["output_throughput"] == 3.6
    assert (found["request_goodput"], found["goodput_share"]) == (0.8, 0.5)
    assert found["max_concurrent_requests"] == 2, "one ends as the next one comes"
    assert (found["mean_ttft_ms"], found["median_ttft_ms"]) == (400, 300)
    assert (found["mean_tpot_ms"], found["p99_tpot_ms"]) == (100, 100)
    assert (found["median_itl_ms"], found["mean_itl_ms"]) == (200, 200)
    assert found["p90_e2el_ms"] == pytest.approx(740)
    nothing = client.figures([sample(0.0, [], 0, "503")], ttft_slo_ms=1.0, tpot_slo_ms=1.0)
    assert (nothing["completed"], nothing["median_ttft_ms"], nothing["goodput_share"]) == (
        0,
        None,
        0,
    )


def test_the_time_per_token_can_miss_its_limit_alone() -> None:
    slow = [sample(0.0, [0.1, 2.1], 11)]
    for limit, share in ((199.0, 0.0), (201.0, 1.0)):
        found = client.figures(slow, ttft_slo_ms=200.0, tpot_slo_ms=limit)
        assert found["goodput_share"] == share


def test_questions_are_the_same_again_new_in_each_round_and_real_pictures() -> None:
    first, again, other = (
        serve_load.make_questions(12, pictures=0.5, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    pictures = {question.picture for question in first + other} - {None}
    assert len(pictures) == sum(q.picture is not None for q in first + other), "none comes twice"
    assert 2 <= sum(question.picture is None for question in first) <= 10
    for picture in pictures:
        opened = Image.open(io.BytesIO(picture))
        assert (opened.format, opened.size) == ("JPEG", (448, 448))


def test_a_body_is_what_the_api_takes() -> None:
    question = serve_load.Question("What is this?", b"jpeg")
    body = json.loads(serve_load.chat_body(question, model="smol", max_tokens=7, stream=True))
    (message,) = body["messages"]
    picture, text = message["content"]
    assert base64.b64decode(picture["image_url"]["url"].split(",")[1]) == b"jpeg"
    assert text == {"type": "text", "text": "What is this?"}
    assert (body["max_completion_tokens"], body["temperature"]) == (7, 0)
    assert body["stream_options"] == {"include_usage": True}
    whole = json.loads(serve_load.chat_body(question, model="smol", max_tokens=7, stream=False))
    assert "stream_options" not in whole


def test_without_the_libraries_of_a_server_it_says_which_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = serve_load.importlib.util.find_spec
    monkeypatch.setattr(
        serve_load.importlib.util,
        "find_spec",
        lambda name: None if name in ("uvicorn", "httpx2") else real(name),
    )
    with pytest.raises(SystemExit, match=r"httpx2, uvicorn.*pip install.*inference\.py"):
        serve_load.main([])
    with pytest.raises(SystemExit, match=r"installed: httpx2\."):
        serve_load.main(["--url", "http://127.0.0.1:1", "--rate", "1"])


def test_a_server_that_is_started_here_takes_all_requests_of_a_row() -> None:
    served = load_config(ServeConfig, None, serve_load.room(64))
    assert (served.limits.max_per_key, served.limits.max_waiting) == (128, 128)
    own = load_config(ServeConfig, None, [*serve_load.room(64), "limits.max_per_key=5"])
    assert (own.limits.max_per_key, own.limits.max_waiting) == (5, 128)


def test_the_key_goes_with_every_request_to_a_keyed_server() -> None:
    asked: list[tuple[str, str]] = []

    class Keyed(http.server.BaseHTTPRequestHandler):
        def _answer(self, body: bytes, kind: str) -> None:
            key = self.headers.get("Authorization", "")
            asked.append((self.path, key))
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(200 if key == "Bearer a-key" else 401)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            text = b"x 1.0\n" if self.path == "/metrics" else b'{"data": [{"id": "smol"}]}'
            self._answer(text, "application/json")

        def do_POST(self) -> None:
            self._answer("".join(WHOLE_STREAM).encode(), "text/event-stream")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Keyed) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        try:
            url = f"http://127.0.0.1:{server.server_address[1]}"
            arguments = ["--url", url, "--key", "a-key", "--rate", "100", "--num-requests", "2"]
            args = serve_load.read_arguments(arguments)
            server_process.wait_until_compiled(url, key=args.key)
            row = serve_load.Bench(url, args, bare=None).load(0, rate=100.0, said="x")
        finally:
            server.shutdown()
            serving.join()
    assert (row["completed"], row["failed"]) == (2, 0)
    paths = ["/metrics", "/v1/models", *["/v1/chat/completions"] * 2]
    assert asked == [(path, "Bearer a-key") for path in paths]


SHARE = {
    "what": "the server's share",
    "share": 0.951,
    "share_of_rounds": [0.93, 0.96],
    "tokens_per_s": {"bare": 200.0, "http": 190.2},
    "same_answers": "64 of 64",
    "load_after": 1.0,
}
LOAD = {
    "what": "50%",
    "request_rate": 1.5,
    **client.figures([sample(0.0, [0.1, 0.2, 0.5], 5)], ttft_slo_ms=200.0, tpot_slo_ms=100.5),
    "load_after": 1.0,
}


def test_the_tables_show_shares_and_percentiles() -> None:
    head = {
        "hardware": {"cpu": "EPYC", "cores": 2, "load_before": 0.5, "python": "3.11", "httpx2": "2"},
        "rounds": 5, "num_requests": 64, "max_tokens": 64, "pictures": 0.75, "burstiness": 1.0, "ttft_slo_ms": 2000.0,
        "tpot_slo_ms": 200.0, "rows": {"share_streamed": SHARE, "load_50": LOAD},
    }  # fmt: skip
    assert tables.serve_share(head).splitlines()[-1] == (
        "| the server's share | 200.0 | 190.2 | 95.1% | 93.0% to 96.0% | 64 of 64 |"
    )
    assert "5 rounds of 64 requests" in tables.serve_share(head)
    assert tables.serve_load(head).splitlines()[-1] == (
        "| 50% | 1.50 | 1 of 1 | 10.0 | 100 / 100 / 100 | 200 / 280 / 298 | 100 / 100 / 100 "
        "| 0.50 / 0.50 / 0.50 | 100% |"
    )


@pytest.fixture(scope="module")
def tiny_overrides(tiny_params: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a server with the tiny model, from a folder as `python -m convert` writes them."""
    folder, preset = tmp_path_factory.mktemp("serve"), PRESETS["tiny"]
    tokenizer = byte_tokenizer()
    frozen = make_frozen(tiny_params, tokenizer)
    model = write_folder(folder / "tiny-model", frozen, preset=preset)
    tokenizer._backend.save(str(model / "tokenizer.json"))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (model / "tokenizer_config.json").write_text(json.dumps(names))
    write_checksums(model)
    projection = write_tiny_projection(folder / "p.safetensors", tiny_params, config=preset.model)
    return [f"model={model}", f"projection={projection}", "context=72", "num_slots=1"]


def test_one_command_measures_the_share_and_the_load_of_a_real_server(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "serve.json"
    command = [
        sys.executable, str(FOLDER / "serve_load.py"), *tiny_overrides, "--num-requests", "6", "--rounds", "2",
        "--max-tokens", "4", "--pictures", "0.5", "--rate", "20", "--out", str(out),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": QUICK_TO_COMPILE,  # which is most of it
        "PYTHONPATH": str(FOLDER.parent),
        "MINIGPT4_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert list(found["rows"]) == ["share_streamed", "share_whole", "load_20"]
    for name in ("share_streamed", "share_whole"):
        row = found["rows"][name]
        assert row["same_answers"] == "12 of 12"
        assert 0 < row["share_of_rounds"][0] <= row["share"] <= row["share_of_rounds"][1]
    load = found["rows"]["load_20"]
    assert (load["completed"], load["failed"]) == (6, 0)
    assert load["total_output_tokens"] == 24
    assert 0 < load["median_ttft_ms"] <= load["p99_e2el_ms"]
    assert tables.serve_share(found).count("12 of 12") == 2
    assert "| 20 requests/s | 20.00 | 6 of 6 |" in tables.serve_load(found)
