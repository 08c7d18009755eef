"""`python -m convert verify`, `inspect` and `export` on a converted folder: every bit compared, and every bit back."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from convert import __main__ as cli
from convert.projection import ProjectionInfo, read_projection, write_projection
from convert.pth import PthSource, write_pth
from convert.sources import open_source
from minigpt4_jax.checksums import write_checksums
from minigpt4_jax.model_folder import ModelFolder
from minigpt4_jax.presets import PRESETS
from tests import llama_forms as forms
from tests import published_files as published

Files = dict[str, str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`downloads` and the `model` made from them. Shared: tests work on copies."""
    folder = tmp_path_factory.mktemp("made")
    files = published.write_files(folder / "downloads")
    assert cli.main(["vicuna-7b", *published.command(files, out=folder / "model")]) == 0
    return folder


@pytest.fixture
def downloads(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "downloads", tmp_path / "downloads"))


@pytest.fixture
def model(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "model", tmp_path / "model"))


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_out", Console(width=250))


def given(downloads: Path) -> list[str]:
    """The sources where they are now."""
    places = {"vit": "eva.pth", "qformer": "blip2.pth", "llm": "llm", "projection": "proj.pth"}
    return [text for option, name in places.items() for text in (f"--{option}", str(downloads / name))]  # fmt: skip


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_folder_is_what_its_sources_give(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(made / "model")]) == 0
    count = len(ModelFolder(made / "model").names())
    assert f"{count} tensors" in capsys.readouterr().out


