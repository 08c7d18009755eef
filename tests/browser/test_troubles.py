"""What the page does when the server refuses, waits, asks for a key or is gone."""

from __future__ import annotations

import urllib.request

import pytest
from playwright.sync_api import Browser, Route

from tests.browser.chatting import LONG, QUESTIONS, Chatting, answer_of, piece, refuse
from tests.browser.conftest import KEY, Server


@pytest.fixture
def refusing(chat: Chatting) -> Chatting:
    """A page whose console may say that requests were refused, with answers of two tokens."""
    chat.refusals = True
    chat.set(max_tokens=2)
    return chat


def announced(beginning: str) -> str:
    """JavaScript: whether screen readers were last told a sentence that begins so."""
    return f"document.querySelector('#announcer').textContent.startsWith({beginning!r})"


def test_a_busy_server_counts_down_and_then_lets_try_again(refusing: Chatting) -> None:
    page = refusing.page
    busy = refuse(429, "64 requests wait already.", **{"Retry-After": "2"})
    page.route(QUESTIONS, busy, times=1)
    refusing.send("What is a cup?")
    page.wait_for_selector(".trouble-actions button:disabled:has-text('Try again in ')")
    assert "64 requests wait already." in page.inner_text(".trouble")
    button = page.locator(".trouble-actions button")
    page.wait_for_selector(".trouble-actions button:enabled")
    button.click()
    assert refusing.finished() != ""
    assert page.is_hidden(".trouble")


def test_a_server_that_is_not_ready_is_waited_for(refusing: Chatting) -> None:
    page = refusing.page
    page.route(QUESTIONS, refuse(503, "The model is being compiled."), times=1)
    page.route("**/ready", lambda route: route.fulfill(status=503, json={}), times=1)
    refusing.send("What is a cup?")
    page.wait_for_selector(".wait:has-text('The server is not ready yet')")
    assert refusing.finished() != ""
    assert len(refusing.bodies) == 2


def test_waiting_for_a_server_can_be_stopped(refusing: Chatting) -> None:
    page = refusing.page
    page.route(QUESTIONS, refuse(503, "The server is about to end."))
    page.route("**/ready", lambda route: route.fulfill(status=503, json={}))
    refusing.send("What is a cup?")
    page.wait_for_selector(".wait:has-text('The server is not ready yet')")
    refusing.until(announced("The server is not ready yet."))
    page.keyboard.press("Escape")
    refusing.finished()
    assert page.inner_text(".remark") == "Stopped."


def test_a_refused_request_shows_the_servers_own_words_and_can_be_edited(
    refusing: Chatting,
) -> None:
    page = refusing.page
    # What the server itself says to a temperature out of its range; the page would not send it.
    page.route(
        QUESTIONS,
        lambda route: route.continue_(
            post_data={**route.request.post_data_json, "temperature": -1}
        ),
        times=1,
    )
    refusing.send("What is a cup?")
    page.wait_for_selector(".trouble:visible")
    assert page.inner_text(".trouble-title") == "The server refused this question"
    assert "temperature is -1" in page.inner_text(".trouble-text")
    refusing.until(announced("The server refused this question. "))
    page.get_by_role("button", name="Edit the question").click()
    assert page.input_value("#question") == "What is a cup?"


def test_a_full_context_offers_a_new_chat(refusing: Chatting) -> None:
    page = refusing.page
    refusing.send("word " * 3000)
    page.wait_for_selector(".trouble:visible")
    assert page.inner_text(".trouble-title") == "This chat is longer than the model can read"
    assert "context is 1024 tokens" in page.inner_text(".trouble-text")
    page.locator(".trouble").get_by_role("button", name="New chat").click()
    assert page.is_visible("#welcome")


def test_a_lost_network_is_said_and_tried_again(refusing: Chatting) -> None:
    page = refusing.page
    refusing.context.set_offline(True)
    refusing.send("What is a cup?")
    page.wait_for_selector(".trouble:visible")
    assert page.inner_text(".trouble-title") == "No connection to the server"
    refusing.context.set_offline(False)
    page.get_by_role("button", name="Try again").click()
    assert refusing.finished() != ""


def test_a_longest_answer_without_room_offers_the_settings(refusing: Chatting) -> None:
    page = refusing.page
    refusing.set(max_tokens=5000)
    refusing.send("What is a cup?")
    page.wait_for_selector(".trouble:visible")
    assert page.inner_text(".trouble-title") == "The longest answer of your settings has no room"
    assert "5000 for the answer" in page.inner_text(".trouble-text")
    page.get_by_role("button", name="Open the settings").click()
    page.fill("#set-max_tokens", "2")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Try again").click()
    assert refusing.finished() != ""


