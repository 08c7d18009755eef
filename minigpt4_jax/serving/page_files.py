"""The chat page's files: read once at the start, served from memory under their exact paths.

For: `load_page`, `page_routes`. Not for: the page itself (`page/`). A path that is not a file of the folder has no
route, so no spelling of one (`..`, `%2e%2e`, a link) leads out of it.
"""

from __future__ import annotations

import base64
import hashlib
import mimetypes
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).parent / "page"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".md": "text/plain; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".webmanifest": "application/manifest+json",
}
"""What must not depend on the system's table of types: with `nosniff` a module of the wrong type does not run."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-cache",
}
"""Nothing from elsewhere, nothing inline, in no frame; asked for again each time, and mostly answered 304."""


@dataclass(frozen=True)
class PageFile:
    """One file as it goes out."""

    content: bytes
    kind: str
    """Content-Type."""
    etag: str


def load_page(folder: Path = FOLDER) -> dict[str, PageFile]:
    """The files of a folder by the path that they have on the server; `index.html` is `/`. None without a folder."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.is_symlink():
            continue
        content = file.read_bytes()
        kind = TYPES.get(file.suffix) or mimetypes.guess_type(file.name)[0]
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
        name = file.relative_to(folder).as_posix()
        path = "/" if name == "index.html" else f"/{name}"
        found[path] = PageFile(content, kind or "application/octet-stream", f'"{digest[:22]}"')
    return found


def page_routes(files: dict[str, PageFile]) -> list[Route]:
    """A route for each file, for GET and HEAD."""
    return [Route(path, _answer(file), methods=["GET"]) for path, file in files.items()]


def _answer(file: PageFile) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        headers = HEADERS | {"etag": file.etag}
        known = [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]
        if file.etag in known or f"W/{file.etag}" in known or known == ["*"]:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers, media_type=file.kind)

    return answer