def test_sources_that_have_moved_are_given_anew(
    made: Path, model: Path, downloads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden = made / "downloads"
    hidden.rename(made / "elsewhere")
    try:
        assert cli.main(["verify", str(model), "--llm", str(downloads / "llm")]) == 2
        err = capsys.readouterr().err
        assert f"--vit {hidden / 'eva.pth'}, --qformer" in err
        assert "--llm" not in err
        assert cli.main(["verify", str(model), *given(downloads)]) == 0
    finally:
        (made / "elsewhere").rename(hidden)


def test_sources_given_by_relative_paths_are_found_from_anywhere(
    downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = iter(given(Path(downloads.name)))
    files = {option.removeprefix("--"): path for option, path in zip(options, options, strict=True)}
    monkeypatch.chdir(tmp_path)
    command = published.command(files, out=Path("relative"))
    assert cli.main(["vicuna-7b", *command]) == 0
    monkeypatch.chdir(tmp_path.parent)
    assert cli.main(["verify", str(tmp_path / "relative")]) == 0


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("eva.pth", "vit/"),
        ("blip2.pth", "qformer/"),
        ("llm/model-00001-of-00002.safetensors", "llama/"),
        ("proj.pth", "llama_proj/kernel differs"),
    ],
)
def test_a_flipped_bit_in_a_source_is_found(
    file: str, said: str, model: Path, downloads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(downloads / file, place_of_a_weight(downloads / file))
    assert cli.main(["verify", str(model), *given(downloads)]) == 2
    err = capsys.readouterr().err
    assert "is not what its sources give" in err
    assert said in err


def place_of_a_weight(file: Path) -> int:
    """Of the lowest byte of a number that a parameter is made from."""
    used = ("attn.proj.weight", "self.query.weight", "up_proj.weight", "llama_proj.weight")
    source = open_source(file)
    name = next(name for name in source.names() if name.endswith(used))
    return file.read_bytes().index(source.get(name).tobytes())


def test_a_flipped_bit_in_the_folder_is_found(
    model: Path, downloads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(model / "weights" / "llama.layers.1.safetensors", -1)
    assert cli.main(["verify", str(model), *given(downloads)]) == 2
    assert "llama.layers.1.safetensors has crc32" in capsys.readouterr().err
    # Checksums that were made to fit: the values themselves tell.
    (model / "checksums.json").unlink()
    write_checksums(model)
    assert cli.main(["verify", str(model), *given(downloads)]) == 2
    err = capsys.readouterr().err
    assert "llama/layers/1/" in err
    assert "Convert it again" in err


def test_a_source_that_describes_another_model_is_found(
    model: Path, downloads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not one tensor differs, but its positions turn at another speed."""
    arrays = forms.draw(published.LLAMA, dtype=published.DTYPES["llama"])
    other = forms.hf_json(published.LLAMA, rope_theta=5e4)
    forms.write_hugging_face(downloads / "llm", arrays, config=other)
    assert cli.main(["verify", str(model), *given(downloads)]) == 2
    assert "its manifest has other sizes" in capsys.readouterr().err


def test_inspect_says_what_a_folder_is_made_of(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(made / "model")]) == 0
    said = capsys.readouterr().out
    for text in (
        "a converted model of this project",
        "vit from eva.pth",
        "llama from model-00001-of-00002.safetensors, model-00002-of-00002.safetensors",
    ):
        assert text in said


def test_the_projection_comes_back_bit_for_bit_as_the_original_reads_it(
    made: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.pth"
    assert cli.main(["export", str(made / "model"), "--projection", str(file)]) == 0
    source = PthSource(file)
    expected = published.projection_arrays(published.MODEL)
    assert set(source.names()) == set(expected)
    for name, value in expected.items():
        assert source.dtype(name) == value.dtype
        np.testing.assert_array_equal(source.get(name), value)
    again = tmp_path / "again"
    files = published.write_files(tmp_path / "downloads") | {"projection": str(file)}
    assert cli.main(["vicuna-7b", *published.command(files, out=again)]) == 0
    name = "llama_proj.safetensors"
    assert (again / "weights" / name).read_bytes() == (made / "model/weights" / name).read_bytes()


def test_the_projection_comes_back_bit_for_bit_in_a_file_of_ours(
    made: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.safetensors"
    assert cli.main(["export", str(made / "model"), "--projection", str(file)]) == 0
    tree, info = read_projection(file, published.MODEL)
    expected = published.projection_arrays(published.MODEL)
    np.testing.assert_array_equal(tree["kernel"], expected["llama_proj.weight"].T)
    np.testing.assert_array_equal(tree["bias"], expected["llama_proj.bias"])
    assert info is not None
    assert info.config == published.MODEL


def test_what_a_projection_says_of_itself_survives_the_way_through_a_folder(
    tmp_path: Path,
) -> None:
    files = published.write_files(tmp_path / "downloads")
    arrays = published.projection_arrays(published.MODEL)
    said = ProjectionInfo(
        config=published.MODEL,
        licence="CC BY 4.0",
        attribution="pictures by somebody",
        frozen_parts={"vit": "ab" * 32},
        training={"steps": 7},
    )
    tree = {"kernel": arrays["llama_proj.weight"].T, "bias": arrays["llama_proj.bias"]}
    files["projection"] = str(tmp_path / "ours.safetensors")
    write_projection(Path(files["projection"]), tree, info=said)
    assert cli.main(["vicuna-7b", *published.command(files, out=tmp_path / "model")]) == 0
    file = tmp_path / "back.safetensors"
    assert cli.main(["export", str(tmp_path / "model"), "--projection", str(file)]) == 0
    assert read_projection(file, published.MODEL)[1] == said


def test_the_language_model_comes_back_bit_for_bit(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    back = tmp_path / "llm"
    assert cli.main(["export", str(made / "model"), "--llm", str(back)]) == 0
    source = open_source(back)
    expected = {
        name: value
        for name, value in forms.draw(published.LLAMA, dtype=published.DTYPES["llama"]).items()
        if "inv_freq" not in name
    }
    assert set(source.names()) == set(expected)
    for name, value in expected.items():
        assert source.dtype(name) == value.dtype
        np.testing.assert_array_equal(source.get(name), value, err_msg=name)
    files = published.write_files(tmp_path / "downloads") | {"llm": str(back)}
    assert cli.main(["vicuna-7b", *published.command(files, out=tmp_path / "again")]) == 0
    for file in sorted((made / "model" / "weights").glob("llama*")):
        assert (tmp_path / "again" / "weights" / file.name).read_bytes() == file.read_bytes()
    capsys.readouterr()
    assert cli.main(["export", str(made / "model"), "--llm", str(back)]) == 2
    assert "is there already; expected a new folder" in capsys.readouterr().err


def test_a_damaged_folder_is_not_exported(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(model / "weights" / "llama_proj.safetensors", -1)
    assert cli.main(["export", str(model), "--projection", str(tmp_path / "p.pth")]) == 2
    assert "is damaged" in capsys.readouterr().err
    assert not (tmp_path / "p.pth").exists()


def test_a_projection_has_one_of_two_endings(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(made / "model"), "--projection", str(tmp_path / "p.bin")]) == 2
    assert "ends in '.bin'; expected .safetensors or .pth" in capsys.readouterr().err


def test_a_folder_without_a_projection_says_so(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As that of smol, whose projection is a file of its own."""
    (model / "weights" / "llama_proj.safetensors").unlink()
    (model / "checksums.json").unlink()
    write_checksums(model)
    assert cli.main(["export", str(model), "--projection", str(tmp_path / "p.pth")]) == 2
    assert "holds no projection; expected a folder" in capsys.readouterr().err


def test_a_folder_that_no_command_converted_cannot_be_verified(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = model / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"preset": "vicuna-7b"', '"was": "x"'))
    assert cli.main(["verify", str(model)]) == 2
    assert "does not remember its sources" in capsys.readouterr().err


def test_the_projection_of_a_converted_model_is_one_of_that_model_alone(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = published.projection_arrays(published.MODEL)
    write_pth(tmp_path / "p.pth", {"model": arrays})
    command = ["projection", str(tmp_path / "p.pth"), "--out", str(tmp_path / "p.safetensors")]
    assert cli.main([*command, "--model", "tiny"]) == 2
    assert PRESETS["tiny"].model.projection_in != published.MODEL.projection_in
    assert cli.main([*command, "--model", str(made / "model")]) == 0
    tree, _ = read_projection(tmp_path / "p.safetensors", published.MODEL)
    np.testing.assert_array_equal(tree["kernel"], arrays["llama_proj.weight"].T)
