"""Chats stay in the browser, whole, in several tabs; they are renamed, deleted, taken along as files and as code."""

from __future__ import annotations

import ast
import base64
import json
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from tests.browser.chatting import COFFEE, QUESTIONS, Chatting, answer_of, piece
from tests.browser.conftest import KEY, Server

PICTURES_KEPT = """
new Promise((resolve) => {
  const opening = indexedDB.open("minigpt4");
  opening.onsuccess = () => {
    const request = opening.result.transaction("pictures").objectStore("pictures").count();
    request.onsuccess = () => { opening.result.close(); resolve(request.result); };
  };
})
"""


NOTHING_KEPT = """
IDBFactory.prototype.open = () => { throw new DOMException("", "SecurityError"); };
for (const name of ["localStorage", "sessionStorage"]) {
  Object.defineProperty(window, name, { get() { throw new DOMException("", "SecurityError"); } });
}
"""
# As on a slow disk, or with many large pictures. `saving`: how many saves have not ended.
SLOW_SAVES = """
async () => {
  const { Store } = await import("./store.js");
  const save = Store.prototype.save;
  window.saving = 0;
  Store.prototype.save = async function (chat) {
    window.saving += 1;
    await new Promise((resolve) => setTimeout(resolve, 700));
    try {
      return await save.call(this, chat);
    } finally {
      window.saving -= 1;
    }
  };
}
"""
HEAR = """
() => {
  window.heard = 0;
  new BroadcastChannel("minigpt4-history").onmessage = () => { window.heard += 1; };
}
"""


@pytest.fixture
def short(chat: Chatting) -> Chatting:
    """A page whose questions are answered at once, with three tokens."""
    chat.answers()
    return chat


def listed(chat: Chatting) -> list[str]:
    """Titles in the list of chats."""
    return chat.page.locator(".chat-link").all_inner_texts()


def test_a_chat_and_its_pictures_are_there_after_a_reload(short: Chatting) -> None:
    short.choose(COFFEE)
    answer = short.ask("What is this?")
    stats = short.turns.locator(".stats").inner_text()
    short.kept()
    short.reload()
    assert short.turns.locator(".answer-text").inner_text() == answer
    assert short.turns.locator(".stats").inner_text() == stats
    image = short.turns.locator(".shown img")
    assert (
        image.evaluate("async (image) => { await image.decode(); return image.naturalWidth; }")
        == 400
    )
    short.ask("What can I do with it?")
    assert short.bodies[-1]["messages"][0]["content"][0]["type"] == "image_url"


def test_an_answer_that_a_reload_cut_is_kept_as_far_as_it_came(chat: Chatting) -> None:
    chat.hold()
    chat.send("What is a cup?")
    chat.give(piece("A cup"))
    # The page keeps an answer every two seconds while it grows.
    chat.until(
        """() => new Promise((resolve) => {
          const opening = indexedDB.open("minigpt4");
          opening.onsuccess = () => {
            const request = opening.result.transaction("chats").objectStore("chats").getAll();
            request.onsuccess = () => {
              opening.result.close();
              resolve(request.result[0]?.turns[0].answer.text.length > 0);
            };
          };
        })"""
    )
    chat.reload()
    assert "This answer was not finished." in chat.turns.inner_text()
    assert chat.turns.locator(".answer-text").inner_text() == "A cup"


def test_chats_are_opened_renamed_and_deleted_with_their_pictures(short: Chatting) -> None:
    page = short.page
    short.choose(COFFEE)
    short.ask("What is this?")
    page.click("#new-chat")
    assert page.is_visible("#welcome")
    short.ask("What is a saucer?")
    expect(page.locator(".chat-link")).to_have_text(["What is a saucer?", "What is this?"])
    page.get_by_role("button", name="What is this?", exact=True).click()
    page.wait_for_selector(".shown img")
    page.locator(".chat-item", has_text="What is this?").hover()
    page.get_by_role("button", name="Rename “What is this?”").click()
    page.fill("#rename-value", "<b>Coffee</b>")
    page.press("#rename-value", "Enter")
    page.wait_for_selector("h1:has-text('<b>Coffee</b>')")
    expect(page.locator(".chat-link")).to_have_text(["What is a saucer?", "<b>Coffee</b>"])
    assert page.evaluate(PICTURES_KEPT) == 1
    page.get_by_role("button", name="Delete “<b>Coffee</b>”").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.wait_for_selector("#welcome")
    short.until("document.querySelectorAll('.chat-link').length === 1")
    assert listed(short) == ["What is a saucer?"]
    assert page.evaluate(PICTURES_KEPT) == 0


