"""Stage 2: questions about a picture and their answers, by rule from its name, its group of things and its colours.

`groups.yaml` says which things belong together and what is true of them. Not for: captions (`naming.py`).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from typing import Any

from naming import MASS, PAIRS, SPOKEN, THE, noun_phrase, sentence
from rendering import COPIES
from tables import load_table

_TABLES = load_table("groups")
GROUPS: dict[str, dict[str, Any]] = _TABLES["groups"]
"""By group: what one of it is (`one`), several are (`many`), and sentences that are true of all (`facts`)."""
SUBGROUP: dict[str, str] = _TABLES["by_subcategory"]
NAMEGROUP = {name: group for group, names in _TABLES["by_name"].items() for name in names}
TUXGROUP: dict[str, str] = _TABLES["by_tuxpaint_path"]
"""The first prefix of the file's path that fits counts."""
ANIMALS, FOODS, SCENES, CLEAR, VAGUE = (
    frozenset(_TABLES[key]) for key in ("animals", "foods", "scenes", "clear", "vague")
)
LIVING = ANIMALS | FOODS | frozenset(_TABLES["no_thing"])
_QUESTIONS = load_table("questions")
SHORT: list[str] = _QUESTIONS["short"]
DETAIL: list[str] = _QUESTIONS["detail"]


def group_of(item: dict[str, Any]) -> str:
    """The group of things to which a picture belongs."""
    if item["vendor"] == "tuxpaint":
        return next(group for prefix, group in TUXGROUP.items() if item["file"].startswith(prefix))
    return NAMEGROUP.get(item["name"], SUBGROUP[item["subcategory"]])


def colour_words(item: dict[str, Any]) -> str | None:
    """Words like `mostly brown`, or nothing when no colour stands out."""
    found = [(name, share) for name, share in item["colours"] if share >= 0.15]
    if item["vendor"] == "openmoji" and len(found) > 1:  # its outlines are black
        found = [pair for pair in found if pair[0] != "black"]
    if not found or found[0][1] < 0.25:
        return None
    if len(found) == 1 or found[0][1] >= 0.7:
        return f"mostly {found[0][0]}"
    if found[0][1] >= 2 * found[1][1]:
        return f"mostly {found[0][0]} with some {found[1][0]}"
    return f"{found[0][0]} and {found[1][0]}"


def colour_sentence(item: dict[str, Any], words: str, rng: random.Random) -> str:
    """A sentence on the colours, with a pronoun."""
    it, its = ("They are", "Their") if item["many"] else ("It is", "Its")
    if words.startswith("mostly") or rng.random() < 0.5:
        return f"{it} {words}."
    return f"{its} main colors are {words}."


def detailed(item: dict[str, Any], rng: random.Random) -> str:
    """Two or three sentences on a picture."""
    group = GROUPS[item["group"]]
    one, many, facts = group["one"], group["many"], group["facts"]
    first = sentence(item["plural"], item["phrase"])
    kind = f"They are {many}." if item["plural"] else f"It is {one}."
    if item["name"].endswith(one.split()[-1]) or item["many"] != item["plural"]:
        kind = ""
    fact = rng.choice(facts)
    if item["many"]:  # no sentence that says "it" of several things
        plain = [text for text in facts if not re.search(r"\b(it|this)\b", text, re.I)]
        fact = rng.choice(plain) if plain else ""
    words = colour_words(item)
    colour = colour_sentence(item, words, rng) if words else ""
    white = rng.choice(("The background is white.", "It is shown on a white background."))
    if item["many"]:
        white = "The background is white."
    plans = [(colour, fact), (kind, colour), (kind, fact), (colour, white), (kind, colour, fact),
             (colour, fact), (fact, colour)]  # fmt: skip
    rest = [part for part in rng.choice(plans) if part]
    if not rest:
        rest = [part for part in (kind, colour, fact, white) if part][:2]
    return " ".join([first, *rest])


def wrong_name(item: dict[str, Any], named: dict[str, str], rng: random.Random) -> str:
    """The name of another thing that this one certainly is not."""
    near = item["group"] in CLEAR and item["code_point"] is not None
    words = set(item["name"].lower().split())
    return rng.choice([
        name for name, group in named.items()
        if (group == item["group"]) == near and name not in VAGUE and not words & set(name.split())
    ])  # fmt: skip


