"""What a thing is called, "as people say it", and its caption.

For: names of emoji from their Unicode names (`names.yaml` where that gives nothing that people say), phrases of Tux
Paint pictures from the line that comes with each (`tuxpaint.yaml`). Not for: questions and longer answers
(`answers.py`).
"""

from __future__ import annotations

import re
from typing import Any

from tables import load_table

_NAMES, _TUX = load_table("names"), load_table("tuxpaint")
NAMES: dict[str, str] = _NAMES["by_short_name"]
PLURAL, PAIRS, MASS, THE = (frozenset(_NAMES[key]) for key in ("plural", "pairs", "mass", "the"))
SPOKEN: dict[str, str] = _NAMES["spoken"]
_TUX_SKIP = re.compile("|".join(_TUX["skip"]))


def common_name(row: dict[str, Any]) -> str:
    """The name people say: the hand-written one, or the Unicode name without its noise."""
    short = row["short_name"]
    if short in NAMES:
        return NAMES[short]
    if short.startswith("clock"):
        return "clock"
    name = re.sub(r" (symbol|sign|emoji)$", "", row["name"].lower())
    return name.removesuffix(" face") if row["category"] == "Animals & Nature" else name


def noun_phrase(name: str) -> tuple[bool, str]:
    """(is it a plural, the name with its article)."""
    spoken = SPOKEN.get(name, name)
    if name in PLURAL:
        return True, spoken
    if name in PAIRS:
        return False, f"a pair of {spoken}"
    if name in MASS:
        return False, spoken
    if name in THE:
        return False, f"the {spoken}"
    an = re.match(r"([aeiou]|hour|ID|x-)", spoken) and not spoken.startswith(("uni", "eu"))
    return False, f"{'an' if an else 'a'} {spoken}"


def sentence(plural: bool, phrase: str) -> str:
    """The caption: `This is a dog.` or `These are cherries.`"""
    return f"{'These are' if plural else 'This is'} {phrase}."


def tux_phrase(stem: str, line: str) -> str | None:
    """The caption of a Tux Paint picture as a noun phrase, or nothing."""
    if _TUX_SKIP.search(stem):
        return None
    if stem in _TUX["captions"]:
        caption: str = _TUX["captions"][stem]
        return caption
    text = re.split(r"(?<=[.!?])\s", line.strip())[0]
    text = re.sub(r"\s*\(.*?\)|[“”\"!.]", "", text).strip()
    if not re.match(r"(A|An|The|Some|Two) ", text) or len(text.split()) > 10:
        return None
    if re.search(r"[—?]| (is|are|lets|means|resembles|carry|carries) ", text):
        return None
    text = (text[0].lower() + text[1:]).replace("’", "'")
    for old, new in _TUX["spelling"].items():
        text = text.replace(old, new)
    return text
