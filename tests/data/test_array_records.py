"""data/array_records.py: what is packed comes back, and files of another kind are refused in words."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt4_jax.config import UserError
from minigpt4_jax.data.array_records import ArrayRecordSource, TfdsSource, write_array_records
from minigpt4_jax.data.faults import SampleFault
from minigpt4_jax.data.sources import Example, Source
from minigpt4_jax.data.tar_shards import TarShards
from minigpt4_jax.data.tfds_builders import prepare
from tests.planted import END, jpeg, sample, samples

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> TarShards:
    folder = tmp_path_factory.mktemp("tars")
    (folder / "0.tar").write_bytes(samples(range(5)) + END)
    (folder / "1.tar").write_bytes(sample(5, image=b"") + sample(6) + END)
    return TarShards(folder)


def test_packed_samples_come_back_in_order(tars: TarShards, tmp_path: Path) -> None:
    assert write_array_records(tars, tmp_path, records_per_file=3) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        f"0000{n}-of-00003.array_record" for n in range(3)
    ]
    source = ArrayRecordSource(tmp_path)
    assert isinstance(source, Source)
    assert len(source) == source.num_images == 7
    for index in (6, 0, 5, 3):
        example = source[index]
        assert example.exchanges == tars[index].exchanges
        assert example.image == source.read_image(index) == tars.read_image(index)
        assert example.name == f"record {index} ({tars[index].name})"
    copy = pickle.loads(pickle.dumps(source))
    assert copy[6] == source[6]


class Gaps:
    """Three samples, the second of which cannot be read; none after `stop`."""

    in_memory = False
    num_images = 3

    def __init__(self, stop: int = 3) -> None:
        self.stop = stop

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Example:
        if index == self.stop:
            raise KeyboardInterrupt
        if index == 1:
            raise SampleFault("unreadable", "gone")
        return Example(f"s{index}", index, (), jpeg(index))

    def read_image(self, row: int) -> bytes:
        return jpeg(row)


def test_an_interrupted_packing_goes_on_and_leaves_out_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_array_records(Gaps(stop=2), tmp_path, records_per_file=2)
    (done,) = tmp_path.glob("*.array_record")
    before = done.stat().st_mtime_ns
    assert write_array_records(Gaps(), tmp_path, records_per_file=2) == 0  # 1 was left out before
    assert done.stat().st_mtime_ns == before
    assert [ArrayRecordSource(tmp_path)[i].name for i in (0, 1)] == [
        "record 0 (s0)",
        "record 1 (s2)",
    ]
    assert not list(tmp_path.glob("*.partial"))
    assert write_array_records(Gaps(), tmp_path / "again") == 1


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no ArrayRecord file at .*expected a folder"):
        ArrayRecordSource(tmp_path)
    (tmp_path / "x.array_record").write_bytes(b"not one")
    with pytest.raises(UserError, match="cannot be read as ArrayRecord"):
        ArrayRecordSource(tmp_path)
    with pytest.raises(UserError, match="cannot be used as a prepared data set"):
        TfdsSource(tmp_path)


def test_records_of_another_layout_are_faults(tmp_path: Path) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:1")
    writer.write(b"\x02\x00\x00\x00{}")
    writer.close()
    with pytest.raises(SampleFault, match="of another kind"):
        ArrayRecordSource(tmp_path)[0]


def test_a_prepared_data_set_is_a_source(tars: TarShards, tmp_path: Path) -> None:
    folder = prepare("image_caption_tars", tars._shards[0].parent, tmp_path)
    source = TfdsSource(folder)
    assert isinstance(source, Source)
    assert len(source) == 7
    pairs = {(source[i].exchanges[0].answer, source[i].image) for i in range(7)}
    assert pairs == {(tars[i].exchanges[0].answer, tars.read_image(i)) for i in range(7)}
    copy = pickle.loads(pickle.dumps(source))
    assert copy[3] == source[3]


def test_a_prepared_data_set_without_captions_is_refused(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    class Numbers(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        name = "numbers"

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict({"caption": tfds.features.Text()})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager: object) -> dict[str, object]:
            return {"train": iter([(0, {"caption": "x"})])}

        def _generate_examples(self) -> None: ...

    builder = Numbers(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    with pytest.raises(UserError, match="it has no image"):
        TfdsSource(Path(builder.data_dir))


def test_preparing_and_reading_need_no_tensorflow(tars: TarShards, tmp_path: Path) -> None:
    # In a process of its own, where no other test can have imported it.
    script = (
        "import sys\n"
        "from minigpt4_jax.data.array_records import TfdsSource, ArrayRecordSource, write_array_records\n"
        "from minigpt4_jax.data.tfds_builders import prepare\n"
        f"source = TfdsSource(prepare('image_caption_tars', {str(tars._shards[0].parent)!r}, {str(tmp_path)!r}))\n"
        f"write_array_records(source, {str(tmp_path / 'packed')!r})\n"
        f"packed = ArrayRecordSource({str(tmp_path / 'packed')!r})\n"
        "assert packed[2].image == source[2].image\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'tensorflow' and sys.modules[name]])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
