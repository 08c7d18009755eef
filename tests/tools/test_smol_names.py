"""tools/smol_sets: what things are called and where their drawings are, without any package fetched."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.tools.smol_sets import FOLDER, answers, drawings, naming, packages, tables


def emoji(short_name: str, name: str, category: str = "Objects", **more: Any) -> dict[str, Any]:
    return {
        "short_name": short_name, "short_names": [short_name], "name": name, "category": category,
        "subcategory": "other-object", "unified": "1F600", "added_in": "0.6", **more,
    }  # fmt: skip


# --- names ---


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (emoji("t-rex", "T-REX"), "dinosaur"),
        (emoji("clock330", "CLOCK FACE THREE-THIRTY"), "clock"),
        (emoji("bell", "BELL SYMBOL"), "bell"),
        (emoji("cow", "COW FACE", "Animals & Nature"), "cow"),
        (emoji("mask", "MASK FACE"), "mask face"),
    ],
)
def test_an_emoji_is_called_as_people_say_it(row: dict[str, Any], name: str) -> None:
    assert naming.common_name(row) == name


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("dog", "This is a dog."), ("elephant", "This is an elephant."), ("unicorn", "This is a unicorn."),
        ("hourglass", "This is an hourglass."), ("DNA", "This is DNA."), ("x-ray", "This is an x-ray."),
        ("cherries", "These are cherries."), ("glasses", "This is a pair of glasses."), ("corn", "This is corn."),
        ("sun", "This is the sun."), ("statue of liberty", "This is the Statue of Liberty."),
        ("christmas tree", "This is a Christmas tree."), ("euphonium", "This is a euphonium."),
    ],
)  # fmt: skip
def test_a_name_gets_the_article_that_it_needs(name: str, caption: str) -> None:
    assert naming.sentence(*naming.noun_phrase(name)) == caption


@pytest.mark.parametrize(
    ("stem", "line", "phrase"),
    [
        ("animals/cat", "A grey cat. Cats purr.", "a gray cat"),
        ("animals/cat", "“A cat!” (Felis catus)", "a cat"),
        ("food/bread", "Mmmm.", "bread"),
        ("animals/cat", "This cat is asleep.", None),
        ("animals/cat", "The cat is asleep.", None),
        ("animals/cat", "A " + "very " * 10 + "old cat.", None),
        ("symbols/math/plus", "A plus.", None),
        ("town/car", "The European car.", "the European car"),
    ],
)
def test_a_stamps_line_is_a_phrase_or_nothing(stem: str, line: str, phrase: str | None) -> None:
    assert naming.tux_phrase(stem, line) == phrase


# --- the tables ---


def test_every_thing_belongs_to_a_group_that_is_described() -> None:
    for table in (answers.SUBGROUP, answers.NAMEGROUP, answers.TUXGROUP):
        assert set(table.values()) <= set(answers.GROUPS)
    for members in (answers.ANIMALS, answers.FOODS, answers.LIVING, answers.SCENES, answers.CLEAR):
        assert members <= set(answers.GROUPS)
    assert list(answers.TUXGROUP)[-1] == ""  # the last one fits every path
    for name, group in answers.GROUPS.items():
        assert set(group) == {"one", "many", "facts"}, name
        assert all(re.fullmatch(r"[A-Z][^.]*\.", fact) for fact in group["facts"]), name


def test_a_more_exact_path_stands_before_the_one_that_it_begins_with() -> None:
    paths = list(answers.TUXGROUP)
    for place, path in enumerate(paths):
        hidden = [later for later in paths[place + 1 :] if later.startswith(path)]
        assert not hidden, path


def test_a_name_has_one_kind_of_article() -> None:
    kinds = [naming.PLURAL, naming.PAIRS, naming.MASS, naming.THE]
    assert sum(map(len, kinds)) == len(frozenset().union(*kinds))
    assert all(spoken.lower() == name for name, spoken in naming.SPOKEN.items())


def test_no_yaml_word_became_a_number_or_a_truth() -> None:
    for file in FOLDER.glob("*.yaml"):
        for name, table in tables.load_table(file.stem).items():
            for leaf in leaves(table):
                assert isinstance(leaf, str), (file.name, name, leaf)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for pair in value.items() for item in pair for leaf in leaves(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


# --- which drawing is which thing ---


def pack(path: Path, **files: Any) -> Path:
    """An npm package with these JSON files."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}.json")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_icons_are_found_by_code_point_and_through_their_aliases(tmp_path: Path) -> None:
    icons = {
        "height": 32, "aliases": {"hound": {"parent": "dog"}},
        "icons": {"dog": {"body": "<path/>", "width": 24}, "cat": {"body": "<circle/>"}},
    }  # fmt: skip
    chars = {"1f436": "hound", "2764": "cat"}
    path = pack(tmp_path / "p.tgz", icons=icons, chars=chars)
    rows = [
        emoji(n, n, unified=u) for n, u in [("dog", "1F436"), ("x", "2764-FE0F"), ("y", "1F999")]
    ]
    found = drawings.iconify_drawings(packages.VENDORS[0], path, rows, {})
    assert set(found) == {"1F436", "2764-FE0F"}
    assert b'viewBox="0 0 24 32"' in found["1F436"]
    assert b"<path/>" in found["1F436"]
    assert b'viewBox="0 0 16 32"' in found["2764-FE0F"]


