"""data/tar_shards.py: samples by index from any thread, an index that is kept and that notices a changed shard."""

from __future__ import annotations

import logging
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data import tar_shards
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.tar_shards import TarShards
from tests.planted import END, jpeg, plant, sample, samples


def write(folder: Path, **shards: bytes) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in shards.items():
        (folder / f"{name}.tar").write_bytes(content + END)
    return folder


def words(source: TarShards) -> list[str]:
    return [source[i].exchanges[0].answer for i in range(len(source))]


def test_every_usable_sample_has_its_own_picture_and_caption(tmp_path: Path) -> None:
    planted = plant(tmp_path)
    source = TarShards(tmp_path)
    assert source.report.counts == planted.index_faults
    found = set()
    for index in range(len(source)):
        example = source[index]
        assert example.image_row == index
        text = example.exchanges[0].answer
        number = int(text.removeprefix("thing "))
        if text in planted.captions:
            found.add(text)
            assert source.read_image(index) == jpeg(number)
    assert found == planted.captions


def test_a_pattern_picks_shards_and_a_file_is_one(tmp_path: Path) -> None:
    write(tmp_path / "a", x0=samples([1]), x1=samples([2]), y=samples([3]))
    write(tmp_path / "b", x0=samples([4]))
    assert words(TarShards(tmp_path / "a" / "x*.tar")) == ["thing 1", "thing 2"]
    assert words(TarShards(tmp_path / "*" / "x0.tar")) == ["thing 1", "thing 4"]
    assert words(TarShards(tmp_path / "a" / "y.tar")) == ["thing 3"]
    assert words(TarShards(tmp_path / "a")) == ["thing 1", "thing 2", "thing 3"]


def test_the_index_is_made_once_and_moves_with_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int]] = []
    folder = write(tmp_path / "a", x=samples([1, 2]), y=samples([3]))
    TarShards(folder, progress=lambda done, of: calls.append((done, of)))
    assert calls == [(1, 2), (2, 2)]
    moved = tmp_path / "moved"
    folder.rename(moved)

    def must_not_run(*args: object, **settings: object) -> None:
        raise AssertionError("indexed again")

    monkeypatch.setattr(tar_shards, "write_index", must_not_run)
    assert words(TarShards(moved)) == ["thing 1", "thing 2", "thing 3"]
    assert [file.suffix for file in moved.iterdir() if file.suffix != ".tar"] == [".bin"]


@pytest.mark.parametrize("change", ["size", "time", "added", "removed"])
def test_a_changed_set_of_shards_is_indexed_again_and_said(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "a", x=samples([1, 2]), y=samples([3]))
    TarShards(folder)
    match change:
        case "size":
            write(folder, x=samples([1, 2, 4]))
        case "time":  # the same size, other content
            write(folder, x=samples([5, 6]))
            os.utime(folder / "x.tar", ns=(1, 1))
        case "added":
            write(folder, z=samples([7]))
        case "removed":
            (folder / "y.tar").unlink()
    with caplog.at_level(logging.WARNING):
        found = words(TarShards(folder))
    assert "indexing again" in caplog.text
    expected = {"size": [1, 2, 4, 3], "time": [5, 6, 3], "added": [1, 2, 3, 7], "removed": [1, 2]}
    assert found == [f"thing {number}" for number in expected[change]]


@pytest.mark.parametrize("damage", [b"", b"x" * 100, None])
def test_a_damaged_index_is_made_again(damage: bytes | None, tmp_path: Path) -> None:
    folder = write(tmp_path / "a", x=samples([1, 2]))
    TarShards(folder)
    (file,) = folder.glob("*.bin")
    file.write_bytes(file.read_bytes()[:-3] if damage is None else damage)
    assert words(TarShards(folder)) == ["thing 1", "thing 2"]


def test_the_source_pickles_and_reads_the_same(tmp_path: Path) -> None:
    source = TarShards(write(tmp_path / "a", x=samples([1, 2]), y=samples([3])))
    words(source)
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(3)] == [source[i] for i in range(3)]
    assert copy.read_image(2) == jpeg(3)


def test_threads_read_right_while_shards_are_closed_and_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_shards, "MAX_OPEN", 2)
    folder = write(tmp_path / "a", **{f"s{n}": samples([n]) for n in range(8)})
    source = TarShards(folder)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(4) as pool:
        for index, data in pool.map(lambda i: (i, source.read_image(i)), list(range(8)) * 100):
            assert data == jpeg(index)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_a_shard_cut_after_indexing_is_a_fault_of_its_samples(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", x=samples([1, 2]), y=samples([3]))
    source = TarShards(folder)
    (folder / "x.tar").write_bytes(b"")
    with pytest.raises(SampleFault, match=r"x\.tar at byte 0 has 0 of .* bytes") as raised:
        source.read_image(0)
    assert raised.value.reason == "unreadable"
    assert source.read_image(2) == jpeg(3)


def test_the_report_is_logged_by_reason_with_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plant(tmp_path)
    for _ in range(2):  # when it is made, and when it is read
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            TarShards(tmp_path)
        assert "1 bad checksum, 1 duplicate key, 2 no caption, 1 truncated tail" in caplog.text
        assert "duplicate key: 04-duplicate.tar: 00040" in caplog.text


def test_what_cannot_be_used_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no shard at"):
        TarShards(tmp_path)
    with pytest.raises(UserError, match="There is no shard at"):
        TarShards(tmp_path / "none" / "*.tar")
    empty = write(tmp_path / "empty", x=sample(1, words=b"{}"))
    with pytest.raises(UserError, match=r"No sample of .* can be used \(1 no caption\)"):
        TarShards(empty)
    with pytest.raises(UserError, match=r"Cannot write the index.*Set the source's `index`"):
        TarShards(write(tmp_path / "a", x=samples([1])), index=tmp_path / "nowhere" / "i.bin")
    source = TarShards(tmp_path / "a", index=tmp_path / "i.bin")
    assert words(source) == ["thing 1"]
    assert not list((tmp_path / "a").glob("*.bin"))