def test_all_chats_are_deleted_after_a_question(short: Chatting) -> None:
    page = short.page
    short.ask("What is a cup?")
    page.click("#delete-all")
    page.get_by_role("button", name="Cancel").click()
    assert listed(short) == ["What is a cup?"]
    page.click("#delete-all")
    page.get_by_role("button", name="Delete all", exact=True).click()
    page.wait_for_selector("#no-chats", state="visible")
    short.reload()
    assert listed(short) == []


def test_deleting_a_chat_while_it_is_answered_leaves_nothing(chat: Chatting) -> None:
    chat.hold()
    chat.send("What is a cup?")
    chat.give(piece("A cup"))
    chat.page.wait_for_selector(".turn.writing")
    chat.page.locator(".chat-item").hover()
    chat.page.locator(".delete-chat").click()
    chat.page.get_by_role("button", name="Delete", exact=True).click()
    chat.page.wait_for_selector("#no-chats", state="visible")
    chat.reload()
    assert listed(chat) == []


def test_a_chat_deleted_from_the_keyboard_leaves_the_focus_in_the_list(short: Chatting) -> None:
    page = short.page
    for question in ("What is a cup?", "What is a saucer?"):
        page.click("#new-chat")
        short.ask(question)
    page.focus("[aria-label='Delete “What is a cup?”']")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Delete", exact=True).press("Enter")
    short.until("document.querySelectorAll('.chat-link').length === 1")
    assert page.evaluate("document.activeElement.id") == "new-chat"


def test_a_deletion_leaves_the_focus_in_the_list_that_another_tab_changed_meanwhile(
    short: Chatting,
) -> None:
    page = short.page
    short.ask("What is a cup?")
    page.click("#new-chat")
    short.ask("What is a saucer?")
    other = short.another_tab()
    short.open(other)
    page.bring_to_front()
    page.get_by_role("button", name="Delete “What is a cup?”").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#confirm[open]")
    other.fill("#question", "What is a spoon?")
    other.press("#question", "Enter")
    short.until("document.querySelectorAll('.chat-link').length === 3")
    page.locator("#confirm-yes").focus()
    page.keyboard.press("Enter")
    short.until("document.querySelectorAll('.chat-link').length === 2")
    short.until("document.activeElement.id === 'new-chat'")


def test_the_list_of_chats_is_made_anew_only_when_it_changed(chat: Chatting) -> None:
    made_anew = """async () => {
      const { showChats } = await import("./sidebar.js");
      const link = () => document.querySelector(".chat-link");
      const show = (title) => showChats([{ id: "1", title }], "1", {});
      show("A cup");
      const first = link();
      show("A cup");
      const second = link();
      show("A saucer");
      return [first !== second, second !== link()];
    }"""
    assert chat.page.evaluate(made_anew) == [False, True]


def test_an_answer_goes_on_while_another_chat_is_shown(chat: Chatting) -> None:
    chat.hold()
    chat.send("What is a cup?")
    chat.give(piece("A cup"))
    chat.page.wait_for_selector(".turn.writing")
    chat.page.click("#new-chat")
    assert chat.turns.count() == 0
    chat.give(answer_of(" of coffee."))
    chat.until("document.querySelector('#announcer').textContent !== ''")
    chat.page.locator(".chat-link").click()
    assert chat.turns.locator(".answer-text").inner_text() == "A cup of coffee."


def test_two_tabs_that_write_one_chat_lose_nothing(short: Chatting) -> None:
    one = short.page
    short.ask("What is a cup?")
    other = short.another_tab()
    short.open(other, path=f"/#{one.url.partition('#')[2]}")
    other.wait_for_selector(".turn")
    # Cut off from what the other tab tells, both change what both have loaded.
    other.evaluate("BroadcastChannel.prototype.postMessage = () => {}")
    other.fill("#question", "From the other tab")
    other.press("#question", "Enter")
    other.wait_for_selector(".turn:nth-of-type(2) .stats:not(:empty)")
    one.bring_to_front()
    short.ask("From this tab")
    one.wait_for_selector("h1:has-text('What is a cup? (copy)')")
    short.kept()
    short.reload()
    assert sorted(listed(short)) == ["What is a cup?", "What is a cup? (copy)"]
    assert "From this tab" in short.turns.nth(1).inner_text()
    one.get_by_role("button", name="What is a cup?", exact=True).click()
    one.wait_for_selector("h1:text-is('What is a cup?')")
    assert "From the other tab" in short.turns.nth(1).inner_text()