def test_icons_without_code_points_are_found_by_name_unless_they_are_younger(
    tmp_path: Path,
) -> None:
    icons = {
        "icons": {
            "hampster": {"body": "<a/>"},
            "hot-dog": {"body": "<b/>"},
            "yak": {"body": "<c/>"},
        }
    }
    path = pack(tmp_path / "p.tgz", icons=icons)
    rows = [
        emoji("hamster", "HAMSTER", unified="1"),
        emoji("hotdog", "HOT DOG", unified="2"),
        emoji("yak", "YAK", unified="3", added_in="13.0"),
    ]
    slugs = drawings.slug_table([], rows)
    fxemoji = next(source for source in packages.VENDORS if source.key == "fxemoji")
    assert set(drawings.iconify_drawings(fxemoji, path, rows, slugs)) == {"1", "2"}


def test_a_thing_that_only_one_family_draws_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        emoji("dog", "DOG", unified="A"),
        emoji("yak", "YAK", unified="B"),
        emoji("gun", "PISTOL", unified="1F52B"),
    ]
    # Microsoft's three styles are one hand.
    drawn = {
        "twemoji": "A 1F52B", "fluent": "A B", "fluentflat": "B", "fluent3d": "B", "emojione1": "1F52B",
    }  # fmt: skip

    def found(source: Any, *_: Any) -> dict[str, bytes]:
        return {code: source.key.encode() for code in drawn.get(source.key, "").split()}

    for name, value in {
        "read_emoji": lambda path: rows, "download": lambda source, folder: Path(source.key),
        "slug_table": lambda paths, rows: {}, "archive_drawings": found, "iconify_drawings": found,
        "tux_pictures": lambda path, scratch: [],
    }.items():  # fmt: skip
        monkeypatch.setattr(drawings, name, value)
    items, kept = drawings.gather(Path("d"), Path("s"))
    assert [row["unified"] for row in kept] == ["A", "1F52B"]
    assert {item["image_id"]: item["name"] for item in items} == {
        "twemoji_A": "dog", "fluent_A": "dog",
        "twemoji_1F52B": "water gun", "emojione1_1F52B": "gun",  # what each of them drew
    }  # fmt: skip
    assert "YAK" in capsys.readouterr().out
    assert [item["name"] for item in drawings.heldout_list([r | {"image": "x"} for r in kept])["items"]] == [
        "dog", "water gun",
    ]  # fmt: skip
