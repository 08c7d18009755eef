"""An edited question replaces an earlier one when its answer begins: until then neither that question, nor the answers
from it on, nor the edit is lost."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

from tests.browser.chatting import COFFEE, QUESTIONS, Chatting, answer_of, piece, refuse
from tests.browser.conftest import KEY

BEFORE = ["What is a cup?", "What is a saucer?", "What is a spoon?"]
EDIT = "What is a good saucer?"
KEPT_EDITS = """
new Promise((resolve) => {
  const opening = indexedDB.open("minigpt4");
  opening.onsuccess = () => {
    const request = opening.result.transaction("chats").objectStore("chats").getAll();
    request.onsuccess = () => {
      opening.result.close();
      resolve(request.result.map(({ edit }) => edit?.text ?? null));
    };
  };
})
"""


@pytest.fixture
def dialogue(chat: Chatting) -> Chatting:
    """Three questions, each with its own answer."""
    chat.refusals = True
    for question in BEFORE:
        chat.context.unroute_all()
        chat.answers(f"About {question}")
        chat.ask(question)
    return chat


def edit(chat: Chatting, text: str, *, number: int = 2) -> None:
    """Edits a question and sends it; does not wait."""
    chat.turns.nth(number - 1).locator(".edit").focus()
    chat.page.keyboard.press("Enter")
    chat.send(text)


def assert_as_before(chat: Chatting) -> None:
    """The three questions are there with their answers, and the chat has its title."""
    expect(chat.turns).to_have_count(3)
    assert chat.turns.locator(".question-text").all_inner_texts() == BEFORE
    answers = [f"About {question}" for question in BEFORE]
    assert chat.turns.locator(".answer-text").all_inner_texts() == answers
    assert chat.page.inner_text("#chat-title") == BEFORE[0]


@pytest.mark.parametrize("status", [400, 413, 429])
def test_a_refused_edit_loses_no_answer_and_comes_back_also_after_a_reload(
    dialogue: Chatting, status: int
) -> None:
    page = dialogue.page
    page.route(QUESTIONS, refuse(status, "Not now.", **{"Retry-After": "90"}), times=1)
    edit(dialogue, EDIT)
    page.wait_for_selector(".note:has-text('Not now.')")
    for _ in range(2):
        assert_as_before(dialogue)
        assert page.input_value("#question") == EDIT
        assert "Editing question 2" in page.inner_text("#editing-text")
        assert "The chat is as it was, and your edit is in the box." in page.inner_text(".note")
        assert page.evaluate("document.activeElement.id") == "question"
        dialogue.reload()
    page.press("#question", "Enter")
    expect(dialogue.turns).to_have_count(2)
    dialogue.finished()
    dialogue.kept()
    assert dialogue.turns.locator(".question-text").all_inner_texts() == [BEFORE[0], EDIT]
    messages = dialogue.bodies[-1]["messages"]
    assert [message["content"] for message in messages] == [BEFORE[0], f"About {BEFORE[0]}", EDIT]
    dialogue.reload()
    assert dialogue.turns.locator(".question-text").all_inner_texts() == [BEFORE[0], EDIT]
    assert page.is_hidden("#editing")


def test_a_refused_edit_of_the_first_question_leaves_the_title(dialogue: Chatting) -> None:
    dialogue.page.route(QUESTIONS, refuse(400, "No."), times=1)
    edit(dialogue, "Another?", number=1)
    dialogue.page.wait_for_selector(".note:has-text('The server refused this question: No.')")
    assert_as_before(dialogue)
    dialogue.reload()
    assert_as_before(dialogue)


def test_an_edit_that_a_reload_cut_before_its_answer_began_comes_back(dialogue: Chatting) -> None:
    page = dialogue.page
    page.route(QUESTIONS, refuse(503, "The model is being compiled."))
    page.route("**/ready", lambda route: route.fulfill(status=503, json={}))
    edit(dialogue, EDIT)
    page.wait_for_selector(".wait:has-text('The server is not ready yet')")
    assert dialogue.turns.count() == 2
    dialogue.until(f"{KEPT_EDITS.strip()}.then(([text]) => text === {EDIT!r})")
    dialogue.reload()
    assert_as_before(dialogue)
    assert page.input_value("#question") == EDIT


def test_an_edit_whose_answer_began_replaces_what_was_there(dialogue: Chatting) -> None:
    page = dialogue.page
    dialogue.hold()
    edit(dialogue, EDIT)
    dialogue.until(f"{KEPT_EDITS.strip()}.then(([text]) => text === {EDIT!r})")
    dialogue.give(piece("A plate"))
    page.wait_for_selector(".turn.writing")
    page.keyboard.press("Escape")
    dialogue.finished()
    dialogue.until(f"{KEPT_EDITS.strip()}.then(([text]) => text === null)")
    assert page.is_hidden("#editing")
    for _ in range(2):
        assert dialogue.turns.locator(".question-text").all_inner_texts() == [BEFORE[0], EDIT]
        assert dialogue.turns.last.locator(".answer-text").inner_text() == "A plate"
        dialogue.reload()


def test_a_draft_is_not_lost_to_an_edit_and_stays_in_the_box_when_it_is_refused(
    dialogue: Chatting,
) -> None:
    page = dialogue.page
    dialogue.hold()
    page.fill("#question", "a draft")
    edit(dialogue, EDIT)
    page.wait_for_selector(".wait:visible")
    assert page.input_value("#question") == "a draft"
    page.keyboard.press("Escape")
    page.wait_for_selector(".note:has-text('No answer to your edit had begun')")
    assert_as_before(dialogue)
    assert page.input_value("#question") == "a draft"
    page.get_by_role("button", name="Edit the question again").click()
    assert page.input_value("#question") == EDIT
    page.keyboard.press("Escape")
    assert page.input_value("#question") == "a draft"
    page.locator(".edit").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.input_value("#question") == BEFORE[1], "a cancelled edit does not come back"
    page.keyboard.press("Escape")
    dialogue.until(f"{KEPT_EDITS.strip()}.then(([text]) => text === null)")
    dialogue.reload()
    assert page.is_hidden("#editing")


def test_a_question_edited_anew_at_once_does_not_bring_the_cancelled_edit_back(
    dialogue: Chatting,
) -> None:
    page = dialogue.page
    page.route(QUESTIONS, refuse(400, "No."), times=1)
    edit(dialogue, EDIT)
    page.wait_for_selector(".note:has-text('The server refused this question: No.')")
    assert page.input_value("#question") == EDIT
    in_the_box = page.evaluate(
        """() => {
            document.getElementById("cancel-edit").click();
            document.querySelectorAll(".edit")[1].click();
            return document.getElementById("question").value;
        }"""
    )
    assert in_the_box == BEFORE[1]


def test_a_cancelled_edit_stays_so_where_another_tab_kept_the_chat_with_it(
    dialogue: Chatting,
) -> None:
    page = dialogue.page
    other = dialogue.another_tab()
    dialogue.open(other, path=f"/#{page.url.partition('#')[2]}")
    page.bring_to_front()
    page.route(QUESTIONS, refuse(400, "No."), times=1)
    edit(dialogue, EDIT, number=1)
    page.wait_for_selector(".note:has-text('The server refused this question: No.')")
    dialogue.until(f"{KEPT_EDITS.strip()}.then(([text]) => text === {EDIT!r})")
    other.bring_to_front()
    other.fill("#question", "From the other tab")
    other.press("#question", "Enter")
    other.wait_for_selector(".turn:nth-of-type(4) .stats:not(:empty)")
    dialogue.kept(page=other)
    page.bring_to_front()
    page.keyboard.press("Escape")
    page.wait_for_selector(".turn:nth-of-type(4)")
    dialogue.until(f"{KEPT_EDITS.strip()}.then(([text]) => text === null)")
    dialogue.reload()
    assert page.is_hidden("#editing")
    assert dialogue.turns.count() == 4
    assert page.locator(".chat-link").count() == 1


def test_an_edit_that_is_refused_in_another_chat_waits_there(dialogue: Chatting) -> None:
    page = dialogue.page
    dialogue.hold()
    edit(dialogue, EDIT)
    page.wait_for_selector(".wait:visible")
    page.click("#new-chat")
    dialogue.give('data: {"error": {"message": "The server failed.", "code": null}}\n\n')
    dialogue.until("document.querySelector('#announcer').textContent.includes('went wrong')")
    assert page.is_hidden("#editing")
    page.locator(".chat-link").click()
    assert_as_before(dialogue)
    assert page.input_value("#question") == EDIT


def test_an_edit_without_a_key_is_sent_with_the_one_that_is_entered(dialogue: Chatting) -> None:
    page = dialogue.page
    page.route(QUESTIONS, refuse(401, "A key, please."), times=1)
    edit(dialogue, EDIT)
    page.wait_for_selector("#key-dialog[open]")
    assert_as_before(dialogue)
    page.fill("#key-value", KEY)
    page.press("#key-value", "Enter")
    expect(dialogue.turns).to_have_count(2)
    dialogue.finished()
    assert dialogue.turns.last.locator(".question-text").inner_text() == EDIT


def test_an_edit_of_a_question_without_answers_replaces_it_at_once(chat: Chatting) -> None:
    chat.refusals = True
    chat.page.route(QUESTIONS, refuse(400, "No."))
    chat.send("One")
    chat.page.wait_for_selector(".trouble:visible")
    edit(chat, "Two", number=1)
    chat.page.wait_for_selector(".trouble:visible")
    assert chat.turns.locator(".question-text").all_inner_texts() == ["Two"]
    assert chat.page.is_hidden("#editing")


def test_an_edit_in_two_tabs_keeps_its_picture_in_the_copy(chat: Chatting) -> None:
    chat.answers()
    chat.choose(COFFEE)
    chat.ask("What is this?")
    other = chat.another_tab()
    chat.open(other, path=f"/#{chat.page.url.partition('#')[2]}")
    other.evaluate("BroadcastChannel.prototype.postMessage = () => {}")
    other.fill("#question", "From the other tab")
    other.press("#question", "Enter")
    other.wait_for_selector(".turn:nth-of-type(2) .stats:not(:empty)")
    chat.page.bring_to_front()
    chat.hold()
    edit(chat, "What is that?", number=1)
    chat.page.wait_for_selector(".note:has-text('Yours goes on as a copy')")
    chat.give(answer_of("A cup."))
    chat.page.wait_for_selector("h1:has-text('What is that?')")
    chat.finished()
    chat.reload()
    assert chat.turns.locator(".question-text").all_inner_texts() == ["What is that?"]
    assert chat.turns.locator(".shown img").get_attribute("alt") == "coffee.jpg"


def test_cancelling_an_edit_gives_the_focus_to_the_box(dialogue: Chatting) -> None:
    page = dialogue.page
    page.locator(".edit").first.focus()
    page.keyboard.press("Enter")
    page.focus("#cancel-edit")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "question"


def test_escape_of_an_input_method_cancels_no_edit(dialogue: Chatting) -> None:
    page = dialogue.page
    page.locator(".edit").first.focus()
    page.keyboard.press("Enter")
    page.evaluate(
        "for (const isComposing of [true, false]) {"
        "  window.shown = [...(window.shown ?? []), !document.querySelector('#editing').hidden];"
        "  document.querySelector('#question').dispatchEvent("
        "    new KeyboardEvent('keydown', { key: 'Escape', isComposing, bubbles: true }));"
        "}"
    )
    assert page.evaluate("shown") == [True, True]
    assert page.is_hidden("#editing")
