"""Sources are hashed rightly, never far ahead of the conversion, and an ended conversion does not wait for them."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import pytest

from convert import source_hashes
from convert.source_hashes import SourceHashes


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Path, ...]]:
    """Two parts of 1,000 bytes and one without files, read 10 bytes at a time."""
    monkeypatch.setattr(source_hashes, "_CHUNK", 10)
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for size, path in zip((400, 600, 1000), paths, strict=True):
        path.write_bytes(path.name.encode() * size)
    return {"vit": tuple(paths[:2]), "ln_vision": (), "llama": (paths[2],)}


def test_every_file_has_its_name_size_and_sha256(files: dict[str, tuple[Path, ...]]) -> None:
    with SourceHashes(files) as hashes:
        found = hashes.wait()
    assert found == {
        part: [
            {"name": f.name, "bytes": f.stat().st_size, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()}
            for f in paths
        ]
        for part, paths in files.items()
    }  # fmt: skip


def test_what_is_read_keeps_behind_the_conversion(files: dict[str, tuple[Path, ...]]) -> None:
    with SourceHashes(files) as hashes:
        for share in (0.25, 0.5):
            hashes.allow(share)
            limit = (share + source_hashes._AHEAD) * 2000
            deadline = time.monotonic() + 60
            while hashes._read <= limit and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.02)  # it would go on here
            assert limit < hashes._read <= limit + 10
        assert len(hashes.wait()["llama"]) == 1


def test_a_conversion_that_ends_early_does_not_wait(files: dict[str, tuple[Path, ...]]) -> None:
    with pytest.raises(KeyboardInterrupt), SourceHashes(files) as hashes:
        raise KeyboardInterrupt
    assert not hashes._thread.is_alive()
    assert hashes._found["llama"] == []


def test_a_file_that_cannot_be_read_is_said_at_the_end(files: dict[str, tuple[Path, ...]]) -> None:
    hashes = SourceHashes(files)
    files["llama"][0].unlink()
    with hashes, pytest.raises(FileNotFoundError):
        hashes.wait()
