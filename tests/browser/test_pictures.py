"""Pictures reach the page in every way that people have, and the model as they are."""

from __future__ import annotations

import base64
import hashlib
import io
from typing import Any

import pytest
from PIL import Image

from minigpt4_jax.presets import MAX_SEED
from minigpt4_jax.serve_config import LimitsConfig, PicturesConfig
from tests.browser.chatting import COFFEE, FLOWER, Chatting, png

READ_FAILS_ONCE = """
() => {
  const read = Blob.prototype.arrayBuffer;
  Blob.prototype.arrayBuffer = () => {
    Blob.prototype.arrayBuffer = read;
    return Promise.reject(new DOMException("A requested file could not be found.", "NotFoundError"));
  };
}
"""
"""As for a folder that was dropped, or a file that was deleted after it was chosen."""
HOLD_EXAMPLES = """
() => {
  const real = window.fetch;
  window.load = [];
  window.fetch = (path, options) =>
    path.startsWith("examples/")
      ? new Promise((resolve) => window.load.push(() => resolve(real(path, options))))
      : real(path, options);
}
"""

LARGE_FILES = """
(picture) => {
  const bytes = Uint8Array.from(atob(picture), (each) => each.charCodeAt(0));
  const padding = new Uint8Array(20 * 2 ** 20);
  const transfer = new DataTransfer();
  // Decoders read a PNG to its last chunk and leave what follows.
  transfer.items.add(new File([bytes, padding], "large.png", { type: "image/png" }));
  transfer.items.add(new File([padding, padding], "video.mp4", { type: "video/mp4" }));
  return transfer;
}
"""


def sent_pictures(body: dict[str, Any]) -> list[bytes]:
    """The pictures of a request, decoded."""
    parts = [
        part for message in body["messages"] for part in message["content"] if type(part) is dict
    ]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [base64.b64decode(url.partition(",")[2]) for url in urls]


def test_a_chosen_file_is_shown_and_answered_byte_for_byte(chat: Chatting) -> None:
    with chat.page.expect_file_chooser() as opened:
        chat.page.click("#pick")
    opened.value.set_files(COFFEE)
    chat.page.wait_for_selector("#attached img[alt='coffee.jpg']")
    assert chat.ask("What is this?") == "This is a cup of coffee."
    assert sent_pictures(chat.bodies[0]) == [COFFEE.read_bytes()]
    assert chat.thumbs.count() == 0
    assert chat.turns.locator(".shown img").get_attribute("alt") == "coffee.jpg"


def test_a_dropped_file_is_added(chat: Chatting) -> None:
    dropped = chat.transfer(("dropped.png", png()))
    chat.page.dispatch_event("#log", "dragover", {"dataTransfer": dropped})
    chat.page.wait_for_selector("#drop", state="visible")
    chat.page.dispatch_event("#log", "drop", {"dataTransfer": dropped})
    chat.page.wait_for_selector("#attached img[alt='dropped.png']")
    assert chat.page.is_hidden("#drop")


def test_a_pasted_picture_is_added_and_pasted_text_stays_text(chat: Chatting) -> None:
    pasted = chat.transfer(("image.png", png()))
    chat.page.focus("#question")
    chat.page.evaluate(
        "data => document.activeElement.dispatchEvent(new ClipboardEvent('paste', "
        "{clipboardData: data, bubbles: true, cancelable: true}))",
        pasted,
    )
    chat.page.wait_for_selector("#attached img[alt='image.png']")
    chat.page.evaluate("navigator.clipboard.writeText('a pasted word')")
    chat.page.press("#question", "Control+v")
    assert chat.page.input_value("#question") == "a pasted word"
    assert chat.thumbs.count() == 1


def test_two_pictures_go_with_one_question_in_their_order(chat: Chatting) -> None:
    chat.set(max_tokens=4)
    chat.choose(FLOWER)
    chat.choose(COFFEE)
    assert chat.ask("Compare.")
    assert sent_pictures(chat.bodies[0]) == [FLOWER.read_bytes(), COFFEE.read_bytes()]
    names = chat.turns.locator(".shown img").evaluate_all("images => images.map(({alt}) => alt)")
    assert names == ["flower.jpg", "coffee.jpg"]