def test_a_server_that_came_back_with_another_model_is_asked_for_it(chat: Chatting) -> None:
    page = chat.page
    chat.refusals = True
    chat.until("document.querySelector('#model-name').textContent === 'smol'")
    gone = refuse(404, "There is no model here.", code="model_not_found")

    def answer(route: Route) -> None:
        if route.request.post_data_json["model"] == "other":
            route.fulfill(content_type="text/event-stream", body=answer_of("A cup."))
        else:
            gone(route)

    page.route(QUESTIONS, answer)
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "other"}]}))
    assert chat.ask("What is a cup?") == "A cup."
    assert [body["model"] for body in chat.bodies] == ["smol", "other"]
    assert page.inner_text("#model-name") == "other"
    page.route(QUESTIONS, gone)
    chat.ask("And now?")
    assert page.inner_text(".trouble:visible .trouble-text") == "There is no model here."
    assert len(chat.bodies) == 4, "tried twice, and no more"


def test_writing_again_in_vain_gives_the_answer_back(chat: Chatting) -> None:
    page, answer = chat.page, chat.turns.locator(".answer-text")
    chat.answers()
    chat.ask("What is a cup?")
    chat.refusals = True
    page.route(QUESTIONS, refuse(429, "Too many.", **{"Retry-After": "60"}), times=1)
    page.get_by_role("button", name="Write this answer again").click()
    page.wait_for_selector(".trouble:visible")
    assert answer.inner_text() == "A cup."
    assert page.inner_text(".remark") == "No new answer came. This is the one from before."
    assert page.locator(".trouble-actions button").is_disabled()
    chat.hold()
    page.get_by_role("button", name="Write this answer again").click()
    page.wait_for_selector(".wait:visible")
    assert answer.inner_text() == ""
    page.keyboard.press("Escape")
    assert chat.finished() == "A cup."
    page.get_by_role("button", name="Write this answer again").click()
    page.wait_for_selector(".wait:visible")
    page.locator(".rename-chat").focus()
    page.keyboard.press("Enter")
    page.fill("#rename-value", "Cups")
    page.press("#rename-value", "Enter")
    page.wait_for_selector(".chat-link:text-is('Cups')")
    chat.reload()
    assert page.inner_text("#chat-title") == "Cups"
    assert answer.inner_text() == "A cup.", "kept until a new one begins"


def test_a_question_that_waits_for_a_slot_says_so(chat: Chatting) -> None:
    chat.hold()
    chat.send("What is a cup?")
    chat.give(": queued 0\n\n")
    chat.page.wait_for_selector(".wait:has-text('Reading')")
    chat.page.keyboard.press("Escape")
    chat.finished()
    chat.send("What is a saucer?")
    chat.page.wait_for_selector(".wait:has-text('Sent')")
    chat.give(": queued 3\n\n")
    chat.page.wait_for_selector(
        ".wait:has-text('The server is busy: 3 requests waited for a turn')"
    )
    chat.until(announced("The server is busy: 3 requests waited for a turn"))
    chat.give(": ping\n\n")
    chat.give(answer_of("A cup."))
    assert chat.finished() == "A cup."


def test_stop_reaches_a_question_that_does_not_know_its_model_yet(chat: Chatting) -> None:
    chat.page.route("**/v1/models", lambda _: None)
    chat.reload()
    chat.send("What is a cup?")
    chat.page.wait_for_selector("#stop:visible")
    chat.page.keyboard.press("Escape")
    chat.finished()
    assert chat.page.inner_text(".remark") == "Stopped."
    assert chat.bodies == []


FAULT = 'data: {"error": {"message": "The server failed.", "code": "internal_error"}}\n\n'


@pytest.mark.parametrize(
    ("events", "title"),
    [
        (piece("A cup"), "No connection to the server"),
        (f": ping\n\n{piece('A cup')}{FAULT}", "Something went wrong"),
    ],
    ids=["breaks", "fails"],
)
def test_a_stream_that_does_not_end_well_keeps_what_came(
    refusing: Chatting, events: str, title: str
) -> None:
    page = refusing.page

    def answer(route: Route) -> None:
        route.fulfill(content_type="text/event-stream", body=events)

    page.route(QUESTIONS, answer)
    refusing.send("What is this?")
    page.wait_for_selector(".trouble:visible")
    assert page.inner_text(".answer-text") == "A cup"
    assert page.inner_text(".trouble-title") == title


