"""What a person does on the page, in the words of the tests, and what must hold whatever they do.

Not for: claims of single tests.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, Route, expect

EXAMPLES = Path(__file__).parents[2] / "examples"
COFFEE, FLOWER = EXAMPLES / "coffee.jpg", EXAMPLES / "flower.jpg"
LONG = "Write a long story about a cup of coffee."
"""What smol answers with hundreds of tokens."""
QUESTIONS = "**/v1/chat/completions"
TIMEOUT_MS = 30_000

_KEPT = """
() => new Promise((resolve) => {
  const opening = indexedDB.open("minigpt4");
  opening.onsuccess = () => {
    const chats = opening.result.transaction("chats").objectStore("chats");
    const request = chats.get(location.hash.slice("#chat=".length));
    request.onsuccess = () => {
      opening.result.close();
      const turns = request.result?.turns ?? [];
      const all = turns.length === document.querySelectorAll(".turn").length;
      resolve(all && turns.length > 0 && turns.at(-1).answer.state !== "writing");
    };
  };
})
"""
_WATCH = """
window.violations = [];
addEventListener("securitypolicyviolation", ({ violatedDirective, blockedURI }) =>
  window.violations.push(`${violatedDirective} ${blockedURI}`));
"""

_TO_FILES = """
(files) => {
  const transfer = new DataTransfer();
  for (const { name, type, data } of files) {
    const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
    transfer.items.add(new File([bytes], name, { type }));
  }
  return transfer;
}
"""


# A question's answer that the test writes itself, piece by piece.
_HOLD = """
() => {
  const real = window.fetch;
  window.fetch = (path, options) => {
    if (path !== "v1/chat/completions") return real(path, options);
    const body = new ReadableStream({
      start(controller) {
        window.give = (text) => controller.enqueue(new TextEncoder().encode(text));
        options.signal.addEventListener("abort", () => controller.error(options.signal.reason));
      },
    });
    return Promise.resolve(new Response(body));
  };
}
"""


def piece(text: str) -> str:
    """The event that carries a piece of an answer."""
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}}]})}\n\n"


def answer_of(text: str) -> str:
    """A whole stream as the server sends it, three tokens by its own count."""
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 20, "completion_tokens": 3}}
    return f"{piece(text)}data: {json.dumps(end)}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n\n"


def png(*, width: int = 8, height: int = 8, colour: str = "red") -> bytes:
    """A small picture as the bytes of a file."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


def refuse(status: int, message: str, *, code: str = "", **headers: str) -> Callable[[Route], None]:
    """A route that answers as the server refuses."""
    body = {"error": {"message": message, "type": "server_error", "param": None, "code": code}}

    def answer(route: Route) -> None:
        route.fulfill(status=status, json=body, headers=headers)

    return answer


