"""The pictures of the chat page in `docs/`, from real answers of a server that runs:

    python serve.py --config configs/serve/smol.yaml &
    python tools/page_screenshots.py --out docs

Needs the extra `browser` and a Chromium. Not for: tests (`tests/browser`).
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

MAX_BYTES = 200_000
DESKTOP = {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "color_scheme": "dark",
    "device_scale_factor": 2,
    "is_mobile": True,
    "has_touch": True,
}
EXAMPLES = Path(__file__).parents[1] / "examples"


def open_page(browser: Browser, address: str, **context: Any) -> Page:
    """The page in a browser that knows no chats yet."""
    page = browser.new_context(base_url=address, **context).new_page()
    page.goto("/")
    page.wait_for_selector("html[data-ready]")
    return page


def ask(page: Page, text: str, *pictures: str) -> None:
    """Asks about pictures of `examples/` and waits for the whole answer."""
    number = page.locator(".turn").count() + 1
    if pictures:
        page.set_input_files("#files", [EXAMPLES / name for name in pictures])
        page.wait_for_selector(f"#attached li:nth-of-type({len(pictures)})")
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.wait_for_selector(f".turn:nth-of-type({number}) .stats:not(:empty)")


def save(page: Page, path: Path) -> None:
    """What the page shows, as WebP. Raises ValueError if the file is too large for a repository."""
    page.locator("body").evaluate("() => document.activeElement.blur()")
    image = Image.open(io.BytesIO(page.screenshot()))
    image.save(path, "WEBP", quality=88, method=6)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; expected at most {MAX_BYTES}.")
    print(f"{path}: {image.width} x {image.height}, {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--address", default="http://127.0.0.1:8000", help="of the server")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    args = parser.parse_args()
    chromium = os.environ.get("MINIGPT4_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = open_page(browser, args.address, **DESKTOP)
        ask(page, "What is this?", "coffee.jpg")
        ask(page, "What can I do with it?")
        save(page, args.out / "page_desktop.webp")
        page = open_page(browser, args.address, **PHONE)
        ask(page, "What is this?", "flower.jpg")
        ask(page, "Write a two-line poem about it.")
        save(page, args.out / "page_phone.webp")
        browser.close()


if __name__ == "__main__":
    main()