def other(item: dict[str, Any], named: dict[str, str], rng: random.Random) -> tuple[str, str]:
    """A question of another kind, and its answer."""
    one, many = GROUPS[item["group"]]["one"], GROUPS[item["group"]]["many"]
    is_, phrase, group = "They are" if item["plural"] else "It is", item["phrase"], item["group"]
    words = colour_words(item)
    asks: list[tuple[str, str]] = [(
        rng.choice(("What kind of thing is this?", "What sort of thing is in the picture?")),
        f"{is_} {many if item['plural'] else one}: {phrase}.",
    )]  # fmt: skip
    if words:
        name = SPOKEN.get(item["name"], item["name"])
        noun = name if name == "Santa Claus" else f"The {name}"
        verb = "are" if item["many"] else "is"
        question = ("What color are they?", "What colors do you see?") if item["many"] else (
            "What color is it?", "What colour is it?", "What color is this?")  # fmt: skip
        asks += [(rng.choice(question), f"{noun} {verb} {words}.")] * 3
    if group in ANIMALS and not item["plural"]:
        asks.append(("Is this an animal or a thing?", f"It is an animal, {phrase}."))
    elif group not in LIVING | SCENES and not item["plural"]:
        asks.append(("Is this an animal or a thing?", f"It is a thing, {phrase}."))
    if group in FOODS:
        asks.append(("Is this something to eat?", f"Yes, {is_.lower()} food: {phrase}."))
    elif group not in LIVING:
        asks.append(("Is this something to eat?", f"No, {is_.lower()} not food. "
                     + sentence(item["plural"], phrase)))  # fmt: skip
    if not item["plural"]:
        wrong = noun_phrase(wrong_name(item, named, rng))[1]
        asks.append((f"Is this {phrase}?", f"Yes, this is {phrase}."))
        asks.append((f"Is this {wrong}?", f"No, this is not {wrong}. This is {phrase}."))
    return rng.choice(asks)


def stage2_rows(items: list[dict[str, Any]], seed: int) -> list[dict[str, str]]:
    """The questions and answers: half ask for the name as in stage 1; of the others about 40 % are short, 40 %
    detailed, 20 % of other kinds. A third is about each kind of copy."""
    rng = random.Random(seed)
    things: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        item["group"] = group_of(item)
        pair = item["name"] in PAIRS or item["phrase"].startswith("a pair of ")
        item["many"] = item["plural"] or pair
        things.setdefault(item["code_point"] or item["image_id"], []).append(item)
    named = {
        item["name"]: item["group"] for item in items
        if item["code_point"] and not item["many"] and item["name"] not in THE | MASS
    }  # fmt: skip
    asked, used = [], Counter[str]()
    for key in sorted(things):
        drawn = things[key]
        rng.shuffle(drawn)
        number = 5 if drawn[0]["code_point"] else 1
        for place in range(number):
            if used[drawn[0]["name"]] < 20:
                asked.append(drawn[place % len(drawn)])
                used[drawn[0]["name"]] += 1
    styles = (["short", "detail", "short", "detail", "other"] * len(asked))[: len(asked)]
    rng.shuffle(styles)
    rows = []
    for item, style in zip(asked, styles, strict=True):
        if style == "short":
            prompt, answer = rng.choice(SHORT), sentence(item["plural"], item["phrase"])
        elif style == "detail":
            prompt, answer = rng.choice(DETAIL), detailed(item, rng)
        else:
            prompt, answer = other(item, named, rng)
        copy = rng.choice(("", *(f"_{copy}" for copy in COPIES)))
        # Beside each, the question that stage 1 taught: without it this stage undoes a part of the names.
        naming = "What is this?", sentence(item["plural"], item["phrase"])
        for ask, say in sorted({(prompt, answer), naming}):
            rows.append({"image_id": item["image_id"] + copy, "prompt": ask, "caption": say})
    return sorted(rows, key=lambda row: (row["image_id"], row["prompt"], row["caption"]))