class Chatting:
    """One browser context with one page (or more, with `another_tab`)."""

    def __init__(self, browser: Browser, address: str, *, key: str, **context: Any) -> None:
        self.address = address
        self.context = browser.new_context(
            base_url=address, permissions=["clipboard-read", "clipboard-write"], **context
        )
        self.context.set_default_timeout(TIMEOUT_MS)
        self.context.add_init_script(_WATCH)
        if key:
            self.context.add_init_script(
                f"if (self.origin === {address!r}) sessionStorage.setItem('minigpt4.key', {key!r})"
            )
        self.errors: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        """Of the questions that were sent."""
        self.refusals = False
        """Whether this test makes the server refuse: the console then has a line about the status."""
        self.page = self.another_tab()

    def another_tab(self) -> Page:
        """A further page of the same browser, watched as well."""
        page = self.context.new_page()
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.errors.append(f"exception: {error}"))
        page.on("request", self._requested)
        return page

    def _heard(self, message: ConsoleMessage) -> None:
        refused = message.text.startswith("Failed to load resource") and self.refusals
        if message.type in ("error", "warning") and not refused:
            self.errors.append(f"console: {message.text}")

    def _requested(self, request: Request) -> None:
        if request.url.startswith(("blob:", "data:")):
            return
        parts = urlsplit(request.url)
        if f"{parts.scheme}://{parts.netloc}" != self.address:
            self.errors.append(f"another origin: {request.url}")
        if parts.path == "/v1/chat/completions":
            self.bodies.append(request.post_data_json)

    def open(self, page: Page | None = None, *, path: str = "/") -> None:
        """Loads the page and waits until it is wired."""
        page = page or self.page
        page.goto(path)
        page.wait_for_selector("html[data-ready]")

    def reload(self) -> None:
        self.page.reload()
        self.page.wait_for_selector("html[data-ready]")

    def kept(self, *, page: Page | None = None) -> None:
        """Waits until the chat that is shown is kept with its last answer, which is after that is read."""
        self.until(_KEPT, page=page)

    def answers(self, text: str = "A cup.") -> None:
        """From now on every question is answered so at once, without the server: for claims about the page alone."""
        self.context.route(
            QUESTIONS,
            lambda route: route.fulfill(content_type="text/event-stream", body=answer_of(text)),
        )

    def hold(self) -> None:
        """Until the page is loaded anew its questions go nowhere, and `give` writes what the server would."""
        self.page.evaluate(_HOLD)

    def give(self, events: str) -> None:
        """Sends events of the answer that is held, once the question is sent."""
        self.until("window.give !== undefined")
        self.page.evaluate("(events) => window.give(events)", events)

    def close(self) -> None:
        """Closes everything; fails for what must never happen."""
        for page in self.context.pages:
            violations = page.evaluate("window.violations")
            self.errors += [f"content security policy: {each}" for each in violations]
        self.context.close()
        assert not self.errors, "\n".join(self.errors)

    # --- what people do ---

    def choose(self, *files: Any) -> None:
        """Picks files: paths, or `{"name", "mimeType", "buffer"}`."""
        before = self.thumbs.count()
        self.page.set_input_files("#files", list(files))
        expect(self.thumbs).to_have_count(before + len(files))

    def transfer(self, *files: tuple[str, bytes]) -> Any:
        """A DataTransfer with files, as dropping and pasting hand them over."""
        described = [
            {"name": name, "type": "image/png", "data": base64.b64encode(data).decode()}
            for name, data in files
        ]
        return self.page.evaluate_handle(_TO_FILES, described)

    def send(self, text: str) -> None:
        """Writes and presses Enter; does not wait."""
        self.page.fill("#question", text)
        self.page.press("#question", "Enter")

    def ask(self, text: str) -> str:
        """Asks and waits for the whole answer."""
        number = self.turns.count() + 1
        self.send(text)
        self.page.wait_for_selector(f".turn:nth-of-type({number})")
        return self.finished()

    def finished(self) -> str:
        """Waits until the last answer is over."""
        self.page.wait_for_selector(".turn:last-child .answer[aria-busy=false]", state="attached")
        self.page.wait_for_selector("#stop", state="hidden")
        return self.turns.last.locator(".answer-text").inner_text()

    def set(self, **values: object) -> None:
        """Fills in settings."""
        self.page.click("#open-settings")
        for name, value in values.items():
            self.page.fill(f"#set-{name}", str(value))
        self.page.keyboard.press("Escape")

    def until(self, expression: str, *, page: Page | None = None) -> Any:
        """Waits until JavaScript gives a true value. (Playwright's own `wait_for_function` needs `eval`, which the
        page's policy forbids.)"""
        page = page or self.page
        deadline = time.monotonic() + TIMEOUT_MS / 1000
        while not (value := page.evaluate(expression)):
            assert time.monotonic() < deadline, f"{expression} stays {value}"
            page.wait_for_timeout(20)
        return value

    # --- what is there ---

    @property
    def turns(self) -> Locator:
        return self.page.locator(".turn")

    @property
    def thumbs(self) -> Locator:
        return self.page.locator("#attached li")

    def axe_violations(self) -> str:
        """What axe-core finds on the page as it is now; empty for nothing."""
        results = Axe().run(
            self.page,
            options={
                "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
            },
        )
        return "" if results.violations_count == 0 else results.generate_report()