def test_a_removed_picture_is_not_sent_and_the_focus_is_not_lost(chat: Chatting) -> None:
    chat.choose(COFFEE, FLOWER)
    chat.page.get_by_role("button", name="Remove flower.jpg").click()
    assert chat.page.evaluate("document.activeElement.id") == "question"
    chat.answers()
    chat.ask("What is this?")
    assert sent_pictures(chat.bodies[0]) == [COFFEE.read_bytes()]


def test_what_is_no_picture_is_refused_in_words_and_the_others_stay(chat: Chatting) -> None:
    chat.page.evaluate(READ_FAILS_ONCE)
    files = {"gone.png": png(), "notes.png": b"dear diary", "dot.png": png()}
    chat.page.set_input_files(
        "#files",
        [{"name": name, "mimeType": "", "buffer": data} for name, data in files.items()],
    )
    chat.page.wait_for_selector(".note")
    note = chat.page.inner_text("#notes")
    assert "gone.png cannot be read: it is a folder, or the file is gone" in note
    assert "notes.png is not a picture that this browser can read." in note
    assert chat.thumbs.count() == 1
    chat.answers()
    assert chat.ask("What is this?") == "A cup."
    assert len(sent_pictures(chat.bodies[0])) == 1


def test_the_ninth_picture_is_left_out_and_said(chat: Chatting) -> None:
    files = [{"name": f"{n}.png", "mimeType": "", "buffer": png()} for n in range(9)]
    chat.page.set_input_files("#files", files)
    chat.page.wait_for_selector(".note")
    assert "takes 8 pictures, earlier questions' too; 8.png was left out." in chat.page.inner_text(
        "#notes"
    )
    assert chat.thumbs.count() == 8


@pytest.mark.parametrize("name", ["wide.png", "drawing.avif"])
def test_a_picture_over_a_limit_or_of_another_format_is_drawn_anew_and_said(
    chat: Chatting, name: str
) -> None:
    chat.page.evaluate("import('./pictures.js').then(({ LIMITS }) => { LIMITS.pixels = 100_000; })")
    if name == "wide.png":
        picture, why = png(width=4096, height=64), "has more than 0.1 million pixels"
        size = "2048 × 32"
    else:
        picture, why, size = _avif(), "is of a format that the server does not read", "16 × 16"
    chat.page.set_input_files("#files", [{"name": name, "mimeType": "", "buffer": picture}])
    chat.page.wait_for_selector(".note")
    assert chat.page.inner_text(".note span") == f"{name} {why}; it is sent as a JPEG of {size}."
    chat.answers()
    chat.ask("What is this?")
    assert sent_pictures(chat.bodies[0])[0].startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize("way", ["picked", "dropped"])
def test_a_file_over_the_servers_limit_is_said_before_anything_is_sent(
    chat: Chatting, way: str
) -> None:
    page = chat.page
    files = page.evaluate_handle(LARGE_FILES, base64.b64encode(png()).decode())
    if way == "picked":
        page.evaluate(
            "(files) => { const input = document.querySelector('#files'); input.files = files.files;"
            " input.dispatchEvent(new Event('change')); }",
            files,
        )
    else:
        page.dispatch_event("#log", "drop", {"dataTransfer": files})
    page.wait_for_selector(".note")
    note = page.inner_text(".note span")
    assert "large.png has more than 20 MiB; it is sent as a JPEG of 8 × 8." in note
    assert "video.mp4 is not a picture that this browser can read." in note
    assert chat.thumbs.count() == 1
    assert chat.bodies == []
    chat.answers()
    chat.ask("What is this?")
    (sent,) = sent_pictures(chat.bodies[0])
    assert sent.startswith(b"\xff\xd8\xff")
    assert len(sent) < 10_000


