"""What the model says of a few held-out pictures while it is trained: `captions.jsonl` and `held_out.html`.

For: keeping and showing captions by step. Not for: generating them; `Caption` comes in from the entry point.

Differs from the original, which shows nothing during training: one loads a checkpoint into its demo to look.
"""

from __future__ import annotations

import base64
import gc
import html
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from minigpt4_jax.data.pixels import open_picture
from minigpt4_jax.training.metrics import Metrics
from minigpt4_jax.training.state import Projection

FILE, SHEET = "captions.jsonl", "held_out.html"
THUMBNAIL = 192
"""Longest side on the sheet, in pixels."""
Caption = Callable[[Projection, Sequence[bytes], Sequence[str | None]], list[str]]
"""(projection, picture files, prompts) to answers; the prompts are those of training, None the bare picture."""


class Shown(NamedTuple):
    """A picture that is captioned."""

    name: str
    data: bytes
    """Its file."""
    prompt: str | None
    truth: str


class Captions:
    """Captions of the same pictures at each look, in `workdir`. Used by the process that writes.

    `captions.jsonl` has a row for each: `step`, `picture`, `prompt`, `answer`, `truth`; rows of steps that a resumed
    run does again are replaced. `held_out.html` shows the same beside the pictures, the newest step first.
    """

    def __init__(self, workdir: Path, shown: Sequence[Shown], caption: Caption) -> None:
        self._workdir, self._shown, self._caption = workdir, shown, caption
        self._off = False

    def write(self, step: int, projection: Projection, metrics: Metrics) -> None:
        """Generates, keeps, prints and sends to TensorBoard what the model says after `step` steps."""
        if self._off:
            return
        try:
            answers = self._caption(
                jax.tree.map(np.asarray, projection),
                [one.data for one in self._shown],
                [one.prompt for one in self._shown],
            )
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            self._off = True  # a run of days must not end for want of room to show something
            metrics.say(
                "No room on the device for a second copy of the weights: no captions from here on. held_out.captions=0 "
                "leaves them out from the start."
            )
        if self._off:
            gc.collect()  # the error held the half of the copy that there was room for
            return
        # What an earlier process did behind its last checkpoint is done again, perhaps at other steps.
        rows = [row for row in read_captions(self._workdir) if row["step"] in metrics.looks]
        for one, answer in zip(self._shown, answers, strict=True):
            row = {"step": step, "picture": one.name, "prompt": one.prompt}
            rows.append({**row, "answer": answer, "truth": one.truth})
            metrics.say(f"  {one.name}: {answer!r} (truth: {one.truth!r})")
        try:
            _replace(self._workdir / FILE, "".join(json.dumps(row) + "\n" for row in rows))
            _replace(self._workdir / SHEET, make_sheet(self._shown, rows))
        except OSError as error:
            metrics.say(f"These captions are not kept: {error.strerror or error}.")
        if metrics.events is not None:
            for number, (one, answer) in enumerate(zip(self._shown, answers, strict=True)):
                name = f"held_out/{number}"
                metrics.events.picture(name, np.asarray(_thumbnail(one.data)), step)
                metrics.events.text(name, f"    {answer}\n\ntruth:\n\n    {one.truth}", step)


def read_captions(workdir: Path) -> list[dict[str, Any]]:
    """All rows of a run's captions, by step."""
    path = workdir / FILE
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def make_sheet(shown: Sequence[Shown], rows: Sequence[dict[str, Any]]) -> str:
    """A page without scripts: a column for each picture, a row for each step, the newest first."""
    said = {(row["step"], row["picture"]): row["answer"] for row in rows}
    steps = sorted({row["step"] for row in rows}, reverse=True)
    heads = "".join(
        f'<th><img alt="{html.escape(one.name)}" src="data:image/jpeg;base64,{_encoded(one.data)}">'
        f"<br>{html.escape(one.prompt or '')}<br><i>{html.escape(one.truth)}</i></th>"
        for one in shown
    )
    lines = "".join(
        f"<tr><td>{step}</td>"
        + "".join(f"<td>{html.escape(said.get((step, one.name), ''))}</td>" for one in shown)
        + "</tr>\n"
        for step in steps
    )
    return (
        '<!doctype html><meta charset="utf-8"><title>Held-out pictures</title>\n'
        "<style>body{font-family:sans-serif}td,th{padding:.5em;vertical-align:top;text-align:left;max-width:16em}"
        "tr:nth-child(even){background:#eee}</style>\n"
        f"<p>What the model says after each step; in italics what it should say.</p>\n"
        f"<table><tr><th>step</th>{heads}</tr>\n{lines}</table>\n"
    )


def _thumbnail(data: bytes) -> Image.Image:
    image = open_picture(data, "a held-out picture")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def _encoded(data: bytes) -> str:
    buffer = io.BytesIO()
    _thumbnail(data).save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def _replace(path: Path, text: str) -> None:
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    os.replace(beside, path)
