"""benchmarks/input_pipeline.py: the whole of it runs at a tiny size, and its table says what it found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmark_scripts import load_script

benchmark = load_script("input_pipeline")
tables = load_script("page_tables")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    out: Path = tmp_path_factory.mktemp("results") / "input_pipeline.json"
    sizes = "--pictures 40 --sides 48 64 --threads 1 2 --batch-size 4 --batches 3 --rounds 1"
    benchmark.main([*sizes.split(), "--out", str(out)])
    found: dict[str, object] = json.loads(out.read_text())
    return found


def test_every_setting_is_a_row_with_its_hardware(result: dict) -> None:
    names = [f"jpeg_{side}_threads_{n}" for side in (48, 64) for n in (1, 2)]
    assert list(result["rows"]) == [*names, "words"]
    assert {"cpu", "cores", "python", "grain", "pillow"} <= result["hardware"].keys()
    for row in result["rows"].values():
        assert row["images_per_s"] > 0
        assert row["images_per_cpu_s"] > 0
        assert row["of_h200"] == pytest.approx(row["images_per_s"] / 350, abs=1e-3)
        assert 0.7 < row["padding_efficiency"] <= 1


def test_the_table_shows_each_row_beside_what_an_h200_takes(result: dict) -> None:
    lines = tables.input_pipeline(result).splitlines()
    row = result["rows"]["jpeg_64_threads_2"]
    assert "350 pictures/s" in lines[0]
    assert len(lines) == 4 + len(result["rows"])
    low, high = row["images_per_s_of_rounds"]
    assert (
        f"| JPEGs of 64 pixels, 2 threads | {row['images_per_s']:,.0f} | {low:,.0f} to {high:,.0f} | "
        f"{row['images_per_cpu_s']:,.0f} | {row['of_h200']:.2f} | {row['padding_efficiency']:.0%} |"
    ) in lines


def test_captions_are_about_as_long_in_tokens_as_the_webs() -> None:
    captions = benchmark.make_captions(400)
    tokenizer = benchmark.make_tokenizer(captions)
    lengths = [len(tokenizer.encode(caption)) for caption in captions]
    assert 13 < sum(lengths) / len(lengths) < 20
