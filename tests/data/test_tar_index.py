"""data/tar_index.py: every member of a good tar is found where `tarfile` finds it, and every fault is counted once."""

from __future__ import annotations

import functools
import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from minigpt4_jax.data import tar_index
from minigpt4_jax.data.tar_index import (
    Damage,
    Member,
    Report,
    index_shard,
    read_caption,
    read_index,
    shard_table,
    split_name,
    walk_members,
    write_index,
)
from tests.planted import (
    END,
    caption,
    flip_checksum,
    header_at,
    jpeg,
    member,
    plant,
    sample,
    samples,
    zero_header,
)


def walk(path: Path) -> list[Member | Damage]:
    with path.open("rb") as file:
        return list(walk_members(file.fileno(), os.path.getsize(path)))


def index(folder: Path, content: bytes) -> tuple[dict[str, int], list[str]]:
    """The faults and the captions of the usable samples of one shard."""
    path = folder / "shard.tar"
    path.write_bytes(content)
    report = Report()
    rows = index_shard(path, 0, report)
    words = [content[r["caption_at"] : r["caption_at"] + r["caption_size"]] for r in rows]
    return dict(report.counts), [read_caption(text).removeprefix("thing ") for text in words]


LONG = "very-long-folder-name/" * 12 + "picture"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_good_tars_are_where_tarfile_finds_them(format: int, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    names = ["a.jpg", "folder/b.json", "c" * 90 + ".png", "folder/" * 20 + "d.jpg"]
    if format != tarfile.USTAR_FORMAT:
        names += [f"{LONG}.jpg", "ünïcode.jpg", "last.json"]
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 100 * number + 511
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(link)
    with tarfile.open(path) as tar:
        expected = [Member(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert [m.name for m in expected] == names
    assert walk(path) == expected


def test_a_size_in_base_256_is_read(tmp_path: Path) -> None:
    block = bytearray(member("a.jpg", b"x" * 700))
    block[124:136] = b"\x80" + (700).to_bytes(11, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(block) + END)
    assert walk(path) == [Member("a.jpg", 512, 700)]


def test_a_pax_size_wins_over_that_of_the_header(tmp_path: Path) -> None:
    record = b"13 size=700\nx"[:12]
    record = b"12 size=700\n"
    extended = bytearray(member("pax", record))
    extended[156:157] = b"x"
    extended[148:156] = b" " * 8
    extended[148:156] = b"%06o\0 " % sum(extended[:512])
    plain = tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)  # says 0 bytes
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(extended) + plain + b"x" * 700 + bytes(324) + END)
    assert walk(path) == [Member("a.jpg", 1536, 700)]


THREE = samples([1, 2, 3])
FAULTS = {
    "none": (THREE + END, {}, "123"),
    "none, one block of zeros at the end": (THREE + END[:512], {}, "123"),
    "none, padded as tar does": (THREE + END * 10, {}, "123"),
    "truncated in a picture": (THREE + sample(4)[:600], {"truncated tail": 1}, "123"),
    "truncated in a caption": (THREE + sample(4)[:-500], {"truncated tail": 1}, "123"),
    "truncated in a header": (THREE + sample(4)[:100], {"truncated tail": 1}, "123"),
    "truncated between two members": (THREE, {"truncated tail": 1}, "123"),
    "no byte at all": (b"", {"truncated tail": 1}, ""),
    "picture's header zero": (zero_header(THREE, "00002.jpg") + END, {"zero block": 1}, "13"),
    "caption's header zero": (zero_header(THREE, "00002.json") + END, {"zero block": 1}, "13"),
    "last header zero": (zero_header(THREE, "00003.json") + END, {"zero block": 1}, "12"),
    "first header zero": (zero_header(THREE, "00001.jpg") + END, {"zero block": 1}, "23"),
    "zeros between samples": (THREE + bytes(1536) + sample(4) + END, {"zero block": 1}, "1234"),
    "two tars in one": (THREE + END + sample(4) + END, {"zero block": 1}, "1234"),
    "picture's checksum": (flip_checksum(THREE, "00002.jpg") + END, {"bad checksum": 1}, "13"),
    "caption's checksum": (flip_checksum(THREE, "00002.json") + END, {"bad checksum": 1}, "13"),
    "last checksum": (flip_checksum(THREE, "00003.json") + END, {"bad checksum": 1}, "12"),
    "two checksums": (
        flip_checksum(flip_checksum(THREE, "00001.jpg"), "00003.jpg") + END,
        {"bad checksum": 2},
        "2",
    ),
    "a sample twice": (THREE + sample(1) + END, {"duplicate key": 1}, "123"),
    "a sample thrice": (THREE + sample(1) + sample(2) + sample(1) + END, {"duplicate key": 3}, "123"),
    "a sample twice at once": (sample(1) + THREE + END, {"duplicate key": 1}, "123"),
    "a picture twice": (member("00001.jpg", b"") + THREE + END, {"duplicate key": 1}, "23"),
    "members apart": (
        member("00004.jpg", jpeg(4)) + THREE + member("00004.json", caption(4)) + END,
        {"wrong member order": 1},
        "4123",
    ),
    "pictures first": (
        member("00001.jpg", b"") + member("00002.jpg", b"") + member("00001.json", caption(1))
        + member("00002.json", caption(2)) + END,
        {"wrong member order": 2},
        "12",
    ),
    "caption before its picture": (
        member("00001.json", caption(1)) + member("00001.jpg", jpeg(1)) + END, {}, "1",
    ),
    "no caption": (member("00000.jpg", jpeg(0)) + THREE + END, {"no caption": 1}, "123"),
    "no picture": (member("00000.json", caption(0)) + THREE + END, {"no image": 1}, "123"),
    "an empty caption": (sample(0, words=b'{"caption": " "}') + THREE + END, {"no caption": 1}, "123"),
    "a broken JSON": (sample(0, words=b'{"caption"') + THREE + END, {"no caption": 1}, "123"),
    "other members": (
        member("00001.txt", b"x") + THREE + member("README", b"x") + member(".hidden.jpg", b"x") + END, {}, "123",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_counted_once_and_costs_no_other_sample(name: str, tmp_path: Path) -> None:
    content, faults, usable = FAULTS[name]
    assert index(tmp_path, content) == (faults, list(usable))


def test_the_planted_corpus_is_reported_as_planted(tmp_path: Path) -> None:
    planted = plant(tmp_path)
    report = Report()
    total = 0
    for number, path in enumerate(sorted(tmp_path.glob("*.tar"))):
        total += len(index_shard(path, number, report))
    assert report.counts == Counter(planted.index_faults)
    assert total == len(planted.captions) + sum(planted.read_faults.values())
    assert report.named["bad checksum"] == [
        f"03-checksum.tar at byte {header_at((tmp_path / '03-checksum.tar').read_bytes(), '00032.jpg')}"
    ]
    assert report.named["duplicate key"] == ["04-duplicate.tar: 00040"]


def test_of_many_faults_the_first_are_named_and_all_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(b"".join(member(f"{n}.jpg", b"x") for n in range(30)) + END)
    report = Report()
    index_shard(path, 0, report)
    assert report.counts == {"no caption": 30}
    assert report.named["no caption"][:2] == ["a.tar: 0", "a.tar: 1"]
    assert len(report.named["no caption"]) == tar_index._NAMED


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("a/b.c.JPG", "a/b", "c.jpg"), ("x.jpg", "x", "jpg"), ("d.e/x.json", "d.e/x", "json"), ("README", "README", ""),
    ],
)  # fmt: skip
def test_a_key_ends_at_the_first_dot_of_the_file_name(name: str, key: str, extension: str) -> None:
    assert split_name(name) == (key, extension)


def test_two_hosts_that_index_at_once_do_not_touch_each_others_halves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, path = tmp_path / "a.tar", tmp_path / "index.bin"
    shard.write_bytes(samples([1, 2, 3]) + END)
    table = shard_table([shard], tmp_path)
    monkeypatch.setattr(tar_index.os, "getpid", lambda: 1)  # as in containers
    write, calls = functools.partial(write_index, path, [shard], table), []

    def meanwhile(done: int, of: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(tar_index.socket, "gethostname", lambda: "another")
            write(progress=lambda done, of: calls.append((done, of)))

    write(progress=meanwhile)
    assert calls == [(1, 1)]
    found = read_index(path, table)
    assert found is not None
    assert len(found.rows) == 3
    assert {file.name for file in tmp_path.iterdir()} == {"a.tar", "index.bin"}
