"""Colours, a phone, the keyboard, screen readers: axe-core finds nothing, in both themes and at both sizes."""

from __future__ import annotations

import pytest
from playwright.sync_api import Route

from tests.browser.chatting import COFFEE, FLOWER, Chatting, piece

SMALL_TARGETS = """
() => [...document.querySelectorAll("button, input, textarea, a[href]")]
  .filter((element) => element.checkVisibility({ visibilityProperty: true, opacityProperty: true }))
  .filter((element) => !element.closest("[inert], .hidden") && !element.matches(".hidden, .skip, .link-button"))
  .map((element) => [element, element.getBoundingClientRect(), getComputedStyle(element, "::before")])
  .filter(([element, box, before]) => {
    const reach = before.position === "absolute" ? -2 * parseFloat(before.top) : 0;
    return Math.min(box.width, box.height) + reach < 44 && box.width > 0;
  })
  .map(([element, box]) => `${element.id || element.className} ${box.width} x ${box.height}`)
"""


def fill(chat: Chatting) -> None:
    """A chat with pictures, a draft and two answers."""
    chat.answers()
    chat.choose(COFFEE, FLOWER)
    chat.ask("What is this?")
    chat.ask("And what is that?")
    chat.choose(COFFEE)


def refuse(route: Route) -> None:
    route.fulfill(
        status=429, headers={"Retry-After": "30"}, json={"error": {"message": "Too many."}}
    )


@pytest.fixture(params=["desktop light", "desktop dark", "phone light", "phone dark"])
def seen(request: pytest.FixtureRequest) -> Chatting:
    """The page in each look."""
    size, theme = request.param.split()
    chat = request.getfixturevalue("chat" if size == "desktop" else "phone")
    chat.page.emulate_media(color_scheme=theme, reduced_motion="reduce")
    return chat


def test_axe_finds_nothing_in_any_state(seen: Chatting) -> None:
    page = seen.page
    assert seen.axe_violations() == "", "empty"
    fill(seen)
    assert seen.axe_violations() == "", "chat with answers"
    page.click("#open-settings")
    page.fill("#set-top_p", "9")
    assert seen.axe_violations() == "", "settings"
    page.keyboard.press("Escape")
    seen.refusals = True
    page.route("**/v1/chat/completions", refuse)
    seen.send("Fails.")
    page.wait_for_selector(".trouble:visible")
    assert seen.axe_violations() == "", "error"
    page.click("#open-code")
    assert seen.axe_violations() == "", "code"


def test_axe_finds_a_mistake_that_is_planted(chat: Chatting) -> None:
    chat.page.evaluate("document.querySelector('#question').previousElementSibling.remove()")
    chat.page.evaluate("document.querySelector('#question').removeAttribute('placeholder')")
    chat.page.evaluate("document.querySelector('.lead').style.color = '#ccc'")
    report = chat.axe_violations()
    assert "color-contrast" in report
    assert "label" in report


def test_the_drawer_of_a_phone_is_accessible_and_gives_the_focus_back(phone: Chatting) -> None:
    page = phone.page
    page.emulate_media(reduced_motion="reduce")
    phone.hold()
    phone.send("What is a cup?")
    phone.give(piece("A cup"))
    page.wait_for_selector(".turn.writing")
    assert not page.locator("#sidebar").is_visible()
    page.click("#open-sidebar")
    assert page.evaluate("document.activeElement.id") == "close-sidebar"
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme, reduced_motion="reduce")
        assert phone.axe_violations() == "", theme
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "open-sidebar"
    assert page.is_visible("#stop"), "Escape was for the drawer"


def test_a_phone_scrolls_nothing_sideways_and_every_target_fits_a_finger(phone: Chatting) -> None:
    def check(state: str) -> None:
        wide = phone.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, state
        log = "(log => log.scrollWidth - log.clientWidth)(document.querySelector('#log'))"
        assert phone.page.evaluate(log) <= 0, state
        assert phone.page.evaluate(SMALL_TARGETS) == [], state

    check("empty")
    fill(phone)
    phone.ask("W" * 60)
    phone.choose(COFFEE)
    check("chat")
    phone.page.click("#open-settings")
    check("settings")
    phone.page.keyboard.press("Escape")
    phone.page.click("#open-sidebar")
    check("drawer")


def test_the_colours_follow_the_system_until_a_person_chooses(chat: Chatting) -> None:
    def background() -> str:
        return chat.page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = background()
    chat.page.emulate_media(color_scheme="dark")
    dark = background()
    assert dark != light
    chat.page.get_by_role("radio", name="Light").check()
    assert background() == light
    chat.reload()
    assert background() == light, "kept, and there before the first drawing"
    chat.page.get_by_role("radio", name="Auto").check()
    assert background() == dark


def test_the_keyboard_alone_leads_from_the_load_to_an_answer(chat: Chatting) -> None:
    page = chat.page
    assert page.evaluate("document.activeElement.id") == "question", "one can write at once"
    page.focus("#new-chat")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "question"
    # Around more than the key that opens it: the browser hears of this listener in its own time.
    with page.expect_file_chooser() as opened:
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        assert page.input_value("#question") == "one\ntwo"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "pick"
        page.keyboard.press("Enter")
    opened.value.set_files(COFFEE)
    page.wait_for_selector("#attached img")
    page.keyboard.press("Control+a")
    page.keyboard.type("Write a long story about a cup of coffee.")
    page.keyboard.press("Enter")
    page.wait_for_selector(".turn.writing")
    page.keyboard.press("Escape")
    chat.finished()
    assert page.inner_text(".remark") == "Stopped."
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.className") == "icon-button again"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid", "the focus is seen"


def test_a_dialog_gives_the_focus_back_to_what_opened_it(chat: Chatting) -> None:
    for button in ("open-settings", "open-key"):
        chat.page.focus(f"#{button}")
        chat.page.keyboard.press("Enter")
        assert chat.page.evaluate("document.activeElement.closest('dialog') !== null")
        chat.page.keyboard.press("Escape")
        assert chat.page.evaluate("document.activeElement.id") == button


def test_a_button_that_goes_at_its_press_leaves_the_focus_in_a_useful_place(
    chat: Chatting,
) -> None:
    page = chat.page

    def focused_after(selector: str) -> str:
        page.focus(selector)
        page.keyboard.press("Enter")
        page.wait_for_selector(selector, state="hidden")
        return page.evaluate("document.activeElement.id")

    chat.answers("A cup.\n" * 100)
    chat.ask("What is a cup?")
    page.evaluate("document.querySelector('#log').scrollTop = 0")
    page.wait_for_selector("#to-end:visible")
    assert focused_after("#to-end") == "log"
    page.set_input_files("#files", {"name": "notes.png", "mimeType": "", "buffer": b"dear diary"})
    page.wait_for_selector(".note")
    page.keyboard.press("Tab")
    assert focused_after(".note .icon-button") == "question"


def test_without_motion_nothing_moves(chat: Chatting) -> None:
    chat.page.emulate_media(reduced_motion="reduce")
    chat.set(max_tokens=60)
    chat.send("Write a long story about a cup of coffee.")
    chat.page.wait_for_selector(".turn.writing")
    assert chat.page.evaluate("document.getAnimations().length") == 0