def test_a_chat_that_is_opened_before_it_was_kept_goes_on_as_it_is(short: Chatting) -> None:
    page = short.page
    short.page.evaluate(SLOW_SAVES)
    short.ask("What is a cup?")
    page.click("#new-chat")
    page.locator(".chat-link").click()
    page.wait_for_selector(".turn")
    assert short.ask("What is a saucer?") == "A cup."
    short.kept()
    assert page.locator(".chat-link").all_inner_texts() == ["What is a cup?"]
    assert page.is_hidden(".note")
    assert short.turns.locator(".answer-text").all_inner_texts() == ["A cup.", "A cup."]


@pytest.mark.parametrize("button", [".delete-chat", "#delete-all"])
def test_a_chat_that_is_deleted_before_it_was_kept_does_not_come_back(
    short: Chatting, button: str
) -> None:
    page = short.page
    short.page.evaluate(SLOW_SAVES)
    short.ask("What is a cup?")
    page.locator(".chat-item").hover()
    page.click(button)
    page.locator("#confirm-yes").click()
    page.wait_for_selector("#welcome")
    short.until("window.saving === 0")
    page.wait_for_selector("#no-chats", state="visible")
    short.reload()
    assert listed(short) == []
    assert page.evaluate(PICTURES_KEPT) == 0


def test_a_tab_shows_what_another_tab_changed_and_deleted(short: Chatting) -> None:
    short.ask("What is a cup?")
    other = short.another_tab()
    short.open(other, path=f"/#{short.page.url.partition('#')[2]}")
    other.wait_for_selector(".turn")
    other.focus(".copy-question")
    short.page.bring_to_front()
    short.ask("What is a saucer?")
    other.wait_for_selector(".turn:nth-of-type(2) .stats:not(:empty)")
    assert "copy-question" in other.evaluate("document.activeElement.className")
    short.page.click("#delete-all")
    short.page.get_by_role("button", name="Delete all", exact=True).click()
    other.wait_for_selector(".note:has-text('deleted in another tab')")
    assert other.locator(".turn").count() == 0


def test_an_edit_goes_on_while_another_tab_writes_the_chat(short: Chatting) -> None:
    short.ask("What is a cup?")
    other = short.another_tab()
    short.open(other, path=f"/#{short.page.url.partition('#')[2]}")
    other.evaluate(HEAR)
    other.locator(".edit").focus()
    other.keyboard.press("Enter")
    other.fill("#question", "What is a better cup?")
    short.page.bring_to_front()
    for question in ("What is a saucer?", "And a spoon?"):
        short.ask(question)
    short.until("window.heard >= 4", page=other)
    assert other.input_value("#question") == "What is a better cup?"
    assert other.is_visible("#editing")
    other.keyboard.press("Escape")
    other.wait_for_selector(".turn:nth-of-type(3) .stats:not(:empty)")


def test_a_full_disk_is_said_and_the_chat_goes_on(short: Chatting) -> None:
    devtools = short.context.new_cdp_session(short.page)
    devtools.send("Storage.overrideQuotaForOrigin", {"origin": short.address, "quotaSize": 1})
    short.choose(COFFEE)
    assert short.ask("What is a cup?") != ""
    short.page.wait_for_selector(".note:has-text('is full, and this chat is not kept')")
    assert short.ask("What is a saucer?") != ""


