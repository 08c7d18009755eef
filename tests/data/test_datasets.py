"""data/datasets.py: settings to opened sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data.array_records import ArrayRecordSource, TfdsSource, write_array_records
from minigpt4_jax.data.captions import blip_caption
from minigpt4_jax.data.datasets import image_offsets, open_sources
from minigpt4_jax.data.jsonl import Jsonl
from minigpt4_jax.data.sources import CcSbuAlign
from minigpt4_jax.data.tar_shards import TarShards
from minigpt4_jax.data.tfds_builders import prepare
from minigpt4_jax.train_config import DataConfig, SourceConfig
from tests.planted import END, jpeg, plant, samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One source of every kind."""
    root = tmp_path_factory.mktemp("sources")
    (root / "align" / "image").mkdir(parents=True)
    (root / "align" / "image" / "0.jpg").write_bytes(jpeg(0))
    (root / "align" / "filter_cap.json").write_text('[{"image_id": 0, "caption": "zero"}]')
    (root / "own.jsonl").write_text(json.dumps({"image": "align/image/0.jpg", "text": "own"}))
    (root / "tars").mkdir()
    (root / "tars" / "0.tar").write_bytes(samples([1, 2, 3]) + END)
    tars = TarShards(root / "tars")
    write_array_records(tars, root / "records")
    prepare("image_caption_tars", root / "tars", root / "tfds")
    return root


KINDS = {
    "cc_sbu_align": ("align", CcSbuAlign), "jsonl": ("own.jsonl", Jsonl), "tar": ("tars", TarShards),
    "array_record": ("records", ArrayRecordSource), "tfds": ("tfds/image_caption_tars/1.0.0", TfdsSource),
}  # fmt: skip


def test_every_kind_is_opened_in_the_order_of_the_settings(folder: Path) -> None:
    sources = {
        kind: SourceConfig(kind=kind, path=str(folder / path), weight=float(place + 1))
        for place, (kind, (path, _)) in enumerate(KINDS.items())
    }
    parts = open_sources(DataConfig(sources=sources))
    assert [(part.name, type(part.source), part.weight) for part in parts] == [
        (kind, cls, place + 1) for place, (kind, (_, cls)) in enumerate(KINDS.items())
    ]
    assert image_offsets(parts) == [0, 1, 2, 5, 8]


def test_the_short_form_is_one_folder(folder: Path) -> None:
    (part,) = open_sources(DataConfig(folder=str(folder / "align")))
    assert isinstance(part.source, CcSbuAlign)
    assert part.process("As IT is.") == "As IT is."


def test_each_source_has_its_own_processor_and_index(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "elsewhere.bin"
    calls: list[tuple[int, int]] = []
    settings = SourceConfig(
        kind="tar", path=str(folder / "tars"), caption_processor="blip_caption", index=str(index)
    )
    (part,) = open_sources(
        DataConfig(sources={"web": settings}), progress=lambda *done: calls.append(done)
    )
    assert part.process is blip_caption
    assert index.exists()
    assert calls == [(1, 1)]


def test_tars_of_which_too_much_is_lost_are_refused_with_an_example(tmp_path: Path) -> None:
    planted = plant(tmp_path)
    web = {"web": SourceConfig(kind="tar", path=str(tmp_path))}
    lost = sum(planted.index_faults.values()) - planted.index_faults["wrong member order"]
    total = lost + len(planted.captions) + sum(planted.read_faults.values())
    with pytest.raises(
        UserError, match=rf"{lost} of {total} samples of source 'web'.*at most 15\.00%.*tar"
    ):
        open_sources(DataConfig(sources=web, max_corrupt_share=0.15))
    open_sources(DataConfig(sources=web, max_corrupt_share=0.2))