def test_a_key_is_asked_for_used_and_kept_as_chosen(server: Server, browser: Browser) -> None:
    chat = Chatting(browser, server.address, key="")
    chat.refusals = True
    chat.open()
    page = chat.page
    page.wait_for_selector("#server-state:has-text('Key needed')")
    chat.send(LONG)
    page.wait_for_selector("#key-dialog[open]")
    page.fill("#key-value", KEY)
    page.press("#key-value", "Enter")
    page.wait_for_selector(".turn.writing")
    page.click("#stop")
    chat.finished()
    assert page.evaluate(
        "[sessionStorage.getItem('minigpt4.key'), localStorage.getItem('minigpt4.key')]"
    ) == [KEY, None]
    page.click("#open-key")
    page.check("#key-keep")
    page.get_by_role("button", name="Use this key").click()
    assert page.evaluate(
        "[sessionStorage.getItem('minigpt4.key'), localStorage.getItem('minigpt4.key')]"
    ) == [None, KEY]
    page.click("#open-key")
    page.get_by_role("button", name="Forget it").click()
    assert page.evaluate("sessionStorage.length") == 0
    assert page.evaluate("localStorage.getItem('minigpt4.key')") is None
    chat.close()


def test_a_key_is_kept_although_its_dialog_is_opened_anew_at_once(chat: Chatting) -> None:
    chat.refusals = True
    entered = chat.page.evaluate(
        """async () => {
            const click = (selector) => document.querySelector(selector).click();
            click("#open-key");
            document.getElementById("key-value").value = "another key";
            click("#key-dialog button[value=save]");
            for (let turn = 0; turn < 10; turn++) await null;
            click("#open-key");
            return document.getElementById("key-value").value;
        }"""
    )
    assert entered == "another key"
    chat.page.keyboard.press("Escape")
    chat.page.wait_for_selector("#key-dialog", state="hidden")
    chat.until("sessionStorage.getItem('minigpt4.key') === 'another key'")


def test_a_key_that_is_entered_late_asks_nothing_that_another_tab_has_gone_beyond(
    chat: Chatting,
) -> None:
    chat.refusals = True
    chat.answers()
    chat.ask("What is a cup?")
    chat.page.route(QUESTIONS, refuse(401, "A key, please."))
    chat.send("What is a saucer?")
    chat.page.wait_for_selector("#key-dialog[open]")
    other = chat.another_tab()
    chat.open(other, path=f"/#{chat.page.url.partition('#')[2]}")
    other.fill("#question", "From the other tab")
    other.press("#question", "Enter")
    chat.page.bring_to_front()
    chat.page.wait_for_selector(".turn:nth-of-type(3) .stats:not(:empty)", state="attached")
    asked = len(chat.bodies)
    chat.page.fill("#key-value", KEY)
    chat.page.press("#key-value", "Enter")
    chat.page.wait_for_selector("#key-dialog", state="hidden")
    assert "From the other tab" in chat.turns.nth(2).inner_text()
    assert len(chat.bodies) == asked


def test_a_remark_that_is_there_already_is_not_said_again(chat: Chatting) -> None:
    replaced = """async () => {
      const { note } = await import("./dom.js");
      const line = () => document.querySelector(".note");
      note("The disk is full.");
      const first = line();
      note("The disk is full.");
      const second = line();
      note("The disk is away.");
      return [first !== second, second !== line()];
    }"""
    assert chat.page.evaluate(replaced) == [False, True]


def test_a_wrong_key_is_asked_for_again(server: Server, browser: Browser) -> None:
    chat = Chatting(browser, server.address, key="no key of this server")
    chat.refusals = True
    chat.open()
    chat.send("What is a cup?")
    chat.page.wait_for_selector("#key-dialog[open]")
    chat.page.keyboard.press("Escape")
    assert chat.page.inner_text(".trouble-title") == "The server asks for an API key"
    chat.page.get_by_role("button", name="Enter a key").click()
    assert chat.page.is_visible("#key-dialog")
    chat.close()


def test_the_key_is_no_part_of_the_address_or_the_code(chat: Chatting) -> None:
    chat.answers()
    chat.ask("What is a cup?")
    chat.page.click("#open-code")
    for language in ("curl", "Python"):
        chat.page.get_by_role("radio", name=language).check()
        assert KEY not in chat.page.inner_text("#code-text")
    assert KEY not in chat.page.url
    request = urllib.request.Request(f"{chat.address}/v1/models")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(request, timeout=10)
