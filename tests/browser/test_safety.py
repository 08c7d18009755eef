"""What anybody wrote stays text, and the page is what its Content-Security-Policy allows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.browser.chatting import EXAMPLES, Chatting, png

PAGE = Path(__file__).parents[2] / "minigpt4_jax" / "serving" / "page"
EVIL = '<img src=x onerror="window.broken = 1"><script>window.broken = 1</script>'


def test_text_of_models_people_and_files_never_becomes_html(chat: Chatting) -> None:
    page = chat.page
    chunk = json.dumps(
        {"choices": [{"index": 0, "delta": {"content": EVIL}, "finish_reason": "stop"}]}
    )
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            content_type="text/event-stream", body=f"data: {chunk}\n\ndata: [DONE]\n\n"
        ),
    )
    chat.choose({"name": f"{EVIL}.png", "mimeType": "image/png", "buffer": png()})
    chat.ask(EVIL)
    chat.kept()
    chat.reload()
    assert chat.turns.locator(".answer-text").inner_text() == EVIL
    assert chat.turns.locator(".question-text").inner_text() == EVIL
    assert chat.turns.locator(".shown img").get_attribute("alt") == f"{EVIL}.png"
    assert page.locator(".chat-link").inner_text().startswith("<img src=x")
    chat.turns.locator(".picture-button").click()
    assert EVIL in page.inner_text("#lightbox-name")
    page.keyboard.press("Escape")
    assert page.locator("img[src=x], main script").count() == 0
    assert page.evaluate("window.broken") is None


def test_a_refusal_never_becomes_html(chat: Chatting) -> None:
    chat.refusals = True
    chat.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(status=400, json={"error": {"message": EVIL, "code": None}}),
    )
    chat.send("What is a cup?")
    chat.page.wait_for_selector(".trouble:visible")
    assert chat.page.inner_text(".trouble-text") == EVIL
    assert chat.page.evaluate("window.broken") is None


def test_a_broken_policy_would_be_noticed(chat: Chatting) -> None:
    chat.page.evaluate(
        "document.body.append(Object.assign(new Image(), { src: 'https://example.org/x.png' }))"
    )
    chat.until("violations.length > 0")
    with pytest.raises(
        AssertionError, match=r"content security policy: img-src https://example.org"
    ):
        chat.close()
    chat.errors.clear()


def test_no_module_makes_html_of_strings() -> None:
    makers = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser"
    )
    found = [path.name for path in PAGE.glob("*.js") if makers.search(path.read_text())]
    assert found == []


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere() -> None:
    text = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)
    files = [*PAGE.glob("*.html"), *PAGE.glob("*.css"), *PAGE.glob("*.js")]
    elsewhere = [
        path.name
        for path in files
        if re.search(r"(src|href|url|from|import)\W{1,3}https?:", path.read_text())
    ]
    assert elsewhere == []


@pytest.mark.parametrize("path", sorted(PAGE.glob("*.js")), ids=lambda path: path.name)
def test_a_module_says_what_it_is_for_parses_and_stays_readable(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("// For: ")
    assert "Not for" in text[:500]
    assert len(text.splitlines()) <= 400
    if path.name == "early.js":
        return
    node = shutil.which("node")
    assert node, "node is not installed; expected it for `node --check`"
    done = subprocess.run([node, "--check", path], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr


def test_the_examples_are_the_repositorys_with_their_licences() -> None:
    for name in ("coffee.jpg", "flower.jpg"):
        assert (PAGE / "examples" / name).read_bytes() == (EXAMPLES / name).read_bytes()
        assert f"`{name}`" in (PAGE / "examples" / "LICENCES.md").read_text()