def test_the_camera_of_a_phone_is_opened_and_its_photo_added(phone: Chatting) -> None:
    with phone.page.expect_file_chooser() as opened:
        phone.page.get_by_role("button", name="Take a photo").tap()
    chooser = opened.value
    assert chooser.element.get_attribute("capture") == "environment"
    assert chooser.element.get_attribute("accept") == "image/*"
    chooser.set_files(COFFEE)
    phone.page.wait_for_selector("#attached img[alt='coffee.jpg']")
    phone.answers()
    phone.ask("What is this?")
    assert sent_pictures(phone.bodies[0]) == [COFFEE.read_bytes()]


def _avif() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "blue").save(buffer, "AVIF")
    return buffer.getvalue()


def test_a_large_view_opens_walks_and_gives_the_focus_back(chat: Chatting) -> None:
    chat.choose(COFFEE, FLOWER)
    chat.thumbs.first.locator(".picture-button").click()
    assert "1 of 2 · coffee.jpg · 400 × 400" in chat.page.inner_text("#lightbox")
    chat.page.keyboard.press("ArrowRight")
    assert "2 of 2 · flower.jpg" in chat.page.inner_text("#lightbox")
    chat.page.keyboard.press("Escape")
    assert chat.page.is_hidden("#lightbox")
    assert chat.page.evaluate("document.activeElement.className") == "picture-button"


def test_the_gallery_asks_at_once_and_keeps_what_was_being_written(chat: Chatting) -> None:
    chat.answers()
    chat.page.fill("#question", "a draft")
    chat.page.locator(".example").first.get_by_text("What is this?").click()
    chat.page.wait_for_selector(".turn")
    assert chat.finished() == "A cup."
    assert chat.page.input_value("#question") == "a draft"
    sent = [hashlib.sha256(each).hexdigest() for each in sent_pictures(chat.bodies[0])]
    assert sent == [hashlib.sha256(COFFEE.read_bytes()).hexdigest()]


def test_an_example_is_asked_once_and_in_no_other_chat(chat: Chatting) -> None:
    page = chat.page
    page.evaluate(HOLD_EXAMPLES)
    chat.answers()
    page.fill("#question", "a draft")
    press_two = "document.querySelectorAll('.ask').forEach((each, at) => at < 2 && each.click())"
    page.evaluate(press_two)
    assert page.evaluate("load.length") == 1
    page.click("#new-chat")
    page.evaluate("load.pop()()")
    page.wait_for_selector(".note:has-text('was not asked')")
    assert chat.bodies == []
    page.evaluate(press_two)
    page.evaluate("load.pop()()")
    page.wait_for_selector(".turn")
    assert chat.finished() == "A cup."
    assert [part["type"] for part in chat.bodies[0]["messages"][0]["content"]] == [
        "image_url",
        "text",
    ]
    assert (len(chat.bodies), chat.turns.count()) == (1, 1)
    assert page.input_value("#question") == "a draft"


def test_a_question_is_not_edited_while_a_picture_is_read_for_another(chat: Chatting) -> None:
    page = chat.page
    chat.answers()
    chat.ask("What is a cup?")
    page.evaluate(
        "() => { const real = createImageBitmap; window.createImageBitmap = (blob) =>"
        " new Promise((resolve) => { window.read = () => resolve(real(blob)); }); }"
    )
    page.set_input_files("#files", COFFEE)
    chat.until("window.read !== undefined")
    page.locator(".edit").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".note:has-text('still being read')")
    assert page.is_hidden("#editing")
    page.evaluate("read()")
    page.wait_for_selector("#attached img[alt='coffee.jpg']")


def test_the_pages_limits_are_the_servers_defaults(chat: Chatting) -> None:
    limits = chat.page.evaluate("import('./pictures.js').then(({ LIMITS }) => LIMITS)")
    pictures = PicturesConfig()
    assert limits == {
        "count": pictures.max_count,
        "bytes": pictures.max_bytes,
        "pixels": pictures.max_pixels,
        "side": pictures.max_side,
        "bodyBytes": LimitsConfig().max_body_bytes,
    }
    fields = chat.page.evaluate("import('./settings.js').then(({ FIELDS }) => FIELDS)")
    most = {field["name"]: field["most"] for field in fields}
    assert (most["seed"], most["num_beams"]) == (MAX_SEED, LimitsConfig().max_beams)
