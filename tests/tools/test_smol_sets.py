"""tools/smol_sets: the pictures, questions and answers of the two sets, made of drawings that are put together here."""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from minigpt4_jax.data.sources import CcSbuAlign
from tests.tools.smol_sets import ROOT, answers, main, naming, rendering

# --- pictures ---


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def thing(colour: tuple[int, int, int] = (200, 20, 20), *, alpha: bool = True) -> Image.Image:
    """A rectangle twice as wide as high, off the centre."""
    image = Image.new("RGBA", (100, 100), (255, 255, 255, 0 if alpha else 255))
    image.paste((*colour, 255), (10, 50, 70, 80))
    return image


@pytest.mark.parametrize("alpha", [True, False])
def test_a_thing_is_cut_to_its_edges_and_fills_most_of_a_white_square(alpha: bool) -> None:
    picture, colours = rendering.on_white(png(thing(alpha=alpha)), "key")
    assert picture.size == (224, 224)
    dark = np.asarray(picture).min(2) < 128
    width, height = dark.any(0).sum(), dark.any(1).sum()
    assert 0.84 * 224 <= width <= 0.96 * 224
    assert abs(width - 2 * height) <= 2
    assert abs(dark.nonzero()[0].mean() - 111.5) < 1
    assert colours[0][0] == "red"


def test_a_blank_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="blank"):
        rendering.on_white(png(Image.new("RGBA", (9, 9), (0, 0, 0, 0))), "key")


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0, 0, 0), "black"), ((255, 255, 255), "white"), ((128, 128, 128), "gray"), ((220, 20, 20), "red"),
        ((255, 150, 30), "orange"), ((120, 70, 30), "brown"), ((250, 220, 40), "yellow"), ((30, 160, 60), "green"),
        ((40, 80, 220), "blue"), ((130, 40, 180), "purple"), ((250, 150, 180), "pink"), ((250, 220, 180), "beige"),
    ],
)  # fmt: skip
def test_colours_have_their_plain_names(rgb: tuple[int, int, int], name: str) -> None:
    assert rendering.colour_name(*map(float, rgb)) == name


def test_the_altered_copies_are_others_of_the_same_thing_and_the_same_each_time() -> None:
    picture = rendering.on_white(png(thing()), "key")[0]
    whole = np.asarray(picture, float)
    for copy in rendering.COPIES:
        made = rendering.altered(picture, "key", copy)
        assert made.size == (224, 224)
        np.testing.assert_array_equal(made, rendering.altered(picture, "key", copy))
        assert np.abs(np.asarray(made, float) - whole).mean() > 1
    moved = [np.asarray(rendering.altered(picture, key, "moved")) for key in ("a", "b")]
    assert not np.array_equal(*moved)


# --- the sets ---


def make_items() -> list[dict[str, Any]]:
    """Drawings by two vendors of twelve things, and twenty stamps."""
    names = [
        "cow",
        "horse",
        "dog",
        "cat",
        "apple",
        "banana",
        "hammer",
        "saw",
        "violin",
        "banjo",
        "cherries",
        "glasses",
    ]
    groups = ["animal-mammal"] * 4 + ["food-fruit"] * 2 + ["tool"] * 2 + ["musical-instrument"] * 2
    groups += ["food-fruit", "clothing"]
    items = []
    for number, (name, subcategory) in enumerate(zip(names, groups, strict=True)):
        plural, phrase = naming.noun_phrase(name)
        for vendor in ("twemoji", "fxemoji"):
            items.append({
                "image_id": f"{vendor}_{number}", "data": png(thing((number * 20, 90, 30))), "plural": plural,
                "phrase": phrase, "name": name, "category": "Objects", "subcategory": subcategory,
                "vendor": vendor, "code_point": str(number),
            })  # fmt: skip
    for number in range(20):
        items.append({
            "image_id": f"tuxpaint_{number}", "data": png(thing()), "plural": False, "phrase": "a parrot",
            "name": "parrot", "category": "Animals & Nature", "subcategory": "animals/birds", "vendor": "tuxpaint",
            "code_point": None, "file": f"animals/birds/{number}.png",
        })  # fmt: skip
    return items


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("sets")
    items = main.write_stage1(make_items(), out, 1)
    rows = main.write_stage2(items, out, 0)
    main.write_sources(items, 12, out)
    return SimpleNamespace(out=out, items=items, rows=rows)


def test_both_sets_are_read_as_training_reads_them(sets: SimpleNamespace) -> None:
    first, second = CcSbuAlign(sets.out / "stage1"), CcSbuAlign(sets.out / "stage2")
    # 44 pictures, one of the twenty stamps left out, each with two copies.
    assert (len(first), first.num_images) == (43 * 3, 43 * 3)
    assert len(second) == sets.rows
    for source in (first, second):
        assert Image.open(io.BytesIO(source.read_image(0))).size == (224, 224)
    captions = {first[i].exchanges[0].answer for i in range(len(first))}
    assert {"This is a cow.", "These are cherries.", "This is a pair of glasses."} <= captions
    assert all(first[i].exchanges[0].question is None for i in range(len(first)))


