"""Files of drawings as 224-pixel pictures: cut to the thing, laid on white; their colours; the two altered copies.

Not for: which drawings there are (`drawings.py`).
"""

from __future__ import annotations

import colorsys
import hashlib
import io
import random
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from packages import console
from PIL import Image
from rich.progress import track

SIZE = 224
COPIES = ("small", "moved")


def raster(data: bytes) -> Image.Image:
    """Any picture as RGBA; SVG through rsvg-convert."""
    head = data[:3000].lstrip()
    if b"<svg" in head or head.startswith(b"<?xml"):
        command = ["rsvg-convert", "--unlimited", "-w", "448", "-h", "448", "-a"]
        data = subprocess.run(command, input=data, capture_output=True, check=True).stdout
    return Image.open(io.BytesIO(data)).convert("RGBA")


def colour_name(red: float, green: float, blue: float) -> str:
    """The plain name of a colour."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    hue *= 360
    if value < 0.22:
        return "black"
    if saturation < (0.25 if 200 < hue < 300 else 0.16):
        return "white" if value > 0.88 else "gray"
    if saturation < 0.4 and value < 0.5 and 60 < hue < 300:
        return "black" if value < 0.38 else "gray"
    if hue < 14 or hue >= 345:
        if saturation < 0.5 and value > 0.75:
            return "pink"
        return "brown" if value < 0.45 or (saturation < 0.6 and value < 0.7) else "red"
    if hue < 42:
        if value < 0.72:
            return "brown"
        return "orange" if saturation > 0.55 else "beige"
    if hue < 68:
        return "yellow" if value > 0.55 else "brown"
    for limit, name in ((165, "green"), (255, "blue"), (295, "purple")):
        if hue < limit:
            return name
    return "pink" if value > 0.6 else "purple"


def colours(picture: Image.Image) -> list[tuple[str, float]]:
    """The colours of a thing (RGBA) and their shares, the largest first."""
    picture = picture.resize((48, 48), Image.Resampling.BOX)
    pixels = np.asarray(picture).reshape(-1, 4)
    seen = pixels[pixels[:, 3] > 200]
    if len(seen) == len(pixels):  # no transparency: the white around is not the thing
        seen = seen[seen[:, :3].min(1) < 245]
    count = Counter(colour_name(*map(float, row[:3])) for row in seen)
    total = max(1, sum(count.values()))
    return [(name, round(number / total, 3)) for name, number in count.most_common(3)]


def on_white(data: bytes, key: str) -> tuple[Image.Image, list[tuple[str, float]]]:
    """The thing, cut to its edges, on a white square that it fills by 85 to 95 %; its colours."""
    picture = raster(data)
    if picture.getchannel("A").getextrema() == (
        255,
        255,
    ):  # no transparency: cut by the white margin
        dark = picture.convert("RGB").point(lambda v: 255 if v < 245 else 0).convert("L")
        box = dark.point(lambda v: 255 if v else 0).getbbox()
    else:
        box = picture.getchannel("A").point(lambda v: 255 if v > 16 else 0).getbbox()
    if box is None:
        raise ValueError("blank picture")
    picture = picture.crop(box)
    flat = Image.new("RGBA", picture.size, "white")
    flat.alpha_composite(picture)
    share = 0.85 + 0.10 * (int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32)
    scale = SIZE * share / max(flat.size)
    size = max(1, round(flat.width * scale)), max(1, round(flat.height * scale))
    small = flat.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    out = Image.new("RGB", (SIZE, SIZE), "white")
    out.paste(small, ((SIZE - size[0]) // 2, (SIZE - size[1]) // 2))
    return out, colours(picture)


def render(items: list[dict[str, Any]], folder: Path, workers: int) -> list[dict[str, Any]]:
    """Write every picture as a JPEG; leave out those that cannot be drawn."""
    folder.mkdir(parents=True)

    def one(item: dict[str, Any]) -> dict[str, Any] | None:
        try:
            picture, item["colours"] = on_white(item.pop("data"), item["image_id"])
        except (ValueError, OSError, subprocess.CalledProcessError) as error:
            console.print(f"left out {item['image_id']}: {error}")
            return None
        if np.asarray(picture).min() > 200:
            console.print(f"left out {item['image_id']}: nearly white")
            return None
        picture.save(folder / f"{item['image_id']}.jpg", quality=95)
        return item

    with ThreadPoolExecutor(workers) as pool:
        done = track(pool.map(one, items), "rendering", total=len(items), console=console)
        return [item for item in done if item is not None]


def altered(picture: Image.Image, key: str, copy: str) -> Image.Image:
    """A copy of a 224x224 picture that shows the same thing to people, but other patches to a model.

    ``small``: mirrored, shrunk to 64 pixels and enlarged again, as small pictures are. ``moved``: turned by up to
    12 degrees, at 65 to 95 % of its size, somewhere on the white, from 96 to 192 pixels. Seeded by ``key``.
    """
    rng = random.Random(f"{key} {copy}")
    bicubic, full = Image.Resampling.BICUBIC, (SIZE, SIZE)
    if copy == "small":
        mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return mirrored.resize((64, 64), bicubic).resize(full, bicubic)
    side = round(SIZE * rng.uniform(0.65, 0.95))
    turned = picture.rotate(rng.uniform(-12, 12), bicubic, fillcolor="white")
    out = Image.new("RGB", full, "white")
    corner = rng.randint(0, SIZE - side), rng.randint(0, SIZE - side)
    out.paste(turned.resize((side, side), bicubic), corner)
    pixels = rng.randint(96, 192)
    return out.resize((pixels, pixels), bicubic).resize(full, bicubic)


def write_copies(image_ids: list[str], folder: Path, workers: int) -> list[str]:
    """Write the altered copies of every picture of ``folder``; their names, in the same order for each kind."""

    def one(name: tuple[str, str]) -> str:
        image_id, copy = name
        with Image.open(folder / f"{image_id}.jpg") as picture:
            made = altered(picture.convert("RGB"), image_id, copy)
        made.save(folder / f"{image_id}_{copy}.jpg", quality=95)
        return f"{image_id}_{copy}"

    names = [(image_id, copy) for copy in COPIES for image_id in image_ids]
    with ThreadPoolExecutor(workers) as pool:
        done = track(pool.map(one, names), "copies", total=len(names), console=console)
        return list(done)