def test_a_browser_that_keeps_nothing_is_said_and_all_works(
    server: Server, browser: Browser
) -> None:
    chat = Chatting(browser, server.address, key="")
    chat.context.add_init_script(NOTHING_KEPT)
    chat.refusals = True
    chat.answers()
    chat.open()
    page = chat.page
    page.wait_for_selector(".note:has-text('Chats last until this tab is closed')")
    page.wait_for_selector("#server-state:has-text('Key needed')")
    page.click("#open-key")
    page.fill("#key-value", KEY)
    page.press("#key-value", "Enter")
    page.wait_for_selector(".note:has-text('keeps nothing for this page')")
    page.wait_for_selector("#model-name:has-text('smol')")
    page.get_by_role("radio", name="Dark").check()
    chat.set(seed=7)
    assert chat.ask("What is a cup?") == "A cup."
    assert chat.bodies[0]["seed"] == 7
    page.click("#new-chat")
    page.get_by_role("button", name="What is a cup?", exact=True).click()
    page.wait_for_selector(".turn")
    chat.close()


def test_settings_that_cannot_be_read_are_said_and_the_page_starts(chat: Chatting) -> None:
    chat.page.evaluate("localStorage.setItem('minigpt4.settings', 'null')")
    chat.reload()
    assert "cannot be read" in chat.page.inner_text(".note")


def download(chat: Chatting, kind: str) -> tuple[str, str]:
    """Name and text of the file that a button of the download dialog gives."""
    chat.page.click("#open-export")
    with chat.page.expect_download() as started:
        chat.page.get_by_role("button", name=kind, exact=True).click()
    return started.value.suggested_filename, Path(started.value.path()).read_text()


def test_a_chat_is_downloaded_as_json_in_openais_form(short: Chatting) -> None:
    short.choose(COFFEE)
    answer = short.ask("What is this?")
    name, text = download(short, "JSON")
    data = json.loads(text)
    url = data["messages"][0]["content"][0]["image_url"]["url"]
    assert name == "what-is-this.json"
    assert (data["format"], data["version"], data["model"]) == ("minigpt4-chat", 1, "smol")
    assert base64.b64decode(url.partition(",")[2]) == COFFEE.read_bytes()
    assert data["messages"][1] == {"role": "assistant", "content": answer}
    assert data["answers"][0]["tokens"] == 3


def test_a_downloaded_chat_has_questions_without_an_answer_too(short: Chatting) -> None:
    short.refusals = True
    short.page.route(QUESTIONS, lambda route: route.abort(), times=1)
    short.send("This one fails.")
    short.page.wait_for_selector(".trouble:visible")
    short.choose(COFFEE)
    short.ask("What is this?")
    data = json.loads(download(short, "JSON")[1])
    assert [message["role"] for message in data["messages"]] == ["user", "user", "assistant"]
    assert [answer["message"] for answer in data["answers"]] == [None, 2]
    assert data["messages"][2]["content"] == data["answers"][1]["text"] == "A cup."
    assert [picture["name"] for picture in data["pictures"]] == ["coffee.jpg"]


def test_a_chat_is_downloaded_as_markdown_in_which_marks_stay_text(short: Chatting) -> None:
    short.choose(COFFEE)
    short.ask("# Is <img src=x onerror=alert(1)> *this*?")
    name, text = download(short, "Markdown")
    picture = base64.b64encode(COFFEE.read_bytes()).decode()
    assert name == "is-img-src-x-onerror-alert-1-this.md"
    assert r"> \# Is &lt;img src=x onerror=alert(1)\> \*this\*?" in text
    assert "<img" not in text
    assert "![coffee.jpg][picture-1]" in text
    assert text.rstrip().endswith(f"[picture-1]: data:image/jpeg;base64,{picture}")


def test_the_last_request_is_shown_as_code_that_is_valid(short: Chatting) -> None:
    short.set(top_k=5, max_tokens=3)
    short.choose(COFFEE)
    short.ask('What\'s "this"?')
    short.page.click("#open-code")
    curl = short.page.inner_text("#code-text")
    assert f"curl {short.address}/v1/chat/completions" in curl
    assert "What'\\''s" in curl
    assert "base64,/9j/" in curl
    assert len(curl) < 1500
    short.page.get_by_role("radio", name="Python").check()
    code = short.page.inner_text("#code-text")
    ast.parse(code)
    assert 'extra_body={"top_k":5}' in code
    assert 'picture("coffee.jpg", "image/jpeg")' in code
    short.page.get_by_role("button", name="Copy", exact=True).click()
    short.until("document.querySelector('#announcer').textContent === 'Copied'")
    assert short.page.evaluate("navigator.clipboard.readText()") == code
