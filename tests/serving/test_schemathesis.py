"""Some thousand generated requests; `python -m tools.serve_fuzz` sends more (docs/reliability.md)."""

from __future__ import annotations

from collections.abc import Callable

from minigpt4_jax import MiniGPT4
from minigpt4_jax.serve_config import ServeConfig
from tests.serving.running import run_server
from tools.serve_fuzz import fuzz

KEY = "a-key-0123456789ab"


def test_no_generated_request_breaks_a_word_of_the_servers_description(
    make_model: Callable[..., MiniGPT4],
) -> None:
    config = ServeConfig(model="tiny", port=0, context=128, num_slots=4)
    with run_server(make_model(), config, keys=(KEY,)) as running:
        found = fuzz(
            running.server.address,
            key=KEY,
            max_examples=15,
            seed=1,
            phases="coverage,fuzzing",
        )
        assert found.code == 0, found.output
        running.wait(lambda: running.idle)