def test_what_is_held_out_is_in_no_set(sets: SimpleNamespace) -> None:
    (left,) = json.loads((sets.out / "heldout_tuxpaint.json").read_text())
    assert (sets.out / "heldout_tuxpaint" / f"{left['image_id']}.jpg").is_file()
    for stage in ("stage1", "stage2"):
        rows = json.loads((sets.out / stage / "filter_cap.json").read_text())["annotations"]
        shown = {row["image_id"].removesuffix("_small").removesuffix("_moved") for row in rows}
        assert left["image_id"] not in shown
        assert not list((sets.out / stage / "image").glob(f"{left['image_id']}*"))


def test_sources_count_what_was_used_of_each(sets: SimpleNamespace) -> None:
    rows = {row["key"]: row for row in json.loads((sets.out / "sources.json").read_text())}
    assert {key: row["pictures"] for key, row in rows.items() if row["pictures"]} == {
        "twemoji": 12, "fxemoji": 12, "tuxpaint": 19, "google": 12,
    }  # fmt: skip
    assert [key for key, row in rows.items() if row["use"] == "test only"] == ["google"]


def test_every_drawn_question_stands_beside_the_one_of_stage_1(sets: SimpleNamespace) -> None:
    rows = json.loads((sets.out / "stage2" / "filter_cap.json").read_text())["annotations"]
    by_id = {item["image_id"]: item for item in sets.items}
    named = {row["image_id"] for row in rows if row["prompt"] == "What is this?"}
    assert named == {row["image_id"] for row in rows}
    yes = no = 0
    for row in rows:
        item = by_id[re.sub("_(small|moved)$", "", row["image_id"])]
        caption = naming.sentence(item["plural"], item["phrase"])
        if row["prompt"] in (*answers.SHORT, "What is this?"):
            assert row["caption"] == caption
        elif row["prompt"] in answers.DETAIL:
            assert row["caption"].startswith(caption)
            assert row["caption"].count(".") >= 2
        elif row["caption"].startswith("Yes, this is "):
            assert row["prompt"] == f"Is this {item['phrase']}?"
            yes += 1
        elif row["caption"].startswith("No, this is not "):
            wrong = row["prompt"].removeprefix("Is this ").removesuffix("?")
            assert wrong != item["phrase"]
            assert row["caption"] == f"No, this is not {wrong}. {caption}"
            no += 1
    assert yes + no > 0


def test_a_seed_gives_the_same_questions_and_another_others(sets: SimpleNamespace) -> None:
    def rows(seed: int) -> Any:
        return answers.stage2_rows([dict(item) for item in sets.items], seed)

    assert rows(0) == rows(0)
    assert rows(0) != rows(1)


def test_a_wrong_name_is_of_a_thing_that_this_one_cannot_be_taken_for() -> None:
    named = {"cow": "mammal", "horse": "mammal", "hammer": "tool", "saw": "tool", "box": "tool"}
    rng = random.Random(0)
    cow = {"group": "mammal", "code_point": "1", "name": "cow"}
    # Mammals are told apart; a hammer is asked about as what is no tool.
    assert {answers.wrong_name(cow, named, rng) for _ in range(30)} == {"horse"}
    hammer = {"group": "tool", "code_point": "2", "name": "hammer"}
    assert {answers.wrong_name(hammer, named, rng) for _ in range(50)} == {"cow", "horse"}


@pytest.mark.parametrize(
    ("colours", "vendor", "words"),
    [
        ([["red", 0.8], ["blue", 0.2]], "twemoji", "mostly red"),
        ([["red", 0.6], ["blue", 0.25]], "twemoji", "mostly red with some blue"),
        ([["red", 0.4], ["blue", 0.35]], "twemoji", "red and blue"),
        ([["red", 0.2]], "twemoji", None),
        ([["black", 0.5], ["red", 0.45]], "openmoji", "mostly red"),
    ],
)
def test_colours_are_said_as_far_as_they_stand_out(
    colours: list[Any], vendor: str, words: str | None
) -> None:
    assert answers.colour_words({"colours": colours, "vendor": vendor}) == words


def test_the_command_of_the_documents_is_there() -> None:
    done = subprocess.run(
        [sys.executable, "tools/smol_sets", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for option in ("--downloads", "--out", "--heldout"):
        assert option in done.stdout
    for page in ("README.md", "configs/train/smol_stage1.yaml"):
        assert (
            "python tools/smol_sets --downloads downloads --out sets" in (ROOT / page).read_text()
        )
